"""What decays weigh within the chunks of mixers/parts/recurrence.py, forward and backward.

With g (B, H, N, c, 1 or D) <= 0 the logarithms of the decays of N chunks of c tokens, and G_t their
sum within a chunk up to t:

    from_start(x)   x_t exp(G_t)              what is left of the state before the chunk, at t
    to_end(x)       x_s exp(G_last - G_s)     what is left at the chunk's end of what s has written
    total           exp(G_last)
    gram(a, b)      sum_d a_td b_sd exp(G_td - G_sd) for s <= t, and 0 above

Why nothing overflows, decays of -inf included. Whatever is exponentiated is the sum of g over
tokens between s and t, so <= 0. Sums are differences of G in float64, and a decay below the
smallest number is as good as that: then they are right to 1e-11, however large others are. (MPS has
no float64: there, sums of hundreds of nats are rounded.)

One decay a head is a table (c, c) for each. One a channel is in two factors, exp(G_t) for a and
exp(-G_s) for b, as long as G stays above -MOST_EXPONENT; so are the entries of a table. A chunk
whose decays leave that range, or any chunk where the numbers cannot be looked at without waiting
(on a GPU), is exponentiated entry by entry in a table. With channels it is halved again and again:
rows of a second half meet columns of its first half, each side decayed to the border between them.
Where the caller guarantees g >= floor, blocks of up to 40 / |floor| tokens stay whole. Only
rows behind the place where the range is left take these ways, so no row is rounded by what comes
after it; for the same reason the reference is the first token, not one in the middle.
"""
import math
from functools import cached_property

import torch

MOST_EXPONENT = 40  # nats over what is left in two factors; float32 ends at exp(88)


def make_decays(g, floor):
    if g is None:
        return NoDecay()
    return HeadDecay(g) if g.size(-1) == 1 else ChannelDecay(g, floor)


class NoDecay:
    channels = 1
    total = None

    def from_start(self, x):
        return x

    to_end = from_start

    def gram(self, a, b):
        return (a @ b.mT).tril_()

    def gram_backward(self, d, a, b):
        """The gradients of a and b for that of the Gram, d (B, H, N, c, c), 0 above its diagonal,
        which may be written over."""
        return d @ b, d.mT @ a


class Decay:
    """What both kinds have in common. g (B, H, N, c, 1 or D)."""

    def __init__(self, g):
        self.dtype, self.channels = g.dtype, g.size(4)
        wide = torch.float32 if g.device.type == "mps" else torch.float64
        zero = math.log(torch.finfo(g.dtype).tiny) - 40  # its exponential is 0
        self.G = g.clamp(min=zero).to(wide).cumsum(3)

    def exp(self, sums):
        return sums.to(self.dtype).exp()

    @cached_property
    def up(self):
        return self.exp(self.G)

    @cached_property
    def down(self):
        return self.exp(self.G[:, :, :, -1:] - self.G)

    @property
    def total(self):
        """(B, H, N, 1 or D, 1)"""
        return self.up[:, :, :, -1, :, None]

    def from_start(self, x):
        return x * self.up

    def to_end(self, x):
        return x * self.down


class HeadDecay(Decay):
    @cached_property
    def table(self):
        """(B, H, N, c, c): exp(G_t - G_s) for s <= t, and 0 above."""
        if not can_look(self.G):
            return self.between(self.G)
        # c exponentials and not c^2, in float64, as far as they stay in range
        up, inverse_up = self.G.exp(), (-self.G).clamp(max=MOST_EXPONENT).exp()
        table = (up.to(self.dtype) * inverse_up.to(self.dtype).mT).tril_()
        wild = self.G < -MOST_EXPONENT  # rows (B, H, N, c, 1)
        chunks = wild[:, :, :, -1, 0]  # those that have any, as G falls
        if chunks.any():
            exact = self.between(self.G[chunks])
            table[chunks] = torch.where(wild[chunks], exact, table[chunks])
        return table

    def between(self, G):
        return self.exp(G - G.mT).tril_()

    def gram(self, a, b):
        gram = a @ b.mT
        if gram.size(1) < self.table.size(1):  # a and b have one head for all
            return gram * self.table
        return gram.mul_(self.table)

    def gram_backward(self, d, a, b):
        d = d.mul_(self.table)
        if a.size(1) == b.size(1) == 1:  # they have one head for all
            d = d.sum(1, keepdim=True)
        return d @ b, d.mT @ a


def can_look(x):
    """Whether a number can be read back to Python without waiting for a device."""
    return x.device.type == "cpu"


class ChannelDecay(Decay):
    def __init__(self, g, floor):
        super().__init__(g)
        self.halves = None
        self.in_factors = can_look(g)
        if self.in_factors:
            self.wild = self.G.amin(4) < -MOST_EXPONENT  # rows (B, H, N, c)
            self.chunks = self.wild[:, :, :, -1]  # those that have any, as G falls
            if self.chunks.any():
                self.halves = Halves(self.G[self.chunks], self.exp, floor)
        else:
            self.halves = Halves(self.G, self.exp, floor)

    @cached_property
    def inverse_up(self):
        return self.exp((-self.G).clamp(max=MOST_EXPONENT))

    def gram(self, a, b):
        if not self.in_factors:
            return self.halves.gram(a, b)
        gram = ((a * self.up) @ (b * self.inverse_up).mT).tril_()
        if self.halves:
            chunks, wild = self.chunks, self.wild[self.chunks][..., None]
            gram[chunks] = torch.where(wild, self.halves.gram(a[chunks], b[chunks]), gram[chunks])
        return gram

    def gram_backward(self, d, a, b):
        if not self.in_factors:
            return self.halves.gram_backward(d, a, b)
        mild = d.masked_fill(self.wild[..., None], 0) if self.halves else d
        da = (mild @ (b * self.inverse_up)).mul_(self.up)
        db = (mild.mT @ (a * self.up)).mul_(self.inverse_up)
        if self.halves:
            chunks = self.chunks
            d = d[chunks].masked_fill(~self.wild[chunks][..., None], 0)
            da_wild, db_wild = self.halves.gram_backward(d, a[chunks], b[chunks])
            da[chunks] += da_wild
            db[chunks] += db_wild
        return da, db


class Halves:
    """The Gram for decays of any size. G, a, b (.., c, D), the Gram (.., c, c)."""

    def __init__(self, G, exp, floor):
        c = G.size(-2)
        self.block = 1
        while floor is not None and 2 * self.block * -floor <= MOST_EXPONENT and self.block < c:
            self.block *= 2
        blocks = G.unflatten(-2, (-1, self.block))
        inside = blocks - blocks[..., :1, :]
        self.inside = exp(inside), exp(-inside)
        self.levels = []  # the decays of rows from the border on, of columns up to it
        half = self.block
        while half < c:
            first, second = G.unflatten(-2, (-1, 2, half)).unbind(-3)
            border = first[..., -1:, :]
            self.levels.append((exp(second - border), exp(border - first)))
            half *= 2

    def pieces(self, a, b):
        """The factors of each part of the Gram: a's rows and b's columns (.., parts, size, D) of
        the blocks on the diagonal, and then of what is below it at each level."""
        from_first, to_first = self.inside
        yield (a.unflatten(-2, (-1, self.block)), from_first,
               b.unflatten(-2, (-1, self.block)), to_first)
        half = self.block
        for from_border, to_border in self.levels:
            yield (a.unflatten(-2, (-1, 2, half))[..., 1, :, :], from_border,
                   b.unflatten(-2, (-1, 2, half))[..., 0, :, :], to_border)
            half *= 2

    def parts(self, gram):
        """The same parts of a Gram (.., c, c), as views."""
        yield diagonal_blocks(gram, self.block)
        half = self.block
        for _ in self.levels:
            yield diagonal_blocks(gram, 2 * half)[..., half:, :half]
            half *= 2

    def gram(self, a, b):
        gram = a.new_zeros(*a.shape[:-1], a.size(-2))
        for part, (rows, of_rows, columns, of_columns) in zip(self.parts(gram), self.pieces(a, b)):
            part.copy_((rows * of_rows) @ (columns * of_columns).mT)
        return gram.tril_()

    def gram_backward(self, d, a, b):
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        parts = zip(self.parts(d), self.pieces(a, b), self.pieces(da, db))
        for part, (rows, of_rows, columns, of_columns), (d_rows, _, d_columns, _) in parts:
            d_rows += (part @ (columns * of_columns)) * of_rows
            d_columns += (part.mT @ (rows * of_rows)) * of_columns
        return da, db


def diagonal_blocks(x, size):
    """The blocks (.., n, size, size) on the diagonal of x (.., c, c), as a view."""
    blocks = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (.., n, size, n, size)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
