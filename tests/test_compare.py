"""tools/compare.py and score.py on real runs; the statistics against values known otherwise."""
import csv
import json
import math
import shutil
import sys
from statistics import mean

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, metrics, one_line, run
from scipy import stats

from base.errors import BadInput
from mixers import MIXERS, load_mixer_file
from tools import compare
from tools.score import STRIDE, score
from training import checkpoint

SHORT = [a for a in TINY if not a.startswith("--learning_rate")] + ["--max_iters=4", "--eval_interval=2", "--log_interval=1"]
ALONE = {"WANDB_MODE": "offline"}


@pytest.fixture(scope="module")
def swept(home, tmp_path_factory):
    """A sweep of two mixers and two seeds, with wandb; what it printed is in swept.log beside it."""
    folder = tmp_path_factory.mktemp("sweeps") / "swept"
    done = run(home, "-m", "tools.sweep", "configs/shakespeare.py", *SHORT, "--keep_last=1", "--mixers=softmax,pelican",
               "--learning_rates=3e-2", "--seeds=2", "--wandb_log", f"--out_dir={folder}", env=ALONE, timeout=300)
    assert done.returncode == 0, done
    folder.with_suffix(".log").write_text(done.stdout)
    return folder


def scores(folder):
    return json.loads((folder / "scores.json").read_text())

def test_a_sweep_that_has_not_ended_shows_no_run_that_chose(home, swept, tmp_path):
    """sweep.json is there from the start, and grows with each run."""
    folder = shutil.copytree(swept, tmp_path / "swept")
    record = json.loads((folder / "sweep.json").read_text())
    last = record["runs"].pop()
    (folder / "sweep.json").write_text(json.dumps(record | {"missing": [last]}))
    done = run(home, "-m", "tools.compare", folder)
    assert done.returncode == 0 and "the sweep has not ended, 1 runs are missing" in done.stdout and f"| {1:>5} |" in done.stdout, done
    (folder / "sweep.json").write_text(json.dumps(record | {"runs": [], "missing": [last]}))
    assert "no run to compare" in one_line(run(home, "-m", "tools.compare", folder))


@pytest.fixture
def refuses(here, monkeypatch, capsys):
    """refuses(tool, *arguments): the one line of a command that ended with status 2, and wrote nothing but a log."""
    def call(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            tool.main()
        line = capsys.readouterr().err
        assert exit.value.code == 2 and line.count("\n") == 1, line
        assert not list(here.iterdir())
        return line
    return call


# -- scores ---------------------------------------------------------------------------------------------------------------

def test_scores_are_those_of_the_two_halves_of_the_windows(home, swept, here):
    """Against one forward pass over every window, halved by hand."""
    from data import load_dataset
    folder = swept / "softmax-lr0.03-seed1"
    model, data = checkpoint.build_model(checkpoint.load(folder)), load_dataset("letters", 16)
    losses = []
    with torch.no_grad():
        for x, y in data.val_batches(16, 1):
            losses.append(F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), reduction="none"))
    half = len(losses) // 2
    of = scores(folder)
    for part, mine in (("select", losses[:half]), ("report", losses[half:])):
        assert of[part]["loss"] == pytest.approx(torch.cat(mine).mean().item(), abs=1e-5)
        assert of[part]["bpb"] == pytest.approx(of[part]["loss"] / math.log(2) / data.bytes_per_token)
    whole = torch.stack([loss for loss in losses[half:] if len(loss) == 16]).mean(0)
    assert np.abs(np.array(of["by_position"])[-1] - whole[-1].item()) < 1e-5
    assert torch.cat(losses).mean().item() == pytest.approx(metrics(folder)[-1]["val_loss"], abs=1e-5)


def test_the_example_leaks_and_is_scored_in_its_last_position(home, tmp_path):
    """The option's figure is that of windows cut by hand; the example is refused without --allow_leak."""
    folder = tmp_path / "run"
    done = run(home, "train.py", *SHORT, "--mixer_file=" + str(ROOT / "examples/leaky_context.py"), "--mixer=causal_max_leak", f"--out_dir={folder}")
    assert "--allow_leak" in one_line(done)
    done = run(home, "train.py", *SHORT, "--mixer_file=" + str(ROOT / "examples/leaky_context.py"), "--mixer=causal_max_leak", f"--out_dir={folder}", "--allow_leak")
    assert done.returncode == 0, done
    done = run(home, "-m", "tools.score", f"--out_dir={folder}", "--last_position", "--mixer_file=" + str(ROOT / "examples/leaky_context.py"))
    [line] = [line for line in done.stdout.splitlines() if line.startswith("in the last position")]
    load_mixer_file(str(ROOT / "examples/leaky_context.py"))
    try:
        model = checkpoint.build_model(checkpoint.load(folder))
    finally:
        for name in ("causal_max_leak", "causal_min_leak"):
            MIXERS.pop(name)
    val = np.fromfile(home / "data/letters/val.bin", dtype="<u2").astype(np.int64)
    val = torch.from_numpy(val[len(val) // 2:])
    with torch.no_grad():
        losses = [F.cross_entropy(model(val[None, i:i + 16])[0][0, -1], val[i + 16]).item() for i in range(0, len(val) - 16, STRIDE)]
    assert float(line.split()[-2]) == pytest.approx(mean(losses), abs=1e-4)


def test_one_window_cannot_be_halved(home, trained, here, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    [*_, last] = checkpoint.checkpoints(folder)
    config = json.loads((last / "config.json").read_text()) | {"eval_tokens": 1}
    (last / "config.json").write_text(json.dumps(config))
    (last / "manifest.json").write_text(json.dumps({name: checkpoint.sha256(last / name) for name in checkpoint.FILES}))
    with pytest.raises(BadInput, match="two are needed"):
        score(folder, torch.device("cpu"))


def test_a_recall_task_is_chosen_by_its_val_split_and_reported_on_its_test_split(home, tmp_path):
    folder = tmp_path / "run"
    done = run(home, "train.py", *[a for a in SHORT if not a.startswith("--dataset")], "--dataset=recall", f"--out_dir={folder}")
    assert done.returncode == 0, done
    assert run(home, "-m", "tools.score", f"--out_dir={folder}").returncode == 0
    of = scores(folder)
    assert of["select"]["loss"] == pytest.approx(metrics(folder)[-1]["val_loss"], abs=1e-4)
    done = run(home, "train.py", "--eval_only", "--eval_split=test", f"--out_dir={folder}")
    assert f"{of['report']['loss']:.4f}" in done.stdout and f"{of['report']['accuracy']:.4f}" in done.stdout
    assert all(f"{value:.4f}" in done.stdout for value in of["by_cell"].values()) and len(of["by_cell"]) == 2


# -- comparison -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def compared(home, swept):
    done = run(home, "-m", "tools.compare", swept, "--wandb_log", f"--keep={swept.parent / 'kept'}", env=ALONE)
    assert done.returncode == 0, done
    return done.stdout


def test_the_table_has_what_the_runs_have(swept, compared):
    with open(swept / "compare" / "table.csv") as file:
        lines = {line["mixer"]: line for line in csv.DictReader(file)}
    assert set(lines) == {"softmax", "pelican"}
    for mixer, line in lines.items():
        losses = [scores(swept / f"{mixer}-lr0.03-seed{seed}")["report"]["loss"] for seed in (1, 2)]
        assert float(line["loss"]) == pytest.approx(mean(losses))
        low, high = stats.t.interval(0.95, 1, loc=mean(losses), scale=stats.sem(losses))
        assert float(line["loss_interval"]) == pytest.approx((high - low) / 2)
        model = checkpoint.build_model(checkpoint.load(swept / f"{mixer}-lr0.03-seed1"))
        assert int(line["parameters"]) == sum(p.numel() for p in model.parameters())
        assert int(line["state_bytes"]) == model.state_bytes(16, torch.float32)
        assert float(line["peak_bytes"]) > 2**27
        assert f"{mean(losses):.4f}" in compared
    assert lines["softmax"]["verdict"] == "baseline"
    assert (swept / "compare" / "table.md").read_text() in compared
    assert all((swept / "compare" / name).read_bytes().startswith(b"\x89PNG") for name in ("verdicts.png", "loss.png", "state.png", "position.png"))


def test_the_records_alone_give_the_same_table(home, swept, compared):
    kept = swept.parent / "kept"
    assert not list(kept.glob("*/checkpoints"))
    done = run(home, "-m", "tools.compare", kept, f"--out_dir={swept.parent / 'again'}")
    assert done.returncode == 0 and (swept.parent / "again" / "table.md").read_text() == (swept / "compare" / "table.md").read_text(), done


def test_single_runs_compare_too_and_what_is_not_equal_is_said(home, swept, compared):
    a, b = swept / "softmax-lr0.03-seed1", changed(swept.parent / "kept/softmax-lr0.03-seed2", swept.parent / "b", learning_rate=0.01)
    done = run(home, "-m", "tools.compare", a, b, "--baseline=softmax learning_rate=0.03", f"--out_dir={swept.parent / 'two'}")
    assert done.returncode == 0, done
    assert "one seed" in done.stdout and "not equal: learning_rate is 0.01 for softmax learning_rate=0.01; 0.03 for" in done.stdout


def test_what_cannot_be_compared_is_one_line(refuses, swept, trained, tmp_path):
    refuse = lambda *arguments: refuses(compare, *arguments, f"--out_dir={tmp_path}/c")
    assert "no run to compare in" in refuse(tmp_path) and "no run to compare" in refuse()
    assert "no run to compare in nowhere" in refuse(swept, "nowhere")
    assert "have pelican, softmax" in refuse(swept, "--baseline=lln")
    run = swept / "softmax-lr0.03-seed1"
    assert "differ in" in refuse(swept, changed(run, tmp_path / "other", "config.json", block_size=8))
    assert "same run twice" in refuse(run, changed(run, tmp_path / "twin"))
    assert "has not reached its 9 steps" in refuse(run, changed(run, tmp_path / "shorter", "config.json", max_iters=9))
    assert "same name, or are there already" in refuse(swept, f"--keep={swept}")
    changed(run, tmp_path / "kept" / run.name, "config.json", max_iters=9)
    assert "is of another run" in refuse(swept, f"--keep={tmp_path / 'kept'}")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("file, content, words", [
    ("config.json", "{}", "it lacks mixer"), ("metrics.jsonl", "3\n", "cannot be read"), ("metrics.jsonl", '{"val_loss": 1}\n', "cannot be read"),
    ("sweep.json", '{"runs": null}', "sweep.json is damaged"), ("scores.json", "{}", "no checkpoint in"), ("sweep.json", "[]", "sweep.json is damaged")])
def test_a_damaged_record_is_one_line(refuses, swept, compared, tmp_path, file, content, words):
    folder = shutil.copytree(swept.parent / "kept", tmp_path / "kept")
    (folder / ("" if file == "sweep.json" else "softmax-lr0.03-seed1") / file).write_text(content)
    assert words in refuses(compare, folder, f"--out_dir={tmp_path}/c")


def test_failed_and_leaking_runs_are_named(home, swept, tmp_path):
    folder = shutil.copytree(swept.parent / "kept", tmp_path / "kept")
    for path in folder.glob("pelican*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"allow_leak": True}))
    (folder / "sweep.json").write_text(json.dumps({"runs": [path.name for path in folder.glob("*/")], "failed": {"lln-seed1": "loss nan"}}))
    done = run(home, "-m", "tools.compare", folder)
    assert "not in the table: lln-seed1: loss nan" in done.stdout and "losses may not be compared: pelican" in done.stdout, done
    [line] = [line for line in done.stdout.splitlines() if line.startswith("| pelican")]
    assert "leaks" in line and "worse" not in line and "better" not in line


def changed(source, folder, file="config.json", **values):
    """A copy of a run with other values in one of its files."""
    shutil.copytree(source, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    return folder


def test_holms_adjustment():
    """The example of Holm's procedure by hand: 0.01 x 4, 0.02 x 3, 0.03 x 2 (below the one before it, so as that), 0.9 x 1."""
    assert compare.holm({"c": 0.03, "a": 0.01, "d": 0.9, "b": 0.02}) == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.9})
    assert compare.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def welch(a, b):
    """p of Welch's test from its definition."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (va + vb)**2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return 2 * stats.t.sf(abs(np.mean(a) - np.mean(b)) / math.sqrt(va + vb), freedom)


def test_verdicts_are_welchs_with_holms_correction():
    losses = {"base": [1.00, 1.01, 0.99], "low": [0.90, 0.91, 0.895], "same": [1.00, 1.02, 0.99], "high": [1.2, 1.3, 1.25], "lone": [0.5]}
    found = compare.verdicts(losses, "base")
    assert {label: row["verdict"] for label, row in found.items()} == {
        "base": "baseline", "low": "better", "same": "inside the seed noise", "high": "worse", "lone": "one seed"}
    adjusted = compare.holm({label: welch(losses[label], losses["base"]) for label in ("low", "same", "high")})
    assert {label: found[label]["p"] for label in adjusted} == pytest.approx(adjusted)
    assert found["low"]["difference_low"] < found["low"]["difference"] < found["low"]["difference_high"] < 0


def test_chance_alone_is_rarely_called_a_difference():
    """13 mixers that are all the baseline: in at most one table of twenty any of them is said to differ."""
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        losses = {str(i): draw.normal(1.8, 0.01, 5).tolist() for i in range(14)}
        wrong += any(row["verdict"] in ("better", "worse") for row in compare.verdicts(losses, "0").values())
    assert wrong / 300 < 0.08  # 0.05, and two and a half standard deviations of 300 draws


# -- wandb ----------------------------------------------------------------------------------------------------------------

def records(path):
    """The records of a .wandb file: 7 bytes, then blocks of 32 KiB that hold pieces, each with 4 bytes of checksum, 2 of length
    and its type: whole, first, middle or last."""
    from wandb.proto.wandb_internal_pb2 import Record
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # the rest of a block too short for a piece
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]
        whole += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def recorded(folder):
    """Of each offline wandb run below a folder: its record, and the keys and last values of its history."""
    for path in sorted(folder.glob("**/offline-run-*/*.wandb")):
        history, own = {}, None
        for record in records(path):
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
