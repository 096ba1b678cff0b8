"""What the mixers on the recurrence share: projections with keys and values of different sizes, the
decay of Mamba, norms of heads.

B batch, T new tokens, H heads, G key/value heads, D key size, E value size.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixers.parts.convolution import ShortConvolution, SiLUAlone
from mixers.parts.heads import repeat_heads
from mixers.parts.products import to_dtype, without_autocast


class Projections(nn.Module):
    """x (B, T, C) -> q, k (B, H, T, D), v (B, H, T, E) in one product; with taps, through a short
    convolution. n_kv_head keys and values are repeated. State: the convolution's, or None.

    own_taps: the mechanism's, which `conv` overrides. SiLU is part of a mechanism that has some,
    and stays where `conv` is 0. unit: q and k are then of length 1, in at least float32."""

    def __init__(self, config, D, E, own_taps=0, unit=False):
        super().__init__()
        self.unit = unit
        self.heads = config.n_head, config.n_kv_head
        self.sizes = D, E
        H, G = self.heads
        self.widths = [H * D, G * D, G * E]
        self.proj = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)
        taps = own_taps if config.conv is None else config.conv
        self.conv = None
        if taps:
            self.conv = ShortConvolution(sum(self.widths), taps)
        elif own_taps:
            self.conv = SiLUAlone()

    def forward(self, x, state):
        H, G = self.heads
        z = self.proj(x)
        if self.conv is not None:
            z, state = self.conv(z, state)
        of_q, of_k, of_v = self.widths
        qk, v = z.split_with_sizes([of_q + of_k, of_v], dim=2)
        qk = qk.unflatten(2, (H + G, -1)).transpose(1, 2)
        q, k = (l2_normalised(qk) if self.unit else qk).split_with_sizes([H, G], dim=1)
        v = v.unflatten(2, (G, -1)).transpose(1, 2)
        return q, repeat_heads(k, H), repeat_heads(v, H), state

    def flops_per_token(self):
        taps = self.conv.flops_per_token() if self.conv is not None else 0
        return 2 * self.proj.weight.numel() + taps

    def state_bytes(self, dtype):
        return self.conv.state_bytes(dtype) if self.conv is not None else 0


class WideLinear(nn.Linear):
    """nn.Linear in at least float32, under autocast and in decoding too: what becomes a decay may
    not be rounded."""

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):
            weight, bias = to_dtype(self.weight, dtype), to_dtype(self.bias, dtype)
            return F.linear(to_dtype(x, dtype), weight, bias)


def l2_normalised(x):
    """x (..., D) over its length, in at least float32; a zero vector stays zero."""
    x = to_dtype(x, torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


class HeadNorm(nn.Module):
    """RMSNorm of y (B, H, T, E) over E, in at least float32, with one weight (E) for all heads."""

    def __init__(self, E):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(E))

    def forward(self, y):
        dtype = torch.promote_types(y.dtype, torch.float32)
        wide, weight = to_dtype(y, dtype), to_dtype(self.weight, dtype)
        return to_dtype(torch.rms_norm(wide, weight.shape, weight, 1e-5), y.dtype)


class MambaDecay(nn.Module):
    """g = -exp(A_log) softplus(u + dt_bias) <= 0, for u (..., n) as projected: the log decay of
    Mamba-2.

    Start: A uniform in A_range, softplus(dt_bias) log-uniform in 0.001 to 0.1: half-lives of 1 to
    some 200 tokens. Both are vectors, which weight decay leaves alone."""

    def __init__(self, n, A_range):
        super().__init__()
        dt = torch.empty(n).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(n).uniform_(*A_range).log())
        self.fixed = None  # -exp(A_log), once it no longer changes

    def forward(self, u):
        """g and the step dt = softplus(u + dt_bias), both like u, in its precision."""
        dt = F.softplus(u + self.dt_bias)
        return (self.rate() if self.fixed is None else self.fixed) * dt, dt

    def rate(self):
        return -self.A_log.exp()

    def ready_to_decode(self):
        self.fixed = self.rate()
