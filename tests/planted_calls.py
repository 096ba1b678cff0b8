"""More mixers with one fault each: in what a call leaves for the next, in pieces of some sizes, in
float32 alone, in checkpoints, in a part of the gradient.

    python -m tools.audit --mixer_file=tests/planted_calls.py --mixer=looked_up     # FAIL

As in planted.py all are y = W u; u = x but for the fault.
"""
import torch
import torch.nn as nn
from planted import Honest
from planted_wide import Leaking, leak

from mixers import MIXERS


class ForgetsInPairs(Honest):
    """The three tokens before; two tokens on top of a state forget what was before them."""

    def mix(self, x, state):
        B, T, C = x.shape
        seen = torch.cat([x.new_zeros(B, 3, C) if state is None else state, x], 1)
        u = seen[:, 3:] + seen[:, :-3]
        kept = seen[:, -3:].clone()
        kept[:, :1] *= T != 2
        return u, kept


class DetachedState(Honest):
    """The token before, through which no gradient goes from piece to piece."""

    def mix(self, x, state):
        before = torch.zeros_like(x[:, :1]) if state is None else state
        return x + torch.cat([before, x[:, :-1]], 1), x[:, -1:].detach().clone()


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
PLANTED_CALLS = {
    "forgets_in_pairs": (ForgetsInPairs, "split"),
    "detached_state": (DetachedState, "split"),
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
    MIXERS.update({name: mixer for name, (mixer, _) in PLANTED_CALLS.items()})
