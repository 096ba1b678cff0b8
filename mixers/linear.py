"""Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs", arXiv 2006.16236): the
plain baseline.

    phi(u) = elu(u) + 1
    y_t = phi(q_t)^T S_t / (phi(q_t)^T z_t)
    S_t = sum_{s<=t} phi(k_s) v_s^T,   z_t = sum_{s<=t} phi(k_s)

q, k, v, y (B, H, T, D); q and k are rotated with `rotate_features` alone. State: that of `conv`, S,
z and the key maximum, see mixers/parts/chunkwise.py.

Deviation: features are formed as logarithms, log phi(u) = log(1 + u) above 0 and u below. So phi
does not round to 0 at u < -17, where float32 would make rows 0/0.
"""
import torch
import torch.nn as nn

from mixers.parts.chunkwise import linear_attention, linear_attention_flops, linear_state_bytes
from mixers.parts.heads import FeatureQKV, merge_heads, qkv_flops, repeat_heads


def log_elu_plus_one(u):
    """log(elu(u) + 1), element-wise, in at least float32."""
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    above = u.relu()  # clamp's gradient takes ten times as long
    return above.log1p() + (u - above)


class Linear(nn.Module):
    takes = "conv", "rotate_features"

    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = FeatureQKV(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, state=None):
        conv, state = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
        log_q, log_k = log_elu_plus_one(q), log_elu_plus_one(k)
        y, state = linear_attention(log_q, log_k, v, state)
        return self.c_proj(merge_heads(y)), (conv, state)

    def flops_per_token(self, T):
        H, _, D = self.c_attn.sizes
        return qkv_flops(self) + linear_attention_flops(T, H, D, D)

    def state_bytes(self, T, dtype):
        H, _, D = self.c_attn.sizes
        return linear_state_bytes(H, D, D, dtype) + self.c_attn.state_bytes(dtype)
