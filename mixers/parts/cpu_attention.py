"""Causal softmax attention on a CPU, where PyTorch's fused kernel takes long: of short sequences,
in a window, and behind tokens that were there before.

    P_ts = softmax_{s<=t}(q_t . k_s / sqrt(D)),   y = P v,   or over s in (t - W, t] in a window

For blocks of queries at a time, of as many heads as a core's cache has room for: a block's rows of
P are whole, so it takes a product, a softmax and a product. With dP = dy v^T and
dS = P (dP - sum_s P dP):

    dv = P^T dy,   dq = dS k / sqrt(D),   dk = dS^T q / sqrt(D)

Of short sequences P is kept for the backward pass, of long ones its blocks are formed again, so
that memory stays linear in T.

q, k, v, y (B, H, T, D) are bfloat16 or float32. Scores, softmax, dP and dS are float32, and so are
the sums of dk and dv over the blocks; P and dS are rounded to bfloat16 only as factors of a product
with bfloat16, as in the fused kernel.
"""
import math

import torch
import torch.nn.functional as F

from base.gradients import differentiable_once
from mixers.parts.products import exact_product, scaled_product

BLOCK = 128  # queries; of 64, 128 and 256 the fastest at T = 256 to 4,096
# tokens up to which P is kept, at 4,096 tokens a pass 5 MB a head at most. Without it blocks take
# longer than the fused kernel, but in a window
KEPT = 512
SCORES_AT_ONCE = 2**19  # of a block of several heads: 2 MB in float32
LONG = 768  # new tokens from which the fused kernel's own blocks are so large that oneDNN gains
MANY = 128  # new tokens from which on those before them are asked apart
# what F.scaled_dot_product_attention runs here; it is private and may go
FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def continued_attention(q, k, v):
    """y (B, H, T, D) of the last T of S tokens, q (B, H, T, D), k and v (B, H, S, D), in at least
    float32, without a gradient.

    A mask for what comes later would take twice the time. So the kernel is asked twice, for the
    tokens before, which all see, and for the new ones among themselves; it says with each the
    logarithm of the sum of weights, whose difference is what share of the whole each has."""
    before = k.size(2) - q.size(2)
    y_before, log_before = FLASH(q, k[:, :, :before], v[:, :, :before])
    y_own, log_own = FLASH(q, k[:, :, before:], v[:, :, before:], is_causal=True)
    own = torch.sigmoid(log_own - log_before)[..., None].to(q.dtype)
    return torch.lerp(y_before, y_own, own)


def blocked_attention(q, k, v, window=None):
    """y (B, H, T, D) of a whole sequence; each token sees those before it, or of them and itself
    the last `window`."""
    with torch.autocast("cpu", enabled=False):
        return BlockedAttention.apply(q, k, v, window)


class BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, window=None):
        shape = q.shape
        q, k, v = (t.contiguous().flatten(0, 1) for t in (q, k, v))  # (X, T, D), X = B H
        X, T, _ = q.shape
        W = ctx.W = window or T
        y, kept = torch.empty_like(v), []
        keeps = T <= KEPT and any(ctx.needs_input_grad)
        for heads in heads_together(X, T, W):
            attend(y[heads], q[heads], k[heads], v[heads], W, kept if keeps else None)
        ctx.save_for_backward(q, k, v, *kept)
        return y.view(shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, dy):
        q, k, v, *kept = ctx.saved_tensors
        shape = dy.shape
        dy = dy.contiguous().flatten(0, 1)
        X, T, _ = q.shape
        found = [torch.empty_like(t) for t in (q, k, v)]
        for heads in reversed(heads_together(X, T, ctx.W)):
            attend_backward([t[heads] for t in found], dy[heads], q[heads], k[heads], v[heads],
                            ctx.W, kept)
        dq, dk, dv = (t.view(shape) for t in found)
        return dq, dk, dv, None


def heads_together(X, T, W):
    """The X heads in pieces, slices, so that the scores of a block stay in a core's own cache."""
    scores = min(BLOCK, T) * min(T, W + BLOCK)  # of a head, at most
    at_once = max(1, SCORES_AT_ONCE // scores)
    return [slice(start, start + at_once) for start in range(0, X, at_once)]


def attend(y, q, k, v, W, kept):
    """Fills y, of q, k and v, all (X, T, D); the blocks' P are appended to `kept`, unless that is
    None."""
    wide_q, wide_k = q.float(), k.float()
    product = scores_product(q.dtype)
    for rows, seen in blocks(q.size(1), W):
        P = probabilities(wide_q, wide_k, rows, seen, W, product)
        y[:, rows] = P.to(v.dtype) @ v[:, seen]
        if kept is not None:
            kept.append(P)


def attend_backward(gradients, dy, q, k, v, W, kept):
    """Fills the three gradients, of dy, q, k and v, all (X, T, D). The blocks' P are taken from the
    end of `kept`, or formed again if there are none."""
    dq, dk, dv = gradients
    wide_v, wide_dy = v.float(), dy.float()
    product = scores_product(q.dtype)
    if not kept:
        wide_q, wide_k = q.float(), k.float()
    scale = 1 / math.sqrt(q.size(-1))
    sum_k, sum_v = None, None
    for rows, seen in reversed(blocks(q.size(1), W)):
        P = kept.pop() if kept else probabilities(wide_q, wide_k, rows, seen, W, product)
        # dS is linear in dP, which carries the scale of dq and dk
        dP = product(wide_dy[:, rows], wide_v[:, seen].mT, scale)
        dS = softmax_backward(dP, P).to(k.dtype)
        dq[:, rows] = dS @ k[:, seen]
        of_k, of_v = dS.mT @ q[:, rows], P.to(v.dtype).mT @ dy[:, rows]
        if sum_k is None:
            sum_k, sum_v = (F.pad(t, (0, 0, seen.start, 0)) for t in (of_k, of_v))
        else:
            sum_k, sum_v = sum_k.float(), sum_v.float()
            sum_k[:, seen] += of_k
            sum_v[:, seen] += of_v
    dk.copy_(sum_k)
    dv.copy_(sum_v)


def blocks(T, W):
    """The blocks of T queries that see W tokens each: (queries, keys that some of them see), two
    slices."""
    found = []
    for start in range(0, T, BLOCK):
        rows = slice(start, min(start + BLOCK, T))
        found.append((rows, slice(max(start - W + 1, 0), rows.stop)))
    return found


def scores_product(dtype):
    """What multiplies float32 factors whose values are of this dtype, and a scale."""
    return exact_product if dtype == torch.bfloat16 else scaled_product


def probabilities(q, k, rows, seen, W, product):
    """P (X, c, n) of the c queries and n keys of a block; all in float32, q and k (X, T, D)."""
    scores = product(q[:, rows], k[:, seen].mT, 1 / math.sqrt(q.size(-1)))
    c, n = scores.shape[1:]
    first = n - c - W  # query i is key n - c + i, and sees none up to first + i
    unseen = torch.full((c, c), -math.inf, device=q.device)
    scores[:, :, n - c:] += unseen.triu(1)
    left = max(first + c, 0)
    scores[:, :, :left] += unseen[:, :left].tril(first)
    return scores.softmax(-1)


def softmax_backward(dP, P):
    """dS = P (dP - sum_s P dP), the gradient of P = softmax(S); all (.., c, seen) in float32."""
    fused = getattr(torch, "_softmax_backward_data", None)  # private: it may go
    if fused is None:
        return P * (dP - (P * dP).sum(-1, keepdim=True))
    return fused(dP, P, -1, P.dtype)
