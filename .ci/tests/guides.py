"""Masks of the 3x3 model; guides; how probable a guide makes images."""

import torch


def known_mask(*hidden):
    known = torch.ones(3, 3, dtype=torch.bool)
    known.view(-1)[list(hidden)] = False
    return known


def released_guide(nb, root, model):
    return nb.Guide(model, nb.load_checkpoint(root / "checkpoints" / "small_guide.pt", "cpu", nb.GuideNetwork))


def meaningless_guide(nb, model, strength=0.15, powers=(0.7, 0.6), seed=3):
    """A guide with random weights: its hints mean nothing, and they reach every block. Its powers need not sum to 1."""
    torch.manual_seed(seed)
    network = nb.starting_guide(model, (1, 2)).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.startswith("encoder.") or ".told." in name:
            parameter.add_(strength * torch.randn_like(parameter))
    network.powers.copy_(torch.tensor(powers))
    return nb.Guide(model, network)


def either_guide(nb, model, learned):
    """The model alone, or a meaningless guide."""
    return meaningless_guide(nb, model) if learned else nb.Guide(model)


def guide_log_prob(nb, guide, images, known):
    """log g(x_U | x_K) of each image [n, h, w], float64 [n], nats."""
    return nb.guide_pixel_log_probs(guide, images, known.expand(images.shape)).sum(dim=(1, 2))
