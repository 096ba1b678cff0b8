"""tools/compare.py and score.py on real runs, and compare.py on records made up for it."""
import csv
import glob
import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, metrics, one_line, run, values_of, wandb_records
from matplotlib.text import Text
from scipy import stats

from config import Options
from mixers import MIXERS, load_mixer_file
from model import model_config
from tools import compare, compare_table, records
from tools import score as scoring
from tools.colours import colour_of
from tools.drawing import outlying, overlap, spread
from tools.score import STRIDE, score
from tools.verdicts import judge
from training import checkpoint
from training.metrics import wandb_group

SHORT = [word for word in TINY if not word.startswith("--learning_rate")]
SHORT += ["--max_iters=4", "--eval_interval=2", "--log_interval=1"]


@pytest.fixture(scope="module")
def swept(home, tmp_path_factory):
    """A sweep of two mixers and two seeds."""
    folder = tmp_path_factory.mktemp("sweeps") / "swept"
    done = run(home, "-m", "tools.sweep", "configs/shakespeare.py", *SHORT, "--keep_last=1",
               "--mixers=softmax,pelican", "--learning_rate=3e-2", "--seeds=2",
               "--keep_checkpoints", f"--out_dir={folder}", timeout=900)
    assert done.returncode == 0, done
    return folder


def scores(folder):
    return json.loads((folder / "scores.json").read_text())


@pytest.fixture
def bare(swept, tmp_path):
    """The sweep without checkpoints, for a test to change."""
    weights = shutil.ignore_patterns("checkpoints", "wandb", "compare", "*.log", "lock")
    return shutil.copytree(swept, tmp_path / "bare", ignore=weights)


def test_a_sweep_that_has_not_ended_shows_no_run_that_chose(home, swept, tmp_path):
    """sweep.json is there from the start, and grows with each run."""
    folder = shutil.copytree(swept, tmp_path / "swept")
    record = json.loads((folder / "sweep.json").read_text())
    last = record["runs"].pop()
    (folder / "sweep.json").write_text(json.dumps(record | {"missing": [last]}))
    done = run(home, "-m", "tools.compare", folder)
    assert done.returncode == 0 and f"| {1:>5} |" in done.stdout, done
    assert "the sweep has not ended, 1 runs are missing" in done.stdout
    (folder / "sweep.json").write_text(json.dumps(record | {"runs": [], "missing": [last]}))
    assert "no run to compare" in one_line(run(home, "-m", "tools.compare", folder))


@pytest.fixture
def refuses(here, refusal):
    """refuses(tool, *arguments): the one line of a command that ended with status 2, and wrote
    nothing but a log."""
    def call(tool, *arguments):
        line = refusal(tool, *arguments)
        assert not list(here.iterdir())
        return line
    return call


# -- scores -------------------------------------------------------------------------------------

def test_the_example_leaks_and_is_scored_in_its_last_position(home, tmp_path):
    """The option's figure is that of windows cut by hand; the example is refused without
    --allow_leak."""
    folder, example = tmp_path / "run", ROOT / "examples/leaky_context.py"
    train = ["train.py", *SHORT, f"--mixer_file={example}", "--mixer=causal_max_leak",
             f"--out_dir={folder}"]
    assert "--allow_leak" in one_line(run(home, *train))
    done = run(home, *train, "--allow_leak")
    assert done.returncode == 0, done
    done = run(home, "-m", "tools.score", f"--out_dir={folder}", "--last_position",
               f"--mixer_file={example}")
    [line] = [line for line in done.stdout.splitlines() if line.startswith("in the last position")]
    load_mixer_file(str(example))
    try:
        model = checkpoint.build_model(checkpoint.load(folder))
    finally:
        for name in ("causal_max_leak", "causal_min_leak"):
            MIXERS.pop(name)
    val = np.fromfile(home / "data/letters/val.bin", dtype="<u2").astype(np.int64)
    val = torch.from_numpy(val)
    losses = []
    with torch.no_grad():
        for i in range(0, len(val) - 16, STRIDE):
            logits, _ = model(val[None, i:i + 16])
            losses.append(F.cross_entropy(logits[0, -1], val[i + 16]).item())
    assert float(line.split()[-2]) == pytest.approx(mean(losses), abs=1e-4)


def with_options(folder, **values):
    """Gives a run's newest checkpoint other options, and a manifest to match."""
    [*_, last] = checkpoint.checkpoints(folder)
    config = json.loads((last / "config.json").read_text()) | values
    (last / "config.json").write_text(json.dumps(config))
    manifest = {name: checkpoint.sha256(last / name) for name in checkpoint.FILES}
    (last / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name, value", [
    ("dtype", "auto"), ("dtype", 3), ("dataset", "nowhere"), ("dataset", "../letters"),
    ("dataset", None), ("eval_tokens", "many"), ("eval_tokens", -1), ("block_size", None),
    ("block_size", 2**31), ("mixer", "nope"), ("mixer", []), ("n_embd", "wide"), ("seed", -1),
    ("learning_rate", None), ("learning_rate", 10**400), ("pos", {}), ("n_head", 3)])
def test_a_hostile_config_is_one_line_of_score(refuses, run_folder, name, value):
    with_options(run_folder, **{name: value})
    refuses(scoring, f"--out_dir={run_folder}", "--device=cpu")


def test_paths_that_hold_no_run_are_one_line(refuses, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("no folder")
    wrong = [tmp_path / ("x" * 300), closed / "run", tmp_path / "pipe", tmp_path / "file",
             tmp_path / "escape\x1b[31m"]
    for path in wrong:
        assert "\x1b" not in refuses(scoring, f"--out_dir={path}", "--device=cpu")
        assert "\x1b" not in refuses(compare, path, f"--out_dir={tmp_path}/c", "--device=cpu")


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_no_damage(run_folder, here, monkeypatch):
    """The newest vanishes between its weights and their checksum, as a training goes on."""
    older, newest = checkpoint.checkpoints(run_folder)
    later = newest.with_name("00000021")
    load = checkpoint.load

    def load_and_lose(*arguments):
        saved = load(*arguments)
        if newest.exists():
            newest.rename(later)
        return saved
    monkeypatch.setattr(checkpoint, "load", load_and_lose)
    assert score(run_folder, torch.device("cpu"))["report"]["loss"] > 0


def test_a_changed_data_set_is_refused_unless_one_insists(refuses, run_folder, monkeypatch, capsys):
    with_options(run_folder, data_sha256="0" * 64)
    assert "has changed" in refuses(scoring, f"--out_dir={run_folder}", "--device=cpu")
    monkeypatch.setattr(sys, "argv", ["score", f"--out_dir={run_folder}", "--other_data"])
    scoring.main()
    assert "report" in capsys.readouterr().out


def test_a_recall_task_is_chosen_by_its_val_split_and_reported_on_its_test_split(home, tmp_path):
    folder = tmp_path / "run"
    short = [word for word in SHORT if not word.startswith("--dataset")]
    done = run(home, "train.py", *short, "--dataset=recall", f"--out_dir={folder}")
    assert done.returncode == 0, done
    assert run(home, "-m", "tools.score", f"--out_dir={folder}").returncode == 0
    of = scores(folder)
    assert of["select"]["loss"] == pytest.approx(metrics(folder)[-1]["val_loss"], abs=1e-4)
    done = run(home, "train.py", "--eval_only", "--eval_split=test", f"--out_dir={folder}")
    assert len(of["by_cell"]) == 2
    for value in (of["report"]["loss"], of["report"]["accuracy"], *of["by_cell"].values()):
        assert f"{value:.4f}" in done.stdout


# -- comparison ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def compared(home, swept):
    done = run(home, "-m", "tools.compare", swept, f"--keep={swept.parent / 'kept'}")
    assert done.returncode == 0, done
    return done.stdout


def test_the_table_has_what_the_runs_have(swept, compared):
    with open(swept / "compare" / "table.csv") as file:
        lines = {line["mixer"]: line for line in csv.DictReader(file)}
    assert [name for name in lines if lines[name]["word"] != "no model"] == sorted(
        ("softmax", "pelican"), key=lambda name: float(lines[name]["loss"]))
    assert float(lines["unigram"]["loss"]) < math.log(28)
    for mixer in ("softmax", "pelican"):
        line = lines[mixer]
        runs = [swept / f"{mixer}-lr0.03-seed{seed}" for seed in (1, 2)]
        losses = [scores(run)["report"]["loss"] for run in runs]
        assert float(line["loss"]) == pytest.approx(mean(losses))
        low, high = stats.t.interval(0.95, 1, loc=mean(losses), scale=stats.sem(losses))
        assert float(line["loss_interval"]) == pytest.approx((high - low) / 2)
        model = checkpoint.build_model(checkpoint.load(runs[0]))
        assert int(line["parameters"]) == sum(p.numel() for p in model.parameters())
        assert int(line["state_bytes"]) == model.state_bytes(16, torch.float32)
        assert float(line["peak_bytes"]) > 2**27
        assert f"{mean(losses):.4f}" in compared
    assert lines["softmax"]["word"] == "baseline"
    losses = {}  # the text makes one block
    for mixer in ("softmax", "pelican"):
        runs = {seed: swept / f"{mixer}-lr0.03-seed{seed}" for seed in (1, 2)}
        losses[mixer] = {seed: [scores(run)["report"]["loss"]] for seed, run in runs.items()}
    line = lines["pelican"]
    found = judge(losses, "softmax", float(line["margin"]))["pelican"]
    assert (line["word"], line["blocks"]) == (found.word, "1")
    assert float(line["difference_low"]) == pytest.approx(found.difference_low)
    assert (swept / "compare" / "table.md").read_text() in compared
    for name in ("verdicts.png", "loss.png", "state.png", "position.png"):
        assert (swept / "compare" / name).read_bytes().startswith(b"\x89PNG")


def test_the_records_alone_give_the_same_table(home, swept, compared):
    kept, again = swept.parent / "kept", swept.parent / "again"
    assert sorted(path.name for path in kept.iterdir()) == [
        "pelican.jsonl.gz", "softmax.jsonl.gz", "sweep.json"]
    done = run(home, "-m", "tools.compare", kept, f"--out_dir={again}")
    assert done.returncode == 0, done
    assert (again / "table.md").read_text() == (swept / "compare" / "table.md").read_text()


def test_an_arm_far_above_all_others_is_named_at_the_edge():
    near = {name: [1.5 + i / 100, 1.51 + i / 100] for i, name in enumerate("abcd")}
    assert outlying(near | {"far": [2.5, 2.6]}) == {"far"}
    assert outlying(near | {"far": [2.5, 2.6], "farther": [9.0]}) == {"far", "farther"}
    assert outlying(near | {"e": [1.6, 1.62]}) == set()
    few = {"a": [1.5], "b": [1.5001], "far": [9.0], "failed": []}
    assert outlying(few) == set()  # there is room for them, whatever they are


def test_a_run_from_before_an_option_has_its_default():
    """Whichever comes first."""
    old = made_up("softmax", 1, blocks=[1.7, 1.6])
    del old.config["conv"], old.config["norm"]
    new = made_up("softmax", 2, blocks=[1.7, 1.6], conv=None, norm="layer")
    other = made_up("softmax", 1, blocks=[1.5, 1.6], conv=4, norm="layer")
    for order in ([old, new, other], [other, old, new], [new, other, old]):
        labels = {arm.label: len(arm.records) for arm in compare.arms_of(order)}
        assert labels == {"softmax conv=null": 2, "softmax conv=4": 1}


def test_single_runs_compare_too_and_what_is_not_equal_is_said(home, swept, bare):
    a = swept / "softmax-lr0.03-seed1"
    b = changed(bare / "softmax-lr0.03-seed1", bare / "b", learning_rate=0.01)
    done = run(home, "-m", "tools.compare", a, b, "--baseline=softmax learning_rate=0.03",
               f"--out_dir={bare / 'two'}")
    assert done.returncode == 0 and "one seed" in done.stdout, done
    assert ("not equal: learning_rate is 0.01 for softmax learning_rate=0.01; 0.03 for"
            in done.stdout)


def test_what_cannot_be_compared_is_one_line(refuses, swept, trained, tmp_path):
    def refuse(*arguments):
        return refuses(compare, *arguments, f"--out_dir={tmp_path}/c")
    assert "no run to compare in" in refuse(tmp_path) and "no run to compare" in refuse()
    assert "no run to compare in nowhere" in refuse(swept, "nowhere")
    assert "have pelican, softmax" in refuse(swept, "--baseline=lln")
    run = swept / "softmax-lr0.03-seed1"
    other = changed(run, tmp_path / "other", "config.json", block_size=8)
    assert "differ in" in refuse(swept, other)
    assert "same run twice" in refuse(run, changed(run, tmp_path / "twin"))
    shorter = changed(run, tmp_path / "shorter", "config.json", max_iters=9)
    assert "has not reached its 9 steps" in refuse(run, shorter)
    assert "same name, or are there already" in refuse(swept, f"--keep={swept}")
    other_data = changed(run, tmp_path / "other_data", "config.json", data_sha256="0", seed=9)
    assert "other data of the same name" in refuse(run, other_data)
    other = changed(run, tmp_path / run.name, "config.json", max_iters=9)
    records.write_records(tmp_path / "kept", records.read_records(other))
    assert "of another run" in refuse(swept, f"--keep={tmp_path / 'kept'}")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("file, content, words", [
    ("config.json", "{}", "mixer: Field required"), ("metrics.jsonl", "3\n", "line 1"),
    ("metrics.jsonl", '{"val_loss": 1}\n', "iter: Field required"),
    ("sweep.json", '{"runs": null}', "sweep.json is damaged"),
    ("scores.json", "{}", "no checkpoint in"), ("sweep.json", "[]", "sweep.json is damaged"),
    ("sweep.json", '{"runs": ["../other"], "failed": {}}', "runs.0"),
    ("sweep.json", '{"runs": ["gone"], "failed": {}}', "gone")])
def test_a_damaged_record_is_one_line(refuses, bare, tmp_path, file, content, words):
    folder = bare if file == "sweep.json" else bare / "softmax-lr0.03-seed1"
    (folder / file).write_text(content)
    assert words in refuses(compare, bare, f"--out_dir={tmp_path}/c")


def test_failed_and_leaking_runs_are_named(home, bare):
    for path in bare.glob("pelican*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"allow_leak": True}))
    runs = [path.name for path in bare.glob("*/")]
    sweep = {"runs": runs, "failed": {"lln-seed1": "loss nan \x1b[31m"}}
    (bare / "sweep.json").write_text(json.dumps(sweep))
    done = run(home, "-m", "tools.compare", bare)
    assert "not in the table: lln-seed1: loss nan \\x1b" in done.stdout, done
    assert "losses may not be compared: pelican" in done.stdout and "\x1b" not in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("| pelican")]
    assert "leaks" in line and "worse" not in line and "better" not in line


def changed(source, folder, file="config.json", **values):
    """A copy of a run with other values in one of its files."""
    shutil.copytree(source, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    return folder


# -- records made up --------------------------------------------------------------------------

MODEL = asdict(Options(n_layer=1, n_head=2, n_embd=8, block_size=4, max_iters=2, dtype="float32",
                       learning_rate=0.01, lr_decay_iters=2, min_lr=0.001, dataset="made_up"))
MODEL |= asdict(model_config(MODEL | {"vocab_size": 9}, "test"))
ROWS = [{"iter": step, "val_loss": 2.0 / step, "flops": 1e3 * step, "seconds": float(step)}
        for step in (1, 2)]
BYTES = 1.5  # a token
LINES = {"unigram": 3.0, "5-grams": 1.65}


def part(loss, accuracy=None):
    bpb = loss / math.log(2) / BYTES if accuracy is None else None
    return {"loss": loss, "bpb": bpb, "accuracy": accuracy}


def made_up(mixer, seed, blocks=None, accuracy=None, loss=None, **options):
    """A Record: of a text with these losses of its blocks, or of a recall task."""
    loss = mean(blocks) if blocks else loss
    of_scores = {
        "weights": "0", "vocab_size": 9, "iter": 2, "report": part(loss, accuracy),
        "select": None if accuracy is None else part(loss, accuracy),
        "by_position": None if accuracy is not None else [1.9, 1.8, 1.7, 1.6],
        "by_block": blocks, "by_cell": None if accuracy is None else {"pairs=1": accuracy}}
    config = MODEL | {"mixer": mixer, "seed": seed, "vocab_size": 9} | options
    name = f"{mixer}-lr{config['learning_rate']:g}-seed{seed}"
    return records.Record(name, Path("unused"), config, ROWS, of_scores)


def tuning(mixer, rate, loss):
    record = made_up(mixer, 0, loss=loss, learning_rate=rate, min_lr=rate / 10, holdout=0.1)
    record.scores |= {"select": part(loss), "report": None, "by_position": None}
    return record


def diverge(record):
    """As a sweep records a run whose loss was not finite."""
    record.scores |= {"diverged": True, "report": part(math.log(9)), "by_position": None,
                      "by_block": None, "iter": 1}
    record.metrics = []


def of_blocks(mixer, above, seeds=5, draw=0):
    """Records of a text in six blocks, with losses around 1.7 + above."""
    drawn = np.random.default_rng([draw, *mixer.encode()])
    losses = 1.7 + above + drawn.normal(0, 0.002, (seeds, 6))
    return [made_up(mixer, 1 + s, row.tolist()) for s, row in enumerate(losses)]


@pytest.fixture
def compare_these(tmp_path, monkeypatch, capsys):
    """compare_these(records, *options): (lines of table.csv by mixer, what was printed). Draws
    nothing, which takes long."""
    monkeypatch.setattr(compare_table, "reference_lines", lambda config, scores: LINES)
    monkeypatch.setattr(compare.plots, "draw", lambda *arguments: [])

    def call(some, *options):
        folder = tmp_path / "some"
        shutil.rmtree(folder, ignore_errors=True)
        records.write_records(folder, some)
        monkeypatch.setattr(sys, "argv", ["compare", str(folder), "--device=cpu", *options])
        compare.main()
        with open(folder / "compare" / "table.csv") as file:
            return {line["mixer"]: line for line in csv.DictReader(file)}, capsys.readouterr().out
    return call


def test_arms_that_differ_by_their_rate_alone_are_called_by_it(compare_these):
    some = of_blocks("softmax", 0) + of_blocks("softmax", 0.1, draw=1)
    for number, record in enumerate(some):
        rate = 0.01 if number < 5 else 0.04
        record.config |= {"learning_rate": rate, "min_lr": rate / 10}
        record.name = f"softmax-lr{rate:g}-seed{record.config['seed']}"
    lines, _ = compare_these(some)
    assert {name for name in lines if name.startswith("softmax")} == {
        "softmax learning_rate=0.01", "softmax learning_rate=0.04"}
    for record in some:
        record.config["learning_rate"] = 0.01
    arms = compare.arms_of(some)
    assert [arm.label for arm in arms] == ["softmax min_lr=0.001", "softmax min_lr=0.004"]


def test_losses_beyond_the_trained_length_and_authors_are_shown_where_known(compare_these):
    some = of_blocks("softmax", 0) + of_blocks("lln", 0.1)
    for seed, record in enumerate(some[:5]):
        record.scores["beyond"] = [1.7, 1.6 + seed / 10, 1.5, 1.4]
    lines, out = compare_these(some)
    assert "over seeds and 6 blocks of text" in out
    assert float(lines["softmax"]["loss_to_2T"]) == pytest.approx(1.8)
    assert float(lines["softmax"]["loss_to_4T"]) == pytest.approx(1.4)
    assert lines["lln"]["loss_to_2T"] == ""
    assert "T to 2 T" in out and " 1.8000 |" in out
    for record in some:
        record.scores |= {"beyond": None, "authors": [f"author {i}" for i in range(6)]}
    out = compare_these(some)[1]
    assert "T to 2 T" not in out and "over seeds and 6 authors, each counted alike" in out


def test_the_verdicts_are_of_pairs_and_blocks_and_the_margin_is_in_bytes(compare_these):
    some = (of_blocks("softmax", 0) + of_blocks("lln", -0.1) + of_blocks("linear", 0.005)
            + of_blocks("ssa", 0.5) + of_blocks("performer", 0.3, seeds=1))
    lines, out = compare_these(some)
    words = {name: line["word"] for name, line in lines.items()}
    assert words == {"softmax": "baseline", "lln": "better", "linear": "worse", "ssa": "worse",
                     "performer": "one seed", "unigram": "no model", "5-grams": "no model"}
    margin = 0.03 * math.log(2) * BYTES
    losses = {}
    for record in some:
        of_mixer = losses.setdefault(record.config["mixer"], {})
        of_mixer[record.config["seed"]] = record.scores["by_block"]
    for name, verdict in judge(losses, "softmax", margin).items():
        line = lines[name]
        assert float(line["margin"]) == pytest.approx(margin)
        assert float(line["difference"]) == pytest.approx(verdict.difference)
        if verdict.difference_low is not None:
            assert float(line["difference_low"]) == pytest.approx(verdict.difference_low)
    assert "worse, within the margin" in out and lines["linear"]["within_margin"] == "True"
    assert f"equivalent: within 0.03 bits per byte, {margin:.4f} nats" in out
    assert "over seeds and 6 blocks of text, with an error of 0.05 for all 4 comparisons" in out
    lines, _ = compare_these(some, "--margin_bpb=2")
    assert lines["ssa"]["within_margin"] == "True" and float(lines["ssa"]["margin"]) > 2


def test_an_undecided_line_says_what_is_missing(compare_these):
    near = of_blocks("lln", 0.02, seeds=3)
    for record, above in zip(near, (-0.03, 0.0, 0.04)):
        record.scores["by_block"] = [loss + above for loss in record.scores["by_block"]]
    lines, out = compare_these(of_blocks("softmax", 0, seeds=4) + near)
    assert lines["lln"]["word"] == "undecided" and "seeds" in lines["lln"]["missing"]
    assert f"undecided: {lines['lln']['missing']}" in out and lines["lln"]["paired_seeds"] == "3"


def test_what_needs_no_model_stands_at_the_end(compare_these):
    lines, out = compare_these(of_blocks("softmax", 0) + of_blocks("lln", -0.1))
    assert list(lines) == ["lln", "softmax", "unigram", "5-grams"]
    baseline = float(lines["softmax"]["loss"])
    for name, loss in LINES.items():
        assert float(lines[name]["loss"]) == loss
        assert float(lines[name]["bpb"]) == pytest.approx(loss / math.log(2) / BYTES)
        [row] = [row for row in out.splitlines() if row.startswith(f"| {name} ")]
        assert f" {loss:.4f} | " in row and f" {loss - baseline:+.4f} | no model" in row


def test_a_run_that_diverged_counts_as_an_even_guess(compare_these):
    some = of_blocks("softmax", 0) + of_blocks("lln", -0.1) + of_blocks("ssa", -0.1)
    without, _ = compare_these(some)
    diverge(some[7])
    lines, out = compare_these(some)
    assert "with the loss of an even guess: lln 1 of 5" in out
    assert without["lln"]["word"] == "better"
    losses = [record.scores["report"]["loss"] for record in some[5:10]]
    assert max(losses) == math.log(9) and float(lines["lln"]["loss"]) == pytest.approx(mean(losses))
    assert lines["lln"]["word"] == "undecided" and lines["lln"]["seeds"] == "5"
    assert lines["ssa"] == without["ssa"]
    for record in some[5:10]:
        diverge(record)
    lines, _ = compare_these(some)
    assert lines["lln"]["word"] == "worse" and float(lines["lln"]["loss"]) == math.log(9)


def test_the_steps_to_learn_a_recall_task_are_the_median_seeds(compare_these):
    """Never, if that of most seeds."""
    steps = {"softmax": (2, 1, None), "lln": (1, None, None), "linear": (None, None, None)}
    some = []
    for mixer, of_seeds in steps.items():
        for seed, first in enumerate(of_seeds, start=1):
            record = made_up(mixer, seed, loss=seed / 1000, accuracy=0.5)
            record.metrics = [ROWS[0] | {"iter": step, "val_accuracy": 0.9 * (step == first)}
                              for step in (1, 2)]
            some.append(record)
    lines, out = compare_these(some)
    found = [lines[mixer]["steps_to_learn"] for mixer in steps]
    assert found == ["2", "", ""] and "steps to 0.9" in out


def test_a_recall_task_has_no_margin_and_is_solved_by_some_seeds(compare_these):
    some = []
    for mixer, accuracies in (("softmax", (0.99, 0.95, 0.9499)), ("lln", (0.1, 0.1, 0.1))):
        for seed, accuracy in enumerate(accuracies, start=1):
            some.append(made_up(mixer, seed, loss=1 - accuracy + seed / 1000, accuracy=accuracy))
    lines, out = compare_these(some)
    assert lines["softmax"]["solved"] == "2" and lines["lln"]["solved"] == "0"
    assert lines["lln"]["margin"] == "" and lines["lln"]["word"] == "worse"
    assert "| 2/3 |" in re.sub(" +", " ", out) and "| 0/3 |" in re.sub(" +", " ", out)
    assert "over seeds alone, with" in out and "equivalent" not in out
    chose = [made_up("lln", 0, loss=0.5, accuracy=0.5, learning_rate=rate) for rate in (0.1, 0.2)]
    assert compare_these(some + chose)[0] == lines


def test_older_records_are_judged_over_seeds_alone(compare_these):
    some = of_blocks("softmax", 0) + of_blocks("lln", -0.1)
    for record in some:
        del record.scores["by_block"]
        record.scores["select"] = part(1.0)
    lines, out = compare_these(some)
    pairs = stats.ttest_rel([r.scores["report"]["loss"] for r in some[5:]],
                            [r.scores["report"]["loss"] for r in some[:5]])
    low, high = pairs.confidence_interval(0.95)
    assert float(lines["lln"]["difference_low"]) == pytest.approx(low)
    assert "over seeds alone, the text is not counted" in out and lines["lln"]["blocks"] == "1"


def test_scores_of_other_text_are_not_compared(compare_these, capsys):
    some = of_blocks("softmax", 0) + of_blocks("lln", -0.1)
    del some[3].scores["by_block"]
    with pytest.raises(SystemExit):
        compare_these(some)
    assert "different parts of the validation text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare_these([tuning("softmax", 0.1, 2.0)])
    assert "only some to choose options by" in capsys.readouterr().err


def test_notes_name_seeds_that_the_baseline_lacks_and_blocks_that_go_together(compare_these):
    some = of_blocks("softmax", 0, seeds=3) + of_blocks("lln", -0.1)
    for record in some[3:]:
        slope = np.linspace(-0.1, 0.1, 6)
        record.scores["by_block"] = (slope + record.scores["by_block"]).tolist()
    _, out = compare_these(some)
    assert "the difference is of the seeds that softmax has too: lln 3 of 5" in out
    assert "differ alike" not in out  # six blocks are too few to say
    for record in some:
        record.scores["by_block"] = np.repeat(record.scores["by_block"], 4).tolist()
    _, out = compare_these(some)
    assert "so 8 long stretches are compared (autocorrelation of the blocks: lln +0." in out


# -- pictures -----------------------------------------------------------------------------------

DRAW = compare.plots.draw


class Stateless(torch.nn.Linear):
    """A mixer that does not say what its state takes."""
    def __init__(self, config, layer):
        super().__init__(config.n_embd, config.n_embd)

    def forward(self, x, state=None):
        return super().forward(x), state


@pytest.fixture
def drawn(compare_these, monkeypatch):
    """{name of a file: its Figure}, of what compare_these draws from now on."""
    monkeypatch.setattr(compare.plots, "draw", DRAW)
    figures = {}

    def save(path, figure):
        figures[path.name] = figure
        return path
    monkeypatch.setattr(compare.plots, "save", save)
    return figures


def words_of(figure):
    """All text of a figure but the ticks'."""
    found = [figure.get_suptitle(), figure.get_supxlabel()]
    for ax in figure.axes:
        found += [ax.get_title(), ax.get_xlabel(), *(text.get_text() for text in ax.texts)]
    return found


def boxes_of(ax):
    """Where the texts of an axes stand once it is drawn, without lines that lead to them: [(left,
    bottom, right, top)]."""
    ax.figure.draw_without_rendering()
    return [tuple(Text.get_window_extent(text).extents) for text in ax.texts if text.get_text()]


def test_every_picture_says_of_what_it_is_and_shows_what_needs_no_model(compare_these, drawn):
    compare_these(of_blocks("softmax", 0) + of_blocks("lln", -0.1))
    assert set(drawn) == {"verdicts.png", "loss.png", "state.png", "position.png"}
    for name, figure in drawn.items():
        title = figure.get_suptitle() or figure.axes[0].get_title()
        assert title == "made_up, 2 steps, 5 seeds", name
    for name in ("verdicts.png", "loss.png", "position.png"):
        figure = drawn[name]
        [words] = [text for text in words_of(figure) if "gram" in text]
        assert words.endswith("dashed: 5-grams 1.650; not in the picture: unigram 3.000"), name
        shown = {line.get_label(): line for line in figure.axes[0].get_lines()}
        across = "get_xdata" if name == "verdicts.png" else "get_ydata"
        assert list(getattr(shown["5-grams"], across)()) == [1.65, 1.65]
    right = [text.get_text() for text in drawn["verdicts.png"].axes[1].get_yticklabels()]
    assert right[0].endswith(" better") and right[1] == "baseline"
    for name in ("loss.png", "position.png"):
        colours = {line.get_label(): line.get_color() for line in drawn[name].axes[0].get_lines()}
        assert colours["softmax"] == "black" and colours["lln"] == colour_of("lln")


def test_many_arms_have_panels_of_their_own_and_labels_that_keep_clear(
        compare_these, drawn, monkeypatch):
    """And what is far above, or has no bytes of state, is named."""
    mixers = sorted(MIXERS)[:4] + ["softmax", "softmax,lln", "stateless"]
    monkeypatch.setitem(MIXERS, "stateless", Stateless)
    some = [of_blocks(mixer, i / 300) for i, mixer in enumerate(mixers)]
    compare_these(sum(some, []) + of_blocks("pelican", 2.0))
    labels = {mixer.replace(",", "+"): mixer for mixer in [*mixers, "pelican"]}
    panels = [ax for ax in drawn["position.png"].axes if ax.get_title()]
    assert sorted(ax.get_title() for ax in panels) == sorted(labels)
    for ax in panels:
        own = {line.get_label(): line.get_color() for line in ax.get_lines()}[ax.get_title()]
        black = ax.get_title() == "softmax"
        assert own == ("black" if black else colour_of(labels[ax.get_title()]))
    assert "missing, as their state_bytes are not known: stateless" in "".join(
        words_of(drawn["state.png"]))
    assert any(word.startswith("pelican 3.7") for word in words_of(drawn["state.png"]))
    for name in ("state.png", "loss.png"):
        for ax in drawn[name].axes:
            boxes = boxes_of(ax)
            assert len(boxes) >= 6, name
            for i, box in enumerate(boxes):
                assert not any(overlap(box, other) for other in boxes[:i]), (name, i)
                assert box[0] > 0 and box[2] < ax.figure.bbox.x1, (name, i)


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.0, 0.1, 9.0], [5.0, 4.9, 5.1, 0.0]])
def test_labels_are_spread_no_further_than_they_must_be(values):
    placed = spread(values, 1.0, 0.0, 10.0)
    assert np.diff(sorted(placed)).min() > 1 - 1e-9 and 0 <= placed.min() <= placed.max() <= 10
    order = np.argsort(values, kind="stable")
    assert np.array_equal(np.argsort(placed, kind="stable"), order)
    free = [i for i in order if min(abs(v - values[i]) for j, v in enumerate(values) if j != i) > 3]
    assert all(placed[i] == pytest.approx(values[i]) for i in free)


def test_the_rates_are_drawn_with_the_chosen_one_ringed(compare_these, drawn):
    chose = [tuning("softmax", rate, loss) for rate, loss in ((0.1, 2.0), (0.2, 1.8), (0.4, 1.9))]
    chose += [tuning("lln", rate, loss) for rate, loss in ((0.2, 1.6), (0.1, 1.7), (0.4, 9.0))]
    chose[-1].scores["diverged"] = True
    lines, _ = compare_these(of_blocks("softmax", 0) + of_blocks("lln", -0.1) + chose)
    assert list(lines) == ["lln", "softmax", "unigram", "5-grams"]
    [ax] = drawn["rates.png"].axes
    marks = {}
    for line in ax.get_lines():
        points = list(zip(np.atleast_1d(line.get_xdata()), np.atleast_1d(line.get_ydata())))
        marks.setdefault(line.get_marker(), []).append(points)
    assert ax.get_xscale() == "log"
    assert [text.get_text() for text in ax.texts] == ["lln", "softmax"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0.1", "0.2", "0.4"]
    assert marks["."] == [[(0.1, 1.7), (0.2, 1.6)], [(0.1, 2.0), (0.2, 1.8), (0.4, 1.9)]]
    assert marks["o"] == [[(0.2, 1.6)], [(0.2, 1.8)]] and marks["x"] == [[(0.4, 1)]]


# -- wandb --------------------------------------------------------------------------------------

def recorded(folder):
    """Of the wandb runs below a folder, which are offline: {id: what it was started as, its config,
    history and summary (last values)}. A run that went on, to be scored say, is one."""
    found = {}
    for path in sorted(folder.glob("**/offline-run-*/*.wandb")):
        of_run = found.setdefault(path.stem.removeprefix("run-"),
                                  {"run": None, "config": {}, "history": {}, "summary": {}})
        for record in wandb_records(path):
            if record.HasField("run"):
                of_run["run"] = of_run["run"] or record.run
                of_run["config"] |= values_of(record.run.config.update)
            of_run["history"] |= values_of(record.history.item)
            of_run["summary"] |= values_of(record.summary.update)
    return list(found.values())


@pytest.mark.slow
def test_wandb_has_the_runs_in_one_group_and_the_comparison_beside_them(home, tmp_path):
    swept, alone = tmp_path / "swept", {"WANDB_MODE": "offline"}
    done = run(home, "-m", "tools.sweep", "configs/shakespeare.py", *SHORT, "--wandb_log",
               "--mixers=softmax,pelican", "--learning_rate=3e-2", "--seeds=1",
               f"--out_dir={swept}", env=alone, timeout=900)
    [command] = re.findall("wandb: to upload all that is offline here: wandb sync (.*)",
                           done.stdout)
    assert done.stdout.count("wandb sync") == 1
    assert f"2 runs to compare: python -m tools.compare {swept} --wandb_log\n" in done.stdout
    done = run(home, "-m", "tools.compare", swept, "--wandb_log", env=alone, timeout=900)
    assert done.returncode == 0, done
    assert done.stdout.endswith(f"to upload all that is offline here: wandb sync {command}\n")
    assert done.stdout.count("wandb sync") == 2  # that of the comparison's own
    every = {str(path.parent) for path in swept.glob("**/*.wandb")}
    assert set(glob.glob(command)) == every and len(every) == 7

    runs = recorded(swept)
    trainings = [found for found in runs if found["run"].job_type != "comparison"]
    [comparison] = [found for found in runs if found not in trainings]
    [group] = {found["run"].run_group for found in runs}
    assert group.startswith("swept-") and group != wandb_group(swept.parent / "a" / "swept")
    assert sorted(tuple(found["run"].tags) for found in trainings) == [
        ("pelican", "seed 1"), ("softmax", "seed 1")]
    with open(swept / "compare" / "table.csv") as file:
        lines = {line["mixer"]: line for line in csv.DictReader(file)}
    for found in trainings:
        folder = swept / found["run"].display_name
        line = lines[found["config"]["mixer"]]
        assert found["history"]["val_loss"] == metrics(folder)[-1]["val_loss"]
        assert found["summary"]["report_loss"] == scores(folder)["report"]["loss"]
        assert found["summary"]["verdict"] == line["word"]
        assert found["summary"]["verdict_against"] == "softmax"
        if line["difference"]:
            assert found["summary"]["difference"] == float(line["difference"])
        for name in ("parameters", "state_bytes", "flops_per_token"):
            assert found["config"][name] == found["summary"][name] == float(line[name])
    history, summary = comparison["history"], comparison["summary"]
    assert (history["comparison/_type"], history["loss/_type"]) == ("table-file", "image-file")
    for mixer in ("softmax", "pelican"):
        of_arm = comparison["config"]["arms"][mixer]
        assert of_arm["word"] == summary[f"{mixer}/word"] == lines[mixer]["word"]
        assert of_arm["loss"] == summary[f"{mixer}/loss"] == float(lines[mixer]["loss"])


def test_unequal_parameters_are_said():
    def lines(**counts):
        return [SimpleNamespace(mixer=name, parameters=n) for name, n in counts.items()]

    sizes = lines(gla=101_900, softmax=100_000, regla=103_260, causal_max=76_300)
    assert compare_table.unequal_parameters(sizes, "softmax") == [
        "not equal: parameters, against softmax: regla +3.3 %, causal_max -23.7 %"]
    assert compare_table.unequal_parameters(lines(gla=100, softmax=100), "softmax") == []
    assert compare_table.unequal_parameters(lines(gla=100), "softmax") == []  # not in the table
