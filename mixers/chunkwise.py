"""The engine of every linear mixer: causal attention with positive features, chunk by chunk.

With features phi_q(t) = exp(a_t) and phi_k(s) = exp(b_s), element-wise, in logarithms a, b (B, H, T, D), v (B, H, T, E):

    y_t = sum_{s<=t} w_ts v_s / sum_{s<=t} w_ts,    w_ts = phi_q(t) . phi_k(s) = sum_d exp(a_td + b_sd)

Time is cut into N chunks of c tokens: quadratic within a chunk, a state between chunks, so time and memory are linear in
T. State: S = sum_s phi_k(s) v_s^T (B, H, D, E), z = sum_s phi_k(s) (B, H, D), both divided by exp(m), and the key maximum
m_d = max_s b_sd (B, H, D), so that keys may grow for ever.

Why nothing overflows, and no row is 0/0. Within a chunk, keys are taken relative to r_d, the maximum of all keys up to
the chunk's *first* token, and row t is divided by exp(M_t), M_t = max_d (a_td + r_d). Then phi_q <= 1, and the row's sum is at
least 1, as some token up to the first one attains r_d. Were the maximum to range over the whole chunk, one huge late key
would push earlier rows to 0/0: the future would show. Keys may exceed r_d by up to MAX_GROWTH: what then underflows
in phi_q is below exp(MAX_GROWTH - 87) of the row's sum. A chunk where they exceed it by more is summed
channel by channel, exactly, and alone: the other chunks and rows of the batch do not notice.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

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
        y, state = chunkwise(a.to(dtype), b.to(dtype), v.to(dtype), state)
    return y.to(v.dtype), state


def chunkwise(a, b, v, state):
    B, H, T, D = a.shape
    N = math.ceil(T / CHUNK)
    c = math.ceil(T / N)
    padding = N * c - T  # fewer than N tokens, whose keys weigh nothing
    cut = lambda x, fill: F.pad(x, (0, 0, 0, padding), value=fill).unflatten(2, (N, c))  # (B, H, N, c, .)
    a, b, v = cut(a, 0.0), cut(b, -math.inf), cut(v, 0.0)
    if state is None:
        S, z = v.new_zeros(B, H, D, v.size(-1)), v.new_zeros(B, H, D)
        m = b.new_full((B, H, D), -math.inf)
    else:
        S, z, m = state

    with torch.no_grad():  # y does not depend on the references, so no gradient goes through them
        ends = torch.cat([m[:, :, None], b.amax(3)], dim=2).cummax(dim=2).values  # (B, H, N + 1, D) maximum before each chunk
        before, after = ends[:, :, :-1], ends[:, :, 1:]
        r = torch.maximum(before, b[:, :, :, 0])  # (B, H, N, D)
        M = (a + r[:, :, :, None]).amax(4, keepdim=True)  # (B, H, N, c, 1)
        wild = (after - r).amax(3) > MAX_GROWTH  # (B, H, N)
        any_wild = bool(wild.any())
        if any_wild:
            M[wild] = (a[wild] + torch.maximum(r[wild][:, None], b[wild].cummax(dim=1).values)).amax(2, keepdim=True)

    # within the chunks
    phi_q = (a + r[:, :, :, None] - M).exp()
    local = b - r[:, :, :, None]
    if any_wild:
        local = local.masked_fill(wild[..., None, None], -math.inf)
    w = (phi_q @ local.exp().mT).tril()  # (B, H, N, c, c)
    if any_wild:
        w = w.index_put(torch.where(wild), exact_weights(a[wild], b[wild], M[wild]))
    y, total = w @ v, w.sum(4, keepdim=True)

    # between them: the state before each chunk, relative to its r
    phi_k = (b - after[:, :, :, None]).exp()  # at most 1
    new_S, new_z = phi_k.mT @ v, phi_k.sum(3)  # (B, H, N, D, E), (B, H, N, D)
    shrink = (before - after).exp()
    states = []
    for i in range(N):
        states.append((S, z))
        S = S * shrink[:, :, i, :, None] + new_S[:, :, i]
        z = z * shrink[:, :, i] + new_z[:, :, i]
    if N > 1 or state is not None:
        old_S, old_z = (torch.stack(part, dim=2) for part in zip(*states))
        phi_q = phi_q * (before - r).exp()[:, :, :, None]
        y = y + phi_q @ old_S
        total = total + phi_q @ old_z[..., None]
    y = (y / total).flatten(2, 3)[:, :, :T]
    return y, LinearState(S, z, after[:, :, -1].clone())  # not a view that holds on to the maxima of all chunks


def exact_weights(a, b, M):
    """sum_d exp(a_td + b_sd - M_t) for s <= t, channel by channel: a, b (K, c, D), M (K, c, 1) -> (K, c, c)."""
    c, D = a.shape[1:]
    later = torch.ones(c, c, dtype=torch.bool, device=a.device).triu(1)
    return sum((a[..., d, None] + b[..., None, :, d] - M).masked_fill(later, -math.inf).exp() for d in range(D))


def linear_attention_flops(T, H, D, E):
    """Multiply-adds of the products above, times 2, per token of a sequence of T tokens; the causal half of a chunk counts."""
    N = math.ceil(T / CHUNK)
    c = math.ceil(T / N)
    within = 2 * (c + 1) / 2 * (D + E)
    between = 2 * D * E + (2 * D * (E + 1) if N > 1 else 0)  # new_S; phi_q with old_S and old_z
    return H * (within + between)


def linear_state_bytes(H, D, E, dtype):
    """S, z and m of one sequence, kept in at least float32."""
    return H * (D * E + 2 * D) * torch.promote_types(dtype, torch.float32).itemsize
