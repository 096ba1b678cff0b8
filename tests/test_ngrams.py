"""Counted n-grams: a slow version with dictionaries agrees, probabilities sum to one, and the lines
are those of the data that a run reports on."""
import json
import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from conftest import ROOT

from base.errors import BadInput
from data import load_dataset
from tools import ngrams
from tools.ngrams import count_lines, held_out_losses, ngram_losses, probabilities
from training.run_folder import data_sha256

# -- counting -------------------------------------------------------------------------------------


class Slow:
    """The formulas of tools/ngrams.py as they stand there: P(w | c) by n-grams of a list."""

    def __init__(self, train, vocab_size):
        self.train, self.vocab_size = tuple(train), vocab_size

    def counts(self, n, of_order):
        """{n-gram: a} of a model of that order."""
        grams = [self.train[i:i + of_order] for i in range(len(self.train) - of_order + 1)]
        if n == of_order:
            return Counter(grams)
        longer = {self.train[i:i + n + 1] for i in range(len(self.train) - n)}
        return Counter(gram[1:] for gram in longer)

    def discount(self, counts, a):
        n = Counter(counts.values())
        if not n[1] or not n[2] or not n[3] or not n[4]:
            return 0.5
        y = n[1] / (n[1] + 2 * n[2])
        i = min(a, 3)
        return min(max(i - (i + 1) * y * n[i + 1] / n[i], 0.1), i)

    def p(self, word, before, n, of_order):
        """P_n(word | the last n - 1 of before), those there are."""
        if n == 0:
            return 1 / self.vocab_size
        lower = self.p(word, before, n - 1, of_order)
        if len(before) < n - 1:
            return lower
        context = tuple(before[len(before) - n + 1:])
        counts = self.counts(n, of_order)
        after = {gram[-1]: a for gram, a in counts.items() if gram[:-1] == context}
        if not after:
            return lower
        freed = sum(self.discount(counts, a) for a in after.values())
        kept = 0
        if word in after:
            kept = after[word] - self.discount(counts, after[word])
        return (kept + freed * lower) / sum(after.values())


def small_text(n, seed=0):
    """Tokens with a memory of two, of which 9 of 12 symbols are frequent and one never occurs."""
    rng = np.random.default_rng(seed)
    tokens = [0, 1]
    for _ in range(n - 2):
        drawn = min(int(rng.zipf(1.8)) - 1, 10)
        tokens.append((tokens[-2] * 3 + tokens[-1] + drawn) % 11 if drawn < 8 else drawn)
    return np.array(tokens, dtype=np.uint16)


def test_counting_is_that_of_the_slow_formulas():
    text = small_text(900)
    train, val, V = text[:860], text[860:], 12
    slow = Slow(train.tolist(), V)
    discounted = set()
    for n, found in zip(range(1, 5), probabilities(train, val, V)):
        expected = [slow.p(val[i], val[:i].tolist(), n, n) for i in range(1, len(val))]
        assert found == pytest.approx(expected, rel=1e-12)
        discounted.add(slow.discount(slow.counts(n, n), 1))
    assert len(discounted - {0.5}) > 1  # the formula for discounts was used too


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_probabilities_sum_to_one(n):
    """After contexts that were seen, that were not, and that are shorter than the n-gram."""
    train, V = small_text(300), 12
    for before in ([11], [3], train[5:12].tolist(), [1, 11, 0, 11, 5, 2, 11], [4, 4, 4, 11]):
        total = 0
        for word in range(V):
            *_, last = islice(probabilities(train, np.array([*before, word]), V), n)
            assert last[-1] > 0
            total += last[-1]
        assert total == pytest.approx(1, abs=1e-12)


def test_counting_in_closed_form():
    chain = np.array([0, 1] * 500 + [0], dtype=np.uint16)  # each symbol says the next
    unigram, bigram = islice(ngram_losses(chain, chain, 2), 2)
    assert unigram == pytest.approx(math.log(2), abs=1e-5) and bigram < 2e-3
    even = np.random.default_rng(1).integers(8, size=40000)  # no symbol says anything
    unigram, bigram = islice(ngram_losses(even[:30000], even[30000:], 8), 2)
    assert unigram == pytest.approx(math.log(8), abs=2e-3)
    assert bigram == pytest.approx(math.log(8), abs=4e-3)


def test_the_order_is_chosen_without_the_validation_split(shakespeare_char):
    data = load_dataset("shakespeare_char", 64)
    train = data.train[:20000]
    losses = held_out_losses(train, data.vocab_size)
    best = int(np.argmin(losses)) + 1
    assert best == len(losses) - 1 and 3 <= best <= 6
    expected = list(islice(ngram_losses(train[:18000], train[18000:], data.vocab_size), best))
    assert losses[:best] == expected


# -- the lines ------------------------------------------------------------------------------------

REPORTED = {"by_block": [2.0, 2.1]}


def config_of(data):
    return {"dataset": data.name, "data_sha256": data_sha256(data)}


def test_the_kept_lines_are_of_the_data(shakespeare_char):
    """Their unigrams and bigrams; the slow test has all orders."""
    data = load_dataset("shakespeare_char", 64)
    kept = json.loads((ROOT / "results/lines.json").read_text())["shakespeare_char"]
    losses = list(islice(ngram_losses(data.train, data.val, data.vocab_size), 2))
    assert kept["by_order"][:2] == pytest.approx(losses, rel=1e-9)
    assert kept["unigram"] == pytest.approx(3.347, abs=0.001)
    assert ngrams.reference_lines(config_of(data), REPORTED) == {
        "unigram": kept["unigram"], "7-gram interpolated": kept["best"]["loss"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_the_kept_lines_are_those_that_are_counted(name, shakespeare_char):
    kept = json.loads((ROOT / "results/lines.json").read_text())[name]
    found = count_lines(load_dataset(name, 64))
    assert found.keys() == kept.keys() and found["data_sha256"] == kept["data_sha256"]
    assert found["best"] == pytest.approx(kept["best"], rel=1e-9)
    for key in ("by_order", "held_out_by_order"):
        assert found[key] == pytest.approx(kept[key], rel=1e-9)


@pytest.fixture
def letters(here, monkeypatch, tmp_path):
    """That data set of `home`, with an empty results/ beside."""
    monkeypatch.setattr(ngrams, "LINES", tmp_path / "results" / "lines.json")
    ngrams.lines_of.cache_clear()
    yield load_dataset("letters", 16)
    ngrams.lines_of.cache_clear()


def test_lines_that_are_not_kept_are_counted(letters):
    config = config_of(letters)
    lines = ngrams.reference_lines(config, REPORTED)
    best = count_lines(letters)["best"]
    assert lines[f"{best['order']}-gram interpolated"] == best["loss"]
    assert 0 < best["loss"] < lines["unigram"] < math.log(28)
    assert not ngrams.LINES.exists()
    # of other tokens, of none that are here, and of less than the whole split, nothing is known
    for unknown in ({"data_sha256": "0" * 64}, {"data_sha256": None}, {"dataset": "nowhere"}):
        assert ngrams.reference_lines(config | unknown, REPORTED) == {}
    for scores in ({"by_block": None}, {}):
        assert ngrams.reference_lines(config, scores) == {}


def test_lines_of_a_recall_task():
    lines = ngrams.reference_lines({"dataset": "mqar"}, {"by_block": None})
    assert lines["guess"] == pytest.approx(math.log(32))


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["ngrams", *arguments])
    capsys.readouterr()
    ngrams.main()
    return capsys.readouterr().out


def test_the_command_prints_and_keeps_them(letters, monkeypatch, capsys):
    out = command(monkeypatch, capsys, "--dataset=letters")
    lines = count_lines(letters)
    for loss in (*lines["by_order"], *lines["held_out_by_order"]):
        assert f" {loss:.4f}" in out
    [best] = [line for line in out.splitlines() if "the best order" in line and "<-" in line]
    assert best.split()[0] == str(lines["best"]["order"])
    assert not ngrams.LINES.exists()

    command(monkeypatch, capsys, "--dataset=letters", "--keep")
    command(monkeypatch, capsys, "--dataset=digits", "--keep")
    kept = json.loads(ngrams.LINES.read_text())
    assert sorted(kept) == ["digits", "letters"] and kept["letters"] == lines
    changed = lines["best"] | {"loss": 1.25}  # what is kept is not counted again
    ngrams.LINES.write_text(json.dumps({"letters": lines | {"best": changed}}))
    ngrams.lines_of.cache_clear()
    assert 1.25 in ngrams.reference_lines(config_of(letters), REPORTED).values()


@pytest.mark.parametrize("arguments, expected", [
    ([], "give --dataset"), (["--dataset=nowhere"], "no data set 'nowhere'"),
    (["--dataset=mqar"], "is a recall task"), (["--order=3"], "no option --order"),
])
def test_bad_input_gets_one_line(arguments, expected, letters, here, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, capsys, *arguments)
    line = capsys.readouterr().err
    assert exit.value.code == 2 and expected in line and line.count("\n") == 1
    assert not list(here.iterdir())


def test_texts_too_large_or_too_short_to_count(letters, monkeypatch):
    monkeypatch.setattr(ngrams, "MOST_TOKENS", 1000)
    with pytest.raises(BadInput, match="data/letters: counting takes texts of 22 to 1,000 tokens"):
        count_lines(letters)
    assert ngrams.reference_lines(config_of(letters), REPORTED) == {}


@pytest.mark.parametrize("damaged", [
    "{", "[]", '{"letters": 3}', '{"letters": {"data_sha256": "a", "unigram": 1.0}}',
    '{"letters": {"data_sha256": "a", "unigram": "1", "best": {"order": 2, "loss": 1.0}}}',
    '{"letters": {"data_sha256": "a", "unigram": 1.0, "best": {"order": 2, "loss": -1.0}}}'])
def test_damaged_lines(damaged, letters):
    ngrams.LINES.parent.mkdir()
    ngrams.LINES.write_text(damaged)
    with pytest.raises(BadInput, match="lines.json is damaged: .*get it anew, or remove it"):
        ngrams.reference_lines(config_of(letters), REPORTED)
