"""LLN plus block-diagonal softmax attention (same paper as mixers/lln.py, arXiv 2311.13541).

    y = 0.5 (LLN + Diag)         --lln_diag_mode=mean
    y = r LLN + p Diag           --lln_diag_mode=sum
    y = r LLN + (1 - r) Diag     --lln_diag_mode=convex

with r, p learnable, per head and channel (H, D), at 0.5. Diag is causal softmax attention within
blocks of D tokens (block size = head size), aligned to the start of the sequence. LLN, Diag, y
(B, H, T, D). State: that of `conv`, the number of tokens, LLN's S, z and key maximum, and keys and
values (B, G, < D, D) of the current block. With RoPE only Diag rotates, unless
`rotate_features` has LLN do it too: the exponential of a rotated vector encodes no relative
position. `attn_temperature` is Diag's alone: LLN's moment matching would take another scale of its
queries back.
"""
from typing import Literal

import torch
import torch.nn as nn

from base.options import option
from mixers.lln import LLN
from mixers.parts.heads import (
    cache_bytes,
    causal_attention,
    causal_attention_flops,
    into_blocks,
    merge_heads,
    repeat_heads,
    rotate,
    tempered,
)


def block_attention(q, k, v, n_before):
    """Causal softmax attention within blocks of D tokens, for q (B, H, T, D) whose first token has
    n_before tokens of its block before it; k, v (B, G, n_before + T, D) begin with those."""
    B, H, T, D = q.shape
    if n_before + T <= D:  # one block: nothing to cut
        return causal_attention(q, k, v)
    k, v = repeat_heads(k, H), repeat_heads(v, H)
    blocks = into_blocks(q, D, n_before), into_blocks(k, D, 0), into_blocks(v, D, 0)
    # each block as a sequence of its own: (B N, H, D, D)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in blocks)
    y = causal_attention(q, k, v)
    y = y.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)  # (B, H, N D, D)
    return y[:, :, n_before:n_before + T]


class LLNDiag(LLN):
    takes = "conv", "attn_temperature", "rotate_features"

    class Options(LLN.Options):
        lln_diag_mode: Literal["mean", "sum", "convex"] = option(
            "mean", "how LLN and Diag, the softmax within blocks, are added: mean: half of each; "
            "sum: r LLN + p Diag; convex: r LLN + (1 - r) Diag; r and p are learned")

    def __init__(self, config, layer):
        super().__init__(config, layer)
        # with rotate_features both halves have them rotated
        by_itself = config.pos == "rope" and not config.rotate_features
        self.rope_base = config.rope_base if by_itself else None
        self.temperature = config.attn_temperature
        H, _, D = self.c_attn.sizes
        # flat, so that weight decay, which is for matrices, leaves them alone
        self.r = nn.Parameter(torch.full((H * D,), 0.5)) if config.lln_diag_mode != "mean" else None
        self.p = nn.Parameter(torch.full((H * D,), 0.5)) if config.lln_diag_mode == "sum" else None

    def forward(self, x, state=None):
        conv, seen = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        n, lln_state, block_k, block_v = seen or (0, None, k[:, :, :0], v[:, :, :0])
        T, D = q.shape[2:]
        lln, lln_state = self.lln(q, k, v, lln_state)
        if self.rope_base:
            q = rotate(q, n, self.rope_base)
            k = rotate(k, n, self.rope_base)
        k = torch.cat([block_k, k], dim=2)
        v = torch.cat([block_v, v], dim=2)
        diag = block_attention(tempered(q, self.temperature), k, v, n % D)
        r = 0.5 if self.r is None else self.r.view(-1, 1, D)
        p = 1 - r if self.p is None else self.p.view(-1, 1, D)
        y = (r * lln + p * diag).to(x.dtype)
        # the tokens of the block that is not complete; copies, as a view would hold on to all
        start = k.size(2) - (n + T) % D
        block_k, block_v = k[:, :, start:].clone(), v[:, :, start:].clone()
        seen = n + T, lln_state, block_k, block_v
        return self.c_proj(merge_heads(y)), (conv, seen)

    def flops_per_token(self, T):
        D = self.c_attn.sizes[2]
        diag = causal_attention_flops(self.c_attn.sizes, min(T, D))
        return super().flops_per_token(T) + diag

    def state_bytes(self, T, dtype):
        """The largest up to T: a block that is complete is dropped."""
        D = self.c_attn.sizes[2]
        block = cache_bytes(self.c_attn.sizes, min(T, D - 1), dtype)
        return super().state_bytes(T, dtype) + block
