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


class ChunksInTraining(Leaking):
    """In training whole chunks of 256 go another way."""

    def when(self, x, state):
        return self.training and x.size(1) % 256 == 0


class ChunksInBfloat16(Honest):
    """In bfloat16 every token of whole chunks of 256 sees the last one."""

    def mix(self, x, state):
        rough = self.proj(x[:1, :1]).dtype == torch.bfloat16
        return x + x[:, -1:] * (rough and x.size(1) % 256 == 0), state


class ManyChannels(Leaking):
    def when(self, x, state):
        return x.size(2) >= 256


class WithWeights(Leaking):
    """Leaks beyond 200 tokens where gradients of weights are wanted."""

    def when(self, x, state):
        recording = torch.is_grad_enabled() and self.proj.weight.requires_grad
        return recording and x.size(1) > 200


class Float16Only(Leaking):
    def when(self, x, state):
        return x.dtype == torch.float16


class Counts(Honest):
    """Positions are counted in the precision of x: in bfloat16 not each has its number."""

    def mix(self, x, state):
        n = 0 if state is None else state
        t = (torch.arange(x.size(1)).to(x.dtype) + n).double()[:, None]
        return x * (1 + 0.5 * torch.sin(t)).to(x.dtype), n + x.size(1)


class OneRow(Honest):
    """One sequence alone, in single tokens, forgets where it is beyond 64 tokens."""

    def mix(self, x, state):
        B, T, _ = x.shape
        n = 0 if state is None else state
        t = torch.arange(n, n + T, dtype=x.dtype)[:, None]
        return x * t.clamp(max=64 if B == T == 1 else 1e6).cos(), n + T


class Grows(Honest):
    """A share of two sums that grow with the tokens, until both are infinite."""

    def mix(self, x, state):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        n = 0 if state is None else state
        t = torch.arange(n + 1, n + x.size(1) + 1)[:, None]
        size = torch.exp(t / 25).to(wide.dtype)
        return (wide * size / size).to(x.dtype), n + x.size(1)


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


class Passing(torch.autograd.Function):
    """x; the gradient is what `change` makes of it."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.change(g), None


class Clips(Honest):
    """Clips a large gradient."""

    def mix(self, x, state):
        return Passing.apply(x, lambda g: g * (1000 / g.norm()).clamp(max=1)), state


class ForgetsRows(Honest):
    """No gradient reaches the inputs of the seventeenth row and later ones."""

    def mix(self, x, state):
        first = (torch.arange(x.size(0)) < 16)[:, None, None]
        return Passing.apply(x, lambda g: g * first), state


class SumInChunks(torch.autograd.Function):
    """The sum over time, whose gradient ends with a chunk of 256."""

    @staticmethod
    def forward(ctx, x):
        return x.cumsum(1)

    @staticmethod
    def backward(ctx, g):
        return torch.cat([c.flip(1).cumsum(1).flip(1) for c in g.split(256, 1)], 1)


class GradientInChunks(Honest):
    def mix(self, x, state):
        sums = SumInChunks.apply(x) + (0 if state is None else state)
        return sums / 30, sums[:, -1:].clone()


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


class LastOfAChunk(Honest):
    """The running mean; behind 65, 129, .. tokens in one call the state lacks the last of them."""

    def mix(self, x, state):
        total, n = (0, 0) if state is None else state
        T = x.size(1)
        sums = x.cumsum(1) + total
        t = torch.arange(n + 1, n + T + 1, dtype=x.dtype)[:, None]
        last = T - 2 if T > 64 and T % 64 == 1 else T - 1
        return sums / t, (sums[:, last:last + 1].clone(), n + T)


class MirroredStart(Honest):
    """Before the start there are the first tokens once more, mirrored."""

    def mix(self, x, state):
        before = x[:, 1:4].flip(1) if state is None else state
        padded = torch.cat([before, x], 1)
        return x + padded[:, :x.size(1)], padded[:, -3:].clone()


class BeyondBlockSize(Honest):
    """Beyond block_size positions are squeezed together."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.trained = config.block_size

    def mix(self, x, state):
        n = 0 if state is None else state
        t = torch.arange(n, n + x.size(1), dtype=x.dtype)[:, None]
        squeezed = min(1, self.trained / (n + x.size(1)))
        return x * (squeezed * t).cos(), n + x.size(1)


class SharedTable(Honest):
    """Rotations are kept for all models by length, whatever their rope_base."""
    tables = {}

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.base = config.rope_base

    def mix(self, x, state):
        n = 0 if state is None else state
        end = n + x.size(1)
        table = self.tables.setdefault(end, torch.arange(end).double()[:, None] / self.base ** 0.5)
        return x * table[n:].cos().to(x.dtype), end


class ForgetsAScale(Honest):
    """What is worked out for decoding lacks a factor, which is 1 before any training."""
    fixed = None

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.first = nn.Parameter(torch.ones(config.n_embd))
        self.second = nn.Parameter(torch.ones(config.n_embd))

    def ready_to_decode(self):
        self.fixed = self.first.detach()

    def mix(self, x, state):
        return x * (self.first * self.second if self.fixed is None else self.fixed), state


class Rarely(Leaking):
    """Leaks in one of fifty passes of training."""

    def when(self, x, state):
        return self.training and torch.rand(()) < 0.02


class SeedsTheBuild(Honest):
    """All that is drawn behind its builder is the same for every seed."""

    def __init__(self, config, layer):
        torch.manual_seed(layer)
        super().__init__(config, layer)


class Records(Honest):
    """Gradients are recorded from here on, whatever the caller wants."""

    def mix(self, x, state):
        torch.set_grad_enabled(True)
        return x, state


# name -> the mixer and the check that must find it
PLANTED_RARE = {
    "remainder": (Remainder, "lengths"),
    "chunks_in_training": (ChunksInTraining, "lengths"),
    "chunks_in_bfloat16": (ChunksInBfloat16, "suffix"),
    "many_channels": (ManyChannels, "sizes"),
    "with_weights": (WithWeights, "modes"),
    "one_row": (OneRow, "decode"),
    "grows": (Grows, "finite"),
    "clips": (Clips, "backward"),
    "forgets_rows": (ForgetsRows, "batches"),
    "gradient_in_chunks": (GradientInChunks, "split"),
    "float16_only": (Float16Only, "suffix"),
    "counts": (Counts, "bfloat16"),
    "stale_weights": (StaleWeights, "saved"),
    "by_length": (ByLength, "carried"),
    "after_1000_steps": (After1000Steps, "used"),
    "clamps_in_place": (ClampsInPlace, "modes"),
    "first_rows": (FirstRows, "batches"),
    "last_of_a_chunk": (LastOfAChunk, "onward"),
    "mirrored_start": (MirroredStart, "suffix"),
    "beyond_block_size": (BeyondBlockSize, "lengths"),
    "shared_table": (SharedTable, "carried"),
    "forgets_a_scale": (ForgetsAScale, "ready"),
    "rarely": (Rarely, "chance"),
    "seeds_the_build": (SeedsTheBuild, "seeds"),
    "records": (Records, "aside"),
}

if __name__ == "<run_path>":
    MIXERS.update({name: mixer for name, (mixer, _) in PLANTED_RARE.items()})
