"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, ICLR 2025, arXiv 2412.06464).

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    y_t = S_t^T q_t / sqrt(D)
    alpha_t = exp(-exp(A_log) softplus(w_a x_t + dt_bias)),    beta_t = sigmoid(w_b x_t)

one alpha and one beta a head. q, k, v come through a short convolution and SiLU, q and k are then
of length 1. y goes through RMSNorm over each head's E channels, times SiLU(W_g x_t), then c_proj.
q, k (B, H, T, D), v, y (B, H, T, E). State: the convolution's last 3 inputs, and S (B, H, D, E).

Deviation: published with keys 0.75 C and values 1.5 C, 6 C^2 parameters; here keys C / 2 and values
C, the same ratio at softmax attention's 4 C^2.
"""
import math

import torch.nn as nn
import torch.nn.functional as F

from mixers.parts.heads import merge_heads, repeat_heads
from mixers.parts.recurrence import recurrence, recurrence_flops, recurrence_state_bytes
from mixers.parts.recurrent_heads import HeadNorm, MambaDecay, Projections, WideLinear

TAPS = 4  # of the short convolution, unless `conv` says otherwise


class GatedDeltaNet(nn.Module):
    takes = ("conv",)

    def __init__(self, config, layer):
        super().__init__()
        C, H = config.n_embd, config.n_head
        D, E = max(C // H // 2, 1), C // H
        self.c_attn = Projections(config, D, E, TAPS, unit=True)
        self.decay_proj = WideLinear(C, config.n_kv_head, bias=False)
        self.decay = MambaDecay(config.n_kv_head, A_range=(1e-4, 16))
        self.beta = WideLinear(C, config.n_kv_head, bias=False)
        self.gate = nn.Linear(C, C, bias=config.bias)
        self.norm = HeadNorm(E)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def forward(self, x, state=None):
        conv, S = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        H = q.size(1)
        g, _ = self.decay(self.decay_proj(x))
        g = repeat_heads(g.mT.unsqueeze(3), H)  # (B, H, T, 1)
        beta = self.beta(x).sigmoid()
        beta = repeat_heads(beta.mT.unsqueeze(3), H)
        y, S = recurrence(q / math.sqrt(q.size(-1)), k, beta * v, g=g, e=-beta * k, state=S)
        y = merge_heads(self.norm(y).to(v.dtype))
        return self.c_proj(y * F.silu(self.gate(x))), (conv, S)

    def ready_to_decode(self):
        self.decay.ready_to_decode()

    def flops_per_token(self, T):
        (D, E), (H, _) = self.c_attn.sizes, self.c_attn.heads
        layers = (self.decay_proj, self.beta, self.gate, self.c_proj)
        products = 2 * sum(layer.weight.numel() for layer in layers)
        return self.c_attn.flops_per_token() + products + recurrence_flops(T, H, D, E, erase=True)

    def state_bytes(self, T, dtype):
        S = recurrence_state_bytes(self.c_attn.heads[0], *self.c_attn.sizes, dtype)
        return S + self.c_attn.state_bytes(dtype)
