"""The delta rule (DeltaNet; Yang et al. 2024, arXiv 2406.06484) as a plain loop: a mixer to copy.

    python -m tools.audit --mixer_file=examples/delta_rule.py --mixer=delta_rule
    python train.py configs/shakespeare.py --mixer_file=examples/delta_rule.py --mixer=delta_rule

A memory S maps keys to values. Each token looks up what S holds under its key, moves that a share
beta towards its value, and reads S with its query:

    S_t = S_{t-1} + beta_t k_t (v_t - k_t^T S_{t-1})^T,   y_t = q_t^T S_t,   |q_t| = |k_t| = 1

Honest, and slow: one step of Python per token. B batch, T tokens, C channels, H heads, D = C / H.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from mixers import MIXERS


class DeltaRule(nn.Module):
    # config: every model option of config.py (n_embd, n_head, ...); layer: 0, 1, ...
    def __init__(self, config, layer):
        super().__init__()
        self.H = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.beta = nn.Linear(config.n_embd, self.H)
        # the name c_proj asks for the smaller initial weights of a sub-layer's last projection
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    # x: new tokens (B, T, C); state: what an earlier call returned, None at the start of a text
    def forward(self, x, state=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).float().view(B, T, 3, self.H, C // self.H).unbind(2)  # (B, T, H, D)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        # with |k| = 1 and beta in (0, 1) the memory cannot blow up
        beta = self.beta(x).float().sigmoid()[..., None]  # (B, T, H, 1)
        S = state
        if S is None:
            S = q.new_zeros(B, self.H, C // self.H, C // self.H)  # (B, H, D keys, D values)
        outputs = []
        for t in range(T):
            old = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
            change = beta[:, t] * (v[:, t] - old)
            # a new tensor, not S += ...: a state that was returned never changes later
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], change)
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        y = torch.stack(outputs, dim=1).flatten(2).to(x.dtype)  # (B, T, C)
        return self.c_proj(y), S

    # two answers that a mixer may give about itself; both may be left out
    def state_bytes(self, T, dtype):
        return self.c_proj.in_features**2 // self.H * 4  # S in float32

    def flops_per_token(self, T):
        projections = 2 * sum(m.weight.numel() for m in (self.qkv, self.beta, self.c_proj))
        return projections + 3 * 2 * self.c_proj.in_features**2 // self.H  # the three products


MIXERS["delta_rule"] = DeltaRule
