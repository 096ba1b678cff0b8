"""The engine of every linear mixer: causal attention with positive features, chunk by chunk.

With features phi_q(t) = exp(a_t) and phi_k(s) = exp(b_s), element-wise, in logarithms a, b (B, H, T, D), v (B, H, T, E):

    y_t = sum_{s<=t} w_ts v_s / sum_{s<=t} w_ts,    w_ts = phi_q(t) . phi_k(s) = sum_d exp(a_td + b_sd)

Time is cut into N chunks of c tokens: quadratic within a chunk, a state between chunks, so time and memory are linear in
T. State: S = sum_s phi_k(s) v_s^T (B, H, D, E), z = sum_s phi_k(s) (B, H, D), both divided by exp(m), and the key maximum
m_d = max_s b_sd (B, H, D), so that keys may grow for ever. A single token takes the recurrence itself.

Why nothing overflows, and no row is 0/0. Within a chunk, keys are taken relative to r_d, the maximum of all keys up to
the chunk's *first* token, and row t is divided by exp(M_t), M_t = max_d (a_td + r_d). Then phi_q <= 1, and the row's sum is at
least 1, as some token up to the first one attains r_d. Were the maximum to range over the whole chunk, one huge late key
would push earlier rows to 0/0: the future would show. Keys may exceed r_d by up to MAX_GROWTH: what then underflows
in phi_q is below exp(MAX_GROWTH - 87) of the row's sum. A chunk where they exceed it by more is "wild": it is summed
channel by channel, exactly, and alone; the other chunks and rows of the batch do not notice.

The gradient is written out, because it needs less time and memory than recorded operations do. y does not depend on
the references r, M and m, so no gradient goes through them.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK = 64        # tokens; of 32, 64, 128 and 256 the fastest at D = 32 and 64
MAX_GROWTH = 60.0  # nats; float32 ends at exp(88)


class LinearState(NamedTuple):
    S: torch.Tensor  # (B, H, D, E)
    z: torch.Tensor  # (B, H, D)
    m: torch.Tensor  # (B, H, D)


def linear_attention(a, b, v, state=None):
    """y (B, H, T, E) in v's dtype, and the new LinearState, for log features a and b (B, H, T, D), values v (B, H, T, E).

    Everything is computed in at least float32, autocast or not."""
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(a.dtype, v.dtype), torch.float32)
        B, H, T, D = a.shape
        E = v.size(-1)
        fresh = state is None
        if fresh:
            state = LinearState(v.new_zeros(B, H, D, E, dtype=dtype), v.new_zeros(B, H, D, dtype=dtype),
                                v.new_full((B, H, D), -math.inf, dtype=dtype))
        a, b, v_wide = a.to(dtype), b.to(dtype), v.to(dtype)
        y, state = recurrent(a, b, v_wide, state) if T == 1 else chunkwise(a, b, v_wide, state, alone=fresh and T <= CHUNK)
    return y.to(v.dtype), state


def recurrent(a, b, v, state):
    """One token: a, b (B, H, 1, D), v (B, H, 1, E)."""
    with torch.no_grad():
        m = torch.maximum(state.m, b[:, :, 0])
        shrink = (state.m - m).exp()
        M = (a + m[:, :, None]).amax(3, keepdim=True)
    phi_k = (b - m[:, :, None]).exp()
    S = torch.addcmul(phi_k.mT * v, state.S, shrink[..., None])
    z = torch.addcmul(phi_k[:, :, 0], state.z, shrink)
    phi_q = (a + (m[:, :, None] - M)).exp()
    return phi_q @ S / (phi_q @ z[..., None]), LinearState(S, z, m)


def chunkwise(a, b, v, state, alone):
    """Any number of tokens: a, b (B, H, T, D), v (B, H, T, E). alone: they fit in one chunk, and nothing is before them."""
    B, H, T, D = a.shape
    N = math.ceil(T / CHUNK)
    c = math.ceil(T / N)
    padding = N * c - T  # fewer than N tokens, whose keys weigh nothing

    def cut(x, fill):  # (B, H, T, .) -> (X, N, c, .), X = B H
        return (F.pad(x, (0, 0, 0, padding), value=fill) if padding else x).reshape(B * H, N, c, -1)

    v1 = torch.cat([v, torch.ones_like(v[..., :1])], dim=3)  # a column of ones: its sums are the rows' totals, and z
    S1 = torch.cat([state.S, state.z[..., None]], dim=3).flatten(0, 1)
    y, S1, m = Chunkwise.apply(cut(a, 0.0), cut(b, -math.inf), cut(v1, 0.0), S1, state.m.flatten(0, 1), alone)
    S1, m = S1.unflatten(0, (B, H)), m.unflatten(0, (B, H))
    return y.reshape(B, H, N * c, -1)[:, :, :T], LinearState(S1[..., :-1], S1[..., -1], m)


class Chunkwise(torch.autograd.Function):
    """y (X, N, c, E), S1 (X, D, E + 1) and m (X, D) for a, b (X, N, c, D), v1 (X, N, c, E + 1), S1 and m before them.
    alone: one chunk, and nothing before it."""

    @staticmethod
    def forward(ctx, a, b, v1, S1, m, alone):
        X, N, c, D = a.shape
        ends = torch.cat([m[:, None], b.amax(2)], dim=1).cummax(dim=1).values  # (X, N + 1, D) key maximum before each chunk
        before, after = ends[:, :-1], ends[:, 1:]
        r = torch.maximum(before, b[:, :, 0])  # (X, N, D)
        wild = (after - r).amax(2) > MAX_GROWTH  # (X, N)
        any_wild = bool(wild.any())
        phi_q = a + r[:, :, None]
        M = phi_q.amax(3, keepdim=True)  # (X, N, c, 1)
        if any_wild:
            M[wild] = (a[wild] + torch.maximum(r[wild][:, None], b[wild].cummax(dim=1).values)).amax(2, keepdim=True)
        phi_q.sub_(M).exp_()
        reference = torch.where(wild[..., None], after, r) if any_wild else r
        phi_k = (b - reference[:, :, None]).exp_()

        # the state before each chunk and behind the last
        from_before, to_after, shrink = ((x - y).exp_()[..., None] for x, y in ((before, r), (reference, after), (before, after)))
        states = phi_k.mT @ v1 * to_after  # (X, N, D, E + 1) what each chunk adds
        for i in range(N):
            states[:, i], S1 = S1, torch.addcmul(states[:, i], S1, shrink[:, i])
        states *= from_before

        w = within(phi_q, phi_k)
        exact = (wild, a[wild], b[wild], M[wild]) if any_wild else ()
        if any_wild:
            w[wild] = sum(exact_weights(*exact[1:]))
        y1 = w @ v1
        if not alone:
            y1 += phi_q @ states
        y, total = y1[..., :-1], y1[..., -1:]
        y = y / total
        m = after[:, -1].clone()
        ctx.save_for_backward(phi_q, phi_k, v1, states, from_before, to_after, shrink, y, total, *exact)
        ctx.mark_non_differentiable(m)
        ctx.set_materialize_grads(False)  # None says that the new state is not used
        ctx.alone = alone
        return y, S1, m

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS1, _):
        phi_q, phi_k, v1, states, from_before, to_after, shrink, y, total, *exact = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else dy
        dy1 = torch.cat([dy, -(dy * y).sum(3, keepdim=True)], dim=3) / total
        w, dw = within(phi_q, phi_k), within(dy1, v1)
        if exact:
            wild, a, b, M = exact
            w[wild] = sum(exact_weights(a, b, M))
            dw_wild, dw[wild] = dw[wild], 0
        dv1, da, db = w.mT @ dy1, dw @ phi_k, dw.mT @ phi_q
        if not ctx.alone or dS1 is not None:
            # of the state behind each chunk, from the last to the first
            dstates = phi_q.mT @ dy1 * from_before
            dS1 = torch.zeros_like(dstates[:, 0]) if dS1 is None else dS1
            for i in reversed(range(dstates.size(1))):
                dstates[:, i], dS1 = dS1, torch.addcmul(dstates[:, i], dS1, shrink[:, i])
            dstates *= to_after
            dv1 += phi_k @ dstates
            da += dy1 @ states.mT
            db += v1 @ dstates.mT
        da, db = da * phi_q, db * phi_k
        if exact:
            for d, weights in enumerate(exact_weights(a, b, M)):
                da[..., d][wild] += (dw_wild * weights).sum(2)
                db[..., d][wild] += (dw_wild * weights).sum(1)
        return da, db, dv1, dS1, None, None


def within(q, k):
    """The products of rows t of q (X, N, c, .) and s <= t of k (X, N, c, .): (X, N, c, c)."""
    c = q.size(2)
    return (q @ k.mT).mul_(torch.ones(c, c, dtype=q.dtype, device=q.device).tril_())


def exact_weights(a, b, M):
    """exp(a_td + b_sd - M_t) for s <= t, channel by channel: a, b (K, c, D), M (K, c, 1) -> D times (K, c, c)."""
    c, D = a.shape[1:]
    later = torch.ones(c, c, dtype=torch.bool, device=a.device).triu(1)
    for d in range(D):
        yield (a[..., d, None] + b[..., None, :, d] - M).masked_fill(later, -math.inf).exp()


def linear_attention_flops(T, H, D, E):
    """Multiply-adds of the products above, times 2, per token of a sequence of T tokens; the causal half of a chunk counts."""
    N = math.ceil(T / CHUNK)
    c = math.ceil(T / N)
    within = 2 * (c + 1) / 2 * (D + E + 1)
    between = 2 * D * (E + 1) * (2 if N > 1 else 1)  # what a chunk adds to the state; what its rows read from it
    return H * (within + between)


def linear_state_bytes(H, D, E, dtype):
    """S, z and m of one sequence, kept in at least float32."""
    return H * (D * E + 2 * D) * torch.promote_types(dtype, torch.float32).itemsize
