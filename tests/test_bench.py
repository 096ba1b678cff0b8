"""bench.py: what is measured, cells that fail, going on, what the figures are turned into."""
import csv
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, Script, run

from base.command_line import Given
from bench import BenchOptions, code_of, model_of
from mixers import MIXERS
from model import GPT, GPTConfig
from tools import bench_measure as measure
from tools import bench_table
from tools.bench_plots import plot
from tools.bench_scaling import (
    IN_TABLE, columns_for, crossover, exponent, scaling, summary, table_head, table_line)

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--device=cpu", "--dtype=float32",
         "--dataset=letters", "--rounds=1", "--seconds=0.01"]

every_mode = pytest.mark.parametrize("mode", ["train", "prefill", "decode"])


@pytest.fixture
def bench(here, monkeypatch, capsys):
    return Script("bench", here, monkeypatch, capsys)


def result(out):
    """The JSON object on the last line."""
    return json.loads(out.splitlines()[-1])


def rows(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def given(per_mixer={}, **options):
    return Given(BenchOptions, options, None, {}, per_mixer)


def cell(mode, mixer, length=8, batch=2, **model):
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    return {"mode": mode, "batch": batch, "length": length, "mixer": mixer,
            "model": model_of(given(**tiny | model), mixer, length, 31),
            "device": "cpu", "dtype": "float32", "compile": False}


def row(ms, time, **more):
    """A measured one of cells.jsonl."""
    return {"status": "ok", "round": 0, "time": time, "ms": ms, "ms_quantiles": [ms] * 19,
            "first_token_ms": None, "peak_bytes": 1, "rise_bytes": 1, "ceiling_flops_per_s": 1e9,
            "state_bytes": 8, "flops_per_token": 1e3, "parameters": 5,
            "read_bytes_per_token": 2e3, "ceiling_bytes_per_s": 1e9} | more


# A whole command ----------------------------------------------------------------------------------

TWO_MIXERS = ["--mixers=softmax,softmax+pelican", "--lengths=16,64", "--batch=2"]


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """The folder of a finished benchmark, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    done = run(home, "bench.py", *SMALL, *TWO_MIXERS, f"--out_dir={folder}", timeout=600)
    assert done.returncode == 0 and done.stderr == "", done
    return folder, done.stdout


def name_of(line):
    return line["mode"], int(line["batch"]), int(line["length"]), line["mixer"]


def test_every_cell_is_in_the_table_the_csv_the_json_and_the_plots(finished):
    folder, out = finished
    found = result(out)
    asked = []
    for mode in ("train", "prefill", "decode"):
        for T in (16, 64):
            asked += [(mode, 2, T, "softmax"), (mode, 2, T, "softmax+pelican")]
    assert [name_of(line) for line in found["cells"]] == asked
    with open(folder / "results.csv") as file:
        in_csv = list(csv.DictReader(file))
    assert [name_of(line) for line in in_csv] == asked
    assert [float(line["ms"]) for line in in_csv] == [line["ms"] for line in found["cells"]]
    assert [name_of(row["cell"]) for row in rows(folder)] == asked
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "decode_batch2.png", "prefill_batch2.png", "train_batch2.png"]
    for line in found["cells"]:
        assert f"{line['mixer']:<20} {line['ms']:>9,.2f}" in out
    assert json.loads((folder / "results.json").read_text()) == found
    assert "not made again" not in out


def test_the_header_says_on_what_and_the_ceiling_comes_before_the_cells(finished):
    _, out = finished
    head, _, _ = out.partition("train, batch 2")
    for word in ("machine ", "threads 1", f"torch {torch.__version__}", "git ",
                 "vocabulary 28 (that of data/letters)", "positions rope", "float32", "GFLOP/s"):
        assert word in head, word
    assert result(out)["ceiling_flops_per_s"] > 0


def test_the_figures_of_a_cell_hang_together(finished):
    for line in result(finished[1])["cells"]:
        model = GPT(GPTConfig(vocab_size=28, n_layer=1, n_head=2, n_embd=16, pos="rope",
                              mixer=line["mixer"]))
        T = line["length"]
        decoding, training = line["mode"] == "decode", line["mode"] == "train"
        assert line["status"] == "ok" and line["error"] is None
        assert line["rounds"] == 1 and line["ms_of_rounds"] == [line["ms"]]
        assert line["ms_p20"] <= line["ms"] <= line["ms_p80"]
        assert line["parameters"] == sum(p.numel() for p in model.parameters())
        assert line["state_bytes"] == model.state_bytes(T, torch.float32)
        assert line["tokens_per_s"] == pytest.approx(2 * (1 if decoding else T) / line["ms"] * 1e3)
        assert (line["first_token_ms"] is not None) == decoding
        assert 0 < line["rise_bytes"] < line["peak_bytes"]
        assert line["of_softmax"] == 1 if line["mixer"] == "softmax" else line["of_softmax"] > 0
        if decoding:
            weights = sum(p.nbytes for p in model.parameters())  # the head's are the embedding's
            assert line["flops_per_token"] is None
            assert line["read_bytes_per_token"] == weights / 2 + line["state_bytes"]
            reached = (line["read_bytes_per_token"] * line["tokens_per_s"]
                       / line["ceiling_bytes_per_s"])
            assert line["of_ceiling"] == pytest.approx(reached)
        else:
            assert line["read_bytes_per_token"] is None and line["ceiling_bytes_per_s"] is None
            flops = model.flops_per_token(T) * (3 if training else 1)
            assert line["flops_per_token"] == flops
            reached = flops * line["tokens_per_s"] / line["ceiling_flops_per_s"]
            assert line["of_ceiling"] == pytest.approx(reached)


def test_finished_cells_are_kept_and_only_what_is_missing_is_measured(finished, bench, here):
    first = rows(finished[0])
    folder = here / "o"
    folder.mkdir()
    whole = (finished[0] / "cells.jsonl").read_text()
    (folder / "cells.jsonl").write_text(whole + '{"cell": {"mode": "tra')  # the power failed
    same = bench(*SMALL, *TWO_MIXERS, "--out_dir=o")
    assert rows(folder) == first
    assert result(same)["cells"] == result(finished[1])["cells"]
    assert same.count(": 4 of 4 measurements are from o/cells.jsonl, not made again") == 3
    # a mixer more: softmax is measured again beside it; another width is another cell
    more = [*SMALL, "--mixers=softmax,pelican", "--lengths=16", "--batch=2", "--mode=prefill",
            "--out_dir=o"]
    bench(*more)
    new = [row["cell"] for row in rows(folder)[len(first):]]
    assert [cell["mixer"] for cell in new] == ["softmax", "pelican"]
    assert new[0] in [row["cell"] for row in first]
    bench(*more, "--n_embd=32")
    new = [row["cell"] for row in rows(folder)[len(first) + 2:]]
    assert [cell["mixer"] for cell in new] == ["softmax", "pelican"]
    assert new[0]["model"]["n_embd"] == 32
    (folder / "notes.txt").write_text("mine")
    bench(*more, "--overwrite")
    assert len(rows(folder)) == 2
    assert (folder / "notes.txt").exists() and not (folder / "train_batch2.png").exists()


def test_a_record_is_printed_as_a_table_for_each_mode(
        finished, here, monkeypatch, capsys, refusal):
    def table(name):
        monkeypatch.setattr(sys, "argv", ["bench_table", name])
        bench_table.main()
        return capsys.readouterr().out

    out = table(str(finished[0]))
    (here / "record").mkdir()
    packed = gzip.compress((finished[0] / "cells.jsonl").read_bytes())
    (here / "record" / "cells.gz").write_bytes(packed)
    assert table("record") == out
    for line in result(finished[1])["cells"]:
        mode, batch, length, mixer = name_of(line)
        entries = out.partition(f"| {mode}, batch {batch} | 16 | 64 |")[2].partition("\n\n")[0]
        entry = next(e for e in entries.splitlines() if e.startswith(f"| {mixer} |"))
        words = entry.split(" | ")[1 if length == 16 else 2]
        ratio = line["of_softmax"]
        assert words == (f"{line['ms']:,.3g} ms" if mixer == "softmax"
                         else f"{ratio:.2f} [{ratio:.2f}, {ratio:.2f}]")
    assert "nowhere has no cells.jsonl" in refusal(bench_table, "nowhere")
    (here / "record" / "cells.gz").write_bytes(packed[:-9])
    assert "damaged" in refusal(bench_table, "record")


# Cells that fail ----------------------------------------------------------------------------------

def test_too_little_memory_is_a_cell(bench, here):
    """Also where the number of tokens is larger than a number can be."""
    most = 2**31 - 1
    found = result(bench(*SMALL, "--mixers=softmax", f"--lengths=65536,{most}",
                         f"--batch=1000000,{most}", "--mode=prefill", "--out_dir=o"))
    assert [line["status"] for line in found["cells"]] == ["oom"] * 4
    assert len(list((here / "o").glob("*.png"))) == 2


LIMITED = """
import json, resource, sys
from tools import bench_measure as measure
from tools import bench_table

class Connection:
    def send(self, found):
        print(found["status"])

resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
for cell in json.loads(sys.argv[1]):
    measure.send_figures(cell, None, 0, Connection())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems set no such limit")
def test_memory_that_runs_out_in_the_middle_of_a_step():
    cells = [cell("train", "pelican", length, n_embd=128) for length in (16, 65536)]
    done = run(ROOT, "-c", LIMITED, json.dumps(cells))
    assert done.stdout == "ok\noom\n", done


def test_too_little_time_is_a_cell_and_more_time_another_chance(bench, here):
    arguments = [*SMALL, "--mixers=pelican", "--lengths=16", "--mode=prefill", "--rounds=3",
                 "--out_dir=o"]
    assert result(bench(*arguments, "--cell_seconds=1e-9"))["cells"][0]["status"] == "timeout"
    assert len(rows(here / "o")) == 1  # no further rounds
    assert result(bench(*arguments, "--cell_seconds=1e-9"))["cells"][0]["status"] == "timeout"
    assert len(rows(here / "o")) == 1
    [line] = result(bench(*arguments, "--cell_seconds=60"))["cells"]
    assert line["status"] == "ok" and line["rounds"] == 3 and len(line["ms_of_rounds"]) == 3


MINE = """
from mixers import MIXERS
from mixers.linear import Linear

class Short(Linear):
    def forward(self, x, state=None):
        assert x.size(1) < 32, "at most 31 \x1b[31m tokens"
        return super().forward(x, state)

MIXERS["short"] = Short
"""


def test_a_mixer_of_the_users_that_fails_is_one_line_and_does_not_stop_the_others(
        home, bench, here):
    """With the place in the user's file; what is not for a terminal to obey is escaped."""
    (here / "mine.py").write_text(MINE)
    arguments = [*SMALL, "--mixers=short,pelican", f"--mixer_file={here}/mine.py",
                 "--lengths=16,32", "--mode=prefill", f"--out_dir={here}/o"]
    done = run(home, "bench.py", *arguments)
    assert done.returncode == 1 and done.stderr == "", done
    assert [row["status"] for row in rows(here / "o")] == ["ok", "ok", "error", "ok"]
    [line] = [line for line in done.stdout.splitlines() if "AssertionError" in line[:200]
              and not line.startswith("{")]
    assert "error: AssertionError: at most 31 \\x1b[31m tokens" in line
    assert line.endswith("mine.py:7)")
    # other code, other cells: nothing of the broken mixer is kept
    (here / "mine.py").write_text(MINE.replace("< 32", "< 33"))
    assert [line["status"] for line in result(bench(*arguments))["cells"]] == ["ok"] * 4
    assert len(rows(here / "o")) == 8


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(bench, home, tmp_path):
    arguments = [*SMALL, "--mixers=softmax,pelican", "--lengths=16", "--mode=prefill",
                 "--rounds=3", "--seconds=0.3", f"--out_dir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "bench.py", *arguments], cwd=home, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    file = tmp_path / "cells.jsonl"
    while not (file.exists() and file.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    assert "in use" in bench.refuses(*arguments, unchanged=home)  # two at once would share figures
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "bench.py: interrupted\n"
    kept = rows(tmp_path)
    assert 1 <= len(kept) < 6 and all(row["status"] == "ok" for row in kept)
    assert {line["status"] for line in result(bench(*arguments))["cells"]} == {"ok"}
    measured = {(row["cell"]["mixer"], row["round"]) for row in rows(tmp_path)}
    assert rows(tmp_path)[:len(kept)] == kept
    assert measured == {(mixer, round) for mixer in ("softmax", "pelican") for round in range(3)}


@pytest.mark.parametrize("argument, naming", [
    ("--mixers=soft", "'soft'"), ("--mixers=softmax,", "''"), ("--mixer=lln", "--mixers"),
    ("--block_size=8", "--lengths"), ("--lengths=0", "'0'"), ("--lengths=1e3", "'1e3'"),
    ("--lengths=", "''"), ("--lengths=2147483648", "'2147483648'"),
    ("--lengths=" + "9" * 5000, "999"), ("--lengths=\u0665", "whole number"),
    ("--mode=training", "train, prefill, decode"), ("--batch=-1", "'-1'"),
    ("--rounds=0", "rounds"), ("--rounds=1000000000", "rounds"), ("--seconds=0", "seconds"),
    ("--cell_seconds=1e300", "cell_seconds"), ("--lln_matching=published", "lln"),
    ("--n_embd=18 --n_head=4", "n_head"), ("--n_embd=12", "rope"),
    ("--max_iters=3", "--max_iters"), ("--dataset=../x", "'../x'"),
    ("--mixer_file=none.py", "none.py"), ("none.py", "none.py"), ("--device=tpu", "tpu"),
    ("--out_dir=/proc/x", "/proc/x"), ("--out_dir=/dev/null/x", "/dev/null/x"),
    ("--out_dir=" + "a" * 300, "too long"),
])
def test_what_is_refused(bench, argument, naming):
    assert naming in bench.refuses("--mixers=softmax,pelican", *argument.split())


def test_a_list_has_each_entry_once(bench, here):
    found = result(bench(*SMALL, "--mixers=pelican,pelican", "--lengths=16,016,16", "--batch=1",
                         "--mode=prefill,prefill", "--out_dir=o"))
    assert [name_of(line) for line in found["cells"]] == [("prefill", 1, 16, "pelican")]


def damaged(**values):
    good = row(1, 2) | {"cell": {}, "cell_seconds": 1.0}
    return json.dumps(good | values)


@pytest.mark.parametrize("line, naming", [
    ("[1]", "line 1"), ("3", "line 1"), ("{}", "line 1"), ("{", "no valid JSON"),
    ("[" * 100_000, "no valid JSON"), ("\0", "no valid JSON"),
    (damaged(cell=[1]), "cell"), (damaged(status="fine"), "status"), (damaged(ms=0), "ms"),
    (damaged(ms="1"), "ms"), (damaged(ms=math.nan), "no valid JSON"), (damaged(ms=10**400), "ms"),
    (damaged(ms_quantiles=[]), "ms_quantiles"), (damaged(time=None), "time"),
    (damaged(round="a"), "round"), (damaged(peak_bytes="\x1b[31m"), "peak_bytes"),
    (damaged(ceiling_flops_per_s=0), "ceiling_flops_per_s")])
def test_results_that_are_damaged_are_refused(bench, here, line, naming):
    (here / "o").mkdir()
    (here / "o" / "cells.jsonl").write_text(line + "\n")
    message = bench.refuses(*SMALL, "--out_dir=o")
    assert "--overwrite" in message and naming in message and len(message) < 500


def test_nothing_is_written_through_a_link_or_to_a_pipe(bench, here, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (here / "o").mkdir()
    cells = here / "o" / "cells.jsonl"
    cells.symlink_to(mine)
    for more in ([], ["--overwrite"]):
        assert "cells.jsonl is a link" in bench.refuses(*SMALL, "--out_dir=o", *more)
    cells.unlink()
    os.mkfifo(cells)
    assert "no regular file" in bench.refuses(*SMALL, "--out_dir=o")
    cells.unlink()
    for name in ("results.csv", "prefill_batch1.png"):
        (here / "o" / name).symlink_to(mine)
    bench(*SMALL, "--mixers=pelican", "--lengths=16", "--batch=1", "--mode=prefill", "--out_dir=o")
    assert mine.read_text() == "mine" and (here / "o" / "results.csv").read_text()[:4] == "mode"


@pytest.mark.parametrize("name", [
    "mixers/lln.py", "mixers/parts/chunkwise.py", "training/device.py", "base/loss.py", "model.py",
    "train.py", "tools/bench_measure.py", "mine.py"])
def test_what_is_measured_changes_with_the_code(clone, monkeypatch, name):
    monkeypatch.setattr("bench.ROOT", clone)
    (clone / "mine.py").write_text(MINE)
    before = code_of(clone / "mine.py")
    assert code_of(clone / "mine.py") == before
    (clone / "bench.py").write_text("")
    (clone / "tools/compare.py").write_text("")
    assert code_of(clone / "mine.py") == before
    (clone / name).write_text((clone / name).read_text() + "# x\n")
    assert code_of(clone / "mine.py") != before


# What is measured ---------------------------------------------------------------------------------

@pytest.mark.parametrize("mixer", sorted(MIXERS))
@every_mode
def test_every_mixer_in_every_mode(mixer, mode, monkeypatch):
    def memory_of(step, device, before):  # leaves this process's malloc as it is
        step()
        return {}

    monkeypatch.setattr(measure, "memory_of", memory_of)
    found = measure.figures(cell(mode, mixer, length=70), seconds=0)
    assert found["ms"] > 0 and found["repeats"] == 3
    assert found["ms_quantiles"] == sorted(found["ms_quantiles"])


@pytest.mark.parametrize("pos, expected", [
    (None, "rope"), ("learned", "rope"), ("rope", "rope"), ("none", "none")])
def test_the_length_adds_no_parameters(pos, expected):
    a, b = (model_of(given(pos=pos), "softmax", length, 31) for length in (16, 65536))
    assert a["pos"] == b["pos"] == expected
    assert a | {"block_size": 65536} == b
    short, long = (GPT(GPTConfig(**model)) for model in (a, b))
    assert sum(p.numel() for p in short.parameters()) == sum(p.numel() for p in long.parameters())


def test_a_recipes_options_for_a_mixer_are_that_mixers():
    own = {"linformer": {"linformer_segment": 8}, "softmax,linformer": {"linformer_segment": 4}}
    segments = [model_of(given(own), mixer, 16, 31)["linformer_segment"]
                for mixer in ("linformer", "softmax+linformer", "linformer+softmax")]
    assert segments == [8, 4, 64]
    assert model_of(given(own, linformer_segment=2), "linformer", 16, 31)["linformer_segment"] == 2


def test_a_config_file_sets_the_model_and_nothing_of_its_run(bench, here):
    (here / "mine.py").write_text(
        "dataset = 'nowhere'\nn_layer = 3\nn_embd = 16\nmixer = 'softmax,lln'\n"
        "lln_matching = 'published'\nout_dir = 'run'\nmax_iters = 7\npos = 'learned'\n"
        "block_size = 9")
    out = bench("mine.py", "--lengths=16", "--mode=prefill", "--rounds=1", "--seconds=0.01",
                "--out_dir=o", "--mixers=softmax,lln", "--n_head=2")
    assert not (here / "run").exists()
    assert ("3 layers, 16 channels, 2 heads, vocabulary 65 (assumed, as data/nowhere is not "
            "prepared), positions rope") in out
    softmax, lln = (row["cell"]["model"] for row in rows(here / "o"))
    assert softmax["lln_matching"] == "table" and lln["lln_matching"] == "published"
    assert lln["block_size"] == 16


def test_a_training_step_is_one_of_train_py(monkeypatch):
    """Gradients, moments and statistics as after one of its steps; the weights stay, so that every
    step is the same work."""
    config = GPTConfig(vocab_size=31, n_layer=1, n_head=2, n_embd=16, mixer="lln", pos="rope")
    torch.manual_seed(0)
    model = GPT(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(31, (2, 9))
    made, make = [], measure.make_optimizer

    def make_optimizer(*arguments):
        made.append(make(*arguments))
        return made[0]

    def autocast():
        return torch.autocast("cpu", enabled=False)

    monkeypatch.setattr(measure, "make_optimizer", make_optimizer)
    step = measure.training_step(model, tokens, autocast, False, torch.device("cpu"))
    step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # the moments of queries and keys
    assert changed and changed.isdisjoint(dict(model.named_parameters()))
    torch.manual_seed(0)
    twin = GPT(config)
    twin.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert p.grad is None
        torch.testing.assert_close(made[0].state[p]["exp_avg"], 0.1 * q.grad, msg=name)


def test_decoding_goes_on_from_the_whole_prefix(monkeypatch):
    """The tokens that it decodes are those of greedy decoding behind the prefix, whatever its
    pieces."""
    monkeypatch.setattr(measure, "PIECE", 6)  # 3 tokens of each of 2 sequences
    monkeypatch.setattr(measure, "memory_of", lambda step, device, before: {})
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, n_layer=1, n_head=2, n_embd=16, pos="rope")).eval()
    prefix = torch.randint(31, (2, 10))
    fed, step = [], model.step

    def step_and_note(idx, state=None):
        fed.append(idx)
        return step(idx, state)

    monkeypatch.setattr(model, "step", step_and_note)
    with torch.no_grad():
        times, first, _ = measure.decode(
            model, model.step, prefix, 0, torch.device("cpu"))
    n = len(times) + 4 + 4  # the prefix in four pieces, and four tokens before the clock
    last = fed[-n:]
    assert [idx.shape[1] for idx in last] == [3, 3, 3] + [1] * (n - 3)
    assert torch.equal(torch.cat(last[:4], dim=1), prefix)
    assert first > 0
    monkeypatch.undo()
    assert torch.equal(torch.cat(last, dim=1), model.generate(prefix, n - 4, temperature=0))


def test_timed_repeats_until_the_time_is_up():
    device, calls = torch.device("cpu"), []
    assert len(measure.timed(lambda: calls.append(1), device, 0)) == len(calls) == 3
    assert len(measure.timed(lambda: None, device, 5, at_most=7)) == 7
    times = measure.timed(lambda: time.sleep(0.01), device, 0.1)
    assert 3 <= len(times) <= 10 and all(0.01 <= t < 0.1 for t in times)


@pytest.mark.parametrize("training, products", [(False, 1), (True, 3)])
def test_the_ceiling_counts_the_models_products(training, products, monkeypatch):
    # two seconds for every shape
    monkeypatch.setattr(measure, "timed", lambda *arguments, **more: [2.0])
    model = GPT(GPTConfig(vocab_size=31, n_layer=3, n_head=2, n_embd=16, pos="rope"))
    weights = 3 * (16 * 48 + 16 * 16 + 2 * 16 * 64) + 31 * 16
    seconds = 2.0 * (3 * 4 + 1)  # four products in each layer, and the head
    found = measure.matmul_ceiling(model, 10, torch.float32, torch.device("cpu"), training, 1)
    assert found == pytest.approx(products * 2 * 10 * weights / seconds)


MEMORY = """
import torch
from tools import bench_measure as measure
from tools import bench_table
device = torch.device("cpu")
old = [torch.ones(2**18) for _ in range(50)]  # 50 MiB that malloc keeps
del old
before = measure.held(device)
kept = torch.ones(5 * 2**18)
def step():
    a = torch.ones(20 * 2**18)
    del a
    b = [torch.ones(2**18) for _ in range(10)]
step()
found = measure.memory_of(step, device, before)
print(found["rise_bytes"] / 2**20, found["peak_bytes"] / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux says")
def test_memory_is_that_of_what_lives_at_once():
    done = run(ROOT, "-c", MEMORY)
    rise, peak = map(float, done.stdout.split())
    # 5 kept and 20, not 5 + 20 + 10, nor the 50 of before
    assert rise == pytest.approx(25, abs=1.0) and peak > 100


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux says")
def test_decoding_with_softmax_needs_its_state_and_with_a_linear_mixer_no_more_at_any_length():
    rise, state = {}, {}
    for mixer in ("softmax", "linear"):
        for T in (4096, 16384):  # both with the kernels of long prompts, which stay
            found = measure.run_cell(cell("decode", mixer, length=T, n_kv_head=2), None, 0.01, 60)
            rise[mixer, T], state[mixer, T] = found["rise_bytes"], 2 * found["state_bytes"]
    grown = state["softmax", 16384] - state["softmax", 4096]
    # the cache has up to as much room again
    assert grown == 2 * 2 * 12288 * 16 * 4
    assert 0.7 * grown < rise["softmax", 16384] - rise["softmax", 4096] < 2.5 * grown
    assert abs(rise["linear", 16384] - rise["linear", 4096]) < 0.2 * grown


# What the figures are turned into -----------------------------------------------------------------

@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_is_as_wide_as_the_terminal(width):
    line = summary(cell("train", "softmax"), [row(10, 0)], [row(10, 0)])
    columns = columns_for(width)
    shown = [table_head(columns), table_line(line, columns)]
    assert len(shown[0]) == len(shown[1]) <= width and columns_for(None) == list(IN_TABLE)
    for name in ("mixer", "ms", "of softmax", "[p20, p80]"):
        assert name in shown[0]
    assert ("of ceiling" in shown[0], len(columns) == len(IN_TABLE)) == (width > 80, width == 200)


def test_an_exponent_is_that_of_a_power_law_through_the_longest_three():
    slope, lengths = exponent({T: 7 * T**1.5 for T in (1024, 64, 256)})
    assert slope == pytest.approx(1.5) and lengths == [64, 256, 1024]
    slope, lengths = exponent({64: 1e9, 128: None, 256: 256.0**2, 512: 512.0**2, 1024: 1024.0**2})
    assert slope == pytest.approx(2) and lengths == [256, 512, 1024]
    assert exponent({64: 5.0, 128: -1.0}) == (None, []) and exponent({}) == (None, [])


def test_a_crossover_is_interpolated_in_logarithms():
    lengths = (128, 256, 512, 1024, 2048)
    T, words = crossover({T: (700 / T) ** 0.8 for T in lengths})
    assert T == pytest.approx(700) and words == "from 700 on"
    assert crossover({T: 1 + T / 1e4 for T in lengths}) == (None, "none up to 2,048")
    assert crossover({T: 0.5 for T in lengths}) == (128, "at all lengths, from 128 on")
    T, words = crossover({128: 0.9, 256: 2.0, 512: 0.5})  # the last one counts
    assert T == pytest.approx(math.sqrt(256 * 512)) and words == "from 362 on"
    assert crossover({}) == (None, "n/a")


def test_the_ratio_pairs_what_was_measured_close_in_time():
    """The machine is three times as slow in the second round, and ten times in rounds of another
    day, which have no pair."""
    softmax = [row(10, 0), row(30, 100), row(100, 1e6)]
    line = summary(cell("train", "lln"), [row(20, 10), row(60, 110), row(21, 12)], softmax)
    assert line["of_softmax"] == 2 and line["ms"] == 21 and line["rounds"] == 3
    assert line["ms_of_rounds"] == [20, 60, 21]
    assert line["tokens_per_s"] == pytest.approx(16 / 21e-3)
    assert line["of_ceiling"] == pytest.approx(16 * 1e3 / 21e-3 / 1e9)
    assert summary(cell("train", "lln"), [row(20, 10)], [])["of_softmax"] is None


def test_quantiles_are_of_all_rounds_each_weighing_the_same():
    """So what differs from process to process is in p20 and p80, however steady each of them is."""
    measured = [row(10, 0, ms_quantiles=[9.0] * 10 + [11.0] * 9), row(30, 0, repeats=3),
                row(20, 0, repeats=999)]
    line = summary(cell("train", "lln"), measured, [])
    assert (line["ms_p20"], line["ms"], line["ms_p80"]) == (11, 20, 30)


def test_a_cell_that_failed_once_and_was_measured_then_is_measured():
    failed = {"status": "timeout", "round": 0, "time": 0}
    assert summary(cell("train", "lln"), [failed, row(20, 10)], [])["status"] == "ok"
    line = summary(cell("train", "lln"), [failed], [row(10, 0)])
    assert line["status"] == "timeout" and line["ms"] is None and line["rounds"] == 0


def test_scaling_leaves_out_what_was_not_measured(tmp_path):
    table = []
    for T in (64, 128, 256, 512):
        softmax = row(T, 0) if T < 512 else {"status": "oom"}
        lln = row(90, 0, rise_bytes=None)
        table.append(summary(cell("decode", "softmax", T), [softmax], []))
        table.append(summary(cell("decode", "lln", T), [lln], [softmax]))
    softmax, lln = scaling(table)
    assert softmax["time_exponent"] == pytest.approx(1)
    assert softmax["time_lengths"] == [64, 128, 256]
    assert lln["time_exponent"] == pytest.approx(0, abs=1e-9)
    assert lln["time_lengths"] == [128, 256, 512]
    assert lln["memory_exponent"] is None and lln["crossover"] == pytest.approx(90)
    plot(tmp_path / "a.png", table, [softmax, lln], "a title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
