"""Selective Self-Attention (Zhang et al. 2024, NeurIPS 2024, arXiv 2411.12892): a temperature of
its own for each token.

Softmax attention on q'_t = tau^q_t q_t, v'_s = tau^v_s v_s and, optionally, k'_s = tau^k_s k_s,
where for each of the three

    tau_t = 1 + [token term on] tanh(f(x_t)) + [position term on] c log(t + 1)

and with every term off it is plain attention. Token term: f_q(x) = w_q . GELU(W_q x), reusing the
projection that it scales, before RoPE; without --ssa_share an MLP C -> C/4 -> 1 of its own.
Position term: a learnable c,

    c = exp(-exp(b))     --ssa_position=authors, as in their code
    c = sigmoid(a)       --ssa_position=paper, as in their text: it moves about 4.5 times slower
                         from the same start

One tau for all heads, or with --ssa_per_head one a head, which then reads its own head's
channels. q (B, H, T, D); k, v (B, G, T, D); tau (B, 1 or heads, T, 1). Scores are also divided by
`attn_temperature`. State: that of `conv`, and the cache of scaled keys and values. q', k', v' are
formed before the fused attention, so speed and memory are softmax attention's.

Start: w = 0 and c = exp(-exp(1.5)) = 0.0113. On weights of a softmax model (init_from) that start
is taken off c, so that the model starts exactly as it was and b (or a) has its normal gradient.
"""
import math
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.options import option
from mixers.parts.heads import (
    Cache,
    ConvolvedQKV,
    cache_bytes,
    causal_attention,
    causal_attention_flops,
    merge_heads,
    qkv_flops,
    rotate,
    tempered,
)

B_START = 1.5
C_START = math.exp(-math.exp(B_START))
A_START = math.log(C_START / (1 - C_START))


class Temperature(nn.Module):
    """tau for queries, keys or values. The token term reads u, the projected vectors, if shared;
    otherwise x through an MLP of its own."""

    def __init__(self, config, heads, token, position):
        super().__init__()
        self.outputs = heads if config.ssa_per_head else 1
        self.token, self.position = token, position
        D = config.n_embd // config.n_head
        hidden = max(config.n_embd // 4, 1)
        if token:
            if config.ssa_share:
                self.hidden = None
                size = heads * D
            else:
                self.hidden = nn.Linear(config.n_embd, hidden, bias=config.bias)
                size = self.outputs * hidden
            # flat, so that weight decay, which is for matrices, leaves it alone
            self.w = nn.Parameter(torch.zeros(size))
        if position:
            # each form has its own name: one is never read as the other
            self.form = config.ssa_position
            if self.form == "authors":
                self.b = nn.Parameter(torch.full((self.outputs,), B_START))
            else:
                self.a = nn.Parameter(torch.full((self.outputs,), A_START))
            self.register_buffer("c_offset", torch.zeros(self.outputs))

    def forward(self, x, u, n):
        """tau (B, outputs, T, 1) for x (B, T, C) and u (B, heads, T, D), whose first token has n
        before it."""
        tau = 1.0
        if self.token:
            tau = tau + self.token_term(x, u)
        if self.position:
            dtype = torch.promote_types(x.dtype, torch.float32)
            position = torch.arange(n + 1, n + x.size(1) + 1, device=x.device, dtype=dtype)
            c = self.c() - self.c_offset
            tau = tau + c[:, None, None] * position.log()[:, None]
        return tau

    def token_term(self, x, u):
        """tanh(f(x)) (B, outputs, T, 1)."""
        if self.hidden is None:
            # all heads' channels, or each head's own: (B, T, outputs, .)
            features = F.gelu(u.transpose(1, 2)).unflatten(2, (self.outputs, -1)).flatten(3)
        else:
            features = F.gelu(self.hidden(x)).unsqueeze(2)
        f = (features * self.w.view(self.outputs, -1)).sum(-1)  # (B, T, outputs)
        return f.tanh().transpose(1, 2)[..., None]

    def c(self):
        """The position term's strength (outputs,), before the offset."""
        if self.form == "authors":
            return (-self.b.to(torch.promote_types(self.b.dtype, torch.float32)).exp()).exp()
        return torch.sigmoid(self.a)

    @torch.no_grad()
    def start_at_one(self):
        """Takes c's present value off, so that tau is 1 while w is 0."""
        if self.position:
            self.c_offset.copy_(self.c())


class SSA(nn.Module):
    takes = "conv", "attn_temperature"

    class Options:
        ssa_query_token: bool = option(True, "SSA's token term for queries")
        ssa_query_position: bool = option(True, "SSA's position term for queries")
        ssa_key_token: bool = option(False, "SSA's token term for keys")
        ssa_key_position: bool = option(False, "SSA's position term for keys")
        ssa_value_token: bool = option(True, "SSA's token term for values")
        ssa_value_position: bool = option(False, "SSA's position term for values")
        ssa_position: Literal["authors", "paper"] = option(
            "authors", "SSA's position term: exp(-exp(b)) log n, or sigmoid(a) log n")
        ssa_share: bool = option(
            True, "SSA's token terms read the queries, keys or values that they scale; otherwise "
            "the hidden states, each through an MLP of its own")
        ssa_per_head: bool = option(
            False, "SSA's temperatures, which multiply, differ between heads")

    def __init__(self, config, layer):
        super().__init__()
        self.rope_base = config.rope_base if config.pos == "rope" else None
        self.temperature = config.attn_temperature
        self.c_attn = ConvolvedQKV(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        H, G, _ = self.c_attn.sizes
        self.tau = nn.ModuleDict()
        for name, heads, token, position in (
            ("q", H, config.ssa_query_token, config.ssa_query_position),
            ("k", G, config.ssa_key_token, config.ssa_key_position),
            ("v", G, config.ssa_value_token, config.ssa_value_position),
        ):
            if token or position:
                self.tau[name] = Temperature(config, heads, token, position)

    def forward(self, x, state=None):
        conv, cache = (None, None) if state is None else state
        *vectors, conv = self.c_attn(x, conv)
        vectors = dict(zip("qkv", vectors))
        n = 0 if cache is None else cache.k.size(2)
        for name, tau in self.tau.items():
            u = vectors[name]
            vectors[name] = (tau(x, u, n) * u).to(u.dtype)
        q, k, v = vectors.values()
        if self.rope_base:
            q = rotate(q, n, self.rope_base)
            k = rotate(k, n, self.rope_base)
        cache = Cache.append(cache, k, v)
        y = causal_attention(tempered(q, self.temperature), cache.k, cache.v)
        return self.c_proj(merge_heads(y)), (conv, cache)

    def be_neutral(self):
        """Makes every tau 1, for weights that come from a softmax model. Returns the names of the
        parameters and buffers that such a model lacks."""
        for tau in self.tau.values():
            tau.start_at_one()
        return {f"tau.{name}" for name in self.tau.state_dict()}

    def flops_per_token(self, T):
        products = 0
        for name, p in self.tau.named_parameters():
            if name.endswith("hidden.weight"):
                products += p.numel()
        attention = causal_attention_flops(self.c_attn.sizes, T)
        return qkv_flops(self) + 2 * products + attention

    def state_bytes(self, T, dtype):
        return cache_bytes(self.c_attn.sizes, T, dtype) + self.c_attn.state_bytes(dtype)
