"""Mixers that are honest and unusual: neither train.py nor the audit may accuse one of them.

    python -m tools.audit --mixer_file=tests/honest.py --mixer=rezero     # pass

B batch, T new tokens, S tokens so far, C channels, H heads, D head size.
"""
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from planted import Honest

from mixers import MIXERS

HEADS = 4


class Attention(nn.Module):
    """Softmax attention with separate projections with biases: the key bias's gradient is zero,
    since a softmax does not see what is added to all of its scores."""

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.q = nn.Linear(C, C)
        self.k = nn.Linear(C, C)
        self.v = nn.Linear(C, C)
        self.c_proj = nn.Linear(C, C)
        nn.init.normal_(self.q.bias, std=0.1)
        self.drop = nn.Dropout(0)

    def heads(self, x):
        return x.unflatten(2, (HEADS, -1)).transpose(1, 2)  # (B, H, T, D)

    def weights(self, scores):
        return scores.softmax(-1)

    def forward(self, x, state=None):
        k, v = self.heads(self.k(x)), self.heads(self.v(x))
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        q = self.heads(self.q(x))
        T, S = q.size(2), k.size(2)
        scores = q @ k.mT / math.sqrt(q.size(3))  # (B, H, T, S)
        later = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)
        weights = self.drop(self.weights(scores.masked_fill(later, -math.inf)))
        return self.c_proj((weights @ v).transpose(1, 2).flatten(2)), (k, v)


class ZeroProjection(Attention):
    """Starts as nothing at all: its last projection is zero. A parameter of its own, since the
    model initialises every nn.Linear anew."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.c_proj = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(config.n_embd, config.n_embd))

    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return F.linear(y, self.weight), state


class FloatSoftmax(Attention):
    """Its softmax is in float32 whatever it is given."""

    def weights(self, scores):
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


class OwnDropout(Attention):
    """Drops attention weights in training, a share of its own."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.drop = nn.Dropout(0.2)


class ReZero(Attention):
    """A gate that starts at zero (Bachlechner et al. 2020, arXiv 2003.04887)."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return self.gate * y, state


class Noisy(Honest):
    """Noise of its own in training."""

    def mix(self, x, state):
        return (x + 0.1 * torch.randn_like(x) if self.training else x), state


class Skipped(Honest):
    """Left out of some training steps by one draw for the whole batch."""

    def mix(self, x, state):
        return (x * (torch.rand(()) < 0.5) if self.training else x), state


class Convolution(Honest):
    """A causal convolution as long as the text, by a zero-padded FFT. State: all inputs so far, in
    float32 at least."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.decay = nn.Parameter(torch.linspace(-4, -1, config.n_embd))

    def wide(self, x):
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def mix(self, x, state):
        u = self.wide(x)
        T = u.size(1)
        u = u if state is None else torch.cat([state, u], dim=1)
        S = u.size(1)
        n = torch.arange(S, dtype=u.dtype, device=u.device)[:, None]
        kernel = torch.exp(-n * self.decay.to(u.dtype).exp())  # (S, C)
        size = 2 * S
        product = torch.fft.rfft(u, size, dim=1) * torch.fft.rfft(kernel, size, dim=0)
        y = torch.fft.irfft(product, size, dim=1)[:, S - T:S]
        return y.to(x.dtype), u


class FloatConvolution(Convolution):
    """The same, always in float32: as most published code has it."""

    def wide(self, x):
        return x.float()


class TopK(Honest):
    """Two of four experts for each token, by a router."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.router = nn.Linear(config.n_embd, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(config.n_embd, config.n_embd) for _ in range(4))

    def mix(self, x, state):
        scores, chosen = self.router(x).topk(2, dim=-1)  # (B, T, 2)
        weights = scores.softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=2)  # (B, T, 4, C)
        index = chosen[..., None].expand(-1, -1, -1, x.size(2))
        return (weights[..., None] * outputs.gather(2, index)).sum(2), state


class Scattered(TopK):
    """The same with one expert a token, each applied to its own tokens only."""

    def mix(self, x, state):
        score, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            y[mine] = expert(x[mine]).to(y.dtype)
        return y * score[..., None].to(y.dtype), state


class TokenShift(Honest):
    """RWKV's: a mean with the token before. State: that token."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.share = nn.Parameter(torch.full((config.n_embd,), 0.5))

    def mix(self, x, state):
        before = torch.zeros_like(x[:, :1]) if state is None else state["last"]
        shifted = torch.cat([before, x[:, :-1]], dim=1)
        return torch.lerp(shifted, x, self.share.to(x.dtype)), {"last": x[:, -1:].clone()}


@dataclass
class Memory:
    mean: torch.Tensor
    count: torch.Tensor  # int64
    note: str = "tokens so far"


class MovingAverage(Honest):
    """A running mean, token by token, then a gate that saturates. State: a dataclass with an
    integer tensor."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gate = nn.Parameter(torch.ones(config.n_embd))

    def mix(self, x, state):
        mean = torch.zeros_like(x[:, 0]) if state is None else state.mean
        count = torch.zeros((), dtype=torch.int64) if state is None else state.count
        means = []
        for token in x.unbind(1):
            count = count + 1
            mean = mean + (token - mean) / count
            means.append(mean)
        gate = F.hardsigmoid(3 * self.gate.to(x.dtype) * x)
        return gate * torch.stack(means, dim=1), Memory(mean, count)


class Normalised(Honest):
    """A layer norm of its own on each token."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.norm = nn.LayerNorm(config.n_embd)

    def mix(self, x, state):
        return self.norm(x), None


class TwoModes(Honest):
    """A parameter that training alone uses, and another that is not trained."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.in_training = nn.Parameter(torch.ones(config.n_embd))
        self.fixed = nn.Parameter(torch.ones(config.n_embd), requires_grad=False)

    def mix(self, x, state):
        u = x * self.fixed.detach()
        return (u * self.in_training if self.training else u), state


class Rotation(Honest):
    """A complex linear recurrence, h_t = a h_{t-1} + b x_t, whose parameters are complex. State: h
    and the position."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        C = config.n_embd
        angle = torch.linspace(0.1, 1, C)
        self.log_a = nn.Parameter(torch.complex(torch.full((C,), -0.5), angle))
        self.b = nn.Parameter(torch.complex(torch.ones(C), torch.ones(C)))

    def mix(self, x, state):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        a = torch.complex(-self.log_a.real.abs() - 0.1, self.log_a.imag).exp()
        h, position = (torch.zeros_like(a[None]), 0) if state is None else state
        outputs = []
        for token in wide.unbind(1):
            h = a * h + self.b * token
            outputs.append(h.real + h.imag)
        y = torch.stack(outputs, dim=1)
        return y.to(x.dtype), (h, position + x.size(1))


class Window(Honest):
    """The mean of the last eight tokens. State: a deque of them."""

    def mix(self, x, state):
        last = deque([] if state is None else state, maxlen=8)
        means = []
        for token in x.unbind(1):
            last.append(token.clone())
            means.append(torch.stack(tuple(last)).mean(0))
        return torch.stack(means, dim=1), last


class Carrier:
    """A plain object that holds a state."""

    def __init__(self, total: Any, tokens: int):
        self.total = total
        self.tokens = tokens


class Spatial(Honest):
    """A learned weight for each pair of positions, up to block_size of them (gMLP, arXiv
    2105.08050, made causal)."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        n = config.block_size
        self.weight = nn.Parameter(torch.randn(n, n) / n)

    def mix(self, x, state):
        u = x if state is None else torch.cat([state.total, x], dim=1)
        T, S = x.size(1), u.size(1)
        weight = self.weight.tril()[S - T:S, :S]
        return x + weight @ u, Carrier(u, S)


class FloatMask(Attention):
    """A mask of float32, added to the scores, and kept from one call to the next."""

    mask = None

    def weights(self, scores):
        T, S = scores.shape[-2:]
        if self.mask is None or self.mask.size(0) < S:
            self.mask = torch.full((S, S), -math.inf).triu(1)
        return (scores + self.mask[S - T:S, :S].to(scores.device)).softmax(-1).to(scores.dtype)


# name -> the mixer and the checks that accused it once, or are likeliest to
HONEST = {
    "plain": (Honest, "depth bits"),
    "biased_qkv": (Attention, "split"),
    "zero_projection": (ZeroProjection, "learns"),
    "float_softmax": (FloatSoftmax, "split"),
    "own_dropout": (OwnDropout, "branch"),
    "rezero": (ReZero, "learns"),
    "noisy": (Noisy, "length"),
    "skipped": (Skipped, "learns"),
    "convolution": (Convolution, "suffix"),
    "float_convolution": (FloatConvolution, "suffix split"),
    "top_k": (TopK, "bfloat16"),
    "scattered": (Scattered, "bfloat16 learns"),
    "token_shift": (TokenShift, "branch"),
    "moving_average": (MovingAverage, "branch bytes"),
    "normalised": (Normalised, "suffix bfloat16 learns"),
    "two_modes": (TwoModes, "learns split"),
    "rotation": (Rotation, "bytes bfloat16"),
    "window": (Window, "branch bytes"),
    "spatial": (Spatial, "branch split"),
    "float_mask": (FloatMask, "branch"),
}

if __name__ == "<run_path>":
    MIXERS.update({name: mixer for name, (mixer, _) in HONEST.items()})
