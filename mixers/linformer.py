"""Linformer (Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", arXiv
2006.04768), made causal.

The paper compresses keys and values along the whole sequence, K' = E K, so every slot holds the
future. Here time is cut into segments of L tokens. Token t attends, with one softmax over scores
q.k / sqrt(D), to

    (a) the exact keys of its own segment up to t,
    (b) r slots of each completed segment: E K_segment and F V_segment, with learned E, F (r, L),
        shared by all segments

q, y (B, H, T, D); k, v (B, G, T, D). Scores are also divided by `attn_temperature`. State: that of
`conv`, the number of tokens, the slots (B, G, r completed, D) of keys and of values, and the keys
and values (B, G, < L, D) of the current segment. It grows by r / L of what softmax attention keeps.
"""
import math

import torch
import torch.nn as nn

from base.options import option
from mixers.parts.heads import (
    ConvolvedQKV,
    attention_scores,
    cache_bytes,
    causal_attention,
    into_blocks,
    merge_heads,
    qkv_flops,
    repeat_heads,
    rotate,
    tempered,
)


def compress(weights, t):
    """Slots (B, G, r N, D) of N segments t (B, G, N L, D), by weights (r, L)."""
    segments = t.unflatten(2, (-1, weights.size(1)))
    return (weights @ segments).flatten(2, 3)


class Linformer(nn.Module):
    takes = "conv", "attn_temperature"

    class Options:
        linformer_segment: int = option(64, "tokens L in a segment of Linformer", ge=1)
        linformer_slots: int = option(4, "slots r of a completed segment of Linformer", ge=1)

    def __init__(self, config, layer):
        super().__init__()
        self.rope_base = config.rope_base if config.pos == "rope" else None
        self.L, self.r = config.linformer_segment, config.linformer_slots
        self.temperature = config.attn_temperature
        self.c_attn = ConvolvedQKV(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # a slot starts near the mean over its segment
        self.E = nn.Parameter(torch.randn(self.r, self.L) * 0.02 + 1 / self.L)
        self.F = nn.Parameter(torch.randn(self.r, self.L) * 0.02 + 1 / self.L)

    def forward(self, x, state=None):
        conv, seen = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        none = k[:, :, :0]
        n, slots_k, slots_v, segment_k, segment_v = seen or (0, none, none, none, none)
        T, L = q.size(2), self.L
        if self.rope_base:
            q = rotate(q, n, self.rope_base)
            k = rotate(k, n, self.rope_base)
        q = tempered(q, self.temperature)
        k = torch.cat([segment_k, k], dim=2)
        v = torch.cat([segment_v, v], dim=2)
        if T == 1:
            # sees all there is; in blocks, every step would have products of another shape, whose
            # kernels take long to build
            all_k, all_v = torch.cat([slots_k, k], dim=2), torch.cat([slots_v, v], dim=2)
            y = causal_attention(q, all_k, all_v)
        whole = k.size(2) // L * L  # tokens in segments that are now complete
        slots_k = torch.cat([slots_k, compress(self.E, k[:, :, :whole])], dim=2)
        slots_v = torch.cat([slots_v, compress(self.F, v[:, :, :whole])], dim=2)
        if T > 1:
            y = self.attend(q, k, v, slots_k, slots_v, n % L, n // L)
        # copies, as a view would hold on to all keys and values
        segment_k, segment_v = k[:, :, whole:].clone(), v[:, :, whole:].clone()
        seen = n + T, slots_k, slots_v, segment_k, segment_v
        return self.c_proj(merge_heads(y)), (conv, seen)

    def attend(self, q, k, v, slots_k, slots_v, n_before, completed):
        """y (B, H, T, D) for q whose first token has n_before tokens of its segment before it,
        which k and v begin with, and `completed` segments before that; the slots are those of all
        completed segments, now and before."""
        B, H, T, D = q.shape
        L = min(self.L, n_before + T)  # one short segment needs no filling up
        k, v, slots_k, slots_v = (repeat_heads(t, H) for t in (k, v, slots_k, slots_v))
        q = into_blocks(q, L, n_before)  # (B, H, N, L, D)
        k, v = into_blocks(k, L, 0), into_blocks(v, L, 0)
        N, S = q.size(2), slots_k.size(2)

        later = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
        own = attention_scores(q, k).masked_fill(later, -math.inf)  # (B, H, N, L, L)
        to_slots = attention_scores(q.flatten(2, 3), slots_k)  # (B, H, N L, S)
        # a block sees the slots of the segments before its own
        segment = completed + torch.arange(N, device=q.device)
        too_late = torch.arange(S, device=q.device) // self.r >= segment[:, None]  # (N, S)
        to_slots = to_slots.unflatten(2, (N, L)).masked_fill(too_late[:, None], -math.inf)

        weights = torch.cat([to_slots, own], dim=-1).softmax(-1).to(v.dtype)  # (.., L, S + L)
        of_slots = weights[..., :S].flatten(2, 3) @ slots_v  # (B, H, N L, D)
        # one product adds to the other: their sum is rounded once
        y = torch.baddbmm(
            of_slots.reshape(-1, L, D),
            weights[..., S:].flatten(0, 2),
            v.flatten(0, 2),
        )
        return y.view(B, H, N * L, D)[:, :, n_before:n_before + T]

    def flops_per_token(self, T):
        H, G, D = self.c_attn.sizes
        L, r = self.L, self.r
        # the slots that a token sees, and the tokens of its own segment, on average over T
        slots = sum(r * (t // L) for t in range(T)) / T
        own = sum(t % L + 1 for t in range(T)) / T
        compress = 2 * 2 * G * D * r * (T // L) * L / T
        return qkv_flops(self) + 2 * 2 * H * D * (slots + own) + compress

    def state_bytes(self, T, dtype):
        """The largest up to T: a segment that is complete shrinks to its slots."""
        completed, left = divmod(T, self.L)
        vectors = completed * self.r + left
        if completed:  # one token before the last segment was complete
            vectors = max(vectors, (completed - 1) * self.r + self.L - 1)
        return cache_bytes(self.c_attn.sizes, vectors, dtype) + self.c_attn.state_bytes(dtype)
