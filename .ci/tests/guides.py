"""Masks of the 3x3 model; guides; what a guide draws and how probable it makes images, for any evidence."""

import torch


def known_mask(*unknown):
    known = torch.ones(3, 3, dtype=torch.bool)
    known.view(-1)[list(unknown)] = False
    return known


def released_guide(nb, root, model):
    return nb.Guide(model, nb.load_checkpoint(root / "checkpoints" / "small_guide.pt", "cpu", nb.GuideNetwork))


def meaningless_guide(nb, model, seed, strength, powers):
    """A guide with random weights: its hints mean nothing. Its exponents need not sum to 1."""
    torch.manual_seed(seed)
    network = nb.GuideNetwork.starting_from(model, (1, 2))
    for parameter in network.encoder.parameters():
        parameter.add_(strength * torch.randn_like(parameter))
    network.powers.copy_(torch.tensor(powers))
    return nb.Guide(model, network)


def guide_log_prob(nb, guide, images, known):
    """log g(x_U | x_K) of the unknown pixels of each image [n, h, w], float64 [n], nats."""
    return nb.guide_pixel_log_probs(guide, images, known.expand(images.shape), 4096).sum(dim=(1, 2))


def guide_draws(nb, guide, image, known, n, seed=0):
    """(n draws of g(x_U | x_K), uint8 [n, h, w]; their log weights log p - log g, float64 [n], nats)."""
    found = nb.smc(guide.told(image[None], known), image[None], n, [seed], looks={}, copies=1)
    return found.draws[0], found.log_w[0]
