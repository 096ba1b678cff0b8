"""Selective Self-Attention (Zhang et al. 2024, NeurIPS 2024, arXiv 2411.12892): a temperature of its own for each token.

Softmax attention on q'_t = tau^q_t q_t, v'_s = tau^v_s v_s and, optionally, k'_s = tau^k_s k_s, where for each of the three

    tau_t = 1 + [token term on] tanh(f(x_t)) + [position term on] c log(t + 1)

and with every term off it is plain attention. Token term: f_q(x) = w_q . GELU(W_q x), reusing the projection that it
scales, before RoPE; without --ssa_share an MLP C -> C/4 -> 1 of its own. Position term: c = sigmoid(a), a learnable.
One tau for all heads, or with --ssa_per_head one a head, which then reads its own head's channels. q (B, H, T, D); k, v
(B, G, T, D); tau (B, 1 or heads, T, 1). State: the cache of scaled keys and values. q', k', v' are formed before the fused
attention, so speed and memory are softmax attention's.

Start: w = 0 and sigmoid(a) = 0.011. On weights of a softmax model (init_from) the position term is (sigmoid(a) - 0.011) log(t + 1),
so that the model starts exactly as it was and `a` has its normal gradient.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.options import option
from mixers.parts.heads import QKV, Cache, cache_bytes, causal_attention, causal_attention_flops, merge_heads, qkv_flops, rotate

C_START = 0.011


class Temperature(nn.Module):
    """tau for queries, keys or values. Shared: f reads u, the projected vectors; otherwise x through an MLP of its own."""

    def __init__(self, config, heads, token, position):
        super().__init__()
        self.outputs = heads if config.ssa_per_head else 1
        self.token, self.position = token, position
        D, hidden = config.n_embd // config.n_head, max(config.n_embd // 4, 1)
        if token:
            self.hidden = None if config.ssa_share else nn.Linear(config.n_embd, hidden, bias=config.bias)
            # flat, so that weight decay, which is for matrices, leaves it alone
            self.w = nn.Parameter(torch.zeros(heads * D if config.ssa_share else self.outputs * hidden))
        if position:
            self.a = nn.Parameter(torch.full((self.outputs,), math.log(C_START / (1 - C_START))))
            self.register_buffer("c_offset", torch.zeros(1))

    def forward(self, x, u, n):
        """tau (B, outputs, T, 1) for x (B, T, C) and u (B, heads, T, D), the first of whose tokens has n before it."""
        tau = 1.0
        if self.token:
            if self.hidden is None:  # all heads' channels, or each head's own
                features = F.gelu(u.transpose(1, 2)).unflatten(2, (self.outputs, -1)).flatten(3)  # (B, T, outputs, .)
            else:
                features = F.gelu(self.hidden(x)).unsqueeze(2)
            tau = tau + (features * self.w.view(self.outputs, -1)).sum(-1).tanh().transpose(1, 2)[..., None]
        if self.position:
            c = torch.sigmoid(self.a) - self.c_offset
            log_n = torch.arange(n + 1, n + x.size(1) + 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)).log()
            tau = tau + c[:, None, None] * log_n[:, None]
        return tau

    def start_at_one(self):
        if self.position:
            self.c_offset.fill_(torch.sigmoid(self.a[0]).item())


class SSA(nn.Module):
    class Options:
        ssa_query_token: bool = option(True, "SSA's token term for queries")
        ssa_query_position: bool = option(True, "SSA's position term for queries")
        ssa_key_token: bool = option(False, "SSA's token term for keys")
        ssa_key_position: bool = option(False, "SSA's position term for keys")
        ssa_value_token: bool = option(True, "SSA's token term for values")
        ssa_value_position: bool = option(False, "SSA's position term for values")
        ssa_share: bool = option(
            True, "SSA's token terms reuse the projection that they scale; otherwise an MLP each")
        ssa_per_head: bool = option(False, "SSA's temperatures differ between heads")

    def __init__(self, config, layer):
        super().__init__()
        self.rope_base = config.rope_base if config.pos == "rope" else None
        self.c_attn = QKV(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        H, G, _ = self.c_attn.sizes
        terms = {"q": (H, config.ssa_query_token, config.ssa_query_position),
                 "k": (G, config.ssa_key_token, config.ssa_key_position),
                 "v": (G, config.ssa_value_token, config.ssa_value_position)}
        self.tau = nn.ModuleDict({name: Temperature(config, *term) for name, term in terms.items() if any(term[1:])})

    def forward(self, x, state=None):
        vectors = dict(zip("qkv", self.c_attn(x)))
        n = 0 if state is None else state.k.size(2)
        for name, tau in self.tau.items():
            u = vectors[name]
            vectors[name] = (tau(x, u, n) * u).to(u.dtype)
        q, k, v = vectors.values()
        if self.rope_base:
            q, k = rotate(q, n, self.rope_base), rotate(k, n, self.rope_base)
        state = Cache.append(state, k, v)
        return self.c_proj(merge_heads(causal_attention(q, state.k, state.v))), state

    def be_neutral(self):
        """Makes every tau 1, for weights that come from a softmax model. Returns the parameters and buffers such a model lacks."""
        for tau in self.tau.values():
            tau.start_at_one()
        return {f"tau.{name}" for name in self.tau.state_dict()}

    def flops_per_token(self, T):
        products = sum(p.numel() for name, p in self.tau.named_parameters() if name.endswith("hidden.weight"))
        return qkv_flops(self) + 2 * products + causal_attention_flops(self.c_attn.sizes, T)

    def state_bytes(self, T, dtype):
        return cache_bytes(self.c_attn.sizes, T, dtype)
