"""Two processes under torchrun against one: the same losses, statistics and checkpoints; what
happens when one dies; and an environment that torchrun did not make."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import TINY, metrics, run
from safetensors.torch import load_file

SHAPE = [*TINY, "--n_embd=32", "--batch_size=12", "--log_interval=1", "--warmup_iters=5",
         "--grad_clip=1"]
LLN = ["--mixer=lln", "--max_iters=50", "--eval_interval=25"]
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
        difference = (a[name] - b[name]).abs().max().item()
        assert difference <= atol, (name, difference)


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    """50 steps of lln in one process, with a whole batch of 12 at each."""
    return train(home, tmp_path_factory.mktemp("alone") / "run", *LLN)


slow_fsdp = pytest.param("fsdp", marks=pytest.mark.slow)


@pytest.mark.parametrize("how", ["ddp", "accumulation", slow_fsdp])
def test_the_same_run_divided_otherwise(home, alone, tmp_path, how):
    """In two micro-steps of 6, by one process or two."""
    halves = [*LLN, "--batch_size=6", "--gradient_accumulation_steps=2"]
    if how == "accumulation":
        out_dir = train(home, tmp_path / "run", *halves)
    else:
        out_dir = train(home, tmp_path / "run", *halves, f"--parallel={how}", processes=2)
    assert len(losses(out_dir)) == len(losses(alone)) == 52
    difference = max(abs(a - b) for a, b in zip(losses(out_dir), losses(alone)))
    assert difference < 1e-5, difference
    ours = tensors(out_dir, 50)
    theirs = tensors(alone, 50)
    moments = [name for name in ours if "moments" in name]
    assert moments
    assert_close({n: ours[n] for n in moments}, {n: theirs[n] for n in moments}, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_saved_by_some_and_resumed_by_others(home, alone, tmp_path, parallel, first, then):
    out_dir = tmp_path / "run"
    options = ["--mixer=lln", "--lr_decay_iters=50", f"--parallel={parallel}"]
    train(home, out_dir, *options, "--max_iters=25", processes=first)
    train(home, out_dir, *options, "--max_iters=50", "--resume", processes=then)
    assert abs(losses(out_dir)[-1] - losses(alone)[-1]) < 1e-5
    assert_close(tensors(out_dir, 50), tensors(alone, 50), 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_muon_on_two_processes(home, tmp_path, parallel):
    """Its update is in bfloat16, so the losses differ by more; resuming is exact all the same."""
    options = [*LLN, "--optimizer=muon"]
    alone = train(home, tmp_path / "alone", *options)
    both = train(home, tmp_path / "both", *options, f"--parallel={parallel}", processes=2)
    difference = max(abs(a - b) for a, b in zip(losses(alone), losses(both)))
    assert difference < 2e-3, difference
    resumed = shutil.copytree(both, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints/00000050")
    train(home, resumed, "--resume", processes=2)
    for name in ("model", "optimizer"):
        assert_close(tensors(resumed, 50, name), tensors(both, 50, name), 0)


def test_a_batch_that_does_not_divide_is_refused(home, tmp_path):
    done = run(home, *TORCHRUN, "train.py", *SHAPE, "--batch_size=5", f"--out_dir={tmp_path}/run")
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    # of either rank, or of both: torchrun ends the other one as soon as one has ended
    said = set()
    for line in done.stderr.splitlines():
        if line.startswith(("train.py: ", "train.py (rank 1): ")):
            said.add(line.replace(" (rank 1)", ""))
    assert said == {"train.py: batch_size 5 is not divisible by the 2 processes; choose a multiple"}


@pytest.mark.parametrize("environment, naming", [
    ({"RANK": "x"}, "RANK is 'x', no number"),
    ({"WORLD_SIZE": "2.5"}, "WORLD_SIZE is '2.5', no number"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', no number"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', no number"),
    ({"RANK": "9" * 5000}, "no number"),
    ({"WORLD_SIZE": "0"}, "RANK 0 and WORLD_SIZE 0"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 and WORLD_SIZE 2"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "cannot join the 2 processes"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
     "cannot join the 2 processes"),
])
def test_an_environment_that_torchrun_did_not_make(environment, naming, train_here, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = train_here()
    assert naming in line and "torchrun" in line


@pytest.fixture
def train_here(here, capsys, monkeypatch):
    """train_here() -> the one line with which train.py ends, before anything is written."""
    import train as script

    def ends():
        monkeypatch.setattr(sys, "argv", ["train.py", *SHAPE])
        with pytest.raises(SystemExit) as exit:
            script.main()
        assert exit.value.code == 2 and list(here.iterdir()) == []
        [line] = capsys.readouterr().err.splitlines()
        return line
    return ends


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"),
                    reason="needs /proc of Linux")
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_others_end_and_a_restart_goes_on(home, tmp_path, victim):
    out_dir = tmp_path / "run"
    command = [sys.executable, *TORCHRUN, "train.py", *SHAPE, f"--out_dir={out_dir}",
               "--max_iters=100000", "--eval_interval=20"]
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
    folders = [p.name for p in (out_dir / "checkpoints").iterdir() if p.name.isdigit()]
    saved = int(max(folders))
    train(home, out_dir, f"--max_iters={saved + 3}", "--resume", processes=2)
    assert metrics(out_dir)[-1]["iter"] == saved + 3
