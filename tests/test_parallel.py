"""Two processes under torchrun against one: the same losses, statistics and checkpoints; and what happens when one dies."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY, metrics, run
from safetensors.torch import load_file

SHAPE = [*TINY, "--n_embd=32", "--batch_size=12", "--log_interval=1", "--warmup_iters=5", "--grad_clip=1"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


def train(home, out_dir, *options, processes=1):
    command = TORCHRUN if processes == 2 else []
    done = run(home, *command, "train.py", *SHAPE, f"--out_dir={out_dir}", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return out_dir


def losses(out_dir):
    return [row["train_loss"] or row["val_loss"] for row in metrics(out_dir)]


def tensors(out_dir, step, name="model"):
    return load_file(out_dir / "checkpoints" / f"{step:08d}" / f"{name}.safetensors")


def assert_close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    """50 steps of lln in one process, with a whole batch of 12 at each."""
    return train(home, tmp_path_factory.mktemp("alone") / "run", "--mixer=lln", "--max_iters=50", "--eval_interval=25")


@pytest.mark.parametrize("how", ["ddp", "accumulation", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_the_same_run_divided_otherwise(home, alone, tmp_path, how):
    """In two micro-steps of 6, by one process or two."""
    out_dir = train(home, tmp_path / "run", "--mixer=lln", "--max_iters=50", "--eval_interval=25", "--batch_size=6",
                    "--gradient_accumulation_steps=2", *([] if how == "accumulation" else [f"--parallel={how}"]),
                    processes=1 if how == "accumulation" else 2)
    assert len(losses(out_dir)) == len(losses(alone)) == 52
    difference = max(abs(a - b) for a, b in zip(losses(out_dir), losses(alone)))
    assert difference < 1e-5, difference
    ours, theirs = tensors(out_dir, 50), tensors(alone, 50)
    moments = [name for name in ours if "moments" in name]
    assert moments
    assert_close({n: ours[n] for n in moments}, {n: theirs[n] for n in moments}, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_saved_by_some_and_resumed_by_others(home, alone, tmp_path, parallel, first, then):
    out_dir = tmp_path / "run"
    train(home, out_dir, "--mixer=lln", "--max_iters=25", "--lr_decay_iters=50", f"--parallel={parallel}", processes=first)
    train(home, out_dir, "--mixer=lln", "--max_iters=50", "--lr_decay_iters=50", "--resume", f"--parallel={parallel}", processes=then)
    assert abs(losses(out_dir)[-1] - losses(alone)[-1]) < 1e-5
    assert_close(tensors(out_dir, 50), tensors(alone, 50), 2e-4)


def test_a_batch_that_does_not_divide_is_refused(home, tmp_path):
    done = run(home, *TORCHRUN, "train.py", *SHAPE, "--batch_size=5", f"--out_dir={tmp_path}/run")
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    # of either rank, or of both: torchrun ends the other one as soon as one has ended
    said = {line.replace(" (rank 1)", "") for line in done.stderr.splitlines() if line.startswith(("train.py: ", "train.py (rank 1): "))}
    assert said == {"train.py: batch_size 5 is not divisible by the 2 processes; choose a multiple"}


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"), reason="needs /proc of Linux")
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_others_end_and_a_restart_goes_on(home, tmp_path, victim):
    out_dir = tmp_path / "run"
    command = [sys.executable, *TORCHRUN, "train.py", *SHAPE, f"--out_dir={out_dir}", "--max_iters=100000", "--eval_interval=20"]
    log = open(tmp_path / "log", "w")
    process = subprocess.Popen(command, cwd=home, stdout=log, stderr=log)
    try:
        deadline = time.time() + 60
        while not (out_dir / "checkpoints" / "newest.json").exists():
            assert time.time() < deadline and process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        os.kill(children(process.pid)[victim], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    saved = int(max(p.name for p in (out_dir / "checkpoints").iterdir() if p.is_dir() and p.name.isdigit()))
    train(home, out_dir, f"--max_iters={saved + 3}", "--resume", processes=2)
    assert metrics(out_dir)[-1]["iter"] == saved + 3
