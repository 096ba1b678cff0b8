"""Causal reduction (Hilsenbek 2024, "Breaking the Attention Bottleneck", arXiv 2406.10906).

No queries, keys, values or heads: per channel, with op = max, min or mean,

    r_t = op(x_t, x_{t-1}),  r_0 = x_0                            y_t = W_o r_t
    r_t = op(x_t, x_{t-1}, m_t),  m_t = 1/(t+1) sum_{s<=t} x_s    with context

x, r, y are (B, T, C). State: x_{t-1} (B, 1, C), and with context the running sum (B, 1, C) and the
number of tokens.

Deviation: the reference code takes m over the whole sequence, which shows every token the future.
Here m_t is the running mean up to t. The paper also uses the reduction in place of an FFN's
activation: `mlp_activation`, in model.py.
"""
import torch
import torch.nn as nn


def pairwise(op, a, b):
    if op == "max":
        return torch.maximum(a, b)
    if op == "min":
        return torch.minimum(a, b)
    return (a + b) / 2


def causal_reduce(x, op, context, state=None):
    """r (B, T, C) of x (B, T, C) on top of state, and the new state."""
    B, T, C = x.shape
    last, total, n = state or (x[:, :1], 0, 0)  # x_0 is its own predecessor
    previous = torch.cat([last.to(x.dtype), x[:, :-1]], dim=1)  # x_{t-1}
    last = as_in_products(x[:, -1:]).clone()  # not a view that holds on to all of x
    if not context:
        return pairwise(op, x, previous), (last, total, n + T)
    # at least float32: a bfloat16 sum stops growing after a few hundred tokens
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = wide.cumsum(1) + total
    counts = torch.arange(n + 1, n + T + 1, device=x.device).view(1, T, 1)
    mean = (sums / counts).to(x.dtype)
    if op == "mean":
        r = (x + previous + mean) / 3
    else:
        r = pairwise(op, pairwise(op, x, previous), mean)
    return r, (last, sums[:, -1:].clone(), n + T)


def as_in_products(x):
    """x in the dtype that autocast would give it in the product behind.

    Norms leave it in float32, which a state need not keep: r is rounded on its way into W_o, and
    the maximum of two rounded values is the rounded maximum."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def reduction_state_bytes(C, context, dtype):
    """x_{t-1}, and with context the running sum, which is kept in at least float32."""
    last = C * dtype.itemsize
    total = C * torch.promote_types(dtype, torch.float32).itemsize
    return last + total if context else last


class CausalReduction(nn.Module):
    def __init__(self, config, layer, op, context=False):
        super().__init__()
        self.op, self.context = op, context
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, state=None):
        r, state = causal_reduce(x, self.op, self.context, state)
        return self.c_proj(r), state

    def flops_per_token(self, T):
        return 2 * self.c_proj.weight.numel()

    def state_bytes(self, T, dtype):
        return reduction_state_bytes(self.c_proj.in_features, self.context, dtype)
