"""Whether losses over seeds and text differ from a baseline's, and in which of four words.

    better, worse    the interval of the difference is beyond 0
    equivalent       not so, and it is within a margin that was fixed beforehand
    undecided        neither; what is missing, seeds or text, is said

Run: python -m tools.verdicts        how often simulated verdicts are false   (half a minute)

Runs of one seed share their batches and the order of these, so arms are compared seed by seed, and
on the same blocks of text. Let D[s, b] be the difference of seed s on block b, of S seeds and B
blocks, and MS_s, MS_b, MS_e the mean squares of its two-way table without replication (seeds,
blocks, rest). The interval of the difference is mean(D) +- half:

    half^2 = (t^2 MS_s + u^2 max(0, MS_b - MS_e)) / (S B)

with Student's quantiles t and u for S - 1 and B - 1 degrees of freedom. Where seeds and blocks are
both drawn at random, (MS_s + MS_b - MS_e) / (S B) estimates the variance of mean(D) (Searle,
Casella, McCulloch 1992, Variance Components, ch. 4), and each part takes the quantile of its own
freedom. The interval speaks of other seeds and of other text of this kind; with one block it is the
t interval over seeds, and says nothing of other text.

That takes blocks to be independent. Where the differences of neighbouring ones go together, as
within a scene or a play, blocks are joined to 8 long stretches of text first (batch means: Law and
Kelton 2000, Simulation Modeling and Analysis, ch. 9).

An error of alpha = 0.05 weight / m is allowed to each of m comparisons (Bonferroni): alpha in all
for better and worse, alpha on each side for equivalent (two one-sided tests, Schuirmann 1987), of
which one alone can be false. The weights of the LOOKS add up to 1, so that looking three times,
with more seeds each time and until a word is found, keeps to 0.05.

In simulation at most 3 % of tables with normal seeds and independent blocks have a false word, and
the intervals cover 0.95 to 0.98; where each block is like the one before it, 6 % and 0.91 to 0.93.
Where a few runs of an arm go wrong (lognormal seeds, against a baseline without any) it is 5 to 9 %
of single comparisons, and 17 % of tables of five at worst: t takes seeds to be normal.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import math
import sys
from dataclasses import dataclass
from functools import cache
from statistics import stdev
from typing import Optional

import numpy as np
from scipy import stats

from base.command_line import parse_options
from base.errors import exit_on_bad_input
from base.options import checked, option

ALPHA = 0.05                         # false words that are allowed in a table or a claim
MARGIN_BPB = 0.03                    # of equivalent, in bits per byte, unless another is fixed
LOOKS = {5: 0.2, 8: 0.3, 12: 0.5}    # seeds: the share of alpha that is spent on looking then
MOST_SEEDS = 100                     # that are advised; beyond it is "more than"
STRETCHES = 8                        # that blocks are joined to where neighbours go together


@dataclass
class Verdict:
    """Of an arm against the baseline, losses in nats. The interval is the one that the word rests
    on, so the two agree; None with less than two seeds."""
    difference: float
    difference_low: Optional[float] = None
    difference_high: Optional[float] = None
    word: str = "one seed"        # better, worse, equivalent, undecided, baseline, leaks
    within_margin: bool = False   # better or worse, and the interval is within the margin
    missing: Optional[str] = None  # of undecided: "about 9 seeds", "more text"
    seeds: int = 0                # that both have
    blocks: int = 1               # of text that it is judged by; 1: the text is not counted
    autocorrelation: Optional[float] = None  # of neighbouring blocks' differences
    joined: bool = False          # to STRETCHES, for that


@dataclass
class Spread:
    """What D[s, b] says of the difference and of how it varies."""
    difference: float
    of_seeds: float  # variance of one seed's mean over the blocks, the rest included
    of_text: float   # variance of a block's mean over ever so many seeds
    S: int
    B: int

    def half_width(self, tail, S=None):
        """Half the interval's width with an error of `tail` on each side; S: with as many seeds."""
        S = S or self.S
        square = 0.0 if S == math.inf else quantile(tail, S - 1)**2 * self.of_seeds / S
        if self.B > 1:
            square += quantile(tail, self.B - 1)**2 * self.of_text / self.B
        return math.sqrt(square)


@cache
def quantile(tail, freedom):
    """Of Student's t: what it exceeds with probability `tail`."""
    return float(stats.t.isf(tail, freedom))


def spread_of(D):
    """The Spread of an array (S, B), S at least 2."""
    S, B = D.shape
    of_seed, of_block = D.mean(axis=1), D.mean(axis=0)
    difference = D.mean()
    MS_s = B * ((of_seed - difference)**2).sum() / (S - 1)
    if B == 1:
        return Spread(float(difference), float(MS_s), 0.0, S, B)
    rest = D - of_seed[:, None] - of_block + difference
    MS_b = S * ((of_block - difference)**2).sum() / (B - 1)
    MS_e = (rest**2).sum() / ((S - 1) * (B - 1))
    return Spread(float(difference), float(MS_s / B), float(max(0, MS_b - MS_e) / S), S, B)


def autocorrelation(D):
    """Of neighbouring blocks' differences, each the mean over the seeds; None if there are fewer
    than three, or all are one."""
    of_block = D.mean(axis=0)
    away = of_block - of_block.mean()
    total = (away**2).sum()
    if len(away) < 3 or total == 0:
        return None
    return float((away[1:] * away[:-1]).sum() / total)


def go_together(D):
    """Whether neighbouring blocks differ alike, by more than a standard error of independent ones:
    joining these in vain, one table in six, costs less than missing those that are not."""
    r = autocorrelation(D)
    return r is not None and r > 1 / math.sqrt(D.shape[1])


def in_stretches(D):
    """D (S, B) of independent blocks: as it is, or (S, STRETCHES) if neighbours go together."""
    if D.shape[1] < 2 * STRETCHES or not go_together(D):
        return D
    parts = np.array_split(D, STRETCHES, axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)


def interval(values):
    """Half the width of the 95 % interval of a mean, by Student's t; None of a single value."""
    n = len(values)
    if n < 2:
        return None
    return quantile(0.025, n - 1) * stdev(values) / n**0.5


def margin_in_nats(bpb, scores):
    """A margin in bits per byte, in nats per token of the text that a run's scores are of. None of
    a recall task, which has no bytes."""
    report = scores["report"]
    if not report["bpb"]:
        return None
    return bpb * abs(report["loss"] / report["bpb"])


def in_words(verdict):
    """The word of a Verdict, and what goes with it."""
    if verdict.within_margin:
        return f"{verdict.word}, within the margin"
    return f"{verdict.word}: {verdict.missing}" if verdict.missing else verdict.word


# The words ------------------------------------------------------------------------------------

def judge(losses, baseline, margin=None, comparisons=None, weight=1.0):
    """{label: Verdict} of {label: {seed: [loss of each block of text, in nats]}}, all of as many
    blocks.

    margin: in nats; None: nothing is equivalent.
    comparisons: how many the error is shared by [default: all arms but the baseline].
    weight: the share of the error that this look may spend."""
    m = comparisons or max(1, len(losses) - 1)
    alpha = ALPHA * weight / m
    verdicts = {}
    for label, of_arm in losses.items():
        verdicts[label] = verdict_of(of_arm, losses[baseline], margin, alpha)
    verdicts[baseline] = Verdict(0.0, word="baseline", seeds=len(losses[baseline]))
    return verdicts


def verdict_of(losses, baseline, margin, alpha):
    """The Verdict of an arm and a baseline, each {seed: losses of the blocks}."""
    seeds = sorted(losses.keys() & baseline.keys())
    if not seeds:
        difference = np.mean(list(losses.values())) - np.mean(list(baseline.values()))
        return Verdict(float(difference), word="undecided", missing="no seed in common")
    D = np.array([losses[seed] for seed in seeds]) - np.array([baseline[seed] for seed in seeds])
    counted = in_stretches(D)
    verdict = Verdict(float(D.mean()), seeds=len(seeds), blocks=counted.shape[1],
                      autocorrelation=autocorrelation(D), joined=counted is not D)
    if len(seeds) == 1:
        return verdict
    spread = spread_of(counted)
    spread.difference = verdict.difference  # stretches may differ in length by a block
    verdict.word = word_of(spread, margin, alpha)
    half = spread.half_width(alpha if verdict.word == "equivalent" else alpha / 2)
    verdict.difference_low = spread.difference - half
    verdict.difference_high = spread.difference + half
    if verdict.word == "undecided":
        verdict.missing = what_is_missing(spread, margin, alpha)
    elif verdict.word != "equivalent" and margin is not None:
        verdict.within_margin = abs(spread.difference) + half <= margin
    return verdict


def word_of(spread, margin, alpha, S=None):
    """The word for a Spread; S: if as many seeds had come out like these."""
    distance = abs(spread.difference)
    if distance > spread.half_width(alpha / 2, S):
        return "better" if spread.difference < 0 else "worse"
    if margin is not None and distance + spread.half_width(alpha, S) <= margin:
        return "equivalent"
    return "undecided"


def what_is_missing(spread, margin, alpha):
    """In words, if the difference and its variances stay what they are."""
    if spread.B > 1 and word_of(spread, margin, alpha, math.inf) == "undecided":
        return "more text"
    for S in range(spread.S + 1, MOST_SEEDS + 1):
        if word_of(spread, margin, alpha, S) != "undecided":
            return f"about {S} seeds"
    return f"more than {MOST_SEEDS} seeds"


# How often they are false ---------------------------------------------------------------------

@dataclass
class World:
    """What losses are drawn from, in nats: an arm's seeds, its blocks, and what is of neither."""
    seeds: float = 0.01
    blocks: float = 0.03
    rest: float = 0.03
    skewed: bool = False  # the arms' seeds are lognormal, as some runs go wrong; the baseline's not
    scenes: float = 0.0   # how far a block is like the one before it: autocorrelation

    def losses(self, draw, differences, S, B):
        """An array (1 + arms, S, B): of a baseline, and of arms of these true differences."""
        A = len(differences) + 1
        seeds = draw.standard_normal((A, S, 1))
        if self.skewed:  # mean 0, standard deviation 1; a baseline as steady as any
            seeds[1:] = (np.exp(seeds[1:]) - math.exp(0.5)) / math.sqrt(math.e * (math.e - 1))
            seeds[0] = 0
        blocks = draw.standard_normal((A, 1, B))
        for b in range(1, B):
            new = math.sqrt(1 - self.scenes**2) * blocks[..., b]
            blocks[..., b] = self.scenes * blocks[..., b - 1] + new
        parts = self.seeds * seeds + self.blocks * blocks
        parts = parts + self.rest * draw.standard_normal((A, S, B))
        return 1.7 + np.array([0.0, *differences])[:, None, None] + parts


WORLDS = {
    "seeds and text": World(),
    "mostly seeds": World(seeds=0.01, blocks=0.003, rest=0.01),
    "mostly text": World(seeds=0.001, blocks=0.03, rest=0.01),
    "text in scenes": World(seeds=0.001, blocks=0.03, rest=0.01, scenes=0.6),
    "skewed seeds": World(seeds=0.01, blocks=0.003, rest=0.01, skewed=True),
    "skewed alone": World(seeds=0.01, blocks=0, rest=0, skewed=True),
}


def words_of_looks(losses, margin):
    """The last word for each arm of an array (1 + arms, seeds, B), the baseline first: an arm that
    is decided at a look is not looked at again."""
    m = len(losses) - 1
    words = {}
    for S, weight in LOOKS.items():
        left = [arm for arm in range(1, m + 1) if words.get(arm, "undecided") == "undecided"]
        known = {arm: dict(enumerate(losses[arm, :S])) for arm in [0, *left]}
        found = judge(known, 0, margin, comparisons=m, weight=weight)
        words.update({arm: found[arm].word for arm in left})
    return words


def is_false(word, difference, margin):
    """Whether a word is false where the true difference is known."""
    if word == "equivalent":
        return abs(difference) >= margin
    if word == "better":
        return difference >= 0
    return word == "worse" and difference <= 0


def false_words(world, difference, m, margin=0.02, B=50, tables=1000, seed=0):
    """The share of simulated tables with a false word, of m arms that truly differ from their
    baseline by `difference`, over the LOOKS."""
    draw = np.random.default_rng(seed)
    wrong = 0
    for _ in range(tables):
        losses = world.losses(draw, [difference] * m, max(LOOKS), B)
        words = words_of_looks(losses, margin).values()
        wrong += any(is_false(word, difference, margin) for word in words)
    return wrong / tables


def coverage(world, S, B=50, draws=1000, seed=0):
    """The share of simulated 95 % intervals that hold the true difference: (over seeds and text,
    over seeds alone)."""
    draw = np.random.default_rng(seed)
    held = np.zeros(2)
    for _ in range(draws):
        baseline, arm = world.losses(draw, [0.0], S, B)
        D = arm - baseline
        for i, counted in enumerate((in_stretches(D), D.mean(axis=1, keepdims=True))):
            spread = spread_of(counted)
            held[i] += abs(spread.difference) <= spread.half_width(ALPHA / 2)
    return held / draws


@checked
class SimulationOptions:
    tables: int = option(2000, "simulated tables, and intervals, for each line", ge=1)
    seed: int = option(0, "of what is drawn", ge=0)


@exit_on_bad_input("tools.verdicts")
def main():
    options, _, _ = parse_options(SimulationOptions, sys.argv[1:], __doc__.splitlines()[0],
                                  with_config_file=False)
    margin = 0.02
    print(f"tables with a false word, of {options.tables:,}: looks at "
          f"{', '.join(map(str, LOOKS))} seeds, 50 blocks, margin {margin} nats")
    print(f"{'':16} {'no difference':>22} {'one of the margin':>22}")
    print(f"{'':16} {'1 arm':>11}{'5 arms':>11} {'1 arm':>11}{'5 arms':>11}")
    for name, world in WORLDS.items():
        rates = []
        for difference in (0.0, margin):
            for m in (1, 5):
                rates.append(false_words(world, difference, m, margin, tables=options.tables,
                                         seed=options.seed))
        print(f"{name:16} {rates[0]:11.1%}{rates[1]:11.1%} {rates[2]:11.1%}{rates[3]:11.1%}")
    print(f"\n95 % intervals that hold the true difference, of {options.tables:,}: "
          "over seeds and text | over seeds alone")
    for name, world in WORLDS.items():
        texts = []
        for S in (3, 5, 8, 12):
            both, alone = coverage(world, S, draws=options.tables, seed=options.seed)
            texts.append(f"{S} seeds {both:.3f} | {alone:.3f}")
        print(f"{name:16} {'    '.join(texts)}")


if __name__ == "__main__":
    main()
