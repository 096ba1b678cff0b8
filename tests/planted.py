"""Mixers with one fault each, which the audit must find; never in the registry, unless a command
names this file:

    python -m tools.audit --mixer_file=tests/planted.py --mixer=whole_mean     # FAIL

All are y = W u, with u what their `mix` makes of x (B, T, C); the state is passed through where
there is nothing to remember.
"""
import random

import torch
import torch.nn as nn

from mixers import MIXERS
from mixers.parts.recurrence import recurrence
from mixers.parts.recurrent_heads import HeadNorm
from mixers.regla import ReGLA


class Honest(nn.Module):
    """u_t = x_t: no fault."""
    def __init__(self, config, layer):
        super().__init__()
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, state=None):
        u, state = self.mix(x, state)
        return self.proj(u), state

    def mix(self, x, state):
        return x, state


class WholeMean(Honest):
    """The mean over the whole sequence, as in a paper's own code."""
    def mix(self, x, state):
        return torch.maximum(x, x.mean(1, keepdim=True)), state


class BatchStd(Honest):
    """Normalised by one standard deviation over batch and time, as in another's."""
    def mix(self, x, state):
        return x / x.std((0, 1)).clamp(min=1e-3) if x.size(1) > 1 else x, state


class OffByOne(Honest):
    """Softmax attention whose mask lets a token see the next one."""
    def mix(self, x, state):
        later = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(2)
        return (x @ x.mT / 8).masked_fill(later, -torch.inf).softmax(-1) @ x, state


class ChunkEnd(Honest):
    """Every token sees the last one of its chunk of 32."""
    def mix(self, x, state):
        last = (torch.arange(x.size(1)) // 32 * 32 + 31).clamp(max=x.size(1) - 1)
        return x + x[:, last], state


class BorderOnly(Honest):
    """The last token of each chunk of 64, and no other, sees the next chunk's first."""
    def mix(self, x, state):
        after = torch.cat([x[:, 1:], x[:, -1:]], dim=1)
        at_border = (torch.arange(x.size(1)) % 64 == 63)[:, None]
        return torch.where(at_border, x + after, x), state


class ChunkMax(Honest):
    """Linear attention with exponential features whose keys are taken relative to the chunk's
    maximum."""
    def mix(self, x, state):
        pieces = []
        S, z, m = state or (0, 0, x.new_full((x.size(0), 1, x.size(2)), -torch.inf))
        for q in x.split(64, dim=1):
            new = torch.maximum(m, q.amax(1, keepdim=True))
            S, z, m = S * (m - new).exp(), z * (m - new).exp(), new
            k = (q - m).exp()  # of a huge late key: 0 for all before
            pieces.append((S + (k * q).cumsum(1)) / (z + k.cumsum(1)))
            S, z = S + (k * q).sum(1, keepdim=True), z + k.sum(1, keepdim=True)
        return torch.cat(pieces, dim=1), (S, z, m)


class Forgetful(Honest):
    """A running mean whose state keeps the sum but not how many tokens it is of."""
    def mix(self, x, state):
        sums = x.cumsum(1) + (0 if state is None else state)
        n = torch.arange(1, x.size(1) + 1, dtype=x.dtype)[:, None]
        return sums / n, sums[:, -1:].clone()


class ZeroGate(Honest):
    """A leak behind a weight that starts at zero: nothing to see before the first step of
    training."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gate = nn.Parameter(torch.zeros(config.n_embd))

    def mix(self, x, state):
        return x + self.gate * x.flip(1), state


class Hidden(Honest):
    """Values are right and gradients come from the future."""
    def mix(self, x, state):
        return x + x.mean(1, keepdim=True) - x.mean(1, keepdim=True).detach(), state


class Length(Honest):
    """Scaled by the length of the sequence: x_t is all it sees of the tokens, but it knows how near
    the end is."""
    def mix(self, x, state):
        return x * torch.arange(1, x.size(1) + 1, dtype=x.dtype)[:, None] / x.size(1), state


class TrainingOnly(WholeMean):
    """Leaks in training alone."""
    def mix(self, x, state):
        return super().mix(x, state) if self.training else (x, state)


class DropoutOnly(WholeMean):
    """Leaks in training with dropout alone: the path beside the fused one."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.dropout = config.dropout

    def mix(self, x, state):
        return super().mix(x, state) if self.training and self.dropout else (x, state)


class Float32Only(WholeMean):
    """The fast path, of float32, leaks; the reference, of all else, does not."""
    def mix(self, x, state):
        fast = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return super().mix(x, state) if fast else (x, state)


class AutocastOnly(Honest):
    """Under autocast to bfloat16 gradients come from the future."""
    def mix(self, x, state):
        mean = x.mean(1, keepdim=True)
        return x + mean - mean.detach() if torch.is_autocast_enabled("cpu") else x, state


class LongOnly(WholeMean):
    """Leaks in long sequences: those of two chunks and more."""
    def mix(self, x, state):
        return super().mix(x, state) if x.size(1) >= 128 else (x, state)


class DeepOnly(WholeMean):
    """The third layer leaks."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.layer = layer

    def mix(self, x, state):
        return super().mix(x, state) if self.layer == 2 else (x, state)


class Late(WholeMean):
    """Leaks from the second step of training on."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("steps", torch.zeros(()))

    def apply_statistics(self):
        self.steps += 1

    def mix(self, x, state):
        return super().mix(x, state) if self.steps > 0 else (x, state)


class EvaluationGate(ZeroGate):
    """The same in evaluation alone."""
    def mix(self, x, state):
        return (x, state) if self.training else super().mix(x, state)


class ReluGate(Honest):
    """A leak behind one weight that starts at zero, and that one sign alone opens."""
    sign = 1

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gate = nn.Parameter(torch.zeros(()))

    def mix(self, x, state):
        return x + (self.sign * self.gate).relu() * x.flip(1), state


class NegativeGate(ReluGate):
    """The same with the other sign."""
    sign = -1


class ReZeroLeak(Honest):
    """Whatever it does is behind a gate that starts at zero; what it does leaks."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x, state=None):
        y = self.proj(torch.maximum(x, x.mean(1, keepdim=True)))
        return self.gate * y, state


class SingleGate(ZeroGate):
    """A leak in float32 alone behind a gate that starts at zero."""
    def mix(self, x, state):
        return super().mix(x, state) if x.dtype == torch.float32 else (x, state)


class Faint(Honest):
    """A leak of one part in ten thousand in float32 alone."""
    def mix(self, x, state):
        return (x + 1e-3 * x.mean(1, keepdim=True) if x.dtype == torch.float32 else x), state


class FaintInside(Honest):
    """A leak of one part in a thousand, computed in float32 whatever is given."""
    def mix(self, x, state):
        u = x.float()
        return (u + 1e-2 * u.mean(1, keepdim=True)).to(x.dtype), state


class TinyBesideMask(Honest):
    """A leak of one part in ten million beside a mask of float32, which excuses nothing."""
    def mix(self, x, state):
        mask = torch.ones(x.size(1), x.size(1)).tril()
        weights = mask / mask.sum(1, keepdim=True)
        return weights.to(x.dtype) @ x + 1e-7 * x.mean(1, keepdim=True), state


class NoisyLeak(WholeMean):
    """A leak beside honest noise in training."""
    def mix(self, x, state):
        u, state = super().mix(x, state)
        return (u + 0.1 * torch.randn_like(u) if self.training else u), state


class WrongKeyBias(Honest):
    """A parameter's gradient is wrong by a third where a sequence comes in pieces."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.shift = nn.Parameter(torch.zeros(config.n_embd))

    def mix(self, x, state):
        u = x + self.shift
        if state is not None:
            u = x + self.shift.detach() + (self.shift - self.shift.detach()) * 2 / 3
        return u, torch.ones(())


class WrapsRound(Honest):
    """A convolution by a Fourier transform without padding: the end comes round to the
    beginning."""
    def mix(self, x, state):
        n = torch.arange(x.size(1), dtype=torch.float32)[:, None]
        product = torch.fft.rfft(x.float(), dim=1) * torch.fft.rfft((-n / 4).exp(), dim=0)
        return torch.fft.irfft(product, x.size(1), dim=1).to(x.dtype), state


class Statistics(Honest):
    """Applies what it collects in the forward pass: a batch sees the one before it."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("mean", torch.zeros(()))

    def mix(self, x, state):
        u = x + self.mean
        self.mean.lerp_(x.detach().mean().to(self.mean.dtype), 0.1)
        return u, state


class InPlace(Honest):
    """A running sum that is added to in place."""
    def mix(self, x, state):
        total = torch.zeros_like(x[:, 0]) if state is None else state
        sums = x.cumsum(1) + total[:, None]
        with torch.no_grad():
            total += x.sum(1)
        return sums, total


class Boast(Honest):
    """Declares half of the state that it has."""
    def mix(self, x, state):
        return x, x[:, -1:].clone()

    def state_bytes(self, T, dtype):
        return self.proj.in_features * dtype.itemsize // 2


class Hoard(Honest):
    """A state of one token that is a view of all."""
    def mix(self, x, state):
        return x, x[:, -1:]


class InDict(Honest):
    """All tokens so far, in a dict, and declares nothing."""
    def mix(self, x, state):
        return x, {"x": x if state is None else torch.cat([state["x"], x], dim=1)}

    def state_bytes(self, T, dtype):
        return 0


class Coarse(Honest):
    """Loses in bfloat16 what it adds and takes away again."""
    def mix(self, x, state):
        return (x + 1000) - 1000, state


class Overflow(Honest):
    """Plain exponentials."""
    def mix(self, x, state):
        return x.exp().log(), state


class Explosive(Honest):
    """Values are right and gradients are 100 times too large, in each layer again."""
    def mix(self, x, state):
        return 100 * x - (99 * x).detach(), state


class Idle(Honest):
    """Half of the weights are never used."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.unused = nn.Linear(config.n_embd, config.n_embd)


class Random(Honest):
    """Chance that no seed governs."""
    def mix(self, x, state):
        return x * (1 + 0.01 * random.SystemRandom().random()), state


class PublishedMaximum(ReGLA):
    """ReGLA as it was published: exponential keys relative to the largest key of all positions, a
    scale that the norm's eps does not let cancel."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.norm = HeadNorm(config.n_embd // config.n_head)

    def attend(self, q, k, v, log_F, state):
        phi_q = (q - q.amax(3, keepdim=True)).exp()
        phi_k = (k - k.amax((2, 3), keepdim=True)).exp()
        return recurrence(phi_q, phi_k, v, g=log_F, state=state)


# name -> the mixer and the checks that must find it
PLANTED = {
    "whole_mean": (WholeMean, "suffix gradient length split"),
    "batch_std": (BatchStd, "rows suffix gradient"),
    "off_by_one": (OffByOne, "suffix gradient length split"),
    "chunk_end": (ChunkEnd, "suffix gradient length split"),
    "border_only": (BorderOnly, "suffix gradient length split"),
    "chunk_max": (ChunkMax, "huge"),
    "forgetful": (Forgetful, "split"),
    "zero_gate": (ZeroGate, "suffix gradient length split"),
    "evaluation_gate": (EvaluationGate, "suffix gradient length split"),
    "relu_gate": (ReluGate, "suffix gradient length split"),
    "negative_gate": (NegativeGate, "suffix gradient length split"),
    "rezero_leak": (ReZeroLeak, "suffix gradient length split"),
    "single_gate": (SingleGate, "suffix gradient"),
    "faint": (Faint, "suffix gradient"),
    "faint_inside": (FaintInside, "suffix gradient length split"),
    "tiny_beside_mask": (TinyBesideMask, "suffix gradient"),
    "noisy_leak": (NoisyLeak, "suffix gradient length split"),
    "wrong_key_bias": (WrongKeyBias, "split"),
    "wraps_round": (WrapsRound, "suffix gradient length split"),
    "hidden": (Hidden, "gradient split"),
    "length": (Length, "length split"),
    "training_only": (TrainingOnly, "suffix gradient"),
    "dropout_only": (DropoutOnly, "suffix gradient"),
    "float32_only": (Float32Only, "suffix gradient"),
    "autocast_only": (AutocastOnly, "gradient"),
    "long_only": (LongOnly, "suffix gradient"),
    "deep_only": (DeepOnly, "suffix gradient"),
    "late": (Late, "suffix gradient"),
    "statistics": (Statistics, "repeat"),
    "in_place": (InPlace, "branch split"),
    "boast": (Boast, "bytes"),
    "hoard": (Hoard, "storage"),
    "in_dict": (InDict, "bytes"),
    "coarse": (Coarse, "bfloat16"),
    "overflow": (Overflow, "finite"),
    "explosive": (Explosive, "depth"),
    "idle": (Idle, "learns"),
    "random": (Random, "repeat bits"),
    "published_maximum": (PublishedMaximum, "suffix gradient length split"),
}

if __name__ == "<run_path>":
    MIXERS.update({name: mixer for name, (mixer, _) in PLANTED.items()})
