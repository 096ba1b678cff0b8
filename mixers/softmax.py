"""Scaled dot-product attention (Vaswani et al. 2017, "Attention Is All You Need", arXiv
1706.03762).

    y_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(D)) v_s

q (B, H, T, D); k, v (B, G, T, D) with G = n_kv_head groups, repeated to H heads. Scores are also
divided by `attn_temperature`. State: that of `conv`, and the key/value cache.

Deviation: no dropout on the attention weights (most mixers have none to drop); `dropout` acts on
the block's outputs.
"""
import torch.nn as nn

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


class Softmax(nn.Module):
    takes = "conv", "attn_temperature"

    def __init__(self, config, layer):
        super().__init__()
        self.rope_base = config.rope_base if config.pos == "rope" else None
        self.temperature = config.attn_temperature
        self.c_attn = ConvolvedQKV(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, state=None):
        conv, cache = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        if self.rope_base:
            start = 0 if cache is None else cache.k.size(2)
            q = rotate(q, start, self.rope_base)
            k = rotate(k, start, self.rope_base)
        cache = Cache.append(cache, k, v)
        y = causal_attention(tempered(q, self.temperature), cache.k, cache.v)
        return self.c_proj(merge_heads(y)), (conv, cache)

    def flops_per_token(self, T):
        return qkv_flops(self) + causal_attention_flops(self.c_attn.sizes, T)

    def state_bytes(self, T, dtype):
        return cache_bytes(self.c_attn.sizes, T, dtype) + self.c_attn.state_bytes(dtype)
