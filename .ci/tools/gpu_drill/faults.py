"""What goes wrong on cards, made on purpose: for drills.py and test_gpu_drill.py."""
import torch


class Infinite(torch.autograd.Function):
    """0 forward, an infinite gradient backward."""

    @staticmethod
    def forward(context, x):
        context.like = x
        return x.flatten()[0] * 0

    @staticmethod
    def backward(context, gradient):
        return torch.full_like(context.like, float("inf"))
