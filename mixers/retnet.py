"""RetNet's multi-scale retention (Sun et al. 2023, arXiv 2307.08621): linear attention with fixed
decays.

    S_t = gamma_h S_{t-1} + k_t v_t^T,    y_t = S_t^T q_t / sqrt(D),    gamma_h = 1 - 2^(-5-h)

for head h = 0 .. H - 1: half-lives of 22, 44, 88, ... tokens. q and k are rotated (RoPE) at
absolute positions; y goes through RMSNorm over each head's E channels, times SiLU(W_g x_t), then
c_proj. q, k (B, H, T, D), v, y (B, H, T, E), D = C / (2 H) made even, E = C / H. State: that
of `conv`, n and S (B, H, D, E).

Deviations: the paper has keys of C, values of 2 C (8 C^2 parameters) and a narrower FFN; here 4
C^2, as softmax attention and gla, which then differs in its decays alone. Its three normalisations
of scores are scales of rows, which the norm cancels: left out. GroupNorm is RMSNorm, as in later
code.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixers.parts.heads import Wide, merge_heads, rotate
from mixers.parts.recurrence import recurrence, recurrence_flops, recurrence_state_bytes
from mixers.parts.recurrent_heads import HeadNorm, Projections


class Decays(Wide):
    """log gamma (H): constants."""

    def __init__(self, H):
        super().__init__()
        log_gamma = torch.log1p(-torch.exp2(-5.0 - torch.arange(H)))
        self.register_buffer("log_gamma", log_gamma, persistent=False)


class RetNet(nn.Module):
    takes = ("conv",)

    def __init__(self, config, layer):
        super().__init__()
        C, H = config.n_embd, config.n_head
        D, E = 2 * max(C // H // 4, 1), C // H
        self.rope_base = config.rope_base
        self.c_attn = Projections(config, D, E)
        self.decays = Decays(H)
        self.gate = nn.Linear(C, C, bias=config.bias)
        self.norm = HeadNorm(E)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def forward(self, x, state=None):
        conv, n, S = (None, 0, None) if state is None else state
        T = x.size(1)
        q, k, v, conv = self.c_attn(x, conv)
        q, k = rotate(torch.cat([q, k], dim=1), n, self.rope_base).chunk(2, dim=1)
        g = self.decays.log_gamma.view(1, -1, 1, 1).expand(-1, -1, T, -1)
        y, S = recurrence(q / math.sqrt(q.size(-1)), k, v, g=g, state=S)
        return self.c_proj(merge_heads(self.norm(y)) * F.silu(self.gate(x))), (conv, n + T, S)

    def flops_per_token(self, T):
        (D, E), (H, _) = self.c_attn.sizes, self.c_attn.heads
        products = 2 * (self.gate.weight.numel() + self.c_proj.weight.numel())
        return self.c_attn.flops_per_token() + products + recurrence_flops(T, H, D, E)

    def state_bytes(self, T, dtype):
        S = recurrence_state_bytes(self.c_attn.heads[0], *self.c_attn.sizes, dtype)
        return S + self.c_attn.state_bytes(dtype)
