"""Performer, FAVOR+ (Choromanski et al. 2020, "Rethinking Attention with Performers", arXiv
2009.14794).

    phi(u) = exp(omega^T u - |u|^2 / 2) / sqrt(m),  u = q / D^(1/4) or k / D^(1/4)
    y_t = sum_{s<=t} phi(q_t).phi(k_s) v_s / sum_{s<=t} phi(q_t).phi(k_s)
    E[phi(q).phi(k)] = exp(q.k / sqrt(D))

q, k, v, y (B, H, T, D); omega (m, D), its rows Gaussian in length and orthogonal within blocks of
D, one for all heads of a layer, drawn from the seed and saved. State: that of `conv`, the number of
tokens, S (B, H, m, D), z and the key maximum, see mixers/parts/chunkwise.py.

Default m: D log D, rounded to a multiple of 8. --performer_redraw=N draws omega anew every N
optimiser steps.
"""
import math
from typing import Optional

import torch
import torch.nn as nn

from base.options import option
from mixers.parts.chunkwise import linear_attention, linear_attention_flops, linear_state_bytes
from mixers.parts.heads import (
    ConvolvedQKV,
    Wide,
    merge_heads,
    qkv_flops,
    repeat_heads,
    rotate,
)


def orthogonal_gaussian(m, D, generator):
    """omega (m, D): blocks of D orthogonal directions, each row as long as a Gaussian vector.

    The directions are uniform (Haar): LAPACK's QR prefers some signs, so the columns of Q take
    the signs of R's diagonal (Mezzadri 2007, arXiv math-ph/0609050). Without them the estimate of
    exp(q.k / sqrt(D)) has a bias that no m removes."""
    blocks = []
    for _ in range(math.ceil(m / D)):
        Q, R = torch.linalg.qr(torch.randn(D, D, generator=generator))
        blocks.append((Q * R.diagonal().sign()).T)
    directions = torch.cat(blocks)[:m]
    lengths = torch.randn(m, D, generator=generator).norm(dim=1, keepdim=True)
    return directions * lengths


def log_features(x, omega):
    """log phi (B, H, T, m) of queries or keys x (B, H, T, D), in at least float32."""
    with torch.autocast(x.device.type, enabled=False):
        u = x.to(torch.promote_types(x.dtype, omega.dtype)) / x.size(-1) ** 0.25
        omega = omega.to(u.dtype)
        return u @ omega.T - u.square().sum(-1, keepdim=True) / 2 - math.log(len(omega)) / 2


class RandomFeatures(Wide):
    """omega (m, D), and the numbers that it is drawn from: the same on every rank, and after a
    resume."""

    def __init__(self, m, D):
        super().__init__()
        self.register_buffer("seed", torch.randint(2**31, (1,)))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("omega", torch.empty(m, D))
        self.draw()

    def draw(self):
        generator = torch.Generator().manual_seed(int(self.seed + self.steps))
        self.omega.copy_(orthogonal_gaussian(*self.omega.shape, generator))

    def forward(self, x):
        return log_features(x, self.omega)


class Performer(nn.Module):
    takes = ("conv",)

    class Options:
        performer_features: Optional[int] = option(
            None, "Performer's features m [default: D log D rounded to a multiple of 8]", ge=1)
        performer_redraw: int = option(
            0, "optimiser steps between draws of Performer's features; 0: never", ge=0)

    def __init__(self, config, layer):
        super().__init__()
        self.rope_base = config.rope_base if config.pos == "rope" else None
        self.redraw_every = config.performer_redraw
        self.c_attn = ConvolvedQKV(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        D = self.c_attn.sizes[2]
        default_m = max(8, round(D * math.log(D) / 8) * 8)
        self.features = RandomFeatures(config.performer_features or default_m, D)

    def forward(self, x, state=None):
        conv, n, state = state or (None, 0, None)
        q, k, v, conv = self.c_attn(x, conv)
        if self.rope_base:
            q = rotate(q, n, self.rope_base)
            k = rotate(k, n, self.rope_base)
        H = q.size(1)
        log_q, log_k = self.features(q), self.features(k)
        y, state = linear_attention(log_q, repeat_heads(log_k, H), repeat_heads(v, H), state)
        return self.c_proj(merge_heads(y)), (conv, n + x.size(1), state)

    def apply_statistics(self):
        """Once per optimiser step: counts it, and draws omega anew when it is time."""
        if self.redraw_every:
            self.features.steps += 1
            if int(self.features.steps) % self.redraw_every == 0:
                self.features.draw()

    def flops_per_token(self, T):
        H, G, D = self.c_attn.sizes
        m = len(self.features.omega)
        return qkv_flops(self) + 2 * (H + G) * D * m + linear_attention_flops(T, H, m, D)

    def state_bytes(self, T, dtype):
        H, _, D = self.c_attn.sizes
        S = linear_state_bytes(H, len(self.features.omega), D, dtype)
        return S + self.c_attn.state_bytes(dtype)
