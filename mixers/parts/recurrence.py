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

Why nothing overflows. Only sums of g over tokens *between* s and t are exponentiated, each a short
cumulative sum of its own and never a difference of two long ones: every exponent is <= 0, decays of
-inf included. For one decay a head that is a c x c table. For one a channel the chunk is halved
again and again: rows of a second half meet columns of its first half, each side decayed to the
border between them. Where the caller guarantees g >= floor, blocks of up to 40 / |floor| tokens
stay whole, relative to their first token: exponents within +-40. (A reference further back, in the
middle say, would allow blocks twice as long, but rounds a row by what comes after it.) The system
is solved by forward substitution: the product (I + L)(I + L^2)(I + L^4)... of many kernels loses
all digits where keys repeat, as those of real text do.
"""
import math

import torch
import torch.nn.functional as F

CHUNK = 64          # tokens; a power of two
MOST_EXPONENT = 40  # nats over a block that is left whole; float32 ends at exp(88)


def recurrence(q, k, v, g=None, e=None, w=None, state=None, floor=None):
    """y (B, H, T, E) in v's dtype, and the new state S (B, H, D, E), in at least float32.

    q, k, e, w (B, H, T, D), v (B, H, T, E), g (B, H, T, 1 or D) <= 0, may be -inf; state as it was
    returned, or None: zeros. q and k may have one head for all where g has one channel. floor: a
    number that no g is below, by the caller's word."""
    with torch.autocast(v.device.type, enabled=False):
        dtype = torch.float32
        for x in (q, k, v):
            dtype = torch.promote_types(dtype, x.dtype)
        q, k, values, g, e, w = (None if x is None else x.to(dtype) for x in (q, k, v, g, e, w))
        if state is None:
            S = values.new_zeros(*v.shape[:2], k.size(-1), v.size(-1))
        else:
            S = state.to(dtype)
        if v.size(2) == 1:
            y, S = one_token(q, k, values, g, e, w, S)
        else:
            y, S = chunks(q, k, values, g, e, w, S, floor)
    return y.to(v.dtype), S


def one_token(q, k, v, g, e, w, S):
    """The recurrence as it stands above, on new tensors: T = 1."""
    if g is not None:
        S = S * g.exp().mT
    written = v
    if e is not None:
        read = e @ S
        if w is None:
            written = v + read
        else:
            S = S + w.mT @ read
    S = S + k.mT @ written
    return q @ S, S


def chunks(q, k, v, g, e, w, S, floor):
    """Any number of tokens, in chunks of c. S (B, H, D, E)."""
    T = v.size(2)
    c = min(CHUNK, 2 ** math.ceil(math.log2(T)))
    N = math.ceil(T / c)

    def cut(x):  # (B, H, T, .) -> (B, H, N, c, .); zeros at the end change nothing
        return None if x is None else F.pad(x, (0, 0, 0, N * c - T)).unflatten(2, (N, c))

    q, k, v, g, e, w = (cut(x) for x in (q, k, v, g, e, w))
    up = down = None
    if g is not None:
        up = g.cumsum(3)
        down = after(g, 3)
    gram = Grams(g, floor)
    q_up, k_down = decayed(q, up), decayed(k, down)
    # (B, H, N, 1 or D, 1): what is left of a state after a chunk
    total = None if g is None else up[:, :, :, -1, :, None].exp()

    if e is None:
        before, S = scan(k_down.mT @ v, total, S)
        y = q_up @ before + gram(q, k) @ v
    elif w is None:
        L = gram(e, k).tril(-1)
        U0, P = solve(L, v, decayed(e, up))
        before, U, S = scan_erased(None, U0, P, k_down, total, S)
        y = q_up @ before + gram(q, k) @ U
    else:
        L_k, L = gram(e, k).tril(-1), gram(e, w).tril(-1)
        R0, P = solve(L, L_k @ v, decayed(e, up))
        before, R, S = scan_erased(k_down.mT @ v, R0, P, decayed(w, down), total, S)
        y = q_up @ before + gram(q, k) @ v + gram(q, w) @ R
    return y.flatten(2, 3)[:, :, :T], S


def decayed(x, exponent):
    return x if exponent is None else x * exponent.exp()


def after(g, dim):
    """At each place along dim the sum of g over all later places, with no -inf minus -inf in it."""
    later = g.narrow(dim, 1, g.size(dim) - 1).flip(dim).cumsum(dim).flip(dim)
    return torch.cat([later, torch.zeros_like(g.narrow(dim, 0, 1))], dim)


def solve(L, *sides):
    """(I - L)^-1 side for each side (B, H, N, c, .). L (B, H, N, c, c) is strictly lower."""
    sizes = [side.size(-1) for side in sides]
    heads = torch.broadcast_shapes(*(side.shape[:-1] for side in sides))
    both = torch.cat([side.expand(*heads, -1) for side in sides], -1)
    solution = torch.linalg.solve_triangular(-L, both, upper=False, unitriangular=True)
    return solution.split(sizes, -1)


def scan(added, total, S):
    """S <- total * S + added, chunk by chunk: the states before each (B, H, N, D, E), the last."""
    before = []
    for i in range(added.size(2)):
        before.append(S)
        kept = S if total is None else S * total[:, :, i]
        S = kept + added[:, :, i]
    return torch.stack(before, 2), S


def scan_erased(added, U0, P, w_down, total, S):
    """U = U0 + P S, then S <- total * S + added + w_down^T U, chunk by chunk: the states before
    each (B, H, N, D, E), all U (B, H, N, c, E), the last state. added may be None."""
    before, us = [], []
    for i in range(U0.size(2)):
        before.append(S)
        u = U0[:, :, i] + P[:, :, i] @ S
        us.append(u)
        if total is not None:
            S = S * total[:, :, i]
        if added is not None:
            S = S + added[:, :, i]
        S = S + w_down[:, :, i].mT @ u
    return torch.stack(before, 2), torch.stack(us, 2), S


class Grams:
    """gram(a, b): [a, b]_ts for s <= t and 0 above, (B, H, N, c, c).

    g: the decays within the chunks, (B, H, N, c, 1 or D), or None. block: the tokens of a block on
    the diagonal that is one product; None where there is one decay a head, or none."""

    def __init__(self, g, floor):
        self.table = None
        self.levels = []
        self.block = None
        if g is not None and g.size(-1) == 1:
            self.table = decay_table(g[..., 0])
        elif g is not None:
            self.decays_by_level(g, floor)

    def __call__(self, a, b):
        if self.block is None:
            products = a @ b.mT
            return products.tril() if self.table is None else products * self.table
        return self.by_halves(a, b)

    def decays_by_level(self, g, floor):
        """Of each level of halving: the decays of rows from the border on, of columns up to it."""
        c = g.size(3)
        self.block = 1
        while floor is not None and 2 * self.block * -floor <= MOST_EXPONENT and self.block < c:
            self.block *= 2
        whole = g.unflatten(3, (-1, self.block)).cumsum(4)
        first = whole[..., :1, :]
        self.inside = None if self.block == 1 else ((whole - first).exp(), (first - whole).exp())
        half = self.block
        while half < c:
            first, second = g.unflatten(3, (-1, 2, half)).unbind(4)  # (B, H, N, pairs, half, D)
            self.levels.append((second.cumsum(4).exp(), after(first, 4).exp()))
            half *= 2

    def by_halves(self, a, b):
        """From blocks on the diagonal, (B, H, N, blocks, size, size), to half as many of twice the
        size at each level, to the whole."""
        rows, columns = a.unflatten(3, (-1, self.block)), b.unflatten(3, (-1, self.block))
        if self.block == 1:
            gram = (rows * columns).sum(-1, keepdim=True)
        else:
            from_first, to_first = self.inside
            gram = ((rows * from_first) @ (columns * to_first).mT).tril()
        half = self.block
        for from_border, to_border in self.levels:
            rows = a.unflatten(3, (-1, 2, half))[:, :, :, :, 1] * from_border
            columns = b.unflatten(3, (-1, 2, half))[:, :, :, :, 0] * to_border
            below = rows @ columns.mT
            first, second = gram.unflatten(3, (-1, 2)).unbind(4)
            above = torch.zeros_like(below)
            gram = torch.cat([torch.cat([first, above], -1), torch.cat([below, second], -1)], -2)
            half *= 2
        return gram.squeeze(3)


def decay_table(g):
    """exp(sum of g_i over s < i <= t) for s <= t and 0 above, (..., c, c), for g (..., c)."""
    c = g.size(-1)
    below = torch.ones(c, c, dtype=torch.bool, device=g.device).tril(-1)
    sums = g[..., None].expand(*g.shape, c).masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(~(below | below.new_ones(c).diag()), -math.inf).exp()


def recurrence_flops(T, H, D, E, erase=False, shared=False):
    """Multiply-adds of the products above, times 2, per token of a sequence of T tokens; the causal
    half of a chunk counts. shared: q and k have one head for all. Exponentials are not counted:
    some (log2(c / block) + 4) D a token for decays by channel."""
    c = min(CHUNK, 2 ** math.ceil(math.log2(max(T, 2))))
    if erase:
        return H * ((c + 1) * (2 * D + E) + (c - 1) * (D + E) + 6 * D * E)
    return (1 if shared else H) * (c + 1) * D + H * ((c + 1) * E + 4 * D * E)


def recurrence_state_bytes(H, D, E, dtype):
    """S of one sequence, kept in at least float32."""
    return H * D * E * torch.promote_types(dtype, torch.float32).itemsize
