"""train.py: what a run writes, that it can be repeated, stopped and continued, and what it
refuses before writing anything."""
import errno
import fcntl
import json
import math
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT, TINY, content, metrics, one_line, run, screen_of, untimed, values_of, wandb_records)
from safetensors.torch import load_file
from test_checkpoint import rewrite

import train as train_script
import training.metrics
import training.report
from base.errors import BadInput
from data import load_dataset
from model import GPT, GPTConfig
from training import checkpoint, run_folder
from training import run_folder as run_folder_module
from training.machine import Machine, parameters_at_least
from training.parallel import World
from training.report import sample_text
from training.run_folder import FolderLock, data_sha256, pieces, read_options

KEYS = {"iter", "train_loss", "val_loss", "val_bpb", "lr", "tokens", "tokens_per_s", "seconds"}
# how `trained` was made, besides TINY
STRAIGHT = ("--dropout=0.1", "--eval_interval=10", "--log_interval=5")


def weights(out_dir, iteration):
    return load_file(out_dir / "checkpoints" / f"{iteration:08d}" / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def start(cwd, *command, **options):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


# -- what a run writes ---------------------------------------------------------------------------

def test_the_metrics_have_the_same_keys_everywhere_and_nulls(trained):
    rows = metrics(trained)
    assert all(row.keys() == rows[0].keys() >= KEYS for row in rows)
    logs = [row for row in rows if row["train_loss"] is not None]
    evals = [row for row in rows if row["val_loss"] is not None]
    assert len(logs) + len(evals) == len(rows)
    assert [row["iter"] for row in logs] == [5, 10, 15, 20]
    assert [row["iter"] for row in evals] == [10, 20]
    for row in logs:
        assert row["val_loss"] is row["val_bpb"] is None
        assert row["lr"] > 0 and row["tokens_per_s"] > 0
    assert all(row["train_loss"] is row["lr"] is row["tokens_per_s"] is None for row in evals)
    assert [row["tokens"] for row in rows] == [row["iter"] * 4 * 16 for row in rows]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert rows[0]["seconds"] > 0
    for row in evals:  # one byte a character in this set
        assert row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2))
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] < math.log(28) + 1


def test_the_folder_of_a_run(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["dataset"] == "letters"
    assert config["n_layer"] == 1
    assert config["mixer"] == "softmax"
    assert (config["lr_decay_iters"], config["min_lr"]) == (20, 0.001)
    # as used: no choice left open
    assert (config["tie_head"], config["ffn_hidden"], config["pos"]) == (True, 64, "learned")
    assert {p.name for p in trained.iterdir()} - {"lock"} == {"config.json", "metrics.jsonl",
                                                              "checkpoints"}
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"00000010", "00000020",
                                                                     "newest.json", "best.json"}
    for name in ("newest.json", "best.json"):
        assert json.loads((trained / "checkpoints" / name).read_text()) == {"folder": "00000020"}


def test_the_log_has_units_a_table_that_adds_up_and_the_data(trained):
    log = trained.with_suffix(".log").read_text()
    table = re.findall(r"^(\w+) +([\d,]+) parameters", log, re.MULTILINE)
    groups = {name: int(count.replace(",", "")) for name, count in table}
    total = groups.pop("all")
    assert set(groups) == {"embedding", "mixer", "mlp", "norms", "head"}
    assert sum(groups.values()) == total
    assert total == sum(t.numel() for t in weights(trained, 20).values())
    step = r"^step +\d+/20 \| loss [\d.]+ nats \| lr \S+ \| [\d,]+ tokens/s \| [\d.]+ s"
    assert len(re.findall(step, log, re.MULTILINE)) == 4
    evaluation = r"^step +\d+/20 \| val loss [\d.]+ nats per token \| [\d.]+ bits per byte"
    assert len(re.findall(evaluation, log, re.MULTILINE)) == 2
    assert "letters" in log and "28" in log


def test_the_folder_is_named_after_the_config_and_a_mixer_from_the_command_line(here):
    def name(*argv):
        return read_options(list(argv), "tests")[0].out_dir

    recipe = str(ROOT / "configs/shakespeare_pelican.py")
    assert name(recipe) == "out/shakespeare_pelican"
    assert name(recipe, "--n_layer=2") == "out/shakespeare_pelican"
    assert name(recipe, "--mixer=softmax") == "out/shakespeare_pelican_softmax"
    assert name(recipe, "--mixer=softmax,pelican") == "out/shakespeare_pelican_softmax+pelican"
    assert name(recipe, "--mixer=softmax", "--out_dir=x/y") == "x/y"
    assert name("--dataset=letters", "--mixer=pelican").startswith("out/")
    assert "pelican" in name("--mixer=pelican")


def test_a_recipe_runs_on_tiny_shakespeare_in_a_folder_of_its_own_name(clone, shakespeare_char):
    """The documented command, shortened by nothing but --max_iters."""
    shutil.copytree(shakespeare_char, clone / "data/shakespeare_char", dirs_exist_ok=True)
    done = run(clone, "train.py", "configs/shakespeare_pelican.py", "--max_iters=30")
    assert done.returncode == 0, done.stderr
    config = json.loads((clone / "out/shakespeare_pelican/config.json").read_text())
    assert (config["lr_decay_iters"], config["warmup_iters"], config["head_temperature"]) == (30,
                                                                                              100,
                                                                                              0.1)
    last = metrics(clone / "out/shakespeare_pelican")[-1]
    assert last["iter"] == 30 and last["val_loss"] < math.log(65)
    newest = clone / "out/shakespeare_pelican/checkpoints/newest.json"
    assert json.loads(newest.read_text()) == {"folder": "00000030"}


def test_no_steps_at_all_leave_the_untrained_model(home, tmp_path):
    process = start(home, "train.py", *TINY, "--max_iters=0", f"--out_dir={tmp_path / 'run'}")
    try:
        _, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        times = len(metrics(tmp_path / "run"))
        pytest.fail(f"--max_iters=0 never ends; it has evaluated {times} times")
    assert process.returncode == 0, err
    [row] = metrics(tmp_path / "run")
    assert row["iter"] == row["tokens"] == 0 and abs(row["val_loss"] - math.log(28)) < 1
    assert weights(tmp_path / "run", 0)


def test_a_terminal_gets_a_progress_bar_with_the_time_left(home, tmp_path):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "train.py", *TINY, "--max_iters=40", "--log_interval=10",
               f"--out_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=end, text=True)
    os.close(end)
    out, shown = process.communicate(timeout=60)[0], b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # how a terminal says that its other end is closed
        pass
    assert process.returncode == 0
    assert b"40/40" in shown and re.search(rb"\d\d:\d\d<\d\d:\d\d", shown) and b"loss" in shown
    assert "| lr" not in out and "val loss" in out  # the bar takes the place of the log lines


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_leaves_one_bar_and_says_how_to_go_on(home, tmp_path):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "train.py", *TINY, "--max_iters=90000", "--eval_interval=90000",
               f"--out_dir={tmp_path / 'run'}"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(command, cwd=home, stdout=end, stderr=end, env=environment)
    os.close(end)
    shown, interrupted = b"", False
    try:
        while part := os.read(terminal, 4096):
            shown += part
            if b"step/s" in shown and not interrupted:
                shown += b"^C"  # as a terminal echoes it
                process.send_signal(signal.SIGINT)
                interrupted = True
    except OSError:  # its other end is closed
        pass
    assert process.wait(timeout=60) == 0
    lines = screen_of(shown.decode())
    assert sum("/90000 [" in line for line in lines) == 1 and "^" not in "".join(lines)
    assert any(line.startswith("stopping after step ") for line in lines)
    assert "go on with --resume" in lines[-2]
    assert max(map(len, lines[1:])) < 80  # the first names the folder


# -- the numbers are right -----------------------------------------------------------------------

def test_the_validation_loss_is_that_of_the_saved_weights_over_the_whole_split(trained, home):
    """Recomputed with plain torch: one block written out by hand, every token but the first a
    target once."""
    w = weights(trained, 20)

    def take(*parts):
        [name, *_] = [name for name in sorted(w) if all(part in name for part in parts)]
        return w[name]

    def norm(h, name):
        return F.layer_norm(h, (16,), take(name, "weight"), take(name, "bias"), 1e-5)

    def linear(h, *parts):
        return F.linear(h, take(*parts, "weight"), take(*parts, "bias"))

    tokens = np.fromfile(home / "data/letters/val.bin", dtype="<u2")
    tokens = torch.from_numpy(tokens.astype(np.int64))
    embed = w["embed.weight"]
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, 16):
        x, y = tokens[start:start + 16], tokens[start + 1:start + 17]
        T = len(y)
        h = embed[x[:T]] + take("pos_embed")[:T]
        parts = qkv(norm(h, "norm1"), w).split(16, dim=-1)
        q, k, v = (part.view(T, 2, 8).transpose(0, 1) for part in parts)
        scores = (q @ k.mT / 8 ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        h = h + linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(T, 16), "mixer", "c_proj")
        h = h + linear(F.gelu(linear(norm(h, "norm2"), "mlp", "c_fc")), "mlp", "c_proj")
        h = F.layer_norm(h, (16,), w["norm.weight"], w["norm.bias"], 1e-5)
        logp = (h @ embed.T).log_softmax(-1)
        total -= logp.gather(1, y[:, None]).sum().item()
        count += T
    assert count == len(tokens) - 1
    assert metrics(trained)[-1]["val_loss"] == pytest.approx(total / count, abs=2e-6)


def qkv(h, w):
    """Queries, keys and values (T, 3 C), whether they are saved as one matrix or as three."""
    def place(name):
        return "qkv".index(name.split(".")[-2][-1]) if w[name].shape[0] == 16 else 0

    names = [n for n in w if ".mixer." in n and "c_proj" not in n and n.endswith("weight")]
    parts = sorted(names, key=place)
    return torch.cat([F.linear(h, w[n], w[n.replace("weight", "bias")]) for n in parts], dim=-1)


def test_two_micro_steps_of_six_are_one_batch_of_twelve(train):
    common = [*TINY, "--max_iters=20", "--log_interval=1"]
    train(*common, "--batch_size=12", "--out_dir=whole")
    train(*common, "--batch_size=6", "--gradient_accumulation_steps=2", "--out_dir=halves")
    whole, halves = metrics("whole"), metrics("halves")
    assert len(whole) == len(halves) == 21
    for a, b in zip(whole, halves):
        assert a["tokens"] == b["tokens"] == a["iter"] * 12 * 16
        for key in ("train_loss", "val_loss"):
            assert a[key] == b[key] is None or a[key] == pytest.approx(b[key], abs=1e-5)


def test_a_seed_gives_the_same_run_and_another_seed_another(train, trained, here):
    """Against a run of another process."""
    train(*TINY, *STRAIGHT, "--max_iters=20", "--out_dir=again")
    assert untimed(metrics("again")) == untimed(metrics(trained))
    assert equal(weights(here / "again", 20), weights(trained, 20))
    train(*TINY, *STRAIGHT, "--max_iters=20", "--out_dir=other", "--seed=1")
    assert metrics("other")[0]["train_loss"] != metrics("again")[0]["train_loss"]


def test_checkpointed_activations_are_the_same_run(train, trained, here):
    train(*TINY, *STRAIGHT, "--max_iters=20", "--checkpoint_activations", "--out_dir=run")
    assert untimed(metrics(here / "run")) == untimed(metrics(trained))


def test_weight_decay_is_on_matrices_only(train, here):
    train(*TINY, "--max_iters=1", "--weight_decay=5", "--learning_rate=1e-4", "--warmup_iters=0",
          "--out_dir=with")
    train(*TINY, "--max_iters=1", "--weight_decay=0", "--learning_rate=1e-4", "--warmup_iters=0",
          "--out_dir=plain")
    decayed, plain = weights(here / "with", 1), weights(here / "plain", 1)
    changed = {name for name in plain if not torch.equal(plain[name], decayed[name])}
    assert changed == {name for name, tensor in plain.items() if tensor.dim() >= 2}


def test_evaluating_a_run_gives_its_loss_and_writes_nothing(train, trained):
    before = content(trained)
    out = train("--eval_only", f"--out_dir={trained}")
    row = metrics(trained)[-1]
    assert f"val loss {row['val_loss']:.4f} nats" in out and f"{row['val_bpb']:.4f} bits" in out
    assert content(trained) == before


def test_a_run_from_the_weights_of_another_starts_where_that_one_ended(train, trained, here):
    train(*TINY, f"--init_from={trained}", "--max_iters=1", "--learning_rate=0", "--out_dir=tuned")
    assert metrics("tuned")[-1]["val_loss"] == metrics(trained)[-1]["val_loss"]
    assert equal(weights(here / "tuned", 1), weights(trained, 20))
    line = train.refuses(*TINY, f"--init_from={trained}", "--n_embd=32", "--out_dir=wide")
    assert "embed.weight" in line and "16" in line and "32" in line
    line = train.refuses(*TINY, f"--init_from={trained}", "--mixer=pelican", "--out_dir=other")
    assert "+blocks.0.norm1" in line and not (here / "other").exists()


def test_the_checksum_is_of_the_weights_that_were_read(train, run_folder, here, monkeypatch):
    """Also where a training has saved newer ones meanwhile."""
    load = checkpoint.load

    def load_and_save(out_dir):
        found = load(out_dir)
        shutil.copytree(found.folder, found.folder.with_name("00000030"))
        return found

    expected = run_folder_module.weights_sha256(run_folder)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "load", load_and_save)
        train(*TINY, f"--init_from={run_folder}", "--max_iters=1", "--out_dir=tuned")
    assert json.loads((here / "tuned/config.json").read_text())["init_sha256"] == expected
    weights = run_folder / "checkpoints/00000030/model.safetensors"
    weights.unlink()
    with pytest.raises(BadInput, match="no regular file"):
        run_folder_module.weights_sha256(run_folder)


# -- stop and go on ------------------------------------------------------------------------------

def test_a_resumed_run_is_the_straight_one_bit_for_bit(trained, home, tmp_path, train):
    """20 steps with dropout: in one process, and as 10 and 10 in two."""
    folder = tmp_path / "run"
    train(*TINY, *STRAIGHT, "--max_iters=10", "--lr_decay_iters=20", f"--out_dir={folder}")
    second = run(home, "train.py", "--resume", "--max_iters=20", f"--out_dir={folder}")
    assert second.returncode == 0 and second.stderr == "", second
    assert str(folder / "checkpoints/00000010") in second.stdout
    assert untimed(metrics(folder)) == untimed(metrics(trained))
    for iteration in (10, 20):
        assert equal(weights(folder, iteration), weights(trained, iteration))
        path = f"checkpoints/{iteration:08d}/optimizer.safetensors"
        a, b = load_file(folder / path), load_file(trained / path)
        assert a and equal(a, b)
    seconds = [row["seconds"] for row in metrics(folder)]
    assert seconds == sorted(seconds)


def test_a_stopped_run_saves_ends_with_0_and_goes_on(home, tmp_path, train):
    folder = tmp_path / "run"
    process = start(home, "train.py", *TINY, "--dropout=0.1", "--max_iters=1000000",
                    "--lr_decay_iters=500", "--log_interval=1", "--eval_interval=1000000",
                    f"--out_dir={folder}")
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "" and "stopped" in out and "--resume" in out
    [saved] = checkpoint.checkpoints(folder)
    step = int(saved.name)
    assert checkpoint.damage(saved) is None
    assert metrics(folder)[-1]["iter"] == step
    assert f"step {step}" in out
    train("--resume", f"--out_dir={folder}", f"--max_iters={step + 5}")
    train(*TINY, "--dropout=0.1", f"--max_iters={step + 5}", "--lr_decay_iters=500",
          "--log_interval=1", "--eval_interval=1000000", "--out_dir=straight")
    assert untimed(metrics(folder)) == untimed(metrics("straight"))


def test_a_killed_run_leaves_whole_checkpoints_and_goes_on(home, tmp_path, train):
    folder = tmp_path / "run"
    process = start(home, "train.py", *TINY, "--max_iters=1000000", "--lr_decay_iters=100",
                    "--log_interval=1", "--eval_interval=1", "--eval_tokens=16",
                    f"--out_dir={folder}")

    def far_enough():
        folders = checkpoint.checkpoints(folder)
        return len(folders) > 1 and int(folders[-1].name) > 8

    wait_for(far_enough, process)
    process.kill()
    process.communicate()
    step = int(checkpoint.load(folder).folder.name)
    assert all(checkpoint.damage(f) is None for f in checkpoint.checkpoints(folder))
    train("--resume", f"--out_dir={folder}", f"--max_iters={step + 3}")
    assert [row["iter"] for row in metrics(folder) if row["train_loss"]] == list(range(1, step + 4))
    assert checkpoint.damage(checkpoint.checkpoints(folder)[-1]) is None
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_run_that_died_before_its_first_checkpoint_starts_again(train, here):
    train(*TINY, "--max_iters=4", "--log_interval=1", "--out_dir=run")
    whole = untimed(metrics("run"))
    shutil.rmtree(here / "run/checkpoints")
    path = here / "run/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    out = train(*TINY, "--max_iters=4", "--log_interval=1", "--out_dir=run", "--resume")
    assert "beginning" in out
    assert untimed(metrics("run")) == whole  # and not the three lines twice


def test_resume_takes_the_runs_own_options_over_the_defaults(run_folder):
    options, saved = read_options([f"--out_dir={run_folder}", "--resume", "--seed=5"], "tests")[:2]
    assert saved.folder.name == "00000020"
    assert (options.n_layer, options.dataset, options.dropout, options.seed) == (1, "letters", 0.1,
                                                                                 5)


def test_a_run_that_was_moved_goes_on_where_it_is(train, run_folder, trained, here):
    """Also where no --out_dir names it."""
    folder = here / "out/letters_softmax"
    folder.parent.mkdir()
    run_folder.rename(folder)
    before = content(trained)
    out = train("--resume", "--dataset=letters", "--max_iters=21")
    assert "going on from out/letters_softmax/checkpoints/00000020" in out
    assert metrics(folder)[-1]["iter"] == 21 and content(trained) == before
    assert json.loads((folder / "config.json").read_text())["out_dir"] == "out/letters_softmax"


def test_resume_says_what_differs_from_the_run_so_far(train, run_folder):
    out = train("--resume", f"--out_dir={run_folder}", "--max_iters=21", "--dropout=0.2")
    assert "dropout 0.1 -> 0.2" in out and "max_iters 20 -> 21" in out and "n_layer" not in out


def test_a_longer_run_decays_over_its_new_length(run_folder):
    longer = read_options([f"--out_dir={run_folder}", "--resume", "--max_iters=50"], "tests")[0]
    assert (longer.max_iters, longer.lr_decay_iters, longer.dropout) == (50, 50, 0.1)
    kept = read_options([f"--out_dir={run_folder}", "--resume", "--max_iters=50",
                         "--lr_decay_iters=20"], "tests")[0]
    assert (kept.max_iters, kept.lr_decay_iters) == (50, 20)


def test_what_followed_from_other_options_follows_whatever_the_config_file_says(train, here):
    (here / "mine.py").write_text("lr_decay_iters = 7\nmin_lr = 0.0\n")
    words = ["mine.py", *TINY, "--max_iters=4", f"--out_dir={here}/run"]
    train(*words, "--lr_decay_iters=4", "--learning_rate=0.1", "--min_lr=0.01")
    again = [*words[:-2], words[-1], "--resume"]
    options = read_options([word for word in again if "learning_rate" not in word], "tests")[0]
    assert (options.max_iters, options.lr_decay_iters, options.min_lr) == (4, 4, 0.01)
    assert "lr_decay_iters not set" in train(*again, "--max_iters=4")


def test_what_the_config_file_sets_is_kept_though_it_equals_what_would_follow(train, here):
    (here / "mine.py").write_text("lr_decay_iters = 4\nmin_lr = 0.01\n")
    words = ["mine.py", *TINY, "--max_iters=4", "--learning_rate=0.1", f"--out_dir={here}/run"]
    train(*words)
    again = ["mine.py", f"--out_dir={here}/run", "--resume"]
    longer = read_options([*again, "--max_iters=6", "--learning_rate=0.2"], "tests")[0]
    assert (longer.max_iters, longer.lr_decay_iters, longer.min_lr) == (6, 4, 0.01)
    assert "not set" not in train(*again)


def test_a_run_that_a_sweep_looks_at_can_be_locked(tmp_path):
    (tmp_path / "lock").touch()
    with open(tmp_path / "lock") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        Timer(0.03, lambda: fcntl.flock(looked_at, fcntl.LOCK_UN)).start()
        with FolderLock() as lock:
            lock.take(tmp_path)
    assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_damaged_newest_checkpoint_is_passed_over_and_replaced(train, run_folder, trained):
    (run_folder / "checkpoints/00000020/model.safetensors").write_bytes(b"gone")
    out = train("--resume", f"--out_dir={run_folder}")
    assert "00000020 is damaged" in out
    assert f"going on from {run_folder / 'checkpoints/00000010'}" in out
    assert untimed(metrics(run_folder)) == untimed(metrics(trained))
    assert equal(weights(run_folder, 20), weights(trained, 20))


def test_a_half_written_line_of_metrics_is_dropped(train, run_folder):
    before = metrics(run_folder)
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"iter": 20, "train_loss"')
    train("--resume", f"--out_dir={run_folder}", "--max_iters=21")
    assert metrics(run_folder)[:-2] == before
    assert [row["iter"] for row in metrics(run_folder)[-2:]] == [21, 21]


@pytest.mark.parametrize("damage",
                         [b"{}\n", b"[]\n", b'{"iter": 3, "train\n', b"\0\0\0\0\n", b"\xff\xfe\n"],
                         ids=str)
def test_damaged_metrics_are_named(train, run_folder, damage):
    path = run_folder / "metrics.jsonl"
    path.write_bytes(damage + path.read_bytes())
    assert "metrics.jsonl" in train.refuses("--resume", f"--out_dir={run_folder}", "--max_iters=21",
                                            unchanged=run_folder / "checkpoints")


@pytest.mark.parametrize("change",
                         ["--n_layer=2", "--mixer=pelican", "--block_size=8", "--no-tie_head"])
def test_resume_and_eval_refuse_another_model(train, run_folder, change):
    name = change.removeprefix("--no-").removeprefix("--").partition("=")[0]
    for action in ("--resume", "--eval_only"):
        assert name in train.refuses(action, f"--out_dir={run_folder}", "--max_iters=25", change,
                                     unchanged=run_folder)


@pytest.mark.parametrize("action", ["--resume", "--eval_only", "--init_from"])
def test_data_of_another_alphabet_is_refused(train, trained, run_folder, action):
    """digits has as many symbols as letters; the weights fit, but they speak of other
    characters."""
    where = [action, f"--out_dir={run_folder}"]
    if action == "--init_from":
        where = [f"--init_from={trained}", *TINY, "--out_dir=new"]
    assert "digits" in train.refuses(*where, "--dataset=digits", "--max_iters=25",
                                     unchanged=run_folder)


# -- folders that hold a run already -------------------------------------------------------------

def test_a_run_is_not_written_over(train, run_folder):
    line = train.refuses(*TINY, f"--out_dir={run_folder}", unchanged=run_folder)
    assert all(way in line for way in ("--resume", "--out_dir", "--overwrite"))
    for name in ("config.json", "metrics.jsonl"):
        for path in run_folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (run_folder / name).write_text("{}\n")
        assert "--overwrite" in train.refuses(*TINY, f"--out_dir={run_folder}",
                                              unchanged=run_folder)


def test_overwrite_clears_the_run_and_nothing_else(train, run_folder):
    (run_folder / "notes.txt").write_text("mine")
    (run_folder / "figures").mkdir()
    train(*TINY, f"--out_dir={run_folder}", "--overwrite", "--max_iters=3", "--log_interval=1")
    assert [row["iter"] for row in metrics(run_folder)] == [1, 2, 3, 3]
    assert [f.name for f in checkpoint.checkpoints(run_folder)] == ["00000003"]
    assert (run_folder / "notes.txt").read_text() == "mine" and (run_folder / "figures").is_dir()
    assert json.loads((run_folder / "config.json").read_text())["dropout"] == 0.0


@pytest.mark.parametrize("bad", [
    "--n_head=3", "--mixer=nope", "--dataset=nope", "--block_size=100000", "--device=nope",
    "--n_layr=2", "--init_from=nope", "--mixer_file=nope.py", "--min_lr=1"])
def test_overwrite_does_not_clear_before_everything_has_checked_out(train, run_folder, bad):
    train.refuses(*TINY, f"--out_dir={run_folder}", "--overwrite", bad, unchanged=run_folder)


# -- lock first, then look -----------------------------------------------------------------------

def test_a_run_that_began_and_ended_meanwhile_is_not_wiped(train, here, monkeypatch):
    """This command waits for its data; the folder was empty when it looked."""
    def wait(*arguments):
        monkeypatch.setattr(train_script, "load_dataset", load_dataset)
        train.call([*TINY, "--max_iters=4", "--out_dir=run"])
        return load_dataset(*arguments)

    for more in ([], ["--overwrite"]):
        shutil.rmtree(here / "run", ignore_errors=True)
        monkeypatch.setattr(train_script, "load_dataset", wait)
        with pytest.raises(SystemExit) as exit:
            train.call([*TINY, "--max_iters=2", "--out_dir=run", *more])
        line = train.capsys.readouterr().err
        assert exit.value.code == 2
        assert "another run has begun in run" in line
        assert "--resume" in line
        assert metrics("run")[-1]["iter"] == 4
        assert json.loads((here / "run/config.json").read_text())["max_iters"] == 4
        assert [folder.name for folder in checkpoint.checkpoints("run")] == ["00000004"]


@pytest.mark.parametrize("action", ["--resume", "--overwrite"])
def test_a_start_that_waits_has_the_lock_already(train, home, run_folder, monkeypatch, action):
    def wait(*arguments):
        other = run(home, "train.py", "--resume", "--max_iters=40", f"--out_dir={run_folder}")
        assert f"process id {os.getpid()};" in one_line(other)
        return load_dataset(*arguments)

    monkeypatch.setattr(train_script, "load_dataset", wait)
    train(*TINY, action, "--max_iters=22", f"--out_dir={run_folder}")
    assert metrics(run_folder)[-1]["iter"] == 22
    with FolderLock() as lock:
        lock.take(run_folder)  # it was released when the command ended


def test_a_run_is_evaluated_without_a_lock(train, run_folder):
    lock = run_folder / "lock"
    lock.unlink()
    train("--eval_only", f"--out_dir={run_folder}")
    assert not lock.exists()


# -- data that have changed ----------------------------------------------------------------------

@pytest.fixture
def changed_data(home, tmp_path, monkeypatch):
    """letters, with the same alphabet and as many tokens in another order."""
    import data.dataset
    shutil.copytree(home / "data/letters", tmp_path / "data/letters")
    path = tmp_path / "data/letters/train.bin"
    np.fromfile(path, dtype="<u2")[::-1].tofile(path)
    monkeypatch.setattr(data.dataset, "DATA", tmp_path / "data")


@pytest.mark.parametrize("action", ["--resume", "--eval_only"])
def test_data_of_the_same_name_that_have_changed_are_refused(train, run_folder, changed_data,
                                                             action):
    command = [action, f"--out_dir={run_folder}", "--max_iters=21"]
    line = train.refuses(*command, unchanged=run_folder)
    assert "letters has changed" in line and "--other_data" in line and "00000020" in line
    assert "warning    data set letters has changed" in train(*command, "--other_data")
    if action == "--resume":  # from now on these are its data
        assert "letters has changed" not in train(*command, "--max_iters=22")


def test_the_checksum_of_data_is_recorded_and_small_changes_show(train, trained, here, home,
                                                                 tmp_path):
    config = json.loads((trained / "config.json").read_text())
    saved = json.loads((trained / "checkpoints/00000020/config.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", config["data_sha256"])
    assert config["data_sha256"] == saved["data_sha256"]
    data = SimpleNamespace(folder=shutil.copytree(home / "data/letters", tmp_path / "letters"))
    assert data_sha256(data) == config["data_sha256"]
    (data.folder / "meta.json").write_text("{}")  # the tokens are what counts
    assert data_sha256(data) == config["data_sha256"]
    tokens = np.fromfile(data.folder / "val.bin", dtype="<u2")
    tokens[-1] = 27 - tokens[-1]
    tokens.tofile(data.folder / "val.bin")
    assert data_sha256(data) != config["data_sha256"]


def test_the_pieces_of_a_large_file_reach_from_its_start_to_its_end():
    size = 10**9
    starts = pieces(size)
    assert len(starts) == 64 and starts[0] == 0 and starts[-1] == size - 2**20
    assert starts == sorted(starts)
    assert pieces(0) == [] and pieces(1) == [0] and pieces(2**20 + 1) == [0, 2**20]


# -- a run folder that somebody else made --------------------------------------------------------

@pytest.mark.parametrize("name", [
    "lock", "metrics.jsonl", ".metrics.jsonl", "config.json", "checkpoints/newest.json"])
def test_no_file_is_written_through_a_link(train, run_folder, tmp_path, name):
    victim = tmp_path / "victim"
    path = run_folder / name
    content_before = path.read_text() if path.exists() else ""
    victim.write_text(content_before)
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    if name == "lock":
        line = train.refuses("--resume", f"--out_dir={run_folder}", "--max_iters=21",
                             unchanged=run_folder)
        assert str(path) in line and "link" in line
    else:
        train("--resume", f"--out_dir={run_folder}", "--max_iters=21")
        assert not path.is_symlink()
    assert victim.read_text() == content_before


@pytest.mark.parametrize("name", ["checkpoints", "wandb"])
def test_no_folder_is_written_through_a_link(train, run_folder, tmp_path, name):
    victim = tmp_path / "victim"
    path = run_folder / name
    if path.exists():
        path.rename(victim)
    else:
        victim.mkdir()
    path.symlink_to(victim)
    line = train.refuses("--resume", f"--out_dir={run_folder}", "--max_iters=21", unchanged=victim)
    assert str(path) in line and "link" in line
    before = content(victim)
    train(*TINY, "--overwrite", f"--out_dir={run_folder}", "--max_iters=2")  # clears the link alone
    assert content(victim) == before and not path.is_symlink()


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "config.json"])
def test_a_pipe_in_a_run_folder_does_not_hang(train, run_folder, name):
    path = run_folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    signal.alarm(30)  # ends the tests: nobody else could
    try:
        train.call(["--resume", f"--out_dir={run_folder}", "--max_iters=21"])
        assert path.is_file()
    except SystemExit as exit:
        assert exit.code == 2 and str(path) in train.capsys.readouterr().err
    signal.alarm(0)


def test_only_this_command_can_start_wandb(train, run_folder, monkeypatch):
    def started(*_, **__):
        raise AssertionError("wandb was started")

    monkeypatch.setattr(training.metrics, "start_wandb", started)
    asking = json.dumps(json.loads((run_folder / "config.json").read_text()) | {"wandb_log": True})
    (run_folder / "config.json").write_text(asking)
    for folder in checkpoint.checkpoints(run_folder):
        saved = json.loads((folder / "config.json").read_text()) | {"wandb_log": True}
        rewrite(folder / "config.json", json.dumps(saved).encode())
    train("--resume", f"--out_dir={run_folder}", "--max_iters=21")
    shutil.rmtree(run_folder / "checkpoints")
    (run_folder / "config.json").write_text(asking)
    train("--resume", f"--out_dir={run_folder}", "--max_iters=2")
    with pytest.raises(AssertionError):
        train.call(["--resume", "--wandb_log", f"--out_dir={run_folder}", "--max_iters=3"])


def test_only_this_command_can_fetch_weights(train, run_folder):
    shutil.rmtree(run_folder / "checkpoints")
    path = run_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_from": "gpt2"}))
    line = train.refuses("--resume", f"--out_dir={run_folder}", unchanged=run_folder)
    assert "config.json" in line and "--init_from=gpt2" in line


@pytest.mark.parametrize("learning_rate", ["null", '"fast"', "1" + 400 * "0", "NaN", "[1]"])
def test_a_bad_config_json_is_one_line(train, run_folder, learning_rate):
    shutil.rmtree(run_folder / "checkpoints")
    path = run_folder / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"learning_rate": 0.01', f'"learning_rate": {learning_rate}'))
    line = train.refuses("--resume", f"--out_dir={run_folder}", unchanged=run_folder)
    assert "config.json is damaged" in line and "--overwrite" in line


def test_what_killed_processes_left_goes_at_the_next_start(train, run_folder):
    ours = [".config.json.4711", f".config.json.{'0f' * 16}.tmp", f".metrics.jsonl.{'ab' * 16}.tmp",
            ".metrics.jsonl"]
    theirs = [".config.json.swp", ".notes.1", ".DS_Store", f".mine.{'0f' * 16}.tmp"]
    for name in ours + theirs:
        (run_folder / name).write_text("")
    train("--resume", f"--out_dir={run_folder}", "--max_iters=21")
    assert {path.name for path in run_folder.glob(".*")} == set(theirs)


# -- overwriting ---------------------------------------------------------------------------------

def rename_that(fails, monkeypatch, error):
    """Path.rename raises `error` where fails(path)."""
    rename = Path.rename

    def call(self, target):
        if fails(self):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", call)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints"])
def test_a_run_that_cannot_be_moved_away_stays_whole(train, run_folder, monkeypatch, name):
    busy = OSError(errno.EBUSY, "Device or resource busy")
    with monkeypatch.context() as patch:
        rename_that(lambda path: path == run_folder / name, patch, busy)
        line = train.refuses(*TINY, "--overwrite", f"--out_dir={run_folder}", unchanged=run_folder)
    assert "busy" in line
    train("--resume", f"--out_dir={run_folder}", "--max_iters=21")


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_run_half_cleared_is_not_gone_on_with(train, run_folder, monkeypatch, name):
    """Killed just before that part is moved."""
    with monkeypatch.context() as patch:
        rename_that(lambda path: path == run_folder / name, patch, SystemExit(9))
        with pytest.raises(SystemExit):
            train.call([*TINY, "--overwrite", f"--out_dir={run_folder}", "--max_iters=2"])
    for action in (["--resume"], ["--eval_only"], []):
        assert "--overwrite" in train.refuses(*TINY, *action, f"--out_dir={run_folder}",
                                              unchanged=run_folder)
    train(*TINY, "--overwrite", f"--out_dir={run_folder}", "--max_iters=2", "--log_interval=1")
    assert [row["iter"] for row in metrics(run_folder)] == [1, 2, 2]
    assert not list(run_folder.glob(".*"))


def test_an_old_run_that_cannot_be_deleted_is_a_line_and_goes_later(train, run_folder, monkeypatch):
    rmtree = shutil.rmtree

    def busy(path, *rest, **options):
        if ".overwritten." in str(path):
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return rmtree(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        out = train(*TINY, "--overwrite", f"--out_dir={run_folder}", "--max_iters=2")
    assert "warning" in out and metrics(run_folder)[-1]["iter"] == 2
    assert [path.name.split(".")[-1] for path in run_folder.glob(".*")] == ["checkpoints"]
    train("--resume", f"--out_dir={run_folder}", "--max_iters=3")
    assert not list(run_folder.glob(".*"))


# -- what does not fit into memory ---------------------------------------------------------------

@pytest.mark.parametrize("option", [
    "--batch_size=2147483647", "--gradient_accumulation_steps=2147483647",
    "--n_embd=2000000", "--ffn_hidden=2147483647"])
def test_what_cannot_fit_is_refused_at_once(train, here, option):
    started = time.monotonic()
    line = train.refuses(*TINY, "--n_embd=128", option, "--out_dir=run")
    name, _, value = option[2:].partition("=")
    assert f"{name} {value}" in line and "GiB" in line and not (here / "run").exists()
    assert time.monotonic() - started < 20


def test_layers_beyond_all_reason_are_refused_by_their_number(train):
    assert "--n_layer=1000000" in train.refuses(*TINY, "--n_layer=1000000", "--out_dir=run")


def test_the_estimate_is_below_what_training_takes():
    config = GPTConfig(vocab_size=100, n_embd=32, n_layer=3, mixer="pelican")
    parameters = sum(p.numel() for p in GPT(config).parameters())
    assert 0.9 * parameters < parameters_at_least(config) <= parameters
    config = GPTConfig(vocab_size=100, n_embd=32, n_layer=3, arch="llama", embed_rank=4)
    parameters = sum(p.numel() for p in GPT(config).parameters())
    assert 0.5 * parameters < parameters_at_least(config) <= parameters


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_first_step_without_memory_leaves_no_run_behind(train, here, run_folder, monkeypatch,
                                                          error):
    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "backward", fails)
        train.refuses(*TINY, "--out_dir=run")
        assert not (here / "run").exists()
        (here / "mine").mkdir()
        (here / "mine/notes.txt").write_text("mine")
        train.refuses(*TINY, "--out_dir=mine")
        train.refuses("--resume", "--max_iters=25", f"--out_dir={run_folder}",
                      unchanged=run_folder / "checkpoints")
    assert (run_folder / "config.json").exists() and len(metrics(run_folder)) == 6
    train(*TINY, "--max_iters=1", "--out_dir=mine")


# -- answers -------------------------------------------------------------------------------------

@pytest.fixture
def no_answers(home, tmp_path, monkeypatch):
    """no_answers(split): the rows of that split of `recall` ask for nothing any more."""
    import data.dataset
    shutil.copytree(home / "data/recall", tmp_path / "data/recall")
    monkeypatch.setattr(data.dataset, "DATA", tmp_path / "data")

    def clear(split):
        path = tmp_path / f"data/recall/{split}_targets.bin"
        path.write_bytes(bytes(path.stat().st_size))
    return clear


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_that_ask_for_nothing_are_named(train, no_answers, split):
    no_answers(split)
    with pytest.raises(SystemExit) as exit:
        train.call([*TINY, "--dataset=recall", "--max_iters=1", "--out_dir=run"])
    line = train.capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1
    assert "data/recall" in line and "no answer due" in line


def test_a_pass_without_an_answer_counts_for_nothing():
    """Its mean over no targets would be 0/0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=8))
    x = torch.randint(5, (2, 4))
    y = torch.tensor([[-1] * 4, [-1, 3, -1, 2]])
    machine = Machine(torch.device("cpu"), torch.autocast("cpu", enabled=False), World())
    losses, gradients = [], []
    for rows in (1, 2):
        model.zero_grad()
        loss = train_script.backward(model, model.loss, x, y, rows, machine)
        losses.append(float(sum(loss)))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1]) and torch.allclose(*gradients, atol=1e-7)


# -- the end of a run ----------------------------------------------------------------------------

def test_a_run_ends_with_some_of_its_text_and_the_next_command(train, trained):
    out = trained.with_suffix(".log").read_text()
    text = out.partition("\na sample:\n")[2].partition("\n\nthe run is in ")[0]
    assert len(text) >= 90 and set(text) <= set("abcdefghijklmnopqrstuvwxyz \n")
    assert f"the run is in {trained}\n" in out
    assert f"python sample.py --out_dir={trained}\n" in out and "pelican" not in out
    assert f"python train.py --resume --out_dir={trained} --max_iters=40\n" in out
    assert f"python -m tools.report {trained}\n" in out and "outlasts" not in out


def test_the_pelican_recipe_names_a_mixer_that_sees_more(shakespeare_char, clone):
    shutil.copytree(shakespeare_char, clone / "data/shakespeare_char", dirs_exist_ok=True)
    done = run(clone, "train.py", "configs/shakespeare_pelican.py", "--max_iters=1",
               "--eval_tokens=100")
    assert "python train.py configs/shakespeare.py\n" in done.stdout, done


def test_a_recall_run_has_no_text(train):
    out = train(*TINY, "--dataset=recall", "--max_iters=1", "--out_dir=run")
    assert "the run is in run" in out and "sample" not in out


def test_the_sample_changes_nothing_and_cannot_fail_the_run(train, here, monkeypatch):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = GPTConfig(vocab_size=28, block_size=16, n_layer=1, n_head=1, n_embd=8, dropout=0.5)
    torch.set_rng_state(before)
    model = GPT(config)
    machine = Machine(torch.device("cpu"), torch.autocast("cpu", enabled=False), World())
    data = load_dataset("letters", 16)
    state = torch.get_rng_state()
    texts = {sample_text(model, data, machine) for _ in range(2)}
    assert len(texts) == 1 and torch.equal(state, torch.get_rng_state())

    def fails(*_):
        raise RuntimeError("no text today")

    monkeypatch.setattr(training.report, "sample_text", fails)
    out = train(*TINY, "--max_iters=1", "--out_dir=run")
    assert "no sample: RuntimeError: no text today" in out and checkpoint.load("run")


# -- bad input: one line, status 2, nothing written ----------------------------------------------

@pytest.mark.parametrize("argv, naming", [
    (["--n_embd=18", "--n_head=4"], ["n_embd 18", "n_head 4"]),
    (["--n_head=2", "--n_kv_head=4"], ["n_head 2", "n_kv_head 4"]),
    (["--mixer=sofmax"], ["sofmax", "softmax", "pelican", "causal_max"]),
    (["--mixer=softmax,"], ["softmax", "pelican"]),
    (["--dataset=nope"], ["nope", "shakespeare_char", "letters"]),
    (["--dataset=../letters"], ["../letters"]),
    (["--block_size=5000"], ["5000", "letters", "val"]),
    (["--device=nope"], ["nope", "cpu"]),
    (["--embed_rank=4"], ["embed_rank", "tie_head"]),
    (["--zero_init_head"], ["zero_init_head", "tie_head"]),
    (["--min_lr=2"], ["min_lr", "learning_rate"]),
    (["--n_layr=3"], ["n_layr", "n_layer"]),
    (["--dropout=1"], ["dropout"]),
    (["--resume"], ["holds no run", "--resume"]),
    (["--eval_only"], ["holds no run"]),
    (["--init_from=nowhere"], ["nowhere"]),
    (["nowhere.py"], ["nowhere.py"]),
    (["--mixer_file=nowhere.py"], ["nowhere.py"]),
    (["--wandb_log", "--wandb_project=a/b"], ["a/b", "wandb_project"]),
])
def test_bad_input_is_named_in_one_line(train, argv, naming):
    line = train.refuses(*TINY, *argv)
    assert all(name in line for name in naming), line


def test_a_bad_option_ends_a_process_with_status_2(home, tmp_path):
    line = one_line(run(home, "train.py", *TINY, "--batchsize=3", f"--out_dir={tmp_path / 'run'}"))
    assert line == "train.py: no option --batchsize; nearest: --batch_size"
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_folder(train, here):
    (here / "file").write_text("mine")
    for folder in ("file", "file/run"):
        assert folder in train.refuses(*TINY, f"--out_dir={folder}", "--max_iters=1")
        assert folder in train.refuses(*TINY, f"--out_dir={folder}", "--max_iters=1", "--overwrite")


@pytest.mark.parametrize("name, removed, added", [
    ("train.bin", 10, b""),            # truncated
    ("val.bin", 2, b"\xff\x7f"),       # beyond the vocabulary
])
def test_damaged_data_is_refused_and_the_old_run_kept(train, home, run_folder, tmp_path,
                                                      monkeypatch, name, removed, added):
    import data.dataset
    shutil.copytree(home / "data/letters", tmp_path / "data/letters")
    path = tmp_path / "data/letters" / name
    path.write_bytes(path.read_bytes()[:-removed] + added)
    monkeypatch.setattr(data.dataset, "DATA", tmp_path / "data")
    line = train.refuses(*TINY, f"--out_dir={run_folder}", "--overwrite", unchanged=run_folder)
    assert ".bin" in line


def small_files(limit):
    """Every file that the process writes is cut at `limit` bytes, like on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_at_a_checkpoint_keeps_the_earlier_ones(home, run_folder):
    before = content(run_folder / "checkpoints")
    line = one_line(run(home, "-B", "train.py", "--resume", "--max_iters=30",
                        f"--out_dir={run_folder}", preexec_fn=small_files(8000)))
    assert "00000030" in line and "cannot write" in line
    assert content(run_folder / "checkpoints") == before
    newest = run_folder / "checkpoints/newest.json"
    assert json.loads(newest.read_text()) == {"folder": "00000020"}


def test_a_full_disk_while_logging_is_one_line_too(home, run_folder):
    done = run(home, "-B", "train.py", "--resume", "--max_iters=1000", "--eval_interval=1000",
               "--log_interval=1", f"--out_dir={run_folder}", preexec_fn=small_files(4000))
    line = one_line(done)
    assert str(run_folder) in line
    assert checkpoint.load(run_folder).folder.name == "00000020"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(train, run_folder):
    before = content(run_folder / "checkpoints")
    with pytest.raises(SystemExit) as exit:
        train.call(["--resume", f"--out_dir={run_folder}", "--max_iters=40", "--learning_rate=1e30",
                    "--grad_clip=0"])
    line = train.capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1
    step = int(re.search(r"step (\d+)", line)[1])
    assert 20 < step < 30 and "finite" in line
    assert content(run_folder / "checkpoints") == before
    train("--resume", f"--out_dir={run_folder}", "--max_iters=22")  # and the run goes on from it
    assert [row["iter"] for row in metrics(run_folder)][-2:] == [22, 22]


def test_a_run_without_checkpoint_that_diverges_does_not_promise_one(train, here):
    with pytest.raises(SystemExit) as exit:
        train.call([*TINY, "--max_iters=40", "--learning_rate=1e30", "--grad_clip=0",
                    "--out_dir=run"])
    assert exit.value.code == 2 and checkpoint.checkpoints(here / "run") == []
    assert "keeps its last checkpoint" not in train.capsys.readouterr().err


# -- mixers of a user's own ----------------------------------------------------------------------

MINE = """
import torch.nn as nn
from mixers import MIXERS
SCALE = 0.5

class Mine(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, state=None):
        return scaled(self.proj(x)), state

def scaled(x):
    return SCALE * x

MIXERS["mine"] = Mine
"""


def test_a_users_mixer_trains_goes_on_and_samples(home, here, train, sample):
    (here / "mine.py").write_text(MINE)
    done = run(home, "train.py", *TINY, "--max_iters=5", f"--mixer_file={here / 'mine.py'}",
               "--mixer=mine", f"--out_dir={here / 'run'}")
    assert done.returncode == 0 and done.stderr == "", done
    assert "blocks.0.mixer.proj.weight" in weights(here / "run", 5)
    for script, argv in ((train, ["--resume", "--max_iters=7"]), (train, ["--eval_only"]),
                         (sample, [])):
        # code is run only if the user names it
        assert "mine" in script.refuses("--out_dir=run", *argv)
    train("--resume", "--out_dir=run", "--max_iters=7", "--mixer_file=mine.py")
    assert metrics("run")[-1]["iter"] == 7
    assert sample("--out_dir=run", "--mixer_file=mine.py", "--num_samples=1", "--max_new_tokens=5")


@pytest.mark.parametrize("text, reason", [
    ("MIXERS = (", "SyntaxError"),
    ("import nowhere_at_all", "nowhere_at_all"),
    ("1 / 0", "ZeroDivisionError"),
    ("x = 1", "registers no mixer"),
    ("raise SystemExit(0)", "SystemExit"),
])
def test_a_mixer_file_that_does_not_work(train, sample, here, trained, text, reason):
    (here / "mine.py").write_text(text)
    for script, argv in ((train, TINY), (sample, [f"--out_dir={trained}"])):
        line = script.refuses(*argv, "--mixer_file=mine.py")
        assert "mine.py" in line and reason in line


def test_a_mode_that_wandb_does_not_know_is_named(train, here, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    assert "WANDB_MODE=nonsense" in train.refuses(*TINY, "--wandb_log", "--out_dir=run")


# -- torch.compile and wandb ---------------------------------------------------------------------

def test_without_a_compiler_training_goes_on_and_says_so(home, trained, tmp_path):
    """The run is that of `trained`, but for the option."""
    done = run(home, "train.py", *TINY, *STRAIGHT, "--max_iters=20", "--compile",
               f"--out_dir={tmp_path / 'run'}", env={"PATH": str(tmp_path)})
    assert done.returncode == 0 and done.stderr == "", done
    [line] = [line for line in done.stdout.splitlines() if line.startswith("compile")]
    assert "no C++ compiler" in line
    assert untimed(metrics(tmp_path / "run")) == untimed(metrics(trained))


def compiler_that_fails(folder):
    folder.mkdir()
    for name in ("c++", "g++", "clang++"):
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}


@pytest.mark.slow
def test_a_failure_to_compile_is_one_line_and_changes_nothing(home, trained, tmp_path):
    done = run(home, "train.py", *TINY, *STRAIGHT, "--max_iters=20", "--compile",
               f"--out_dir={tmp_path / 'run'}", env=compiler_that_fails(tmp_path / "bin"))
    assert done.returncode == 0, done
    [line] = [line for line in done.stdout.splitlines() if line.startswith("compile")]
    assert "off" in line and "failed" in line
    assert untimed(metrics(tmp_path / "run")) == untimed(metrics(trained))


def test_the_compilers_trial_run_leaves_nothing_behind(home, tmp_path, train):
    """torch.compile is made to hand the function back as it is, so the numbers must be those
    without --compile."""
    arguments = [*TINY, "--dropout=0.1", "--grad_clip=0", "--max_iters=5", "--log_interval=1"]
    train(*arguments, f"--out_dir={tmp_path / 'plain'}")
    done = run(home, "train.py", *arguments, "--compile", f"--out_dir={tmp_path / 'compiled'}",
               env={"TORCHDYNAMO_DISABLE": "1"} | compiler_that_fails(tmp_path / "bin"))
    assert done.returncode == 0 and "\ncompile" not in done.stdout, done
    assert untimed(metrics(tmp_path / "compiled")) == untimed(metrics(tmp_path / "plain"))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_a_compiled_run_learns_the_same(home, tmp_path):
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        done = run(home, "train.py", *TINY, "--max_iters=20", "--log_interval=1", *more,
                   f"--out_dir={tmp_path / name}")
        assert done.returncode == 0 and "\ncompile" not in done.stdout, done
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled"), strict=True):
        key = "train_loss" if a["train_loss"] else "val_loss"
        assert a[key] == pytest.approx(b[key], abs=1e-4)


def test_wandb_without_account_records_offline_and_says_so_in_one_line(home, tmp_path):
    folder = tmp_path / "run"
    alone = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path),
             "NETRC": str(tmp_path / "none")}
    done = run(home, "train.py", *TINY, "--max_iters=5", "--log_interval=1", "--wandb_log",
               f"--out_dir={folder}", env=alone)
    assert done.returncode == 0 and done.stderr == "", done
    [line] = [line for line in done.stdout.splitlines() if line.startswith("wandb")]
    assert "offline, as there is no account" in line
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    assert line.endswith(f"wandb sync {path.parent}")
    config, history, summary, defined = {}, {}, {}, {}
    for record in wandb_records(path):
        config |= values_of(record.run.config.update)
        history |= values_of(record.history.item)
        summary |= values_of(record.summary.update)
        defined[record.metric.name or record.metric.glob_name] = record.metric
    rows = metrics(folder)
    last, lowest = rows[-1], min(row["val_loss"] for row in rows if row["val_loss"] is not None)
    assert history["val_loss"] == last["val_loss"] and history["iter"] == 5
    assert {"train_loss", "val_bpb", "tokens_per_s"} < set(history)
    assert summary["val_loss"] == {"min": lowest}
    parameters = sum(t.numel() for t in weights(folder, 5).values())
    assert config["parameters"] == summary["parameters"] == parameters
    assert config["learning_rate"] == 0.01 and config["state_bytes"] > 0
    assert defined["*"].step_metric == defined["val_loss"].step_metric == "iter"
    assert defined["val_loss"].summary.min
    for name in ("iter", "seconds", "tokens", "flops"):
        assert defined[name].options.hidden
    first = f"step      0/5 | loss {rows[0]['train_loss']:.4f} nats | an even guess has 3.3322"
    assert first in done.stdout and "warning    the warm-up outlasts the run" in done.stdout
    assert len(metrics(folder)) == 6


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_wandb_run(home, tmp_path):
    alone = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path),
             "NETRC": str(tmp_path / "none")}
    for max_iters, more in ((4, []), (8, ["--resume"])):
        done = run(home, "train.py", *TINY, f"--max_iters={max_iters}", "--wandb_log",
                   f"--out_dir={tmp_path}/run", *more, env=alone)
        assert done.returncode == 0, done
    records = list(tmp_path.glob("run/wandb/offline-run-*"))
    assert len(records) == 2 and len({path.name.rsplit("-", 1)[1] for path in records}) == 1


def test_overwrite_takes_the_scores_of_the_old_run_away(tmp_path):
    """Without checkpoints nothing else says that they are of other options."""
    for name in ("config.json", "scores.json", "mine.txt"):
        (tmp_path / name).write_text("{}")
    run_folder.move_away(tmp_path)
    assert not (tmp_path / "scores.json").exists() and (tmp_path / "mine.txt").exists()
    assert len([path for path in tmp_path.iterdir() if run_folder.OVERWRITTEN.fullmatch(path.name)
                ]) == 2
