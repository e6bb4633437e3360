"""Are samples as surprising as the model expects?"""
import math

import torch


@torch.no_grad()
def surprise_z(nb, model, images):
    """z of the surprise of images [n, height, width]: standard normal for draws of the model.

    At each pixel the model says what surprise to expect, the entropy of its forecast, and its variance. For ancestral
    draws -log p(x_i | x_<i) less that entropy has mean 0 given the past, so the terms are uncorrelated (their sums are
    a martingale).
    """
    excess = variance = 0.0
    for batch in nb.check_images(model, images).split(100):
        log_probs = torch.log_softmax(model(batch).double(), dim=1)
        probs, chosen = log_probs.exp(), log_probs.gather(1, batch.long().unsqueeze(1)).squeeze(1)
        entropy = -(probs * log_probs).sum(dim=1)
        excess += (-chosen - entropy).sum().item()
        variance += ((probs * log_probs**2).sum(dim=1) - entropy**2).sum().item()
    return excess / math.sqrt(variance)
