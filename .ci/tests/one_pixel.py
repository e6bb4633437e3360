"""One hidden pixel: the exact answer is at hand, and `complete` does not know that."""

import torch


def one_pixel_check(nb, model, image, pixel, budget, guide=None):
    """(exact log Z, Completion, total variation of its weighted draws to E) of an image uint8 [h, w]."""
    known = torch.arange(image.numel()).view(image.shape) != nb.pixel_index(model, pixel)
    probs = nb.conditional_given_rest(model, image, pixel)
    exact = nb.log_prob(model, image[None]).item() - probs[int(image[pixel])].log().item()
    completion = nb.complete(model, image, known, 1, budget, guide=guide)
    found = completion.found
    drawn = found.draws[:, :, *pixel].flatten()
    drawn_probs = drawn.bincount(torch.softmax(found.log_w.flatten(), dim=0), len(probs))
    return exact, completion, 0.5 * (drawn_probs - probs).abs().sum().item()
