"""Mamba-2, state space duality (Dao and Gu 2024, arXiv 2405.21060).

    S_t = exp(g_t) S_{t-1} + B_t (dt_t x'_t)^T,    y_t = S_t^T C_t + d x'_t
    dt_t = softplus(w_dt x_t + dt_bias),    g_t = -exp(A_log) dt_t

z, x' (B, T, e C), B_t, C_t (B, T, N) and dt (B, T, H) come from one projection of x; x', B and C go
through a short convolution with bias and SiLU. Heads of P = C / n_head channels of x', H = e n_head
of them, share B and C, which are keys and queries of N channels. Then RMSNorm(y * SiLU(z)) over all
e C channels, and c_proj. State: the convolution's last 3 inputs, and S (B, H, N, P). No positions.

Deviations: the published models have e = 2 and no FFN; here e = 1 and the FFN stays. Published is
N = 128; by default N = C / 2, which makes 4 C^2 parameters as in softmax attention. P is published
as 64; here it is the size of a head of the other mixers.
"""
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.options import option
from mixers.parts.convolution import ShortConvolution, SiLUAlone
from mixers.parts.heads import merge_heads
from mixers.parts.recurrence import recurrence, recurrence_flops, recurrence_state_bytes
from mixers.parts.recurrent_heads import HeadNorm, MambaDecay, WideLinear

TAPS = 4  # of the short convolution, unless `conv` says otherwise


class Mamba2(nn.Module):
    takes = ("conv",)

    class Options:
        mamba2_state: Optional[int] = option(
            None, "Mamba-2's state channels N [default: half of n_embd; published 128]", ge=1)
        mamba2_expand: int = option(1, "Mamba-2's inner width over n_embd; published 2", ge=1)

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        inner = config.mamba2_expand * C
        N = config.mamba2_state or max(C // 2, 1)
        H = config.mamba2_expand * config.n_head
        self.sizes = H, N, C // config.n_head
        self.proj = nn.Linear(C, 2 * inner + 2 * N, bias=config.bias)
        self.dt_proj = WideLinear(C, H, bias=False)
        taps = TAPS if config.conv is None else config.conv
        self.conv = ShortConvolution(inner + 2 * N, taps, bias=True) if taps else SiLUAlone()
        self.decay = MambaDecay(H, A_range=(1, 16))
        self.skip = nn.Parameter(torch.ones(H))
        self.norm = HeadNorm(inner)
        self.c_proj = nn.Linear(inner, C, bias=config.bias)

    def forward(self, x, state=None):
        conv, S = (None, None) if state is None else state
        H, N, P = self.sizes
        z, xBC = self.proj(x).split_with_sizes([H * P, H * P + 2 * N], dim=2)
        xBC, conv = self.conv(xBC, conv)
        inner, k, q = xBC.split_with_sizes([H * P, N, N], dim=2)
        inner = inner.unflatten(2, (H, P)).transpose(1, 2)  # (B, H, T, P)
        g, dt = self.decay(self.dt_proj(x))
        g, dt = g.mT.unsqueeze(3), dt.mT.unsqueeze(3)  # (B, H, T, 1)
        y, S = recurrence(q[:, None], k[:, None], dt * inner, g=g, state=S)
        y = torch.addcmul(y, self.skip[:, None, None], inner)
        y = self.norm(merge_heads(y) * F.silu(z)).to(z.dtype)
        return self.c_proj(y), (conv, S)

    def ready_to_decode(self):
        self.decay.ready_to_decode()

    def flops_per_token(self, T):
        H, N, P = self.sizes
        layers = (self.proj, self.dt_proj, self.c_proj)
        products = 2 * sum(layer.weight.numel() for layer in layers)
        return products + self.conv.flops_per_token() + recurrence_flops(T, H, N, P, shared=True)

    def state_bytes(self, T, dtype):
        return recurrence_state_bytes(*self.sizes, dtype) + self.conv.state_bytes(dtype)
