"""tools/verdicts.py: intervals against their definition and scipy's, words that agree with them,
advice that holds, and how often a simulated verdict is false."""
import math
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from tools import verdicts
from tools.verdicts import ALPHA, LOOKS, WORLDS, World, coverage, false_words, in_words, judge

MARGIN = 0.02


def by_seed(losses, first=1):
    """{seed: its losses} of an array (S, B)."""
    return {first + s: list(row) for s, row in enumerate(losses)}


def two_arms(seed=0, S=5, B=20, difference=0.0, world=World()):
    """The losses of a baseline and an arm, drawn: two arrays (S, B)."""
    return world.losses(np.random.default_rng(seed), [difference], S, B)


def half_width_by_the_book(D, alpha):
    """Of the interval with alpha / 2 on each side, by sums over the table, one by one."""
    if verdicts.go_together(D) and D.shape[1] >= 16:
        D = np.array([[part.mean() for part in np.array_split(row, 8)] for row in D])
    S, B = D.shape
    whole = sum(D[s, b] for s in range(S) for b in range(B)) / (S * B)
    of_seed = [sum(D[s, b] for b in range(B)) / B for s in range(S)]
    of_block = [sum(D[s, b] for s in range(S)) / S for b in range(B)]
    ss_s = sum(B * (m - whole)**2 for m in of_seed)
    ss_b = sum(S * (m - whole)**2 for m in of_block)
    ss = sum((D[s, b] - whole)**2 for s in range(S) for b in range(B))
    MS_s, MS_b = ss_s / (S - 1), ss_b / (B - 1)
    MS_e = (ss - ss_s - ss_b) / ((S - 1) * (B - 1))
    t, u = stats.t.ppf(1 - alpha / 2, S - 1), stats.t.ppf(1 - alpha / 2, B - 1)
    return math.sqrt((t**2 * MS_s + u**2 * max(0, MS_b - MS_e)) / (S * B))


# -- the interval ---------------------------------------------------------------------------------

@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_the_interval_is_that_of_the_two_way_table(world):
    for seed in range(20):
        base, arm = two_arms(seed, S=2 + seed % 6, B=3 + seed, world=world)
        found = judge({"base": by_seed(base), "arm": by_seed(arm)}, "base")["arm"]
        half = half_width_by_the_book(arm - base, ALPHA)
        assert found.difference == pytest.approx((arm - base).mean())
        assert found.difference_low == pytest.approx(found.difference - half)
        assert found.difference_high == pytest.approx(found.difference + half)
        assert (found.seeds, found.blocks) == (len(base), 8 if found.joined else base.shape[1])


def test_without_blocks_it_is_scipys_of_pairs_and_shares_the_error():
    """m comparisons, at a look that may spend a part of it."""
    base, arm = two_arms(B=1)
    losses = {"base": by_seed(base), "arm": by_seed(arm), "other": by_seed(arm + 1)}
    pairs = stats.ttest_rel(arm[:, 0], base[:, 0])
    for given, error in (({}, 0.05 / 2), ({"comparisons": 5}, 0.05 / 5),
                         ({"comparisons": 1}, 0.05),
                         ({"comparisons": 5, "weight": 0.2}, 0.05 * 0.2 / 5)):
        found = judge(losses, "base", **given)["arm"]
        expected = pairs.confidence_interval(1 - error)
        assert (found.difference_low, found.difference_high) == pytest.approx(tuple(expected))
    base, arm = base - base.mean(), arm - arm.mean()  # no difference at all
    losses = {"base": by_seed(base), "arm": by_seed(arm)}
    found = judge(losses, "base", margin=1.0)["arm"]
    expected = stats.ttest_rel(arm[:, 0], base[:, 0]).confidence_interval(1 - 2 * 0.05)
    assert found.word == "equivalent"
    assert (found.difference_low, found.difference_high) == pytest.approx(tuple(expected))


def test_what_a_seed_does_to_both_is_no_difference():
    """The seeds that both have are paired, whatever their order; the others are left out."""
    base, arm = two_arms(difference=0.03)
    alone = judge({"base": by_seed(base), "arm": by_seed(arm)}, "base")["arm"]
    shared = 10 * np.random.default_rng(1).standard_normal((5, 1))
    losses = {"base": by_seed(base + shared) | {9: [0.0] * 20},
              "arm": dict(reversed(by_seed(arm + shared).items())) | {8: [9.0] * 20}}
    found = judge(losses, "base")["arm"]
    assert found.seeds == 5 and found.word == alone.word
    assert found.difference_low == pytest.approx(alone.difference_low)


def test_one_seed_or_none_in_common_is_no_verdict():
    losses = {"base": {1: [1.0, 1.2], 2: [1.0, 1.3]}, "one": {2: [0.5, 0.5], 3: [0.1, 0.1]},
              "none": {3: [1.5, 1.5]}}
    found = judge(losses, "base", margin=MARGIN)
    assert {label: verdict.word for label, verdict in found.items()} == {
        "base": "baseline", "one": "one seed", "none": "undecided"}
    assert found["one"].difference == pytest.approx(0.5 - 1.15)
    assert found["none"].difference == pytest.approx(1.5 - 1.125)
    assert in_words(found["none"]) == "undecided: no seed in common"
    assert {verdict.difference_low for verdict in found.values()} == {None}


def test_seeds_without_any_spread_are_no_fault():
    same = {1: [1.0], 2: [1.1]}
    losses = {"base": same, "same": same, "higher": {1: [1.5], 2: [1.6]}}
    words = {label: v.word for label, v in judge(losses, "base", margin=MARGIN).items()}
    assert words == {"base": "baseline", "same": "equivalent", "higher": "worse"}
    assert in_words(judge(losses, "base")["same"]) == "undecided: more than 100 seeds"


# -- the words ------------------------------------------------------------------------------------

def test_the_word_and_its_interval_agree():
    """Over differences and spreads of all sizes; every word occurs, also within the margin."""
    words = []
    for seed in range(400):
        draw = np.random.default_rng(seed)
        scale = 10 ** draw.uniform(-3, 0)
        world = World(seeds=0.02 * scale, blocks=0.03 * scale, rest=0.03 * scale)
        base, arm = world.losses(draw, [draw.normal(0, MARGIN)], int(draw.integers(2, 13)), 10)
        losses = {"base": by_seed(base), "arm": by_seed(arm)}
        found = judge(losses, "base", MARGIN, comparisons=int(draw.integers(1, 6)))["arm"]
        low, high = found.difference_low, found.difference_high
        inside = -MARGIN <= low and high <= MARGIN
        if found.word == "better":
            assert high < 0
        elif found.word == "worse":
            assert low > 0
        else:
            assert low <= 0 <= high or inside
            assert found.word == ("equivalent" if inside else "undecided")
        assert found.within_margin == (inside and found.word in ("better", "worse"))
        assert (found.missing is not None) == (found.word == "undecided")
        words.append(in_words(found).split(":")[0])
    assert set(words) == {"better", "worse", "equivalent", "undecided", "better, within the margin",
                          "worse, within the margin"}


def test_nothing_is_equivalent_without_a_margin():
    base, arm = two_arms()
    losses = {"base": by_seed(base), "arm": by_seed(arm - arm.mean() + base.mean())}
    assert judge(losses, "base", margin=1.0)["arm"].word == "equivalent"
    assert judge(losses, "base")["arm"].word == "undecided"


def seeds_like(S, mean, variance):
    """Losses of S seeds, one block: a baseline of 0, and an arm of exactly this mean and variance
    over the seeds."""
    values = np.random.default_rng(S).standard_normal(S)
    values = (values - values.mean()) / values.std(ddof=1) * math.sqrt(variance) + mean
    return {"base": by_seed(np.zeros((S, 1))), "arm": by_seed(values[:, None])}


@pytest.mark.parametrize("difference, spread", [
    (1.0, 0.5), (0.015, 0.014), (0.018, 0.03), (0.0, 0.03), (0.012, 0.02), (0.5, 0.9)])
def test_as_many_seeds_as_advised_decide(difference, spread):
    """If they come out as those before did; with one fewer they do not."""
    first = judge(seeds_like(3, difference, spread**2), "base", MARGIN)["arm"]
    about, S, seeds = first.missing.split()
    assert (first.word, about, seeds) == ("undecided", "about", "seeds")
    for n, is_enough in ((int(S), True), (int(S) - 1, False)):
        then = judge(seeds_like(n, difference, spread**2), "base", MARGIN)["arm"]
        assert (then.word != "undecided") == is_enough, n


def test_advice_has_an_end():
    """A difference on the border of the margin, and text that differs more than seeds can mend."""
    found = judge(seeds_like(3, 0.001, 0.2**2), "base", MARGIN)["arm"]
    assert found.missing == "more than 100 seeds"
    base, arm = two_arms(world=World(seeds=0.001, blocks=0.2, rest=0.01))
    arm += base.mean() - arm.mean() + 0.01
    losses = {"base": by_seed(base), "arm": by_seed(arm)}
    assert in_words(judge(losses, "base", MARGIN)["arm"]) == "undecided: more text"


def test_neighbouring_blocks_that_differ_alike_are_joined():
    """Of independent blocks one table in six is, of smooth ones every one; never of few blocks."""
    draw = np.random.default_rng(0)
    joined = []
    for _ in range(200):
        steps = draw.standard_normal((5, 51))
        smooth = steps + np.roll(steps, 1, axis=1)  # r about 1/2
        for D in (steps, smooth):
            found = judge({"base": by_seed(0 * D), "arm": by_seed(D)}, "base")["arm"]
            centred = D.mean(axis=0) - D.mean()
            expected = np.dot(centred[1:], centred[:-1]) / np.dot(centred, centred)
            assert found.autocorrelation == pytest.approx(expected)
            assert found.joined == (expected > 51**-0.5)
            assert found.blocks == (8 if found.joined else 51)
            assert found.difference == pytest.approx(D.mean())
            joined.append(found.joined)
        few = judge({"base": by_seed(0 * D[:, :15]), "arm": by_seed(D[:, :15])}, "base")["arm"]
        assert (few.joined, few.blocks) == (False, 15)
    assert 0.08 < np.mean(joined[::2]) < 0.25 and np.mean(joined[1::2]) > 0.95
    assert judge(seeds_like(3, 0, 1), "base")["arm"].autocorrelation is None


def test_a_margin_in_bits_per_byte_is_one_in_nats_per_token():
    """Of a text whose tokens have four bytes."""
    scores = {"report": {"loss": 3.0, "bpb": 3.0 / math.log(2) / 4, "accuracy": None}}
    assert verdicts.margin_in_nats(0.03, scores) == pytest.approx(0.03 * 4 * math.log(2))
    scores = {"report": {"loss": 3.0, "bpb": None, "accuracy": 0.5}}
    assert verdicts.margin_in_nats(0.03, scores) is None


# -- how often they are false ---------------------------------------------------------------------

NORMAL = [name for name, world in WORLDS.items() if not world.skewed and not world.scenes]


def test_the_looks_spend_the_error_once():
    assert sum(LOOKS.values()) == pytest.approx(1)
    assert list(LOOKS) == [5, 8, 12]


def test_an_arm_that_is_decided_is_not_looked_at_again():
    """The first five seeds say better, all twelve would say worse."""
    losses = np.ones((3, 12, 10))
    losses[1, :5], losses[1, 5:] = 0.9, 9.0
    losses[1:] += np.random.default_rng(0).normal(0, 1e-3, (2, 12, 10))
    losses[2, :, 0] = np.linspace(0, 2, 12)
    words = verdicts.words_of_looks(losses, MARGIN)
    assert words[1] == "better" and judge(
        {0: by_seed(losses[0]), 1: by_seed(losses[1])}, 0)[1].word != "better"


@pytest.mark.parametrize("difference", [0.0, MARGIN], ids=["none", "the margin"])
@pytest.mark.parametrize("m", [1, 5])
def test_few_simulated_tables_have_a_false_word(m, difference):
    """Where seeds decide, so that nothing but the looks and comparisons spends the error: at most
    0.05, and two and a half standard deviations of 300 tables."""
    rate = false_words(WORLDS["mostly seeds"], difference, m, MARGIN, B=10, tables=300)
    assert rate <= 0.05 + 0.032


def test_the_interval_covers_where_one_over_seeds_alone_does_not():
    both, alone = coverage(WORLDS["mostly text"], S=5, draws=400)
    assert both >= 0.93 and alone < 0.5
    both, alone = coverage(WORLDS["mostly seeds"], S=5, draws=400)
    assert both >= alone >= 0.93


def test_the_command_prints_the_rates(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["verdicts", "--tables=2"])
    verdicts.main()
    out = capsys.readouterr().out
    assert all(out.count(f"\n{name} ") == 2 for name in WORLDS) and "12 seeds" in out


def recorded_rate(name, m, difference):
    """That of results/verdicts.txt, which is what python -m tools.verdicts prints."""
    lines = (ROOT / "results/verdicts.txt").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(name) and "%" in line]
    return line[len(name):].split()[2 * (difference > 0) + (m == 5)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMAL)
@pytest.mark.parametrize("difference", [0.0, MARGIN, -MARGIN])
@pytest.mark.parametrize("m", [1, 5])
def test_at_most_5_percent_of_simulated_tables_have_a_false_word(name, m, difference):
    rate = false_words(WORLDS[name], difference, m, MARGIN, tables=2000)
    print(f"{name}, {m} arms, difference {difference}: {rate:.3f}")
    assert rate <= 0.05
    if difference >= 0:
        assert recorded_rate(name, m, difference) == f"{rate:.1%}"


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 5])
def test_text_in_scenes_costs_little(m, monkeypatch):
    """Where blocks are like their neighbours: stated, no promise; many were false without
    joining them."""
    rate = false_words(WORLDS["text in scenes"], 0.0, m, MARGIN, tables=2000)
    print(f"{m} arms: {rate:.3f}")
    assert rate <= 0.06
    assert recorded_rate("text in scenes", m, 0.0) == f"{rate:.1%}"
    monkeypatch.setattr(verdicts, "in_stretches", lambda D: D)
    assert false_words(WORLDS["text in scenes"], 0.0, m, MARGIN, tables=200) > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMAL)
@pytest.mark.parametrize("S", [3, 5, 8, 12])
def test_the_intervals_cover(name, S):
    both, alone = coverage(WORLDS[name], S, draws=4000)
    print(f"{name}, {S} seeds: {both:.3f}, over seeds alone {alone:.3f}")
    assert both >= 0.94  # 0.95, and three standard deviations of 4,000 draws


@pytest.mark.slow
@pytest.mark.parametrize("m, limit", [(1, 0.10), (5, 0.20)])
def test_skewed_seeds_are_more_often_false(m, limit):
    """Arms of whose runs a few go wrong, against a baseline of which none does: stated, no
    promise."""
    rate = false_words(WORLDS["skewed alone"], 0.0, m, MARGIN, tables=2000)
    print(f"{m} arms: {rate:.3f}")
    assert 0.05 < rate < limit
    assert recorded_rate("skewed alone", m, 0.0) == f"{rate:.1%}"
