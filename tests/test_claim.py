"""tools/claim.py: cards are read strictly, words follow from the card and the records alone, and a
tiny claim goes from its card to its record on real runs."""
import contextlib
import importlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, content

from base.errors import BadInput
from mixers.parts.convolution import ShortConvolution
from model import GPT, GPTConfig, model_config
from tools import claim, claim_record, records, sweep_runs
from tools.claim_cards import (
    Arm, Card, find_file, mixer_file_sums, read_card, sha256_of)
from tools.claim_outcomes import findings, outcome_of_word
from tools.claim_table import COLUMNS, table_for_terminal
from tools.records import Record
from tools.sweep_cost import Cost
from tools.sweep_runs import Run
from tools.verdicts import LOOKS, Verdict, judge
from training import pretrained

CARDS = sorted((ROOT / "claims").glob("*.toml"))
FROM_NOTHING = [path for path in CARDS if path.stem != "ssa_smollm2"]
RECIPE = """
dataset, n_layer, n_head, n_embd, block_size = "letters", 1, 2, 16, 16
batch_size, max_iters, eval_interval, log_interval, warmup_iters = 4, 4, 4, 1, 1
eval_tokens = 2048
device = "cpu"
_helper = object()
"""
CARD = """
paper = "Nobody 2026"
claim = "lln is better"
recipe = "tiny.py"
baseline = "softmax"

[arms.softmax]
mixer = "softmax"

[arms.lln]
mixer = "lln"
lln_matching = "published"
prediction = "better"

[arms.linear]
mixer = "linear"
prediction = "equivalent"

[tune]
learning_rate = [1e-3, 2e-3]
"""
SHORT = CARD.replace("[arms.linear]", "[arms.pelican]").replace('"linear"', '"pelican"')
MIXER = """
from mixers import MIXERS, mixers_with
from mixers.softmax import Softmax
class Mine(Softmax):
    pass
MIXERS["mine"] = Mine
"""
BLOCKS = 12


@pytest.fixture
def write_card(tmp_path):
    """write_card(text, name="tried"): the path of a card in a repository of its own, with tiny.py
    and mine.py."""
    (tmp_path / "repository" / "claims").mkdir(parents=True)
    (tmp_path / "repository" / "tiny.py").write_text(RECIPE)
    (tmp_path / "repository" / "mine.py").write_text(MIXER)

    def write(text, name="tried"):
        path = tmp_path / "repository" / "claims" / f"{name}.toml"
        path.write_text(text)
        return path
    return write


# Cards ----------------------------------------------------------------------------------------

def test_there_are_cards():
    assert len(CARDS) >= 11


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_of_ours_can_be_run(path, tmp_path, monkeypatch):
    """train.py takes every arm at every rate, and the lines are short enough to be read. Nothing is
    fetched for it."""
    card = read_card(path)
    config = GPTConfig(vocab_size=49152, arch="llama", block_size=8192, n_head=9, n_embd=576)
    monkeypatch.setattr(pretrained, "read_config", lambda init_from: config)
    monkeypatch.chdir(ROOT)
    for arm in claim.arms_to_run(path, card).values():
        for rate in card.tune.get("learning_rate", [2e-3]):
            words = [f"--{name}={value}" for name, value in arm.items()]
            words.append(f"--learning_rate={rate}")
            Run(str(tmp_path / "none"), (card.recipe, *words)).options()
    assert all(len(line) <= 200 for line in path.read_text().splitlines())


def model_of(card, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [f"--{key}={value}" for key, value in card.options_of(name).items()]
    options = Run("none", (card.recipe, *words)).options()
    return GPT(model_config(options | {"vocab_size": 65}, "test"))


def test_the_linear_attentions_are_compared_at_equal_state(monkeypatch):
    card = read_card(ROOT / "claims/lln_beats_linear.toml")
    models = [model_of(card, name, monkeypatch) for name in card.arms]
    assert {model.state_bytes(64, torch.float32) for model in models} == {69632}
    assert len({sum(p.numel() for p in model.parameters()) for model in models}) == 1


@torch.no_grad()
def test_the_window_reaches_as_far_as_the_reduction(monkeypatch):
    """Four layers: the last of 12 outputs depends on the last 5 tokens, in both arms."""
    card = read_card(ROOT / "claims/reduction_window.toml")
    tokens = torch.randint(32, (1, 12)).repeat(13, 1)
    tokens[range(12), range(12)] += 32  # row i differs from the last one in token i
    for name in card.arms:
        logits, _ = model_of(card, name, monkeypatch).eval()(tokens)
        last = logits[:, -1]
        assert (last[:12] != last[12]).any(1).tolist() == 7 * [False] + 5 * [True], name


@torch.no_grad()
@pytest.mark.parametrize("path", FROM_NOTHING, ids=lambda path: path.stem)
def test_no_arm_starts_far_from_an_even_guess(path, monkeypatch):
    """As a low temperature before a head that is not zero would."""
    card = read_card(path)
    tokens, targets = torch.randint(65, (2, 4, 64))
    for arm in card.arms:
        loss = model_of(card, arm, monkeypatch).loss(tokens, targets)
        assert abs(loss - math.log(65)) < 1, arm


@pytest.mark.parametrize("name", ["deltanet_recalls", "gated_deltanet"])
def test_every_arm_beside_the_delta_rule_has_the_short_convolution(name, monkeypatch):
    card = read_card(ROOT / f"claims/{name}.toml")
    for arm in card.arms:
        model = model_of(card, arm, monkeypatch)
        taps = {m.taps for m in model.modules() if isinstance(m, ShortConvolution)}
        assert taps == {4}, arm


WRONG = {  # what is put in the place of what, and what the one line says
    "no TOML": ('paper = "Nobody 2026"', "paper = ", "no valid TOML"),
    "a name twice": ('paper = "Nobody 2026"', 'paper = "a"\npaper = "b"', "no valid TOML"),
    "unknown key": ("baseline =", "basline =", "'basline'; nearest: baseline"),
    "no paper": ('paper = "Nobody 2026"', "", "paper is missing"),
    "empty claim": ('"lln is better"', '""', "claim: "),
    "a number": ('"Nobody 2026"', "2026", "paper: "),
    "no recipe": ('recipe = "tiny.py"', "", "recipe is missing"),
    "baseline": ('baseline = "softmax"', 'baseline = "sofmax"', "'sofmax'; nearest: softmax"),
    "no arm's name": ("[arms.lln]", '[arms."../lln"]', "a name is of letters"),
    "hyphen": ("[arms.lln]", "[arms.lln-2]", "a name is of letters"),
    "mixer missing": ('mixer = "lln"\n', "", "arms.lln.mixer is missing"),
    "mixer unknown": ('mixer = "lln"', 'mixer = "lnn"', "'lnn'; nearest: lln"),
    "option unknown": ("lln_matching =", "lln_mathcing =", "nearest: lln_matching"),
    "option by another name": ("lln_matching =", "lr =", "nearest: learning_rate"),
    "option's value": ('"published"', '"publshed"', "arms.lln.lln_matching: "),
    "option's type": ('lln_matching = "published"', "dropout = 3", "arms.lln.dropout: "),
    "nan": ('lln_matching = "published"', "dropout = nan", "arms.lln.dropout: "),
    "a list": ('lln_matching = "published"', "dropout = [1]", "arms.lln.dropout"),
    "a date": ('lln_matching = "published"', "dropout = 2026-01-01", "arms.lln.dropout"),
    "tuned and set": ('lln_matching = "published"', "learning_rate = 0.1", "is tuned"),
    "seed": ('lln_matching = "published"', "seed = 1", "the looks say"),
    "holdout": ('lln_matching = "published"', "holdout = 0.1", "tuning runs have it"),
    "folder": ('lln_matching = "published"', 'out_dir = "x"', "says nothing of the experiment"),
    "length": ('lln_matching = "published"', "block_size = 8", "[options]"),
    "prediction": ('prediction = "better"', 'prediction = "beter"', "arms.lln.prediction: "),
    "of the baseline": ('mixer = "softmax"', 'mixer = "softmax"\nprediction = "worse"',
                        "predict the others"),
    "grid": ("[1e-3, 2e-3]", "[1e-3]", "tune.learning_rate"),
    "grid of texts": ("[1e-3, 2e-3]", '["a", "b"]', "learning_rate"),
    "grid below 0": ("[1e-3, 2e-3]", "[-1e-3, 2e-3]", "learning_rate"),
    "grid of what": ("learning_rate = [", "learning_rat = [", "nearest: learning_rate"),
    "tuned data": ("learning_rate = [1e-3, 2e-3]", 'dataset = ["a", "b"]', "dataset"),
    "looks": ("[tune]", "looks = [5, 5]\n[tune]", "arms.linear"),  # of the arm it stands in
    "parameters": ('prediction = "better"', 'prediction = "better"\nparameters_at_most = -1.0',
                   "arms.lln.parameters_at_most: "),
    "counting": ('prediction = "better"', 'prediction = "better"\nbeats_counting = "yes"',
                 "arms.lln.beats_counting: "),
}
WRONG_AT_TOP = {
    "looks fall": ("looks = [5, 4]", "looks: [5, 4] does not rise"),
    "look of one": ("looks = [1, 2]", "looks.0: "),
    "no look": ("looks = []", "looks: "),
    "looks of text": ('looks = ["5"]', "looks.0: "),
    "no seed to tune by": ("tune_seeds = 0", "tune_seeds: "),
    "margin": ("margin_bpb = 0.0", "margin_bpb: "),
    "margin of text": ('margin_bpb = "0.03"', "margin_bpb: "),
    "margin inf": ("margin_bpb = inf", "margin_bpb: "),
    "options": ("options = 3", "options: "),
    "options unknown": ("options = {n_layers = 2}", "nearest: n_layer"),
    "mixer in options": ('options = {mixer = "lln"}', "an arm says its own"),
    "predicted for nobody": ('prediction = {lnn = "better"}', "'lnn'; nearest: lln"),
    "predicted twice": ('prediction = {lln = "better"}', "both predict"),
    "prediction no table": ('prediction = "better"', "'prediction'"),
    "leaking baseline": ("options = {allow_leak = true}", "allowed to leak"),
    "arms": ("arms = 3", "no valid TOML"),  # there is a table of that name
}


def assert_refused(path, words):
    with pytest.raises(BadInput) as error:
        read_card(path)
    message = str(error.value)
    assert words in message and str(path) in message and "\n" not in message, message
    assert len(message) < 600


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_in_a_card_is_refused_by_name(write_card, wrong):
    before, after, words = WRONG[wrong]
    assert CARD.count(before) >= 1
    assert_refused(write_card(CARD.replace(before, after, 1)), words)


@pytest.mark.parametrize("wrong", WRONG_AT_TOP)
def test_what_cannot_be_at_the_top_of_a_card_is_refused_by_name(write_card, wrong):
    line, words = WRONG_AT_TOP[wrong]
    assert_refused(write_card(f"{line}\n{CARD}"), words)


def test_a_card_that_predicts_nothing_is_refused(write_card):
    text = "\n".join(line for line in CARD.splitlines() if "prediction" not in line)
    assert_refused(write_card(text), "no arm has a prediction")


def test_files_that_are_no_cards_are_refused(write_card, tmp_path):
    assert_refused(write_card("a = " + "[" * 5000), "no valid TOML")
    assert_refused(write_card(f'{CARD}\n# {"x" * 2**16}'), "at most")
    path = write_card("")
    path.write_bytes(CARD.encode() + b"# \xff")
    assert_refused(path, "no valid TOML")
    for name in ("card.json", ".toml", "a b.toml", "..toml", "x" * 65 + ".toml"):
        with pytest.raises(BadInput, match="is no card"):
            read_card(tmp_path / name)
    with pytest.raises(BadInput, match="cannot read"):
        read_card(tmp_path / "none.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(BadInput, match="cannot read|no regular file"):
        read_card(tmp_path / "folder.toml")


def test_whatever_stands_in_a_card_is_read_or_is_one_line(write_card):
    """Two hundred cards with lines of it, or their values, replaced by others or by junk."""
    draw = random.Random(3)
    values = ["nan", "inf", "-1", "1e999", "9" * 5000, "true", '"\\u0000"', '"' + "x" * 5000 + '"',
              "[]", "[[]]", "{}", "{a = 1}", "1979-05-27T07:32:00Z", '"""\n"""', "'\\'", ""]
    lines = CARD.splitlines()
    read = 0
    for _ in range(200):
        changed = list(lines)
        for _ in range(draw.randint(1, 3)):
            i = draw.randrange(len(changed))
            key, equals, value = changed[i].partition(" = ")
            if equals and draw.random() < 0.7:
                changed[i] = f"{key} = {draw.choice(values)}"
            else:
                changed[i] = draw.choice([*lines, *(f"{key} = {v}" for v in values)])
        path = write_card("\n".join(changed))
        try:
            read_card(path)
            read += 1
        except BadInput as error:
            assert "\n" not in str(error) and str(path) in str(error)
    assert 2 < read < 180  # or the test tries nothing


def card_sha256(path):
    card = read_card(path)
    return sha256_of(card, mixer_file_sums(path, card))


def test_predictions_may_stand_in_a_table_of_their_own(write_card):
    plain = read_card(write_card(CARD))
    text = "\n".join(line for line in CARD.splitlines() if "prediction" not in line)
    path = write_card(f'{text}\n[prediction]\nlln = "better"\nlinear = "equivalent"\n')
    assert read_card(path) == plain
    assert sha256_of(plain, {}) == card_sha256(path)


def test_the_checksum_is_of_what_decides(write_card):
    """Texts, order and comments may be mended; everything else makes another claim."""
    def checksum(text, code=MIXER):
        path = write_card(text)
        (path.parents[1] / "mine.py").write_text(code)
        return card_sha256(path)

    mine = CARD.replace('mixer = "linear"', 'mixer = "mine"\nmixer_file = "mine.py"')
    arm = '[arms.softmax]\nmixer = "softmax"\n'
    same = [CARD.replace("lln is better", "the best"), CARD + "# thus", f"note = 'x'\n{CARD}",
            CARD.replace(arm, "") + arm,
            f"tune_seeds = 1\nmargin_bpb = 0.03\nlooks = [5, 8, 12]\n{CARD}"]
    other = [f"margin_bpb = 0.02\n{CARD}", f"tune_seeds = 3\n{CARD}", f"looks = [5, 8]\n{CARD}",
             f"options = {{dropout = 0.1}}\n{CARD}",
             CARD.replace('"published"', '"table"'), CARD.replace("2e-3]", "4e-3]"),
             CARD.replace('"equivalent"', '"better"'), CARD.replace("arms.linear", "arms.linear2"),
             CARD.replace('"better"', '"better"\nbeats_counting = true'),
             CARD.replace('"better"', '"better"\nparameters_at_most = 1.0'), mine]
    assert {checksum(text) for text in same} == {checksum(CARD)}
    assert len({checksum(text) for text in [CARD, *other]}) == 1 + len(other)
    assert checksum(mine) != checksum(mine, MIXER + "# another")
    renamed = mine.replace("mine.py", "claims/../mine.py")
    assert checksum(renamed) == checksum(mine)  # the file's content counts, not its name


def test_every_key_is_explained():
    text = (ROOT / "docs" / "claims.md").read_text()
    for name in [*Card.model_fields, *Arm.model_fields]:
        assert f"`{name}`" in text or f"[{name}" in text, name


# Words ----------------------------------------------------------------------------------------

class Drawn:
    """In the place of tools.experiment.Experiment: records whose losses are drawn, their true means
    given by `means`, and a list of what was asked for."""
    means = {}
    spread = 0.01
    asked = []
    lacking = set()  # names of runs that fail
    kept = None      # whether the last runs keep their checkpoints

    def __init__(self, folder, config_file, common, arms, tune=None, at_once=None, max_hours=None,
                 keep_checkpoints=False, tune_seeds=1):
        type(self).tune_seeds = tune_seeds
        self.folder, self.config_file, self.arms = Path(folder), config_file, common and {} or arms
        self.keep_checkpoints = keep_checkpoints
        self.configs = {}  # arm -> what config.json would say

    def cost(self, seeds):
        return Cost(len(self.arms) * len(seeds), 0.01 * len(self.arms) * len(seeds))

    def tune(self):
        assert not self.keep_checkpoints  # of the runs to tune by nothing else is asked
        type(self).asked.append(("tune", sorted(self.arms)))
        return {arm: {"learning_rate": 0.002} for arm in self.arms}

    def run(self, chosen, seeds):
        type(self).asked.append((sorted(chosen), max(seeds)))
        type(self).kept = self.keep_checkpoints
        return [self.record(arm, chosen[arm], seed) for arm in chosen for seed in seeds
                if f"{arm}-{seed}" not in self.lacking]

    def record(self, arm, chosen, seed):
        name = f"{arm}-lr0.002-seed{seed}"
        if arm not in self.configs:
            words = [f"--{key}={value}" for key, value in (self.arms[arm] | chosen).items()]
            self.configs[arm] = Run("out/none", (self.config_file, *words)).options()
        config = self.configs[arm] | {"dtype": "float32", "device": "cpu", "seed": seed}
        draw = np.random.default_rng([seed, sorted(self.arms).index(arm), len(arm)])
        blocks = self.means[arm] + self.spread * (draw.normal() + draw.normal(size=BLOCKS))
        loss = float(blocks.mean())
        scores = {
            "weights": None, "vocab_size": 28, "iter": 4, "select": None,
            "report": {"loss": loss, "bpb": loss / np.log(2), "accuracy": None},
            "by_position": [loss] * 16, "by_block": blocks.tolist(), "by_cell": None,
        }
        metrics = [{"iter": 4, "val_loss": loss, "seconds": 36.0}]
        return Record(name, self.folder / name, config, metrics, json.loads(json.dumps(scores)))


@pytest.fixture
def drawn(monkeypatch):
    """The class Drawn, as new."""
    cls = type("Mine", (Drawn,), {"asked": [], "means": {}, "lacking": set()})
    monkeypatch.setattr(claim, "Experiment", cls)
    return cls


@pytest.fixture
def call(here, monkeypatch, capsys, tmp_path):
    """call(*arguments): (exit status, standard output, standard error) of tools.claim."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    lines = {"5-grams": 1.5, "unigram": 3.0}
    monkeypatch.setattr(claim_record, "reference_lines", lambda config, scores: lines)

    def run_it(*arguments):
        monkeypatch.setattr(sys, "argv", ["tools.claim", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            claim.main()
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err
    return run_it


@pytest.fixture
def claimed(tmp_path):
    """claimed(name="tried"): the content of claim.json."""
    def read(name="tried"):
        return json.loads((tmp_path / "results/claims" / name / "claim.json").read_text())
    return read


def test_decided_arms_stop_and_undecided_ones_go_on_to_the_next_look(
        write_card, drawn, call, claimed, tmp_path):
    """lln is far ahead and stops at 5 seeds; linear is where the baseline is, its seeds too far
    apart for the margin, and sees all three looks."""
    drawn.means = {"softmax": 1.7, "lln": 1.0, "linear": 1.7}
    drawn.spread = 0.05
    status, out, err = call(write_card(CARD))
    assert (status, err) == (0, "")
    everyone, left = ["linear", "lln", "softmax"], ["linear", "softmax"]
    assert drawn.asked == [("tune", everyone), (everyone, 5), (left, 8), (left, 12)]
    found = claimed()["arms"]
    assert found["lln"]["against_baseline"]["word"] == "better"
    assert (found["lln"]["against_baseline"]["look"], found["lln"]["runs"]) == (5, 5)
    assert found["lln"]["outcome"] == "confirmed"
    assert found["linear"]["against_baseline"]["word"] == "undecided"
    assert (found["linear"]["against_baseline"]["look"], found["softmax"]["runs"]) == (12, 12)
    assert claimed()["outcome"] == "undecided" and "tried: undecided" in out
    assert claimed()["chosen"]["lln"] == {"learning_rate": 0.002}
    assert claimed()["hours"] == pytest.approx({"softmax": 0.12, "linear": 0.12, "lln": 0.05})
    # the words are judge's with the look's share of the error, by two comparisons
    by_arm = claim_record.arms_of(records.read_records(tmp_path / "results/claims/tried"))
    for name, look in (("lln", 5), ("linear", 12)):
        losses = {arm: {seed: by_arm[arm][seed].scores["by_block"] for seed in range(1, look + 1)}
                  for arm in (name, "softmax")}
        bits = by_arm["softmax"][1].scores["report"]
        right = judge(losses, "softmax", 0.03 * bits["loss"] / bits["bpb"], 2, LOOKS[look])[name]
        word = dict(found[name]["against_baseline"])
        assert word.pop("look") == look and Verdict(**word) == right


@pytest.mark.parametrize("line, seeds", [("", 1), ("tune_seeds = 3\n", 3)])
def test_a_card_says_with_how_many_seeds_is_tuned(line, seeds, write_card, drawn, call):
    drawn.means = {"softmax": 1.7, "lln": 1.6, "linear": 1.7}
    path = write_card(f"{line}{CARD}")
    call(path)
    assert drawn.tune_seeds == seeds


def test_when_all_is_decided_nothing_more_runs(write_card, drawn, call, claimed):
    drawn.means = {"softmax": 1.7, "lln": 1.8, "linear": 1.7}
    drawn.spread = 0.001
    status, out, _ = call(write_card(CARD))
    assert status == 0 and [asked[1] for asked in drawn.asked[1:]] == [5]
    assert claimed()["arms"]["lln"]["outcome"] == "refuted"
    assert claimed()["arms"]["linear"]["outcome"] == "confirmed"
    assert claimed()["outcome"] == "refuted"
    drawn.asked.clear()
    before = claimed()
    assert call(write_card(CARD))[0] == 0 and claimed() == before
    assert drawn.asked == [(["linear", "lln", "softmax"], 5)]  # and the tuning stands


def test_a_changed_card_recipe_or_mixer_file_is_a_new_claim(write_card, drawn, call, claimed):
    text = CARD.replace('mixer = "linear"', 'mixer = "mine"\nmixer_file = "mine.py"')
    path = write_card(text)
    drawn.means = {"softmax": 1.7, "lln": 1.8, "linear": 1.7}
    assert call(path)[0] == 0
    before = claimed()
    write_card(text.replace("lln is better", "lln is much better"))  # a text decides nothing
    assert call(path)[0] == 0 and claimed()["card"]["claim"] == "lln is much better"
    assert claimed()["card_sha256"] == before["card_sha256"]
    repository = path.parents[1]
    for name, content_then in (("claims/tried.toml", f"margin_bpb = 0.05\n{text}"),
                               ("mine.py", MIXER + "\n"), ("tiny.py", RECIPE + "bias = False\n")):
        kept = (repository / name).read_text()
        (repository / name).write_text(content_then)
        for more in ([], ["--dry_run"]):
            status, _, err = call(path, *more)
            assert status == 2 and "a card that changes is a new claim" in err, err
            assert err.count("\n") == 1
        (repository / name).write_text(kept)
    assert call(path)[0] == 0
    others = "per_mixer = {'pelican': dict(learning_rate=1.0)}\nlog_interval = 7\n"
    for same in (f"# a comment decides nothing\n{RECIPE}", RECIPE + others):
        (repository / "tiny.py").write_text(same)
        assert call(path)[0] == 0
    own = "per_mixer = {'softmax': dict(dropout=0.5)}\n"
    (repository / "tiny.py").write_text(RECIPE + own)
    assert call(path)[0] == 2


def test_the_card_is_registered_before_anything_runs(write_card, drawn, call, claimed):
    """So that a card cannot be fitted to the first runs."""
    def interrupted(self):
        raise KeyboardInterrupt
    drawn.tune = interrupted
    assert call(write_card(CARD))[0] == 130
    assert claimed()["outcome"] == "undecided" and claimed()["arms"] == {}
    assert claimed()["registered"] == claim_record.git_state()
    status, _, err = call(write_card(f"looks = [2]\n{CARD}"))
    assert status == 2 and "new claim" in err
    status, out, _ = call("--table")
    assert status == 0 and "no look yet" in out


def test_runs_that_are_missing_are_said_and_decide_nothing(write_card, drawn, call, claimed):
    drawn.means = {"softmax": 1.7, "lln": 1.5, "linear": 1.7}
    drawn.lacking = {"lln-3"}
    status, out, _ = call(write_card(CARD))
    assert status == 1 and "runs are missing" in out
    assert claimed()["arms"]["lln"]["against_baseline"] is None
    assert claimed()["arms"]["lln"]["outcome"] == "undecided"
    assert call("--table")[0] == 0
    drawn.lacking = set()
    assert call(write_card(CARD))[0] == 0
    assert claimed()["arms"]["lln"]["outcome"] == "confirmed"


def test_more_parameters_than_promised_refute(write_card, drawn, call, claimed):
    """ssa has 0.1 % more than softmax here: too many for one card, few enough for the other."""
    drawn.means = {"softmax": 1.7, "a": 1.5, "b": 1.5}
    lines = ['mixer = "ssa"', 'prediction = "better"', "parameters_at_most = "]
    text = CARD[:CARD.index("[arms.lln]")]
    text += "\n".join(["[arms.a]", *lines]) + "1.0\n" + "\n".join(["[arms.b]", *lines]) + "1.05\n"
    assert call(write_card(text))[0] == 0
    found = claimed()["arms"]
    times = found["a"]["parameters"] / found["softmax"]["parameters"]
    assert 1 < times < 1.05 and found["softmax"]["state_bytes"] == 2 * 16 * 16 * 4
    assert (found["a"]["outcome"], found["b"]["outcome"]) == ("refuted", "confirmed")
    assert found["a"]["against_baseline"]["word"] == "better"


def test_an_arm_may_have_to_beat_counting(write_card, drawn, call, claimed):
    """Both are better than the baseline, but counting reaches 1.5."""
    drawn.means = {"softmax": 2.0, "lln": 1.6, "linear": 1.4}
    text = CARD.replace('"equivalent"', '"better"')
    text = text.replace('"better"', '"better"\nbeats_counting = true')
    assert call(write_card(text))[0] == 0
    found = claimed()["arms"]
    assert claimed()["counting"] == 1.5
    assert found["lln"]["against_counting"]["word"] == "worse"
    assert found["lln"]["against_counting"]["difference"] == pytest.approx(0.1, abs=0.03)
    assert (found["lln"]["outcome"], found["linear"]["outcome"]) == ("refuted", "confirmed")
    assert "against counting worse" in call("--table")[1]


def test_what_leaks_has_no_verdict(write_card, drawn, call, claimed):
    drawn.means = {"softmax": 2.0, "lln": 0.1, "linear": 2.0}
    text = CARD.replace('lln_matching = "published"', "allow_leak = true")
    assert call(write_card(text))[0] == 0
    found = claimed()["arms"]["lln"]
    assert (found["against_baseline"]["word"], found["outcome"]) == ("leaks", "leaks")
    assert found["against_baseline"]["difference_low"] is None


def test_what_diverged_counts_as_the_worst(write_card, drawn, call, claimed, monkeypatch):
    """One run of five at an even guess: what was far ahead no longer is for sure."""
    class Diverging(drawn):
        def record(self, arm, chosen, seed):
            record = super().record(arm, chosen, seed)
            if (arm, seed) == ("lln", 2):
                even = float(np.log(28))
                record.scores["report"] |= {"loss": even, "bpb": even / np.log(2)}
                record.scores |= {"by_block": [even], "by_position": None, "diverged": True}
            return record

    drawn.means = {"softmax": 1.7, "lln": 1.5, "linear": 1.7}
    monkeypatch.setattr(claim, "Experiment", Diverging)
    assert call(write_card(CARD))[0] == 0
    found = claimed()["arms"]["lln"]
    assert found["diverged"] == 1 and found["against_baseline"]["word"] == "undecided"
    assert found["loss"] == pytest.approx((11 * 1.5 + np.log(28)) / 12, abs=0.02)
    assert "1 of 12 runs diverged" in call("--table")[1]


@pytest.mark.parametrize("word, within, outcomes", [
    ("better", False, ["confirmed", "refuted", "refuted"]),
    ("better", True, ["confirmed", "refuted", "confirmed"]),
    ("worse", False, ["refuted", "confirmed", "refuted"]),
    ("worse", True, ["refuted", "confirmed", "confirmed"]),
    ("equivalent", False, ["refuted", "refuted", "confirmed"]),
    ("undecided", False, ["undecided"] * 3),
    ("one seed", False, ["undecided"] * 3),
    ("leaks", False, ["leaks"] * 3),
])
def test_the_rule(word, within, outcomes):
    """Words by predictions, as docs/claims.md states it."""
    verdict = Verdict(0.0, word=word, within_margin=within)
    predictions = ("better", "worse", "equivalent")
    assert [outcome_of_word(prediction, verdict) for prediction in predictions] == outcomes


def test_max_hours_starts_no_look_that_would_end_later(write_card, drawn, call, claimed):
    drawn.means = dict.fromkeys(["softmax", "lln", "linear"], 1.7)
    drawn.spread = 0.05
    path = write_card(CARD)
    status, _, err = call(path, "--max_hours=0.1")  # the first look: 15 runs of 0.01 h
    assert status == 2 and "0.1" in err and not drawn.asked
    status, out, _ = call(path, "--max_hours=0.2")  # the second: 24
    assert status == 1 and "--max_hours" in out
    assert claimed()["arms"]["linear"]["against_baseline"]["look"] == 5


def test_checkpoints_of_the_runs_to_compare_are_kept_if_asked_for(write_card, drawn, call):
    drawn.means = dict.fromkeys(["softmax", "lln", "linear"], 1.7)
    path = write_card(CARD)
    for more, kept in (([], False), (["--keep_checkpoints"], True)):
        assert call(path, *more)[0] == 0 and drawn.kept is kept


def test_a_dry_run_says_the_cost_and_writes_nothing(write_card, drawn, call, here, tmp_path):
    before = content(tmp_path)
    status, out, _ = call(write_card(CARD), "--dry_run")
    assert status == 0 and "15 runs" in out and "36 runs" in out
    assert not drawn.asked and not (tmp_path / "results").exists()
    assert set(content(tmp_path)) - set(before) == {"repository/claims/tried.toml"}


# The table ------------------------------------------------------------------------------------

def test_the_table_is_of_the_records(write_card, drawn, call, claimed, tmp_path):
    """And changes with them: a claim.json that says otherwise is refused."""
    drawn.means = {"softmax": 1.7, "lln": 1.5, "linear": 1.9}
    path = write_card(CARD)
    assert call(path)[0] == 0
    status, out, _ = call("--table")
    header, rule, row = out.splitlines()
    assert status == 0 and header.startswith("| so | claim |")
    word = claimed()["arms"]["lln"]["against_baseline"]
    interval = f"{word['difference']:+.4f} [{word['difference_low']:+.4f}"
    so, claimed_words, measured = row.strip("| ").split(" | ")
    assert (so, claimed_words) == ("**refuted**", "lln is better (Nobody 2026)")
    lln, linear = measured.split("<br>")
    assert lln.startswith(f"`lln` against `softmax`: {interval}") and "predicted" not in lln
    assert "] better; 5 seeds; " in lln
    assert linear.startswith("`linear` against `softmax`: +0.")
    assert "] worse; predicted equivalent; 5 seeds; " in linear
    assert call("--table", path)[1] == out
    # the same words by tools.compare's reading of the folder
    folder = tmp_path / "results/claims/tried"
    assert len(records.read_records(folder)) == 15
    place = folder / "claim.json"
    kept = place.read_text()
    for word, lie, words in (("worse", "better", "disagree"), ("refuted", "confirmed", "disagree"),
                             ("equivalent", "worse", "its card is not that of its checksum")):
        assert f'"{word}"' in kept
        place.write_text(kept.replace(f'"{word}"', f'"{lie}"'))
        status, out, err = call("--table")
        assert status == 2 and words in err and out == "", err
    place.write_text(kept)
    write_card(f"margin_bpb = 0.05\n{CARD}")
    assert call("--table", path)[0] == 2
    status, out, _ = call("--table", write_card(CARD, "other"))
    assert status == 0 and "| **not run yet** | lln is better" in out


def test_a_terminal_shows_each_claim_in_lines_that_fit(monkeypatch):
    row = dict(zip(COLUMNS, ("**refuted**", f"\x1b[31mIt {'helps ' * 30}(Somebody 2026)",
                             "`a` against `b`: worse; 5 seeds<br>`c` against `b`: better")))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert table_for_terminal([row]).startswith("\x1b[31mrefuted\x1b[0m     \\x1b[31mIt helps")
    monkeypatch.setenv("NO_COLOR", "1")
    lines = table_for_terminal([row]).split("\n")
    assert all(len(line) <= 80 for line in lines) and "\x1b" not in "".join(lines)
    assert lines[-2:] == [f"{'':12}a against b: worse; 5 seeds", f"{'':12}c against b: better"]


def test_a_recall_tasks_table_has_accuracies(write_card, drawn, call, claimed, monkeypatch):
    """And no margin: what is as good as equal stays undecided."""
    class Recalling(drawn):
        def record(self, arm, chosen, seed):
            record = super().record(arm, chosen, seed)
            record.scores["report"] |= {"bpb": None, "accuracy": {"lln": 0.9}.get(arm, 0.5)}
            record.scores |= {"by_position": None, "by_block": None, "by_cell": {"length 8": 0.5}}
            return record

    drawn.means = {"softmax": 1.7, "lln": 1.5, "linear": 1.7}
    drawn.spread = 0.001
    monkeypatch.setattr(claim, "Experiment", Recalling)
    assert call(write_card(CARD))[0] == 0
    found = claimed()["arms"]
    assert found["lln"]["against_baseline"]["word"] == "better"
    assert found["linear"]["against_baseline"]["word"] == "undecided"
    assert "; accuracy 0.90 against 0.50; 5 seeds" in call("--table")[1]


def test_records_of_other_runs_are_refused(write_card, drawn, call, tmp_path):
    drawn.means = {"softmax": 1.7, "lln": 1.5, "linear": 1.9}
    assert call(write_card(CARD))[0] == 0
    folder = tmp_path / "results/claims/tried"
    own = records.read_file(folder / "lln.jsonl.gz")
    for record in own:
        record.config["lln_matching"] = "table"
    (folder / "lln.jsonl.gz").unlink()
    records.write_records(folder, own)
    status, _, err = call("--table")
    assert status == 2 and "lln_matching" in err and err.count("\n") == 1


def test_texts_of_a_card_stay_texts_in_the_table(write_card, drawn, call):
    drawn.means = {"softmax": 1.7, "lln": 1.5, "linear": 1.9}
    text = CARD.replace("Nobody 2026", "a | b\\n\\u001b[31m")
    assert call(write_card(text))[0] == 0
    out = call("--table")[1]
    assert len(out.splitlines()) == 3 and "\x1b" not in out and "a \\| b" in out


def test_whatever_stands_in_claim_json_is_read_or_is_one_line(write_card, drawn, call, tmp_path):
    drawn.means = {"softmax": 1.7, "lln": 1.5, "linear": 1.9}
    assert call(write_card(CARD))[0] == 0
    path = tmp_path / "results/claims/tried/claim.json"
    whole = json.loads(path.read_text())
    junk = [None, True, "text", -1, 1e300, [], {}, [None], {"a": {}}, "\x1b[31m", 2**80]
    draw = random.Random(5)
    for place in (whole, whole["arms"]["lln"], whole["card"], whole["sizes"]["lln"]):
        for key, kept in list(place.items()):
            for value in draw.sample(junk, 2):
                place[key] = value
                path.write_text(json.dumps(whole))
                status, out, err = call("--table")
                assert status in (0, 2) and err.count("\n") == (status == 2), (key, value)
                assert "\x1b" not in out + err
            place[key] = kept
    for text in ("", "[", "[]", "null", "[" * 100000):
        path.write_text(text)
        assert call("--table")[0] == 2


# The command ----------------------------------------------------------------------------------

def test_bad_commands_are_one_line(write_card, call, drawn):
    path = write_card(CARD)
    for arguments, words in ((["--tabel"], "nearest: --table"), ([], "which claim?"),
                             ([path, "--table", "--dry_run"], "runs nothing"),
                             ([path, "--table", "--keep_checkpoints"], "runs nothing"),
                             ([path, path], "the same name"), (["none.toml"], "cannot read"),
                             ([path, "--max_hours=0"], "max_hours"), (["card"], "unexpected"),
                             ([path, "--at_once=0"], "at_once")):
        status, out, err = call(*arguments)
        assert status == 2 and words in err and err.count("\n") == 1, err


def test_what_a_card_names_has_to_be_there(write_card, call, drawn):
    for text in (CARD.replace("tiny.py", "huge.py"),
                 CARD.replace('mixer = "linear"', 'mixer = "mine"\nmixer_file = "yours.py"'),
                 CARD.replace('"tiny.py"', '"a\\u0000b"')):
        status, _, err = call(write_card(text))
        assert status == 2 and "is not there" in err and err.count("\n") == 1, err


def test_reading_and_printing_execute_nothing(write_card, drawn, call, monkeypatch):
    """The recipe and the mixer file are run by a claim, and by nothing else."""
    text = CARD.replace('mixer = "linear"', 'mixer = "mine"\nmixer_file = "mine.py"')
    path = write_card(text)
    drawn.means = {"softmax": 1.7, "lln": 1.5, "linear": 1.9}
    assert call(path)[0] == 0
    (path.parents[1] / "tiny.py").write_text("raise SystemExit('executed')")
    assert call("--table", path)[0] == 0
    status, _, err = call(path)
    assert status == 2 and "executed" in err


def test_the_revision_is_gits(tmp_path, monkeypatch):
    """Results do not make a tree unclean, nor does what git does not know."""
    def git(*words):
        names = ["-c", "user.name=n", "-c", "user.email=e@x.org"]
        done = subprocess.run(["git", *names, *words], cwd=tmp_path, capture_output=True, text=True,
                              check=True)
        return done.stdout.strip()

    monkeypatch.setattr(claim_record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert claim_record.git_state() is None
    (tmp_path / "results").mkdir()
    for name in ("model.py", "results/claim.json"):
        (tmp_path / name).write_text("one")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "results" / "claim.json").write_text("two")
    (tmp_path / "notes").write_text("two")
    assert claim_record.git_state() == {"revision": git("rev-parse", "HEAD"), "clean": True}
    (tmp_path / "model.py").write_text("two")
    assert claim_record.git_state()["clean"] is False


def test_the_table_in_the_docs_is_printed_from_the_records():
    """What all claims together would come to stands in README too."""
    for name in ("README.md", "docs/results.md"):
        assert claim.together_in_words(claim_record.claimed()) in (ROOT / name).read_text()
    printed = claim.table(claim.rows_of([])).splitlines()
    lines = (ROOT / "docs/results.md").read_text().splitlines()
    start = lines.index(printed[0])
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    assert lines[start:end] == printed


@pytest.mark.parametrize("folder", claim_record.claimed(), ids=lambda folder: folder.name)
def test_what_a_record_says_of_its_arms_is_what_its_runs_say_today(folder):
    content = json.loads((folder / "claim.json").read_text())
    card = claim_record.card_in(claim_record.read_claim_file(folder), folder)
    by_arm = claim_record.arms_of(claim_record.recorded(folder))
    found = findings(card, by_arm, content["counting"], content["sizes"])
    assert json.loads(json.dumps(found)) == content["arms"]


def test_what_the_readme_says_of_each_claim_is_what_was_found():
    text = (ROOT / "README.md").read_text()
    pattern = r"^\| \*\*(\w+)\*\* \| .* \| `(\S+)` (.*) \| \[(\w+)\]"
    rows = re.findall(pattern, text, re.MULTILINE)
    told = {name: word for word, _, _, name in rows}
    found = {folder.name: claim_record.read_claim_file(folder)
             for folder in claim_record.claimed()}
    assert told == {name: content["outcome"] for name, content in found.items()}
    for _, arm, figures, name in rows:
        of_arm = found[name]["arms"][arm]["against_baseline"]
        low, high = of_arm["difference_low"], of_arm["difference_high"]
        assert figures == f"{of_arm['difference']:+.3f} [{low:+.3f}, {high:+.3f}]", name


def test_the_example_in_the_docs_can_be_run(write_card, call, here, monkeypatch):
    """With the mixer of the README, in a smaller recipe."""
    monkeypatch.setattr("tools.experiment.seconds_of_run", lambda options, threads: 600.0)
    text = (ROOT / "docs" / "claims.md").read_text()
    [card] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    [mixer] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = write_card(card.replace("configs/shakespeare.py", "tiny.py"), "mine")
    (path.parents[1] / "mine.py").write_text(mixer)
    status, out, err = call(path, "--dry_run")
    assert (status, err) == (0, "") and "mine: to the first look, at 5 seeds: 18 runs" in out


def test_files_are_found_from_the_cards_repository_or_this_one(write_card, tmp_path, monkeypatch):
    path = write_card(CARD)
    monkeypatch.chdir(tmp_path)
    repository = path.parents[1]
    assert find_file(path, "tiny.py", "recipe") == Path("repository/tiny.py")
    assert find_file(repository / "card.toml", "tiny.py", "recipe") == Path("repository/tiny.py")
    assert find_file(path, "configs/shakespeare.py", "recipe") == ROOT / "configs/shakespeare.py"
    assert find_file(path, repository / "mine.py", "recipe") == Path("repository/mine.py")
    with pytest.raises(BadInput, match="arms.x.mixer_file: claims is not there"):
        find_file(path, "claims", "arms.x.mixer_file")  # a folder


# On real runs ---------------------------------------------------------------------------------

def test_the_cost_is_of_the_real_experiment(write_card, call, here, tmp_path, monkeypatch):
    """Nothing has run: two values and five seeds, or twelve, of three arms."""
    monkeypatch.setattr("tools.experiment.seconds_of_run", lambda options, threads: 600.0)
    status, out, err = call(write_card(CARD), "--dry_run")
    assert (status, err) == (0, "") and "21 runs" in out and "42 runs" in out, out
    assert not (tmp_path / "results").exists() and not list(here.iterdir())


def test_what_train_would_refuse_is_refused_before_anything_runs(write_card, call, here):
    """An option that is none of a mixer_file's; one without effect on an arm."""
    mine = 'mixer = "mine"\nmixer_file = "mine.py"\nmine_depth = 3'
    for text, words in ((CARD.replace('mixer = "linear"', mine), "mine_depth"),
                        (CARD.replace('mixer = "lln"', 'mixer = "linear"'), "lln_matching")):
        status, _, err = call(write_card(text))
        assert status == 2 and words in err and err.count("\n") == 1, err
        assert not list(here.iterdir())


class Here:
    """A pool whose jobs are done, in this thread, before they are handed back."""

    def __init__(self, at_once):
        pass

    def submit(self, function, *arguments):
        job = Future()
        job.set_result(function(*arguments))
        return job

    def shutdown(self, cancel_futures):
        pass


@pytest.fixture
def trained_here(monkeypatch):
    """train.py and tools.score run in this process, where torch is loaded: the names of what ran.
    The processes themselves are tests/test_sweep.py's business."""
    ran = []

    def run_child(command, env, log):
        if "--then" in command:
            end = command.index("--then")
            return run_child(command[:end], env, log) or run_child(command[end + 1:], env, log)
        ran.append(command[0])
        monkeypatch.setattr(sys, "argv", command)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                importlib.import_module(command[0]).main()
            except SystemExit as exit:
                return exit.code
        return 0

    monkeypatch.setattr(sweep_runs, "ThreadPoolExecutor", Here)
    monkeypatch.setattr(sweep_runs, "run_child", run_child)
    monkeypatch.setattr("tools.experiment.seconds_of_run", lambda options, threads: 1.0)
    return ran


def test_a_claim_from_its_card_to_its_record(
        write_card, call, claimed, trained_here, here, tmp_path):
    """Tuned, run to the first of two looks or to the second, found again from the records alone;
    run once more, nothing trains."""
    path = write_card("""
        paper = "Nobody 2026"
        claim = "attention that is called otherwise is no better"
        recipe = "tiny.py"
        baseline = "softmax"
        looks = [2, 3]
        arms.softmax = {mixer = "softmax"}
        arms.pelican = {mixer = "pelican", head_temperature = 1.0}
        arms.mine = {mixer = "mine", mixer_file = "mine.py", prediction = "equivalent"}
        tune = {learning_rate = [1e-9, 3e-2, 3.0]}
    """)
    command = [path, "--at_once=100"]  # or the sweep would wait between its runs
    status, out, err = call(*command)
    assert (status, err) == (0, ""), (out, err)
    content_then = claimed()
    assert content_then["outcome"] == "confirmed", out  # it is the same mixer, draw by draw
    found = content_then["arms"]
    assert found["mine"]["against_baseline"]["difference"] == 0
    assert found["mine"]["against_baseline"]["look"] == 2
    assert found["pelican"]["parameters"] < found["softmax"]["parameters"]
    assert content_then["chosen"]["mine"] == content_then["chosen"]["softmax"]

    folder = tmp_path / "results" / "claims" / "tried"
    runs = records.read_records(folder)
    by_arm = claim_record.arms_of(runs)
    looked_at = found["pelican"]["against_baseline"]["look"]
    assert {name: len(own) for name, own in by_arm.items()} == {
        "softmax": looked_at, "mine": 2, "pelican": looked_at}
    assert len(trained_here) == 2 * trained_here.count("train")
    kept = [record for file in folder.glob("*.jsonl.gz") for record in records.read_file(file)]
    assert trained_here.count("train") == len(kept)
    tuning = [record for record in kept if record.config["seed"] == 0]
    assert len(tuning) == len(kept) - len(runs) >= 9
    assert all(record.config["holdout"] == 0.1 for record in tuning)
    for arm, values in content_then["chosen"].items():
        losses = {record.config["learning_rate"]: record.scores["select"]["loss"]
                  for record in tuning if record.name.startswith(f"{arm}-")}
        assert values["learning_rate"] == min(losses, key=losses.get)
    losses = [by_arm[name][seed].scores["report"]["loss"]
              for name in ("pelican", "softmax") for seed in (1, 2)]
    difference = (losses[0] + losses[1] - losses[2] - losses[3]) / 2
    if looked_at == 2:
        word = found["pelican"]["against_baseline"]
        assert word["difference"] == pytest.approx(difference, abs=0.01)  # blocks differ in size

    trained_here.clear()
    status, out, _ = call(*command)
    assert status == 0 and trained_here == [], out
    shutil.rmtree(here / "out")  # the runs; their records serve
    status, out, _ = call(*command)
    assert status == 0 and trained_here == [], out
    assert claimed() == content_then  # hours and tuning too
    status, table, _ = call("--table")
    assert status == 0 and "**confirmed**" in table and "equivalent" in table
