"""Sliding window attention (Beltagy et al. 2020, arXiv 2004.05150), with sinks if asked for (Xiao
et al. 2023, arXiv 2309.17453): softmax attention over the last W tokens and the first few.

    y_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s   over s in (t - W, t] and s < n_s

q (B, H, T, D); k, v (B, G, T, D) with G = n_kv_head groups, repeated to H heads. Under pos "rope" q
and k are rotated at absolute positions. Long inputs go in blocks of W queries, which see the W - 1
tokens before their block, the block and the sinks: 2 W - 1 + n_s keys. Scores are also divided by
`attn_temperature`. State: that of `conv`, how many tokens there were, the sinks' and the last W - 1
tokens' keys and values. L layers reach L (W - 1) tokens back, and `conv` K - 1 more each.
"""
import math
from typing import Any, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.options import option
from mixers.parts.cpu_attention import blocked_attention
from mixers.parts.heads import (
    ConvolvedQKV,
    attention_scores,
    causal_attention,
    merge_heads,
    qkv_flops,
    repeat_heads,
    rotate,
    tempered,
)


class Window(NamedTuple):
    """n tokens so far; keys and values (B, G, ., D) of the first n_s, and of the last W - 1 behind
    them."""
    n: int
    sinks: Any
    recent: Any


class SWA(nn.Module):
    takes = "conv", "attn_temperature"

    class Options:
        swa_window: Optional[int] = option(
            None, "tokens W that sliding window attention sees [default: a quarter of block_size]",
            ge=1)
        swa_sinks: int = option(
            0, "first tokens that sliding window attention sees besides", ge=0)

    def __init__(self, config, layer):
        super().__init__()
        self.rope_base = config.rope_base if config.pos == "rope" else None
        self.window = config.swa_window or max(config.block_size // 4, 1)
        self.sinks = config.swa_sinks
        self.temperature = config.attn_temperature
        self.c_attn = ConvolvedQKV(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, state=None):
        conv, seen = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        n, T = 0 if seen is None else seen.n, x.size(1)
        if self.rope_base:
            q, k = rotate(q, n, self.rope_base), rotate(k, n, self.rope_base)
        if seen is None:
            nothing = k[:, :, :0], v[:, :, :0]
            seen = Window(0, nothing, nothing)
        first = []   # keys and values of the sinks,
        window = []  # and of the last W - 1 tokens and the new ones
        for sink, recent, new in zip(seen.sinks, seen.recent, (k, v)):
            missing = min(self.sinks - sink.size(2), T) if n == sink.size(2) else 0
            first.append(torch.cat([sink, new[:, :, :missing]], dim=2))
            window.append(torch.cat([recent, new], dim=2))
        y = windowed_attention(tempered(q, self.temperature), first, window, n, self.window)
        kept = min(self.window - 1, window[0].size(2))
        recent = tuple(t[:, :, t.size(2) - kept:].clone() for t in window)
        return self.c_proj(merge_heads(y)), (conv, Window(n + T, tuple(first), recent))

    def flops_per_token(self, T):
        H, _, D = self.c_attn.sizes
        seen = 0
        for n in range(1, T + 1):  # tokens so far
            seen += min(n, self.window) + min(self.sinks, max(n - self.window, 0))
        return qkv_flops(self) + 2 * 2 * H * D * seen / T

    def state_bytes(self, T, dtype):
        _, G, D = self.c_attn.sizes
        tokens = min(self.window - 1, T) + min(self.sinks, T)
        return 2 * G * D * tokens * dtype.itemsize + self.c_attn.state_bytes(dtype)


def windowed_attention(q, first, window, n, W):
    """y (B, H, T, D) for q (B, H, T, D) of the tokens n, n + 1, ...

    first: keys and values (B, G, n_s, D) of the first tokens; window: (B, G, R + T, D), of the R
    tokens before n and of the new ones."""
    B, H, T, D = q.shape
    n_s, R = first[0].size(2), window[0].size(2) - T
    if T == 1:  # sees all there is; sinks may still be in the window too
        again = max(n_s - (n - R), 0)
        keys, values = (
            torch.cat([sinks, t[:, :, again:]], dim=2) if n_s else t
            for sinks, t in zip(first, window))
        return causal_attention(q, keys, values)
    in_blocks = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float32)
    if in_blocks and n_s == R == 0:
        k, v = (repeat_heads(t, H) for t in window)
        return blocked_attention(q, k, v, W)
    first = [repeat_heads(t, H).flatten(0, 1)[:, None] for t in first]  # (X, 1, n_s, D), X = B H
    window = [repeat_heads(t, H).flatten(0, 1) for t in window]
    size = min(W, T)  # queries in a block; each sees W - 1 + size keys of the window
    N = math.ceil(T / size)
    q = F.pad(q.flatten(0, 1), (0, 0, 0, N * size - T)).unflatten(1, (N, size))
    keys, values = (
        torch.cat([sinks.expand(-1, N, -1, -1), blocks(t, W - 1 - R, N, size, W)], dim=2)
        for sinks, t in zip(first, window))
    t = n + torch.arange(N * size, device=q.device).view(N, size, 1)
    s = t[:, :1] + torch.arange(1 - W, size, device=q.device)  # (N, 1, W - 1 + size)
    seen = (s <= t) & (s > t - W) & (s >= max(n_s, n - R))
    sinks = (torch.arange(n_s, device=q.device) <= t).expand(N, size, n_s)
    y = attention(q, keys, values, torch.cat([sinks, seen], dim=2))
    return y.flatten(1, 2)[:, :T].unflatten(0, (B, H))


def blocks(t, missing, N, size, W):
    """(X, N, W - 1 + size, D): for each block of queries the keys from W - 1 tokens before it on.

    t (X, ., D) lacks `missing` of the W - 1 tokens before the first block: zeros, never seen."""
    behind = N * size + W - 1 - missing - t.size(1)
    padded = F.pad(t, (0, 0, missing, behind))
    return padded.unfold(1, W - 1 + size, size).mT


def attention(q, k, v, mask):
    """Softmax attention of q over k and v with a mask of what is seen; on a CPU in at least
    float32, and written out, as the fused kernel takes long over small blocks."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    weights = attention_scores(q, k).masked_fill(~mask, -math.inf).softmax(-1)
    return weights.to(v.dtype) @ v
