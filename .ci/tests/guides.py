"""The released guide; what a guide draws and how probable it makes images, for any evidence."""


def released_guide(nb, root, model):
    return nb.Guide(model, nb.load_checkpoint(root / "checkpoints" / "small_guide.pt", "cpu", nb.GuideNetwork))


def guide_log_prob(nb, guide, images, known):
    """log g(x_U | x_K) of the unknown pixels of each image [n, h, w], float64 [n], nats."""
    return nb.guide_pixel_log_probs(guide, images, known.expand(images.shape), 4096).sum(dim=(1, 2))


def guide_draws(nb, guide, image, known, n, seed=0):
    """(n draws of g(x_U | x_K), uint8 [n, h, w]; their log g, float64 [n], nats)."""
    draws = guide.told(image[None], known[None]).draw(image, n, seed)[0]
    return draws, guide_log_prob(nb, guide, draws, known)
