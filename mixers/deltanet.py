"""DeltaNet (Schlag et al. 2021, arXiv 2102.11174; in parallel: Yang et al. 2024, arXiv 2406.06484).

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    y_t = S_t^T q_t / sqrt(D)

what is stored under k_t is taken out before v_t is put there. q, k, v come through a short
convolution and SiLU, q and k are then of length 1, beta_t = sigmoid(w x_t) for each head. y goes
through RMSNorm over each head's channels, then c_proj. q, k, v, y (B, H, T, D), D = C / H. State:
the convolution's last 3 inputs, and S (B, H, D, D). No positions, no forgetting.

--deltanet_negative: beta in (0, 2), so that I - beta k k^T has negative eigenvalues, as parity and
other state tracking need (Grazzi et al. 2024, arXiv 2411.12537). Keys of length 1 are part of the
mechanism: with beta |k|^2 above 2 the state explodes.
"""
import math

import torch.nn as nn

from base.options import option
from mixers.parts.heads import merge_heads, repeat_heads
from mixers.parts.recurrence import recurrence, recurrence_flops, recurrence_state_bytes
from mixers.parts.recurrent_heads import HeadNorm, Projections, WideLinear

TAPS = 4  # of the short convolution, unless `conv` says otherwise


class DeltaNet(nn.Module):
    takes = ("conv",)

    class Options:
        deltanet_negative: bool = option(
            False, "DeltaNet's beta in (0, 2) instead of (0, 1): negative eigenvalues")

    def __init__(self, config, layer):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        self.c_attn = Projections(config, D, D, TAPS, unit=True)
        self.beta = WideLinear(C, config.n_kv_head, bias=False)
        self.most_beta = 2.0 if config.deltanet_negative else 1.0
        self.norm = HeadNorm(D)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def forward(self, x, state=None):
        conv, S = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        beta = self.most_beta * self.beta(x).sigmoid()
        beta = repeat_heads(beta.mT.unsqueeze(3), q.size(1))  # (B, H, T, 1)
        y, S = recurrence(q / math.sqrt(q.size(-1)), k, beta * v, e=-beta * k, state=S)
        return self.c_proj(merge_heads(self.norm(y).to(v.dtype))), (conv, S)

    def flops_per_token(self, T):
        (D, E), (H, _) = self.c_attn.sizes, self.c_attn.heads
        products = 2 * (self.beta.weight.numel() + self.c_proj.weight.numel())
        return self.c_attn.flops_per_token() + products + recurrence_flops(T, H, D, E, erase=True)

    def state_bytes(self, T, dtype):
        S = recurrence_state_bytes(self.c_attn.heads[0], *self.c_attn.sizes, dtype)
        return S + self.c_attn.state_bytes(dtype)
