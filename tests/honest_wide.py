"""More mixers that are honest and unusual: none may be refused by train.py or failed by the audit.

    python -m tools.audit --mixer_file=tests/honest_wide.py --mixer=top_keys     # pass

B batch, T new tokens, S tokens so far, C channels.
"""
import math
import time
from dataclasses import dataclass, field
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from honest import Attention, Convolution
from planted import Honest

from mixers import MIXERS


class TopKeys(Attention):
    """Each query sees its four best keys: among equal ones any may be chosen."""

    def weights(self, scores):
        k = min(4, scores.size(-1))
        kept = scores.topk(k, dim=-1)
        return torch.full_like(scores, -math.inf).scatter(-1, kept.indices, kept.values).softmax(-1)


class Hard(Attention):
    """Each query sees its one best key."""

    def weights(self, scores):
        best = scores.argmax(-1, keepdim=True)
        soft = scores.softmax(-1)
        hard = torch.zeros_like(scores).scatter(-1, best, 1.0)
        return hard + soft - soft.detach()


class Sigmoid(Attention):
    """Sigmoids in place of a softmax, with a bias by how many are seen, counted from the mask."""

    def weights(self, scores):
        n = scores.isfinite().sum(-1, keepdim=True)
        return torch.sigmoid(scores - n.to(scores.dtype).log())


class NoBias(Convolution):
    """A Fourier transform, by which zeros before other tokens are zeros but for rounding."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.proj.bias = None


class StochasticFeatures(Honest):
    """Linear attention with random features, drawn anew in each step of training."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("fixed", torch.randn(config.n_embd, 16))

    def mix(self, x, state):
        w = torch.randn_like(self.fixed) if self.training else self.fixed
        phi = (x @ w.to(x.dtype)).relu() + 0.1
        S = torch.einsum("btm,btc->btmc", phi, x).cumsum(1)
        z = phi.cumsum(1)
        if state is not None:
            S, z = S + state["S"], z + state["z"]
        y = torch.einsum("btm,btmc->btc", phi, S) / torch.einsum("btm,btm->bt", phi, z)[..., None]
        return y, {"S": S[:, -1:].clone(), "z": z[:, -1:].clone()}


class OwnGenerator(Honest):
    """Noise in training from a generator of its own."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.generator = torch.Generator().manual_seed(layer)

    def mix(self, x, state):
        if self.training:
            x = x + 0.1 * torch.randn(x.shape, generator=self.generator).to(x.dtype)
        return x, state


class ExpertsWithDropout(Honest):
    """One of three experts a token, each with dropout of its own: how many numbers are drawn
    depends on the tokens, which row or which time they are of."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.router = nn.Linear(config.n_embd, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(config.n_embd, config.n_embd), nn.Dropout(0.3))
            for _ in range(3))

    def mix(self, x, state):
        score, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            if mine.any():
                y[mine] = expert(x[mine]).to(y.dtype)
        return y * score[..., None].to(y.dtype), state


class StochasticDepth(Honest):
    """Rows are dropped in training."""

    def mix(self, x, state):
        if self.training:
            x = x * torch.bernoulli(torch.full((x.size(0), 1, 1), 0.8, dtype=x.dtype))
        return x, None


class ByStatistics(Honest):
    """Normalised by a running deviation, which apply_statistics alone moves."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("deviation", torch.ones(config.n_embd))
        self.register_buffer("sum", torch.zeros(config.n_embd), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)

    def mix(self, x, state):
        if self.training:
            with torch.no_grad():
                self.sum += x.square().mean((0, 1)).to(self.sum.dtype)
                self.count += 1
        return x / self.deviation.to(x.dtype).clamp(min=1e-3), state

    @torch.no_grad()
    def apply_statistics(self):
        if self.count > 0:
            self.deviation.lerp_((self.sum / self.count).sqrt(), 0.05)
            self.sum.zero_()
            self.count.zero_()


class ShortMask(Attention):
    """A mask of block_size, beyond which it cannot go."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        n = config.block_size
        self.register_buffer("bias", torch.full((n, n), -math.inf).triu(1), persistent=False)

    def weights(self, scores):
        T, S = scores.shape[-2:]
        return (scores + self.bias[S - T:S, :S].to(scores.dtype)).softmax(-1)


class LearnedTable(Honest):
    """A learned vector for each position up to block_size. State: how many there were."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.table = nn.Parameter(0.1 * torch.randn(config.block_size, config.n_embd))

    def mix(self, x, state):
        n = state or 0
        return x + self.table[n:n + x.size(1)].to(x.dtype), n + x.size(1)


class EvenHeads(Honest):
    """Wants an even number of heads, and heads of 8 channels and more."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        D = config.n_embd // config.n_head
        if config.n_head % 2 or D < 8:
            raise ValueError(f"{config.n_head} heads of {D} channels: choose an even number of 8")


class NeedsFourHeads(Honest):
    """The same, said by its forward pass."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.mixing = nn.Parameter(torch.eye(4))
        self.heads = config.n_head

    def mix(self, x, state):
        h = x.unflatten(2, (self.heads, -1)).transpose(2, 3)
        return (h @ self.mixing.to(x.dtype)).transpose(2, 3).flatten(2), state


class FloatState(Honest):
    """A decaying sum that is kept in float32 whatever is given."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.decay = nn.Parameter(torch.linspace(0, 3, config.n_embd))

    def mix(self, x, state):
        a = torch.sigmoid(self.decay.float())
        h = torch.zeros_like(x[:, 0]).float() if state is None else state
        outputs = []
        for token in x.unbind(1):
            h = a * h + (1 - a) * token.float()
            outputs.append(h)
        return torch.stack(outputs, 1).to(x.dtype), h


@dataclass
class Slots:
    tokens: Optional[torch.Tensor] = None
    seen: int = 0
    extra: dict = field(default_factory=dict)


class Strided(Honest):
    """The mean of every third token so far. State: a dataclass with None, a number and a dict with
    a transposed tensor."""

    def mix(self, x, state):
        n = 0 if state is None else state.seen
        position = torch.arange(n, n + x.size(1))
        kept = (x * (position % 3 == 0)[:, None]).cumsum(1)
        if state is not None:
            kept = kept + state.extra["sum"].mT
        count = (position // 3 + 1).to(x.dtype)[:, None]
        return kept / count, Slots(None, n + x.size(1), {"sum": kept[:, -1:].mT.clone()})


class Votes(Honest):
    """How often each channel was positive. State: integers."""

    def mix(self, x, state):
        votes = (x > 0).long().cumsum(1)
        n = torch.arange(1, x.size(1) + 1)[:, None]
        if state is not None:
            votes, n = votes + state[0], n + state[1]
        return x * votes.to(x.dtype) / n.to(x.dtype), (votes[:, -1:].clone(), n[-1:].clone())


class Quantised(Honest):
    """Rounded to eighths, with a straight-through gradient."""

    def mix(self, x, state):
        rounded = (8 * x).round() / 8
        return x + (rounded - x).detach(), state


class DetachedScale(Honest):
    """Divided by its size, through which no gradient goes."""

    def mix(self, x, state):
        return x / (x.detach().square().mean(-1, keepdim=True) + 0.1).sqrt(), state


class SmallGradient(Honest):
    """Passes a tenth of the gradient to its input, as CogView's embedding does, by a hook."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.slow = nn.Parameter(torch.ones(config.n_embd))

    def mix(self, x, state):
        return x * self.slow.to(x.dtype).clamp(0.1, 10), state


class EarlyExit(Honest):
    """Goes on while a token needs it, each for itself."""

    def mix(self, x, state):
        u = x
        for _ in range(4):
            active = (u.abs().amax(-1, keepdim=True) > 1).to(x.dtype)
            if not active.any():
                break
            u = u * (1 - 0.5 * active)
        return u, state


class Slow(Honest):
    """A recurrence in plain Python."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.cell = nn.GRUCell(config.n_embd, config.n_embd)

    def mix(self, x, state):
        h = torch.zeros_like(x[:, 0]) if state is None else state
        outputs = []
        for token in x.unbind(1):
            h = self.cell(token, h).to(x.dtype)
            outputs.append(h)
        return torch.stack(outputs, 1), h


class Library(Honest):
    """A library's LSTM."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.lstm = nn.LSTM(config.n_embd, config.n_embd, batch_first=True)

    def mix(self, x, state):
        return self.lstm(x, state)


class Timed(Honest):
    """Keeps how long its calls took."""
    seconds = 0.0

    def mix(self, x, state):
        started = time.perf_counter()
        u = F.silu(x)
        self.seconds += time.perf_counter() - started
        return u, state


class CachedTable(Honest):
    """Sines that are kept from call to call and grow with the longest."""
    table = None

    def mix(self, x, state):
        n = state or 0
        end = n + x.size(1)
        if self.table is None or len(self.table) < end or self.table.dtype != x.dtype:
            position = torch.arange(end, dtype=torch.float64)[:, None]
            self.table = (position / 10 ** torch.linspace(0, 3, x.size(2)).double()).sin()
            self.table = self.table.to(x.dtype)
        return x + self.table[n:end], end


class ScaledGlobally(Honest):
    """exp(x) relative to the largest of all tokens, which cancels but for rounding."""

    def mix(self, x, state):
        top = x.amax(1, keepdim=True)
        weights = (x.clamp(-20, 20) - top.clamp(-20, 20)).exp()
        before = (0, 0) if state is None else state
        scale = top.clamp(-20, 20).exp()
        z = weights.cumsum(1) * scale + before[0]
        s = (weights * x).cumsum(1) * scale + before[1]
        return s / z, (z[:, -1:].clone(), s[:, -1:].clone())


# name -> the mixer and the checks that are likeliest to accuse it
HONEST_WIDE = {
    "top_keys": (TopKeys, "inputs lengths"),
    "hard": (Hard, "derivative inputs"),
    "sigmoid": (Sigmoid, "modes"),
    "no_bias": (NoBias, "inputs"),
    "stochastic_features": (StochasticFeatures, "length batches"),
    "own_generator": (OwnGenerator, "repeat"),
    "experts_with_dropout": (ExpertsWithDropout, "rows suffix batches"),
    "stochastic_depth": (StochasticDepth, "batches"),
    "by_statistics": (ByStatistics, "used aside saved"),
    "short_mask": (ShortMask, "sizes"),
    "learned_table": (LearnedTable, "sizes saved bfloat16"),
    "even_heads": (EvenHeads, "sizes"),
    "needs_four_heads": (NeedsFourHeads, "sizes"),
    "float_state": (FloatState, "decode carried"),
    "strided": (Strided, "carried decode"),
    "votes": (Votes, "carried derivative"),
    "quantised": (Quantised, "derivative"),
    "detached_scale": (DetachedScale, "derivative"),
    "small_gradient": (SmallGradient, "derivative learns"),
    "early_exit": (EarlyExit, "batches lengths"),
    "slow": (Slow, "compiled"),
    "library": (Library, "compiled modes"),
    "timed": (Timed, "carried"),
    "cached_table": (CachedTable, "carried"),
    "scaled_globally": (ScaledGlobally, "suffix"),
}

if __name__ == "<run_path>":
    MIXERS.update({name: mixer for name, (mixer, _) in HONEST_WIDE.items()})
