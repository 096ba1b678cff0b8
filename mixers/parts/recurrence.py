"""The engine of the mixers that forget and erase: at every token a matrix state is decayed, read,
corrected and written.

For keys of D channels and values of E, with g_t <= 0 the logarithm of the decay (one a head, or one
a key channel):

    S'_t = exp(g_t) * S_{t-1}             (D, E): what is left of the state
    r_t  = S'_t^T e_t                     (E): read off along e_t before writing; without e nothing
    S_t  = S'_t + k_t v_t^T + w_t r_t^T   w = k unless given
    y_t  = S_t^T q_t

    mechanism        q    k    v           g        e          w
    retnet, mamba2   q    k    v or dt x   scalar   -          -
    gla              q    k    v           vector   -          -
    deltanet         q    k    beta v      -        -beta k    -
    gated_deltanet   q    k    beta v      scalar   -beta k    -
    kda              q    k    beta v      vector   -beta k    -

Time is cut into N chunks of c tokens. Within a chunk, with

    [a, b]_ts = sum_d a_td b_sd exp(sum of g_d over s < i <= t),

up_t the sum of g up to t and down_s the sum of g after s, the rows r solve a unit lower triangular
system, the UT transform of the DeltaNet paper (Yang et al. 2024, arXiv 2406.06484):

    w = k:     u = v + r,  L = [e, k] for s < t,  (I - L) u = v + (e * exp(up)) S_before
    w given:               L = [e, w] for s < t,  (I - L) r = [e, k] v + (e * exp(up)) S_before

Outputs and the state behind the chunk are products then; only the states are computed one chunk
after the other.

The chunks' states follow from each other by one product: with P = (I - L)^-1 (e * exp(up)),

    S behind = (diag(exp(up_c)) + (w * exp(down))^T P) S_before + what the chunk writes by itself

Decays are the business of mixers/parts/decays.py, which says why nothing overflows. The system is
solved by forward substitution in blocks: the product (I + L)(I + L^2)(I + L^4)... of many kernels
loses all digits where keys repeat, as those of real text do.
"""
import math

import torch
import torch.nn.functional as F

from base.gradients import differentiable_once
from mixers.parts.decays import diagonal_blocks, make_decays
from mixers.parts.products import fast_products, to_dtype, without_autocast

CHUNK = 32  # tokens; a power of two
SOLVED = 16  # tokens of the blocks that are solved one by one; a power of two


def recurrence(q, k, v, g=None, e=None, w=None, state=None, floor=None):
    """y (B, H, T, E) in v's dtype, and the new state S (B, H, D, E), in at least float32.

    q, k, e, w (B, H, T, D), v (B, H, T, E), g (1 or B, H, T, 1 or D) <= 0, may be -inf; state as it
    was returned, or None: zeros. q and k may have one head for all where g has one channel. floor:
    a number that no g is below, by the caller's word."""
    with without_autocast(v.device):
        dtype = torch.float32
        for x in (q, k, v):
            dtype = torch.promote_types(dtype, x.dtype)
        q, k, wide_v, g, e, w, S = (
            to_dtype(x, dtype) for x in (q, k, v, g, e, w, state))
        if v.size(2) == 1:
            y, S = one_token(q, k, wide_v, g, e, w, S)
        else:
            with fast_products():
                y, S = Chunks.apply(q, k, wide_v, g, e, w, S, floor)
    return to_dtype(y, v.dtype), S


def one_token(q, k, v, g, e, w, S):
    """The recurrence as it stands above, on new tensors: T = 1."""
    if S is None:
        S = v.new_zeros(*v.shape[:2], k.size(-1), v.size(-1))
    if g is not None:
        S = S * g.exp().mT
    written = v
    if e is not None:
        read = e @ S
        if w is None:
            written = v + read
        else:
            S = torch.addcmul(S, w.mT, read)
    S = torch.addcmul(S, k.mT, written)  # an outer product, without a product of matrices
    return q @ S, S


def chunk_size(T):
    """Tokens of a chunk: of so few tokens that one chunk holds them, or the next power of two."""
    return CHUNK if T > 2 * CHUNK else 2 ** math.ceil(math.log2(T))


class Chunks(torch.autograd.Function):
    """Any number of tokens, in chunks of c. The gradient is written out, for it takes a fraction of
    the time and memory that recorded operations do.

    A chunk writes u under the keys k, or v under k and r under w: the contents. From the last chunk
    to the first, dS being the gradient of the state behind a chunk,

        du = [q, k]^T dy + (k * exp(down)) dS
        dS before = exp(up_c) * dS + (q * exp(up))^T dy + P^T du

    and then for all at once z = (I - L)^-T du, dv = z, d[q, k] = dy u^T, d[e, k] = z u^T. Decays
    need no pass of their own. exp(sum of g up to t) is a factor of q_t and e_t and, inverted, of
    k_t and w_t: dg_t is the sum of q dq + e de - k dk - w dw over all tokens from t on, of which
    those behind the chunk come as S dS at its end."""

    @staticmethod
    def forward(ctx, q, k, v, g, e, w, S, floor):
        T = v.size(2)
        c = chunk_size(T)
        ctx.shapes = [None if x is None else x.shape for x in (q, k, v, g, e, w)]
        q, k, v, g, e, w = (None if x is None else cut(x, c) for x in (q, k, v, g, e, w))
        decays = make_decays(g, floor)
        keys, contents, inverse = [k], [v], None
        if e is not None:
            keys = [k] if w is None else [k, w]
            inverse = inverted(decays.gram(e, keys[-1]).tril_(-1))
            u = inverse @ (v if w is None else decays.gram(e, k).tril_(-1) @ v)
            contents = [u] if w is None else [v, u]

        added = sum_of(decays.to_end(key).mT @ x for key, x in zip(keys, contents))
        before = P = kept = None
        if S is None and v.size(2) == 1:
            S = added[:, :, 0]
        else:
            kept = decays.total
            if e is not None:
                P = inverse @ decays.from_start(e)
                kept = transition(kept, decays.to_end(keys[-1]).mT @ P)
            S = torch.zeros_like(added[:, :, 0]) if S is None else S
            before, S = scan(added, kept, S)
            if e is not None:
                u += P @ before

        grams = [decays.gram(q, key) for key in keys]
        y = sum_of(gram @ x for gram, x in zip(grams, contents))
        if before is not None:
            y += decays.from_start(q) @ before
        y = y.flatten(2, 3)[:, :, :T]
        ctx.save_for_backward(q, k, v, e, w, contents[-1], inverse, P, before, kept, y, S, *grams)
        ctx.decays = decays
        ctx.set_materialize_grads(False)  # None says that the new state is not used
        return y, S

    @staticmethod
    @differentiable_once
    def backward(ctx, dy, dS):
        with fast_products():
            return *chunks_backward(ctx, dy, dS), None


def chunks_backward(ctx, dy, dS):
    """The gradients of q, k, v, g, e, w and S for those of y and of the S behind, or None."""
    q, k, v, e, w, u, inverse, P, before, kept, y, S, *grams = ctx.saved_tensors
    decays = ctx.decays
    dy = torch.zeros_like(v) if dy is None else cut(dy, v.size(3))
    keys, contents = ([k], [u]) if w is None else ([k, w], [v, u])

    d_contents = [gram.mT @ dy for gram in grams]
    behind = None if dS is None else dS[:, :, None]  # of the states behind the chunks
    if before is not None:
        reads = decays.from_start(q).mT @ dy
        if e is not None:
            reads += P.mT @ d_contents[-1]
            kept = kept.mT
        dS = torch.zeros_like(S) if dS is None else dS
        behind, dS = scan(reads, kept, dS, backwards=True)
    if behind is not None:
        for key, dx in zip(keys, d_contents):
            dx += decays.to_end(key) @ behind

    # what reads the state, the gradient of what it read, and whether at its own token
    readers = [(q, dy, 0)]
    dv = d_contents[0]
    if e is not None:
        z = inverse.mT @ d_contents[-1]
        readers.append((e, z, -1))
        dv = z if w is None else dv + decays.gram(e, k).tril_(-1).mT @ z
    d_rows, d_keys = through_products(decays, readers, keys, contents, before, behind)
    dg = None
    if ctx.needs_input_grad[3]:
        if decays.channels == 1:  # the same, summed over channels
            at = torch.addcmul(cut(y, v.size(3)) * dy, v, dv, value=-1).sum(4, keepdim=True)
        else:
            at = sum_of(a * d for (a, _, _), d in zip(readers, d_rows))
            at = at - sum_of(key * d for key, d in zip(keys, d_keys))
        dg = decay_gradient(at, before, S, behind)

    dq, de = d_rows if e is not None else (*d_rows, None)
    dk, dw = d_keys if w is not None else (*d_keys, None)
    found = []
    for d, shape in zip((dq, dk, dv, dg, de, dw), ctx.shapes):
        whole = None if d is None else d.flatten(2, 3)[:, :, :y.size(2)]
        found.append(whole if d is None else whole.sum_to_size(shape))
    return *found, dS if ctx.needs_input_grad[6] else None


def through_products(decays, readers, keys, contents, before, behind):
    """The gradients of what reads and of the keys. readers: (q, dy, 0), and (e, z, -1) as it does
    not read its own token; before, behind: the states before the chunks and the gradients of those
    behind, or None."""
    d_rows, d_keys = [], []
    for x in contents:
        d_keys.append(None if behind is None else decays.to_end(x @ behind.mT))
    for a, da, diagonal in readers:
        d_row = None if before is None else decays.from_start(da @ before.mT)
        for j, (key, x) in enumerate(zip(keys, contents)):
            d = decays.gram_backward((da @ x.mT).tril_(diagonal), a, key)
            d_row = plus(d_row, d[0], a.shape)
            d_keys[j] = plus(d_keys[j], d[1], key.shape)
        d_rows.append(d_row)
    return d_rows, d_keys


def plus(a, b, shape):
    """a + b, summed to a shape as where q and k have one head for all; a may be None."""
    b = b.sum_to_size(shape)
    return b if a is None else b.add_(a.sum_to_size(shape))


def decay_gradient(at, before, S, behind):
    """The gradient of g from the terms of each token (B, H, N, c, 1 or D): the sum over all later
    tokens, of which those behind the chunk are S dS there."""
    dg = at.flip(3).cumsum(3).flip(3)
    if behind is not None:
        ends = S[:, :, None]
        if before is not None:
            ends = torch.cat([before[:, :, 1:], ends], 2)
        later = (ends * behind).sum(4)[:, :, :, None]  # (B, H, N, 1, D)
        dg += later if at.size(4) > 1 else later.sum(4, keepdim=True)
    return dg


def cut(x, c):
    """(B, H, T, .) -> (B, H, N, c, .); zeros at the end change nothing."""
    missing = -x.size(2) % c
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.contiguous().unflatten(2, (-1, c))


def sum_of(parts):
    first, *rest = parts
    for x in rest:
        first = first + x
    return first


def inverted(L):
    """(I - L)^-1 for strictly lower L (B, H, N, c, c): of blocks on the diagonal by substitution,
    and of twice their size from those."""
    c = L.size(-1)
    size = min(SOLVED, c)
    inverse = torch.zeros_like(L)
    one = torch.eye(size, dtype=L.dtype, device=L.device)
    diagonal_blocks(inverse, size).copy_(torch.linalg.solve_triangular(
        -diagonal_blocks(L, size), one, upper=False, unitriangular=True))
    while size < c:
        of_two, below = diagonal_blocks(inverse, 2 * size), diagonal_blocks(L, 2 * size)
        first, second = of_two[..., :size, :size], of_two[..., size:, size:]
        of_two[..., size:, :size] = second @ (below[..., size:, :size] @ first)
        size *= 2
    return inverse


def transition(kept, M):
    """M (B, H, N, D, D) plus the diagonal matrix of what decays keep: (B, H, N, 1 or D, 1) or None,
    all; written over M."""
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    diagonal += 1 if kept is None else kept[..., 0]
    return M


def scan(added, kept, S, backwards=False):
    """S <- kept S + added, chunk by chunk: the states before each, written over `added` (B, H, N,
    D, E), and the last (B, H, D, E). kept: matrices (B, H, N, D, D), diagonals (B, H, N, 1 or D, 1)
    or None, all. backwards: from the last chunk to the first."""
    B, H, N = added.shape[:3]
    added, S = added.flatten(0, 1), S.flatten(0, 1)
    if kept is not None:
        kept = kept.expand(B, H, -1, -1, -1).flatten(0, 1)
    for i in reversed(range(N)) if backwards else range(N):
        if kept is None:
            new = added[:, i] + S
        elif kept.size(3) == 1:
            new = torch.addcmul(added[:, i], kept[:, i], S)
        else:
            new = torch.baddbmm(added[:, i], kept[:, i], S)
        added[:, i] = S
        S = new
    return added.unflatten(0, (B, H)), S.unflatten(0, (B, H))


def recurrence_flops(T, H, D, E, erase=False, shared=False):
    """Multiply-adds of the products above, times 2, per token of a sequence of T tokens; the causal
    half of a chunk counts. shared: q and k have one head for all. Exponentials are not counted, nor
    what decays of channels cost where two factors do not hold them."""
    c = chunk_size(max(T, 2))
    alone = T <= c  # then nothing reads a state
    heads_of_keys = 1 if shared else H
    flops = heads_of_keys * (c + 1) * D + H * ((c + 1) * E + 2 * D * E)
    if not alone:
        flops += H * 2 * D * E
    if erase:  # the system, its inverse, and that times v
        flops += H * ((c - 1) * D + c * c / 3 + (c + 1) * E)
        if not alone:  # P, the transition, the states by it, P times a state
            flops += H * ((c + 1) * D + 2 * D * D + 2 * D * D * E / c + 2 * D * E)
    return flops


def recurrence_state_bytes(H, D, E, dtype):
    """S of one sequence, kept in at least float32."""
    return H * D * E * torch.promote_types(dtype, torch.float32).itemsize
