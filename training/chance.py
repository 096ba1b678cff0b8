"""Calls in which chance stands still: the same numbers are drawn each time, or none matter."""
import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def call(module, x, autocast=False, still=False):
    """The outputs (B, T, .) of a mixer or model, (y, anything) = module(x), which may write into x.

    Dropout, if there is any, always drops the same; with `still` it drops nothing."""
    chance = Chance(still=True) if still else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.default_generator.manual_seed(0)
        with chance:
            return module(x.clone())[0]


class Chance(TorchDispatchMode):
    """Notes the sizes of all random numbers that are drawn. still: every number drawn is 0.4 (true,
    where it is a decision to keep), so that outputs do not depend on how many are."""

    def __init__(self, still=False):
        super().__init__()
        self.still = still
        self.drawn = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if name == "aten::dropout" and self.still:  # whole, in inference mode
            self.drawn.append(args[0].shape)
            return scaled(*args)
        result = function(*args, **kwargs)
        # fused attention could drop weights, on a GPU: what it returns are no random numbers
        fused = "fused" in name or "attention" in name
        if fused or torch.Tag.nondeterministic_seeded not in function.tags:
            return result
        outputs = result if isinstance(result, tuple) else (result,)
        # what a generator of the mixer's own gives differs from call to call
        self.drawn.append(object() if kwargs.get("generator") else outputs[0].shape)
        if self.still and name == "aten::native_dropout":
            return scaled(*args), torch.ones_like(outputs[1])
        if self.still:
            keeps = "bernoulli" in name
            outputs[0].fill_(1 if keeps or not outputs[0].is_floating_point() else 0.4)
        return result


def scaled(x, p, train):
    """What dropout of a share p gives that drops nothing."""
    return x / (1 - p) if train else x.clone()


def drawn(module, x):
    """The sizes of the random numbers that a module draws for x (B, T, C)."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), Chance() as chance:
        module(x.clone())
    return chance.drawn
