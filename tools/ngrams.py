"""What counting reaches: unigram and bigram models of token ids, by the counts of a training split.

    P(b)     = (n(b) + d) / (N + d V)             N tokens, V symbols
    P(b | a) = (n(a, b) + k P(b)) / (n(a) + k)    n(a) pairs begin with a

d and k are those of a fixed grid that do best on the last tenth of the training split, given the
counts of the rest; the counts then are of the whole split. Only pairs that occur are held: sorting
them takes some 40 bytes a training token.
"""
import numpy as np

D = 2.0 ** np.arange(-10, 4)
K = 2.0 ** np.arange(-4, 17)


class Counts:
    """Of a split's tokens, an array of ids below vocab_size, and of its pairs of neighbours."""

    def __init__(self, tokens, vocab_size):
        tokens = np.asarray(tokens).astype(np.int64)
        self.V = vocab_size
        self.N = len(tokens)
        self.single = np.bincount(tokens, minlength=vocab_size)
        self.first = np.bincount(tokens[:-1], minlength=vocab_size)
        pairs = tokens[:-1] * vocab_size + tokens[1:]
        self.pairs, self.pair_counts = np.unique(pairs, return_counts=True)

    def unigram(self, b, d):
        """P(b) of an array of tokens."""
        return (self.single[b] + d) / (self.N + d * self.V)

    def pair(self, a, b):
        """n(a, b) of two arrays of tokens."""
        key = a * self.V + b
        at = np.minimum(np.searchsorted(self.pairs, key), len(self.pairs) - 1)
        return np.where(self.pairs[at] == key, self.pair_counts[at], 0)

    def losses(self, tokens, ds, ks):
        """Mean loss in nats of every token but the first, which has none before it: the lowest of
        the unigram model over ds, the d it takes, and with that d the same of the bigram model
        over ks: (unigram, d, bigram, k)."""
        tokens = np.asarray(tokens).astype(np.int64)
        a, b = tokens[:-1], tokens[1:]
        unigram, d = min((nats(self.unigram(b, d)), float(d)) for d in ds)
        p_b = self.unigram(b, d)
        n_ab, n_a = self.pair(a, b), self.first[a]
        bigram, k = min((nats((n_ab + k * p_b) / (n_a + k)), float(k)) for k in ks)
        return unigram, d, bigram, k


def nats(probabilities):
    """The mean loss of what was predicted with these probabilities."""
    return float(-np.log(probabilities).mean())


def counted_losses(train, val, vocab_size):
    """Losses of a unigram and a bigram model on val, in nats per token, and their d and k:
    (unigram, d, bigram, k). train has at least 20 tokens, val 2."""
    cut = len(train) * 9 // 10
    _, d, _, k = Counts(train[:cut], vocab_size).losses(train[cut:], D, K)
    return Counts(train, vocab_size).losses(val, [d], [k])
