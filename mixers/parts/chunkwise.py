"""The engine of every linear mixer: causal attention with positive features, chunk by chunk.

With features phi_q(t) = exp(a_t) and phi_k(s) = exp(b_s), element-wise, in logarithms a, b
(B, H, T, D), and v (B, H, T, E):

    y_t = sum_{s<=t} w_ts v_s / sum_{s<=t} w_ts
    w_ts = phi_q(t) . phi_k(s) = sum_d exp(a_td + b_sd)

Time is cut into N chunks of c tokens: quadratic within a chunk, a state between chunks, so time
and memory are linear in T. State: S = sum_s phi_k(s) v_s^T (B, H, D, E) and z = sum_s phi_k(s)
(B, H, D), both divided by exp(m), and the key maximum m_d = max_s b_sd (B, H, D), so that keys may
grow for ever. A single token takes the recurrence itself.

Why nothing overflows, and no row is 0/0. Within a chunk, keys are taken relative to r_d, the
maximum of all keys up to the chunk's *first* token, and row t is divided by exp(M_t), with
M_t = max_d (a_td + r_d). Then phi_q <= 1, and the row's sum is at least 1, as some token up to the
first one attains r_d. Were the maximum to range over the whole chunk, one huge late key would push
earlier rows to 0/0: the future would show. Keys may exceed r_d by up to MAX_GROWTH: what then
underflows in phi_q is below exp(MAX_GROWTH - 87) of the row's sum. A chunk where they exceed it by
more is "wild": it is summed channel by channel, exactly, and alone; the other chunks and rows of
the batch do not notice.

The gradient is written out, because it needs less time and memory than recorded operations do. y
does not depend on the references r, M and m, so no gradient goes through them.

Whether a chunk is wild is read back to Python, which costs nothing on a CPU. A GPU would stand
still in every layer until the answer is there; so elsewhere the growth of the key maximum is a
decay, and the other engine, mixers/parts/recurrence.py, which takes any decays, computes the same
without a look at the numbers. It takes several times as many exponentials.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from base.gradients import differentiable_once
from mixers.parts.products import fast_products
from mixers.parts.recurrence import recurrence

CHUNK = 64  # tokens; of 32, 64, 128 and 256 the fastest at D = 32 and 64
MAX_GROWTH = 60.0  # nats; float32 ends at exp(88)


class LinearState(NamedTuple):
    S: torch.Tensor  # (B, H, D, E)
    z: torch.Tensor  # (B, H, D)
    m: torch.Tensor  # (B, H, D)


def linear_attention(a, b, v, state=None):
    """y (B, H, T, E) in v's dtype, and the new LinearState, for log features a and b (B, H, T, D)
    and values v (B, H, T, E), on top of `state` (None: the start).

    Everything is computed in at least float32, autocast or not."""
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(a.dtype, v.dtype), torch.float32)
        T = a.size(2)
        alone = state is None and T <= CHUNK
        if state is None:
            state = empty_state(a, v, dtype)
        a, b, wide_v = a.to(dtype), b.to(dtype), v.to(dtype)
        if T == 1:
            y, state = recurrent(a, b, wide_v, state)
        elif v.device.type == "cpu":
            y, state = chunkwise(a, b, wide_v, state, alone)
        else:
            y, state = by_decays(a, b, wide_v, state)
    return y.to(v.dtype), state


def empty_state(a, v, dtype):
    B, H, _, D = a.shape
    E = v.size(3)
    S = v.new_zeros(B, H, D, E, dtype=dtype)
    z = v.new_zeros(B, H, D, dtype=dtype)
    m = v.new_full((B, H, D), -math.inf, dtype=dtype)
    return LinearState(S, z, m)


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


def by_decays(a, b, v, state):
    """Any number of tokens, as a recurrence whose decay is the growth of the key maximum: a, b
    (B, H, T, D), v (B, H, T, E). Nothing is read back from the device."""
    with torch.no_grad():
        m = torch.cat([state.m[:, :, None], b], dim=2).cummax(dim=2).values  # (B, H, T + 1, D)
        before, m = m[:, :, :-1], m[:, :, 1:]
        M = (a + m).amax(3, keepdim=True)
    # a column of ones: its sums are the rows' totals, and z
    v1 = torch.cat([v, torch.ones_like(v[..., :1])], dim=3)
    S1 = torch.cat([state.S, state.z[..., None]], dim=3)
    y1, S1 = recurrence((a + (m - M)).exp(), (b - m).exp(), v1, g=before - m, state=S1)
    return y1[..., :-1] / y1[..., -1:], LinearState(S1[..., :-1], S1[..., -1], m[:, :, -1].clone())


def chunkwise(a, b, v, state, alone):
    """Any number of tokens: a, b (B, H, T, D), v (B, H, T, E). alone: they fit in one chunk, and
    nothing is before them."""
    B, H, T, D = a.shape
    N = math.ceil(T / CHUNK)
    c = math.ceil(T / N)
    padding = N * c - T  # fewer than N tokens, whose keys weigh nothing

    def cut(x, fill):
        """(B, H, T, .) -> (X, N, c, .), X = B H."""
        if padding:
            x = F.pad(x, (0, 0, 0, padding), value=fill)
        return x.reshape(B * H, N, c, -1)

    a, b, v = cut(a, 0.0), cut(b, -math.inf), cut(v, 0.0)
    S, z, m = (x.flatten(0, 1) for x in state)
    with fast_products():
        y, S, z, m = Chunkwise.apply(a, b, v, S, z[..., None], m, alone)
    S, z, m = (x.unflatten(0, (B, H)) for x in (S, z[..., 0], m))
    return y.reshape(B, H, N * c, -1)[:, :, :T], LinearState(S, z, m)


class Chunkwise(torch.autograd.Function):
    """y (X, N, c, E), S (X, D, E), z (X, D, 1) and m (X, D) for a, b (X, N, c, D), v (X, N, c, E),
    and S, z and m before them. alone: one chunk, and nothing before it."""

    @staticmethod
    def forward(ctx, a, b, v, S, z, m, alone):
        # the key maximum before each chunk and behind the last: (X, N + 1, D)
        ends = torch.cat([m[:, None], b.amax(2)], dim=1).cummax(dim=1).values
        before, after = ends[:, :-1], ends[:, 1:]
        r = torch.maximum(before, b[:, :, 0])  # (X, N, D)
        wild = (after - r).amax(2) > MAX_GROWTH  # (X, N)
        any_wild = bool(wild.any())

        phi_q = a + r[:, :, None]
        M = phi_q.amax(3, keepdim=True)  # (X, N, c, 1)
        if any_wild:
            largest_key = torch.maximum(r[wild][:, None], b[wild].cummax(dim=1).values)
            M[wild] = (a[wild] + largest_key).amax(2, keepdim=True)
        phi_q.sub_(M).exp_()
        reference = torch.where(wild[..., None], after, r) if any_wild else r
        phi_k = (b - reference[:, :, None]).exp_()

        # factors that change a state's reference, (X, N, D, 1) each
        from_before = (before - r).exp_()[..., None]
        to_after = (reference - after).exp_()[..., None]
        shrink = (before - after).exp_()[..., None]
        # what each chunk adds to S (X, N, D, E) and z (X, N, D, 1)
        states, S = running_states(phi_k.mT @ v * to_after, shrink, S)
        totals, z = running_states(phi_k.sum(2)[..., None] * to_after, shrink, z)
        states *= from_before
        totals *= from_before

        w = (phi_q @ phi_k.mT).mul_(visible(a))
        exact = ()
        if any_wild:
            exact = (wild, a[wild], b[wild], M[wild])
            w[wild] = sum(exact_weights(*exact[1:]))
        y = w @ v
        total = w.sum(3, keepdim=True)
        if not alone:
            y += phi_q @ states
            total += phi_q @ totals
        y /= total
        m = after[:, -1].clone()
        ctx.save_for_backward(phi_q, phi_k, v, states, totals, from_before, to_after, shrink, w, y,
                              total, *exact)
        ctx.mark_non_differentiable(m)
        ctx.set_materialize_grads(False)  # None says that the new state is not used
        ctx.alone = alone
        return y, S, z, m

    @staticmethod
    @differentiable_once
    def backward(ctx, dy, dS, dz, _):
        with fast_products():
            return *chunkwise_backward(ctx, dy, dS, dz), None, None


def chunkwise_backward(ctx, dy, dS, dz):
    """The gradients of a, b, v, S and z for those of y and of S and z behind."""
    phi_q, phi_k, v, states, totals, *rest = ctx.saved_tensors
    from_before, to_after, shrink, w, y, total, *exact = rest
    dy = torch.zeros_like(y) if dy is None else dy / total  # of the sum that total divides
    dtotal = -(dy * y).sum(3, keepdim=True)
    dw = (dy @ v.mT).add_(dtotal).mul_(visible(v))
    if exact:
        wild, a, b, M = exact
        dw_wild = dw[wild]
        dw[wild] = 0
    dv = w.mT @ dy
    da = dw @ phi_k
    db = dw.mT @ phi_q
    if not ctx.alone or dS is not None or dz is not None:
        # what each chunk reads of the states before it
        dstates, dS = running_states_backward(phi_q.mT @ dy * from_before, shrink, dS)
        dtotals, dz = running_states_backward(phi_q.mT @ dtotal * from_before, shrink, dz)
        dstates *= to_after
        dtotals *= to_after
        dv += phi_k @ dstates
        da += dy @ states.mT + dtotal * totals.mT
        db += v @ dstates.mT + dtotals.mT
    da *= phi_q
    db *= phi_k
    if exact:
        for d, weights in enumerate(exact_weights(a, b, M)):
            da[..., d][wild] += (dw_wild * weights).sum(2)
            db[..., d][wild] += (dw_wild * weights).sum(1)
    return da, db, dv, dS, dz


def running_states(added, shrink, state):
    """The state before each chunk (X, N, D, E), written over `added`, and that behind the last:

        state_{i+1} = shrink_i state_i + added_i,   state_0 = state

    added (X, N, D, E); shrink (X, N, D, 1); state (X, D, E)."""
    for i in range(added.size(1)):
        next_state = torch.addcmul(added[:, i], state, shrink[:, i])
        added[:, i] = state
        state = next_state
    return added, state


def running_states_backward(of_reads, shrink, dstate):
    """The gradient of the state behind each chunk, written over of_reads, and that of the state
    before the first; the same recurrence, from the last chunk to the first. dstate: that of the
    state behind them all, or None."""
    if dstate is None:
        dstate = torch.zeros_like(of_reads[:, 0])
    for i in reversed(range(of_reads.size(1))):
        next_dstate = torch.addcmul(of_reads[:, i], dstate, shrink[:, i])
        of_reads[:, i] = dstate
        dstate = next_dstate
    return of_reads, dstate


def visible(x):
    """1 for rows t and s <= t, 0 above, (c, c), for x (X, N, c, .)."""
    c = x.size(2)
    return torch.ones(c, c, dtype=x.dtype, device=x.device).tril_()


def exact_weights(a, b, M):
    """exp(a_td + b_sd - M_t) for s <= t, one channel d after the other: a, b (K, c, D), M (K, c, 1)
    -> D times (K, c, c)."""
    c, D = a.shape[1:]
    later = torch.ones(c, c, dtype=torch.bool, device=a.device).triu(1)
    for d in range(D):
        log_w = a[..., d, None] + b[..., None, :, d] - M
        yield log_w.masked_fill(later, -math.inf).exp()


def linear_attention_flops(T, H, D, E):
    """Multiply-adds of the products above, times 2, per token of a sequence of T tokens; the causal
    half of a chunk counts."""
    N = math.ceil(T / CHUNK)
    c = math.ceil(T / N)
    within = 2 * (c + 1) / 2 * (D + E)
    adds = 2 * D * E  # what a chunk adds to the state
    reads = 2 * D * (E + 1) if N > 1 else 0  # what its rows read from it
    return H * (within + adds + reads)


def linear_state_bytes(H, D, E, dtype):
    """S, z and m of one sequence, kept in at least float32."""
    return H * (D * E + 2 * D) * torch.promote_types(dtype, torch.float32).itemsize
