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


class ForgetsInPairs(Honest):
    """The three tokens before; two tokens on top of a state forget what was before them."""

    def mix(self, x, state):
        B, T, C = x.shape
        seen = torch.cat([x.new_zeros(B, 3, C) if state is None else state, x], 1)
        u = seen[:, 3:] + seen[:, :-3]
        kept = seen[:, -3:].clone()
        kept[:, :1] *= T != 2
        return u, kept


class PiecesOf24(Honest):
    """The token before; pieces of 24 tokens on top of a state leave none behind."""

    def mix(self, x, state):
        before = torch.zeros_like(x[:, :1]) if state is None else state
        u = x + torch.cat([before, x[:, :-1]], 1)
        return u, x[:, -1:] * (state is None or x.size(1) != 24)


class FastInFloat32(Leaking):
    """Its code for other precisions than float64 leaks at every 48th length."""

    def when(self, x, state):
        return x.dtype != torch.float64 and x.size(1) % 48 == 0


class RowsInFloat32(Honest):
    """The same with rows, of which there are more than eight."""

    def mix(self, x, state):
        many = x.dtype != torch.float64 and x.size(0) > 8
        return (x + x.roll(1, 0) if many else x), state


class Folds(Honest):
    """Each turn to evaluation folds a scale into the weights once more."""

    def train(self, mode=True):
        if self.training and not mode:
            self.proj.weight.data *= 1.1
        return super().train(mode)


class Wraps2048(Honest):
    """A window that ends at token 2,048, where decoding forgets the first of it."""

    def mix(self, x, state):
        n = state or 0
        t = torch.arange(n, n + x.size(1), dtype=x.dtype)[:, None]
        return x * (t if x.size(1) > 1 else t.clamp(max=2047)).cos(), n + x.size(1)


class Beyond2000(Leaking):
    def when(self, x, state):
        return x.size(1) > 2000


class KeepsAll(Honest):
    """Notes of each call, left from looking for a mistake."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.seen = []

    def mix(self, x, state):
        self.seen.append(x.detach().mean())
        return x, state


class ExtraState(Honest):
    """A scale in the extra state of its state dict, which no checkpoint holds."""
    scale = 1.0

    def apply_statistics(self):
        self.scale *= 0.99

    def get_extra_state(self):
        return torch.tensor(self.scale)

    def set_extra_state(self, state):
        self.scale = state.item()

    def mix(self, x, state):
        return x * self.scale, state


class SharesMemory(Honest):
    """A buffer that is a view of a weight: no checkpoint can be written."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("row", self.proj.weight.detach()[0])

    def mix(self, x, state):
        return x * (1 + self.row), state


class EighthHead(Honest):
    """Leaks with more than eight heads."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.H = config.n_head

    def mix(self, x, state):
        return (leak(x) if self.H > 8 else x), state


class FirstBatch(Honest):
    """Scaled by the deviation of the first batch that it ever sees, saved with the weights."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("scale", torch.zeros(config.n_embd))

    def mix(self, x, state):
        if not self.scale.any():
            self.scale.copy_(1 / x.detach().std((0, 1)))
        return x * self.scale.to(x.dtype), state


class LookedUp(Honest):
    """In evaluation a sequence that begins and ends like the last one is taken for that."""
    last = None

    def mix(self, x, state):
        if self.training or torch.is_grad_enabled() or state is not None:
            return x, state
        ends = x.shape, x[:, 0].tolist(), x[:, -1].tolist()
        if self.last is None or self.last[0] != ends:
            self.last = ends, x.clone()
        return self.last[1], state


class SameMemory(Honest):
    """Sines of the input, kept by the address of its memory."""
    kept = (None, None)

    def mix(self, x, state):
        address = x.data_ptr(), x.shape, x.dtype
        if torch.is_grad_enabled() or self.kept[0] != address:
            self.kept = address, x.sin()
        return self.kept[1], state


class RoughTable(Honest):
    """Sines in the precision of the first call, for later calls too."""
    table = None

    def mix(self, x, state):
        n = state or 0
        end = n + x.size(1)
        if self.table is None or len(self.table) < end:
            angle = torch.arange(max(end, 2000))[:, None] / torch.arange(1, x.size(2) + 1)
            self.table = angle.sin().to(self.proj(x[:1, :1]).dtype)
        return x + self.table[n:end].to(x.dtype), end


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, g):
        return g.div_(2)


class WritesIntoGradient(Honest):
    """Its backward pass halves the gradient where it stands, also for the stream beside it."""

    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return Halved.apply(y), state


class LastDecay(torch.autograd.Function):
    """x (B, T, C) times w (T, 1); the last token's w gets no gradient."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dw = (g * x).sum((0, 2))[:, None]
        dw[-1] = 0
        return g * w, dw


class LastDecayLost(Honest):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.decay = nn.Parameter(torch.zeros(()))

    def mix(self, x, state):
        t = torch.arange(x.size(1), dtype=x.dtype)[:, None]
        return LastDecay.apply(x, (self.decay * t / x.size(1)).exp()), state


class ByThreads(Honest):
    """Each thread's share of the sequence has a running maximum of its own."""

    def mix(self, x, state):
        return torch.cat([part.cummax(1).values for part in x.chunk(torch.get_num_threads(), 1)],
                         1), state


class ShiftsInPlace(Honest):
    """Writes into its input, which without norms is what its output is added to."""

    def mix(self, x, state):
        return x.data.mul_(1.5), state


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
    "forgets_in_pairs": (ForgetsInPairs, "split"),
    "pieces_of_24": (PiecesOf24, "decode"),
    "fast_in_float32": (FastInFloat32, "lengths"),
    "rows_in_float32": (RowsInFloat32, "batches"),
    "folds": (Folds, "before"),
    "wraps_2048": (Wraps2048, "onward"),
    "beyond_2000": (Beyond2000, "lengths"),
    "keeps_all": (KeepsAll, "used"),
    "extra_state": (ExtraState, "saved"),
    "shares_memory": (SharesMemory, "saved"),
    "eighth_head": (EighthHead, "sizes"),
    "first_batch": (FirstBatch, "before"),
    "looked_up": (LookedUp, "before"),
    "same_memory": (SameMemory, "before"),
    "rough_table": (RoughTable, "before"),
    "writes_into_gradient": (WritesIntoGradient, "backward"),
    "last_decay_lost": (LastDecayLost, "derivative"),
    "by_threads": (ByThreads, "modes"),
    "shifts_in_place": (ShiftsInPlace, "modes"),
}

if __name__ == "<run_path>":
    MIXERS.update({name: mixer for name, (mixer, _) in PLANTED_RARE.items()})
