"""ReGLA (Lu et al. 2025, NAACL, arXiv 2502.01578): gated linear attention with exponential
features, no normaliser and a refined gate; here in an exact causal form.

    S_t = Diag(F_t) S_{t-1} + phi(k_t) v_t^T,    y_t = S_t^T phi(q_t)

    phi(q) = exp(q - max_d q),   phi(k) = exp(k - max k)   the published maximum: over all channels
                                                           and *positions*
    F = (1 - r) f^2 + r (1 - (1 - f)^2),   f = sigmoid(W_f x + b_f),   r = sigmoid(W_r x + b_r)

then RMSNorm over each head's E channels, times SiLU(W_g x_t), then c_proj. q, k, F (B, H, T, D), v,
y (B, H, T, E) with D = C / (2 H), E = C / H, as in gla; W_f, W_r C -> 16 -> keys. F's slope in f,
2 (1 - r) f + 2 r (1 - f), does not vanish at both ends (the gate of Gu et al. 2020, arXiv
1910.09890).

The published maximum leaks: it scales every row by what comes later, and the norm's eps does not
let that cancel. But row scales are all it is, so the same function has a causal form. With the
largest log weight that is left in a channel,

    m_t = max(m_{t-1} + log F_t, k_t)   (B, H, D)

keys are exp(k_t - m_t), decays exp(log F_t + m_{t-1} - m_t) <= 1, queries exp(q_t + m_t - max_d),
and y is divided by max_e |y_e|. Of every channel some token has the weight 1, so nothing overflows,
and a huge key that is forgotten has not erased the others. State: that of `conv`, S (B, H, D, E)
and m.

Deviations: the scale 1 / (e sqrt(D (e^2 - 1))) cancels in the norm and is left out. The text's F
gates value channels if read literally; they build on GLA's kernel, which gates key channels, and so
does this. The start was not found: b_f = 4, so F is about 0.98 and half-lives are 38 tokens; b_r =
0. The paper's W_f and W_r have full rank.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.options import option
from mixers.parts.heads import merge_heads, repeat_heads
from mixers.parts.recurrence import recurrence, recurrence_flops, recurrence_state_bytes
from mixers.parts.recurrent_heads import HeadNorm, Projections, WideLinear

SMALLEST = 1e-30  # of what a row is divided by


class Gate(nn.Module):
    """The logits (B, T, n) of a gate from x (B, T, C): W_2 W_1 x + b, b starting at `start`."""

    def __init__(self, C, rank, n, start):
        super().__init__()
        self.down = WideLinear(C, rank, bias=False)
        self.up = WideLinear(rank, n, bias=False)
        self.bias = nn.Parameter(torch.full((n,), start))

    def forward(self, x):
        return self.up(self.down(x)) + self.bias


class ScaleFreeNorm(HeadNorm):
    """HeadNorm of y (B, H, T, E) over max_e |y_e|, so that its eps is a share of the row."""

    def forward(self, y):
        return super().forward(y / y.abs().amax(3, keepdim=True).clamp(min=SMALLEST))


class ReGLA(nn.Module):
    takes = ("conv",)

    class Options:
        regla_rank: int = option(16, "rank of the projections to ReGLA's two gates", ge=1)
        regla_start: float = option(
            4.0, "where the logits of ReGLA's forget gates start; larger forgets more slowly")

    def __init__(self, config, layer):
        super().__init__()
        C, H = config.n_embd, config.n_head
        D, E = max(C // H // 2, 1), C // H
        self.c_attn = Projections(config, D, E)
        self.forget = Gate(C, config.regla_rank, config.n_kv_head * D, config.regla_start)
        self.refine = Gate(C, config.regla_rank, config.n_kv_head * D, 0.0)
        self.gate = nn.Linear(C, C, bias=config.bias)
        self.norm = ScaleFreeNorm(E)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def log_decay(self, x):
        """log F (B, H, T, D) <= 0, in at least float32, for x (B, T, C).

        F = f (f + 2 r (1 - f)); in logarithms, as f is 1 in float32 for logits beyond 17."""
        f, r = self.forget(x), self.refine(x)
        doubled = math.log(2) + F.logsigmoid(r) + F.logsigmoid(-f)
        log_F = F.logsigmoid(f) + torch.logaddexp(F.logsigmoid(f), doubled)
        H, G = self.c_attn.heads
        log_F = log_F.clamp(max=0).unflatten(2, (G, -1)).transpose(1, 2)
        return repeat_heads(log_F, H)

    def attend(self, q, k, v, log_F, state):
        """y (B, H, T, E), each row up to a scale, in at least float32, and the state."""
        S, before = (None, k[:, :, :1]) if state is None else (state[0], state[1][:, :, None])
        with torch.no_grad():  # y does not depend on the references
            decayed = log_F.cumsum(2)
            m = torch.maximum(before, (k - decayed).cummax(2).values) + decayed
            before = torch.cat([before, m[:, :, :-1]], dim=2)
            largest = (q + m).amax(3, keepdim=True)
        y, S = recurrence((q + m - largest).exp(), (k - m).exp(), v, g=log_F + before - m, state=S)
        return y, (S, m[:, :, -1].clone())

    def forward(self, x, state=None):
        conv, state = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        with torch.autocast(x.device.type, enabled=False):
            log_F = self.log_decay(x)
            wide = (t.to(log_F.dtype) for t in (q, k, v))
            y, state = self.attend(*wide, log_F, state)
            y = self.norm(y).to(v.dtype)
        return self.c_proj(merge_heads(y) * F.silu(self.gate(x))), (conv, state)

    def flops_per_token(self, T):
        (D, E), (H, _) = self.c_attn.sizes, self.c_attn.heads
        layers = [self.gate, self.c_proj]
        for gate in (self.forget, self.refine):
            layers += [gate.down, gate.up]
        products = 2 * sum(layer.weight.numel() for layer in layers)
        return self.c_attn.flops_per_token() + products + recurrence_flops(T, H, D, E)

    def state_bytes(self, T, dtype):
        (D, E), (H, _) = self.c_attn.sizes, self.c_attn.heads
        of_heads = recurrence_state_bytes(H, D, E + 1, dtype)  # m is a column more
        return of_heads + self.c_attn.state_bytes(dtype)
