"""More mixers with one fault each, which shows at few lengths, in one precision, or after something
else was done.

    python -m tools.audit --mixer_file=tests/planted_rare.py --mixer=stale_weights     # FAIL

As in planted.py all are y = W u; u = x but for the fault.
"""
import torch
import torch.nn as nn
from planted import Honest
from planted_wide import Leaking, leak

from mixers import MIXERS


class Remainder(Leaking):
    """Leaks at every 32nd length beyond 500."""

    def when(self, x, state):
        return x.size(1) > 500 and x.size(1) % 32 == 7


class Float16Only(Leaking):
    def when(self, x, state):
        return x.dtype == torch.float16


class Counts(Honest):
    """Positions are counted in the precision of x: in bfloat16 not each has its number."""

    def mix(self, x, state):
        n = 0 if state is None else state
        t = (torch.arange(x.size(1)).to(x.dtype) + n).double()[:, None]
        return x * (1 + 0.5 * torch.sin(t)).to(x.dtype), n + x.size(1)


class StaleWeights(Honest):
    """What it made of a weight at the first call in evaluation is kept for good."""
    kept = None

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.scale = nn.Parameter(torch.zeros(config.n_embd))

    def mix(self, x, state):
        scale = self.scale.exp()
        if not self.training:
            if self.kept is None or self.kept.dtype != scale.dtype:
                self.kept = scale.detach().clone()
            scale = self.kept
        return x * scale, state


class ByLength(Honest):
    """Gates made from a weight are kept by length, for all layers and models."""
    gates = {}

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.decay = nn.Parameter(torch.linspace(0, 3, config.n_embd))

    def mix(self, x, state):
        decay = self.decay.sigmoid()
        if not self.training:
            decay = self.gates.setdefault((x.size(1), x.dtype), decay.detach())
        return x * decay, state


class After1000Steps(Honest):
    """A schedule softens the mask late in training."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("steps", torch.zeros(()))

    def apply_statistics(self):
        self.steps += 1

    def mix(self, x, state):
        return leak(x, 0.001 * (self.steps > 1000)), state


class ClampsInPlace(Honest):
    """Writes into its input where no gradient is wanted."""

    def mix(self, x, state):
        return (x.clamp(-1, 1) if torch.is_grad_enabled() else x.clamp_(-1, 1)), state


class ScaleByFirstRows(torch.autograd.Function):
    """x (B, T, C) times w (C); the gradient of w is that of the first eight rows."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x)[:8].sum((0, 1))


class FirstRows(Honest):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.scale = nn.Parameter(torch.ones(config.n_embd))

    def mix(self, x, state):
        return ScaleByFirstRows.apply(x, self.scale), state


# name -> the mixer and the check that must find it
PLANTED_RARE = {
    "remainder": (Remainder, "lengths"),
    "float16_only": (Float16Only, "suffix"),
    "counts": (Counts, "bfloat16"),
    "stale_weights": (StaleWeights, "saved"),
    "by_length": (ByLength, "carried"),
    "after_1000_steps": (After1000Steps, "used"),
    "clamps_in_place": (ClampsInPlace, "modes"),
    "first_rows": (FirstRows, "batches"),
}

if __name__ == "<run_path>":
    MIXERS.update({name: mixer for name, (mixer, _) in PLANTED_RARE.items()})
