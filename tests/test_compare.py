"""tools/compare.py and score.py on real runs; the statistics against values known otherwise."""
import csv
import json
import math
import os
import shutil
import sys
from statistics import mean

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, metrics, one_line, run
from scipy import stats

from mixers import MIXERS, load_mixer_file
from tools import compare, records
from tools import score as scoring
from tools.compare_verdicts import holm, judge
from tools.score import STRIDE, score
from training import checkpoint

SHORT = [word for word in TINY if not word.startswith("--learning_rate")]
SHORT += ["--max_iters=4", "--eval_interval=2", "--log_interval=1"]
ALONE = {"WANDB_MODE": "offline"}


@pytest.fixture(scope="module")
def swept(home, tmp_path_factory):
    """A sweep of two mixers and two seeds, with wandb; what it said is in swept.log beside it."""
    folder = tmp_path_factory.mktemp("sweeps") / "swept"
    done = run(home, "-m", "tools.sweep", "configs/shakespeare.py", *SHORT, "--keep_last=1",
               "--mixers=softmax,pelican", "--learning_rates=3e-2", "--seeds=2", "--wandb_log",
               f"--out_dir={folder}", env=ALONE, timeout=300)
    assert done.returncode == 0, done
    folder.with_suffix(".log").write_text(done.stdout)
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
def refuses(here, monkeypatch, capsys):
    """refuses(tool, *arguments): the one line of a command that ended with status 2, and wrote
    nothing but a log."""
    def call(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            tool.main()
        line = capsys.readouterr().err
        assert exit.value.code == 2 and line.count("\n") == 1, line
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
    done = run(home, "-m", "tools.compare", swept, "--wandb_log",
               f"--keep={swept.parent / 'kept'}", env=ALONE)
    assert done.returncode == 0, done
    return done.stdout


def test_the_table_has_what_the_runs_have(swept, compared):
    with open(swept / "compare" / "table.csv") as file:
        lines = {line["mixer"]: line for line in csv.DictReader(file)}
    assert set(lines) == {"softmax", "pelican"}
    for mixer, line in lines.items():
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
    assert lines["softmax"]["verdict"] == "baseline"
    assert (swept / "compare" / "table.md").read_text() in compared
    for name in ("verdicts.png", "loss.png", "state.png", "position.png"):
        assert (swept / "compare" / name).read_bytes().startswith(b"\x89PNG")


def test_the_records_alone_give_the_same_table(home, swept, compared):
    kept, again = swept.parent / "kept", swept.parent / "again"
    assert sorted(path.name for path in kept.iterdir()) == [
        "pelican-lr0.03.jsonl.gz", "softmax-lr0.03.jsonl.gz", "sweep.json"]
    done = run(home, "-m", "tools.compare", kept, f"--out_dir={again}")
    assert done.returncode == 0, done
    assert (again / "table.md").read_text() == (swept / "compare" / "table.md").read_text()


def test_single_runs_compare_too_and_what_is_not_equal_is_said(home, swept, bare):
    a = swept / "softmax-lr0.03-seed1"
    b = changed(bare / "softmax-lr0.03-seed2", bare / "b", learning_rate=0.01)
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


def test_holms_adjustment():
    """The example of Holm's procedure by hand: 0.01 x 4, 0.02 x 3, 0.03 x 2 (below the one before
    it, so as that), 0.9 x 1."""
    assert holm({"c": 0.03, "a": 0.01, "d": 0.9, "b": 0.02}) == pytest.approx(
        {"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.9})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def welch(a, b):
    """p of Welch's test from its definition."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (va + vb)**2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return 2 * stats.t.sf(abs(np.mean(a) - np.mean(b)) / math.sqrt(va + vb), freedom)


def test_verdicts_are_welchs_with_holms_correction():
    losses = {"base": [1.00, 1.01, 0.99], "low": [0.90, 0.91, 0.895], "same": [1.00, 1.02, 0.99],
              "high": [1.2, 1.3, 1.25], "lone": [0.5]}
    found = judge(losses, "base")
    assert {label: verdict.verdict for label, verdict in found.items()} == {
        "base": "baseline", "low": "better", "same": "inside the seed noise", "high": "worse",
        "lone": "one seed"}
    several = ("low", "same", "high")
    adjusted = holm({label: welch(losses[label], losses["base"]) for label in several})
    assert {label: found[label].p for label in several} == pytest.approx(adjusted)
    low = found["low"]
    assert low.difference_low < low.difference < low.difference_high < 0


def test_chance_alone_is_rarely_called_a_difference():
    """13 mixers that are all the baseline: in at most one table of twenty any of them is said to
    differ."""
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        losses = {str(i): draw.normal(1.8, 0.01, 5).tolist() for i in range(14)}
        words = {verdict.verdict for verdict in judge(losses, "0").values()}
        wrong += bool(words & {"better", "worse"})
    assert wrong / 300 < 0.08  # 0.05, and two and a half standard deviations of 300 draws


# -- wandb --------------------------------------------------------------------------------------

def wandb_records(path):
    """The records of a .wandb file: 7 bytes, then blocks of 32 KiB that hold pieces, each with 4
    bytes of checksum, 2 of length and its type: whole, first, middle or last."""
    from wandb.proto.wandb_internal_pb2 import Record
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # the rest of a block too short for a piece
            at += 2**15 - at % 2**15
            continue
        length = int.from_bytes(content[at + 4:at + 6], "little")
        kind = content[at + 6]
        whole += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def recorded(folder):
    """Of each offline wandb run below a folder: its record, and the keys and last values of its
    history."""
    for path in sorted(folder.glob("**/offline-run-*/*.wandb")):
        history, own = {}, None
        for record in wandb_records(path):
            own = record.run if record.HasField("run") and own is None else own
            for item in record.history.item:
                history[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        yield own, history


def test_wandb_has_the_runs_in_one_group_and_the_comparison_beside_them(swept, compared):
    runs = list(recorded(swept))
    trainings = [(own, history) for own, history in runs if own.job_type != "comparison"]
    assert {own.run_group for own, _ in runs} == {"swept"}
    assert sorted(tuple(own.tags) for own, _ in trainings) == sorted(
        (mixer, f"seed {seed}") for mixer in ("softmax", "pelican") for seed in (1, 2))
    for own, history in trainings:
        assert history["val_loss"] == metrics(swept / own.display_name)[-1]["val_loss"]
    [(_, history)] = [entry for entry in runs if entry not in trainings]
    assert (history["comparison/_type"], history["loss/_type"]) == ("table-file", "image-file")
