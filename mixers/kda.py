"""Kimi Delta Attention (Kimi Linear, 2025, arXiv 2510.26692): the delta rule with a decay for each
channel.

  S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,   y_t = S_t^T q_t / sqrt(D)

alpha_t = exp(g_t) for each key channel, from f_t = W_2 W_1 x_t (W_1 C -> D):

    bounded (default)      g = -5 sigmoid(exp(A_log) (f + dt_bias)),  in (-5, 0)
    --no-kda_bounded       g = -exp(A_log) softplus(f + dt_bias)

A_log a head, dt_bias a channel; beta_t = sigmoid(w_b x_t) a head. q, k, v come through a short
convolution and SiLU, q and k are then of length 1. y goes through RMSNorm over each head's
channels, times sigmoid(W_g2 W_g1 x_t + b) (W_g1 C -> D), then c_proj. q, k, v, y (B, H, T, D), D =
C / H. State: the convolution's last 3 inputs, and S (B, H, D, D). No positions.

Start, ours: dt_bias such that -g is log-uniform in 0.001 to 0.1, half-lives of 7 to 690 tokens;
A_log 0 where bounded, else A in 1 to 16 with Mamba's dt_bias. Published models have one layer of
softmax attention after three of these: --mixer=kda,kda,kda,softmax.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.options import option
from mixers.parts.heads import merge_heads, repeat_heads
from mixers.parts.recurrence import recurrence, recurrence_flops, recurrence_state_bytes
from mixers.parts.recurrent_heads import HeadNorm, Projections, WideLinear

TAPS = 4  # of the short convolution, unless `conv` says otherwise
LOWEST = -5.0  # log decay of a token where it is bounded


class KDA(nn.Module):
    takes = ("conv",)

    class Options:
        kda_bounded: bool = option(
            True, "KDA's log decay is at least -5 a token: -5 sigmoid(.), otherwise Mamba's")

    def __init__(self, config, layer):
        super().__init__()
        C, D, G = config.n_embd, config.n_embd // config.n_head, config.n_kv_head
        self.c_attn = Projections(config, D, D, TAPS, unit=True)
        self.bounded = config.kda_bounded
        self.decay_down = WideLinear(C, D, bias=False)
        self.decay_up = WideLinear(D, G * D, bias=False)
        speed = torch.empty(G * D).uniform_(math.log(0.001), math.log(0.1)).exp()
        if self.bounded:
            self.dt_bias = nn.Parameter(torch.logit(speed / -LOWEST))
            self.A_log = nn.Parameter(torch.zeros(G))
        else:
            self.dt_bias = nn.Parameter(speed + torch.log(-torch.expm1(-speed)))
            self.A_log = nn.Parameter(torch.empty(G).uniform_(1, 16).log())
        self.fixed = None  # exp(A_log), once it no longer changes
        self.beta = WideLinear(C, G, bias=False)
        self.gate_down = nn.Linear(C, D, bias=False)
        self.gate_up = nn.Linear(D, C)
        self.norm = HeadNorm(D)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def log_decay(self, x):
        """g (B, G, T, D) <= 0, in at least float32."""
        f = self.decay_up(self.decay_down(x)) + self.dt_bias
        f = f.unflatten(2, (len(self.A_log), -1)).transpose(1, 2)
        A = self.rate() if self.fixed is None else self.fixed
        return LOWEST * (A * f).sigmoid() if self.bounded else -A * F.softplus(f)

    def rate(self):
        """exp(A_log) (G, 1, 1)."""
        return self.A_log.clamp(max=10).exp()[:, None, None]  # inf times a slope of 0 is no number

    def ready_to_decode(self):
        self.fixed = self.rate()

    def forward(self, x, state=None):
        conv, S = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        H = q.size(1)
        g = repeat_heads(self.log_decay(x), H)
        beta = self.beta(x).sigmoid()
        beta = repeat_heads(beta.mT.unsqueeze(3), H)  # (B, H, T, 1)
        q, floor = q / math.sqrt(q.size(-1)), LOWEST if self.bounded else None
        y, S = recurrence(q, k, beta * v, g=g, e=-beta * k, state=S, floor=floor)
        y = merge_heads(self.norm(y).to(v.dtype))
        return self.c_proj(y * self.gate_up(self.gate_down(x)).sigmoid()), (conv, S)

    def flops_per_token(self, T):
        (D, E), (H, _) = self.c_attn.sizes, self.c_attn.heads
        layers = (self.decay_down, self.decay_up, self.beta, self.gate_down, self.gate_up)
        products = 2 * sum(layer.weight.numel() for layer in (*layers, self.c_proj))
        return self.c_attn.flops_per_token() + products + recurrence_flops(T, H, D, E, erase=True)

    def state_bytes(self, T, dtype):
        S = recurrence_state_bytes(self.c_attn.heads[0], *self.c_attn.sizes, dtype)
        return S + self.c_attn.state_bytes(dtype)
