"""Backward passes that are written out."""
import functools

import torch


def differentiable_once(backward):
    """The backward of a torch.autograd.Function, with nothing of it recorded.

    NotImplementedError where a gradient of the gradient is to be formed (create_graph=True).
    torch.autograd.function.once_differentiable lets that pass, and returns too little, where the
    gradient that comes in is a constant, as that of a loss is."""
    @functools.wraps(backward)
    def alone(ctx, *gradients):
        # while a compiler reads it, gradients are recorded, and later they are not
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "this backward pass is written out and has no derivative: no create_graph=True")
        with torch.no_grad():
            return backward(ctx, *gradients)
    return alone
