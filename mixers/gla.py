"""Gated Linear Attention (Yang et al. 2023, ICML 2024, arXiv 2312.06635).

    S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,    y_t = S_t^T q_t / sqrt(D)
    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1 / divisor),  one decay for each key channel

then RMSNorm over each head's E channels, times SiLU(W_g x_t), then c_proj. q, k (B, H, T, D), v, y
(B, H, T, E) with D = C / (2 H), E = C / H: about as many parameters as softmax attention, 4 C^2.
W_1 C -> 16. State: that of `conv`, and S (B, H, D, E). No positions: the decay carries them.

At the start every channel's half-life is 16 tokens (g = log(1/2) / 16); memory over thousands takes
gates of +7. Deviations: none known; the paper has 4 heads whatever C, here n_head.
"""
import math

import torch.nn as nn
import torch.nn.functional as F

from base.options import option
from mixers.parts.heads import merge_heads, repeat_heads
from mixers.parts.recurrence import recurrence, recurrence_flops, recurrence_state_bytes
from mixers.parts.recurrent_heads import HeadNorm, Projections, WideLinear


class GLA(nn.Module):
    takes = ("conv",)

    class Options:
        gla_divisor: float = option(
            16.0, "GLA's gates are the power 1 / divisor of a sigmoid; larger forgets more slowly",
            gt=0)
        gla_rank: int = option(16, "rank of the projection to GLA's gates", ge=1)

    def __init__(self, config, layer):
        super().__init__()
        C, H = config.n_embd, config.n_head
        D, E = max(C // H // 2, 1), C // H
        self.c_attn = Projections(config, D, E)
        self.divisor = config.gla_divisor
        self.decay_down = WideLinear(C, config.gla_rank, bias=False)
        self.decay_up = WideLinear(config.gla_rank, config.n_kv_head * D)
        self.gate = nn.Linear(C, C, bias=config.bias)
        self.norm = HeadNorm(E)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def log_decay(self, x):
        """log alpha (B, H, T, D) <= 0, in at least float32, for x (B, T, C)."""
        H, G = self.c_attn.heads
        g = F.logsigmoid(self.decay_up(self.decay_down(x))) / self.divisor
        return repeat_heads(g.unflatten(2, (G, -1)).transpose(1, 2), H)

    def forward(self, x, state=None):
        conv, S = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        g = self.log_decay(x)
        y, S = recurrence(q / math.sqrt(q.size(-1)), k, v, g=g, state=S)
        return self.c_proj(merge_heads(self.norm(y)) * F.silu(self.gate(x))), (conv, S)

    def flops_per_token(self, T):
        (D, E), (H, _) = self.c_attn.sizes, self.c_attn.heads
        layers = (self.decay_down, self.decay_up, self.gate, self.c_proj)
        products = 2 * sum(layer.weight.numel() for layer in layers)
        return self.c_attn.flops_per_token() + products + recurrence_flops(T, H, D, E)

    def state_bytes(self, T, dtype):
        S = recurrence_state_bytes(self.c_attn.heads[0], *self.c_attn.sizes, dtype)
        return S + self.c_attn.state_bytes(dtype)
