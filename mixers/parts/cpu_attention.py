"""Causal softmax attention in bfloat16 on a CPU, where PyTorch's fused kernel takes longest.

    P_ts = softmax_{s<=t}(q_t . k_s / sqrt(D)),   y = P v

For blocks of queries at a time: a block's rows of P are whole, so it takes a product, a softmax
and a product, and memory stays linear in T. The backward pass forms each block of P again. With
dP = dy v^T and dS = P (dP - sum_s P dP):

    dv = P^T dy,   dq = dS k / sqrt(D),   dk = dS^T q / sqrt(D)

q, k, v, y (B, H, T, D) are bfloat16. Scores, softmax, dP and dS are float32, and so are the sums
of dk and dv over the blocks; P and dS are rounded to bfloat16 only as factors of a product, as
in the fused kernel.
"""
import math

import torch
from torch.autograd.function import once_differentiable

from mixers.parts.products import exact_product

BLOCK = 128  # queries; of 64, 128 and 256 the fastest at T = 256 to 4,096


class BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        shape = q.shape
        q, k, v = (t.contiguous().flatten(0, 1) for t in (q, k, v))  # (X, T, D), X = B H
        y = torch.empty_like(q)
        for rows, seen, P in probabilities(q, k):
            y[:, rows] = P.to(v.dtype) @ v[:, seen]
        ctx.save_for_backward(q, k, v)
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        shape = dy.shape
        dy = dy.contiguous().flatten(0, 1)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k, dtype=torch.float32)
        dv = torch.zeros_like(v, dtype=torch.float32)
        wide_v, wide_dy = v.float(), dy.float()
        scale = 1 / math.sqrt(q.size(-1))
        for rows, seen, P in probabilities(q, k):
            dv[:, seen] += P.to(v.dtype).mT @ dy[:, rows]
            # dS is linear in dP, which carries the scale of dq and dk
            dP = exact_product(wide_dy[:, rows], wide_v[:, seen].mT, scale)
            dS = softmax_backward(dP, P).to(k.dtype)
            dq[:, rows] = dS @ k[:, seen]
            dk[:, seen] += dS.mT @ q[:, rows]
        return dq.view(shape), dk.to(k.dtype).view(shape), dv.to(v.dtype).view(shape)


def probabilities(q, k):
    """P block by block, for q and k (X, T, D): the block's queries and the keys they see, both as
    slices, and P (X, c, seen) in float32."""
    T, D = q.shape[1:]
    q, k = q.float(), k.float()
    future = torch.full((BLOCK, BLOCK), -math.inf, device=q.device).triu(1)
    for start in range(0, T, BLOCK):
        end = min(start + BLOCK, T)
        scores = exact_product(q[:, start:end], k[:, :end].mT, 1 / math.sqrt(D))
        scores[:, :, start:] += future[:end - start, :end - start]
        yield slice(start, end), slice(end), scores.softmax(-1)


def softmax_backward(dP, P):
    """dS = P (dP - sum_s P dP), the gradient of P = softmax(S); all (.., c, seen) in float32."""
    fused = getattr(torch, "_softmax_backward_data", None)  # private: it may go
    if fused is None:
        return P * (dP - (P * dP).sum(-1, keepdim=True))
    return fused(dP, P, -1, P.dtype)
