"""What an attention matrix looks like, in numbers.

P is a causal attention matrix, a (T, T) array: row t holds the weights of token t on the tokens s
<= t; rows sum to 1. Entropy, spectral gap, log-normality and temperatures are those of the LLN
paper (Nahshan et al. 2023, arXiv 2311.13541).

Where rows do not sum to 1, as in mixers that decay and erase, weights are shares of the |P| of
their row (describe_signed).
"""
import math

import numpy as np
from scipy import stats
from scipy.special import entr  # -p ln p, and 0 at 0


LONGEST = 1e6  # tokens; half-lives beyond it are it
SATURATED = 0.01
BINS = 20  # of a gate's histogram


def uniform(T):
    """The matrix of even attention: row t has t + 1 weights of 1 / (t + 1)."""
    return np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]


def entropy(P):
    """H = -1/T sum_ts P_ts log2 P_ts, in bits: 0 if every token attends to one, 1/T log2 T! if
    evenly to all it sees."""
    return entr(P).sum(1).mean() / math.log(2)


def effective_rank(P):
    """exp of the entropy of the singular values, scaled to sum 1 (Roy and Vetterli 2007): 1 to
    T."""
    singular = np.linalg.svd(P, compute_uv=False)
    return float(np.exp(entr(singular / singular.sum()).sum()))


def spectral_gap(P):
    """1 - |lambda_2|. P is triangular, so its eigenvalues are its diagonal, and the first row gives
    lambda_1 = 1. What remains is one minus the largest weight that any later token has on itself: 0
    as soon as one looks at itself alone."""
    return float(1 - np.diag(P)[1:].max())


def weight_by_distance(P):
    """(T,): entry d is the mean weight on the token d back, over the tokens t >= d, which have one.
    0 is the token itself."""
    return np.array([P.diagonal(-d).mean() for d in range(len(P))])


def weight_on_first(P):
    """Mean weight on token 0 of all other tokens."""
    return P[1:, 0].mean()


def mean_distance(P):
    """How many tokens back the weight lies, on average over rows."""
    t = np.arange(len(P))
    return (P * (t[:, None] - t)).sum() / len(P)


def log_weights(P):
    """ln((t + 1) P_ts) of the visible weights above 0, row 0 aside, which has no choice.

    The paper's P is not causal and takes ln P_ts; here rows have t + 1 weights, which shifts their
    logarithms by -ln(t + 1) whatever the mechanism. So weights are taken relative to even ones."""
    t, s = np.tril_indices(len(P))
    t, P = t[1:], P[t, s][1:]
    return np.log((t[P > 0] + 1) * P[P > 0])


def normality(x):
    """How close a sample comes to a normal distribution: its mean, variance, skewness, excess
    kurtosis (both 0 for a normal), and ks, the largest difference between its distribution function
    and that of the normal with its mean and variance (Kolmogorov-Smirnov's statistic). The last
    three are None for a constant. No p-value: weights are not independent."""
    mean, std = x.mean(), x.std()
    shape = dict(skewness=None, kurtosis=None, ks=None)
    if std > 1e-6:  # below is float32's rounding
        ks = stats.kstest(x, "norm", (mean, std)).statistic
        shape = dict(skewness=stats.skew(x), kurtosis=stats.kurtosis(x), ks=ks)
    return dict(mean=mean, variance=std ** 2) | shape


def temperature_softmax(q, k):
    """1 / (sigma_q sigma_k) for the queries and keys (T, D) of a head, over tokens and channels: of
    independent ones, the scores q.k / sqrt(D) have the variance sigma_q^2 sigma_k^2."""
    return 1 / (q.std() * k.std())


def temperature_lln(q, k, alpha, beta):
    """1 / sqrt(alpha^2 sigma_q^2 + beta^2 sigma_k^2), LLN's; q, k (T, D)."""
    return 1 / math.hypot(alpha * q.std(), beta * k.std())


def describe(P):
    """Every measure of a matrix by name."""
    by_distance = weight_by_distance(P)
    return dict(
        entropy_bits=entropy(P),
        entropy_of_uniform=entropy(P) / entropy(uniform(len(P))),
        effective_rank=effective_rank(P),
        spectral_gap=spectral_gap(P),
        weight_on_self=by_distance[0],
        weight_on_previous=by_distance[1],
        weight_on_first=weight_on_first(P),
        mean_distance=mean_distance(P),
        log_weights=normality(log_weights(P)),
        weight_by_distance=by_distance.tolist(),
    )


def describe_signed(P):
    """Measures of a causal (T, T) matrix with weights of both signs; `row_sum` and `row_size` are
    the mean sums of P and |P| in a row. A row of zeros has no weight anywhere."""
    sizes = np.abs(P).sum(1, keepdims=True)
    shares = np.divide(np.abs(P), sizes, out=np.zeros_like(P), where=sizes > 0)
    by_distance = weight_by_distance(shares)
    return dict(
        negative=shares[P < 0].sum() / len(P),
        row_sum=P.sum(1).mean(),
        row_size=sizes.mean(),
        effective_rank=effective_rank(P) if P.any() else 0.0,
        weight_on_self=by_distance[0],
        weight_on_previous=by_distance[1],
        weight_on_first=weight_on_first(shares),
        mean_distance=mean_distance(shares),
        weight_by_distance=by_distance.tolist(),
    )


def half_lives(g):
    """Tokens after which half is left, (heads, channels), for log decays g (heads, T, channels):
    ln 2 over the mean of -g over the text; at most LONGEST."""
    return math.log(2) / np.maximum(-g.mean(1), math.log(2) / LONGEST)


def saturation(values):
    """Of a gate's values in (0, 1): their mean, the shares below SATURATED and above 1 - SATURATED,
    and the shares in each of BINS equal parts of (0, 1)."""
    counts, _ = np.histogram(values, BINS, range=(0, 1))
    return dict(mean=values.mean(), below=(values < SATURATED).mean(),
                above=(values > 1 - SATURATED).mean(), histogram=(counts / values.size).tolist())
