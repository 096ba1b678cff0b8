"""Linformer (Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768), made causal.

The paper compresses keys and values along the whole sequence, K' = E K, so every slot holds the future. Here time is cut
into segments of L tokens. Token t attends, with one softmax over scores q.k / sqrt(D), to

    (a) the exact keys of its own segment up to t,
    (b) r slots of each completed segment: E K_segment and F V_segment, with learned E, F (r, L), shared by all segments

q, y (B, H, T, D); k, v (B, G, T, D). State: the number of tokens, the slots (B, G, r completed, D) of keys and of values,
and the keys and values (B, G, < L, D) of the current segment. It grows by r / L of what softmax attention keeps.
"""
import math

import torch
import torch.nn as nn

from base.options import option
from mixers.parts.heads import QKV, causal_attention, into_blocks, merge_heads, qkv_flops, repeat_heads, rotate


class Linformer(nn.Module):
    class Options:
        linformer_segment: int = option(64, "tokens L in a segment of Linformer", ge=1)
        linformer_slots: int = option(4, "slots r of a completed segment of Linformer", ge=1)

    def __init__(self, config, layer):
        super().__init__()
        self.rope_base = config.rope_base if config.pos == "rope" else None
        self.L, self.r = config.linformer_segment, config.linformer_slots
        self.c_attn = QKV(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # a slot starts near the mean over its segment
        self.E = nn.Parameter(torch.randn(self.r, self.L) * 0.02 + 1 / self.L)
        self.F = nn.Parameter(torch.randn(self.r, self.L) * 0.02 + 1 / self.L)

    def forward(self, x, state=None):
        q, k, v = self.c_attn(x)
        none = k[:, :, :0]
        n, slots_k, slots_v, segment_k, segment_v = state or (0, none, none, none, none)
        T, L = q.size(2), self.L
        if self.rope_base:
            q, k = rotate(q, n, self.rope_base), rotate(k, n, self.rope_base)
        k, v = torch.cat([segment_k, k], dim=2), torch.cat([segment_v, v], dim=2)
        if T == 1:  # sees all there is; in blocks, every step would have products of another shape, whose kernels take long to build
            y = causal_attention(q, torch.cat([slots_k, k], dim=2), torch.cat([slots_v, v], dim=2))
        whole = k.size(2) // L * L  # tokens in segments that are now complete
        new_k, new_v = ((self.E @ k[:, :, :whole].unflatten(2, (-1, L))).flatten(2, 3),
                        (self.F @ v[:, :, :whole].unflatten(2, (-1, L))).flatten(2, 3))
        slots_k, slots_v = torch.cat([slots_k, new_k], dim=2), torch.cat([slots_v, new_v], dim=2)
        if T > 1:
            y = self.attend(q, k, v, slots_k, slots_v, n % L, n // L)
        state = n + T, slots_k, slots_v, k[:, :, whole:].clone(), v[:, :, whole:].clone()  # not views of all keys and values
        return self.c_proj(merge_heads(y)), state

    def attend(self, q, k, v, slots_k, slots_v, n_before, completed):
        """y (B, H, T, D) for q whose first token has n_before tokens of its segment before it, which k and v begin with,
        and `completed` segments before that; the slots are those of all completed segments, now and before."""
        H, T = q.shape[1:3]
        L = min(self.L, n_before + T)  # one short segment needs no filling up
        k, v, slots_k, slots_v = (repeat_heads(t, H) for t in (k, v, slots_k, slots_v))
        q, k, v = into_blocks(q, L, n_before), into_blocks(k, L, 0), into_blocks(v, L, 0)  # (B, H, N, L, D)
        N, S = q.size(2), slots_k.size(2)
        scale = 1 / math.sqrt(q.size(-1))
        own = (q @ k.mT * scale).masked_fill(torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1), -math.inf)
        to_slots = q.flatten(2, 3) @ slots_k.mT * scale  # (B, H, N L, S)
        segment = completed + torch.arange(N, device=q.device)  # of each block; it sees the slots of those before it
        too_late = torch.arange(S, device=q.device) // self.r >= segment[:, None]  # (N, S)
        to_slots = to_slots.unflatten(2, (N, L)).masked_fill(too_late[:, None], -math.inf)
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = torch.cat([to_slots, own], dim=-1).softmax(-1, dtype=wide).to(v.dtype)  # (B, H, N, L, S + L)
        y = (weights[..., :S].flatten(2, 3) @ slots_v).unflatten(2, (N, L)) + weights[..., S:] @ v
        return y.flatten(2, 3)[:, :, n_before:n_before + T]

    def flops_per_token(self, T):
        H, G, D = self.c_attn.sizes
        L, r = self.L, self.r
        completed = T // L
        # the slots that a token sees, and the tokens of its own segment, on average over T
        slots = sum(r * (t // L) for t in range(T)) / T
        own = sum(t % L + 1 for t in range(T)) / T
        compress = 2 * 2 * G * D * r * completed * L / T
        return qkv_flops(self) + 2 * 2 * H * D * (slots + own) + compress

    def state_bytes(self, T, dtype):
        _, G, D = self.c_attn.sizes
        return 2 * G * D * (T // self.L * self.r + T % self.L) * dtype.itemsize
