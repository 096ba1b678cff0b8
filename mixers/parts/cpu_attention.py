"""Causal softmax attention in bfloat16 on a CPU, whose fused kernel's backward pass is the slowest part of a training step.

    P_ts = softmax_{s<=t}(q_t . k_s / sqrt(D)),   y = P v

for blocks of c queries at a time: a block's rows of P are whole, so it takes a product, a softmax and a product, and memory
stays linear in T. The backward pass forms each block of P again. With dS = P (dP - sum_s P dP), dP = dy v^T:

    dv = P^T dy,   dq = dS k / sqrt(D),   dk = dS^T q / sqrt(D)

q, k, v, y (B, H, T, D) in bfloat16; products and softmax accumulate in float32, and so do dk and dv over the blocks.
"""
import math

import torch
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries; of 64, 128 and 256 the fastest at T = 256 to 4,096


class BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        shape = q.shape
        q = q / math.sqrt(q.size(-1))
        q, k, v = (t.contiguous().flatten(0, 1) for t in (q, k, v))  # (X, T, D), X = B H
        y = torch.empty_like(q)
        for rows, seen, P in probabilities(q, k):
            y[:, rows] = P @ v[:, seen]
        ctx.save_for_backward(q, k, v)
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        shape, dy = dy.shape, dy.contiguous().flatten(0, 1)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for rows, seen, P in probabilities(q, k):
            dv[:, seen] += P.mT @ dy[:, rows]
            dP = dy[:, rows] @ v[:, seen].mT
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
            dq[:, rows] = dS @ k[:, seen]
            dk[:, seen] += dS.mT @ q[:, rows]
        dq /= math.sqrt(q.size(-1))
        return dq.view(shape), dk.to(k.dtype).view(shape), dv.to(v.dtype).view(shape)


def probabilities(q, k):
    """P block by block, for q, already over sqrt(D), and k (X, T, D): the block's queries, the keys they see, P (X, c, seen)."""
    T = q.size(1)
    future = torch.full((BLOCK, BLOCK), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    for start in range(0, T, BLOCK):
        end = min(start + BLOCK, T)
        scores = q[:, start:end] @ k[:, :end].mT
        scores[:, :, start:] += future[:end - start, :end - start]
        yield slice(start, end), slice(end), scores.softmax(-1)
