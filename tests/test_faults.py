"""Exact resume and what a run must survive: kills at any moment, full disks, a second training in its folder."""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import TINY, content, metrics, run, untimed

from data import Dataset

SHAPE = [*TINY, "--dropout=0.1", "--gradient_accumulation_steps=2", "--eval_interval=25", "--log_interval=8"]


def start(home, out_dir, *options):
    return subprocess.Popen([sys.executable, "train.py", *SHAPE, f"--out_dir={out_dir}", *options], cwd=home, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(home, out_dir, *options):
    done = run(home, "train.py", *SHAPE, f"--out_dir={out_dir}", *options, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def weights(out_dir, step):
    folder = out_dir / "checkpoints" / f"{step:08d}"
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


@pytest.mark.parametrize("mixer", ["softmax", "lln", "performer"])
def test_60_steps_are_30_and_a_resumed_30(train, tmp_path, monkeypatch, mixer):
    """With dropout and accumulation; SIGTERM comes within step 30, between the log lines of 24 and 32."""
    command = [*SHAPE, f"--mixer={mixer}", "--max_iters=60"] + (["--performer_redraw=7"] if mixer == "performer" else [])
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(*command, f"--out_dir={straight}")
    batch = Dataset.batch

    def batch_and_stop(self, seed, step, *rest):
        if step == 29:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, seed, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "batch", batch_and_stop)
        assert "after step 30; go on with --resume" in train(*command, f"--out_dir={stopped}")
    assert metrics(stopped)[-1]["iter"] == 25
    train(*command, f"--out_dir={stopped}", "--resume")
    assert weights(stopped, 60) == weights(straight, 60)
    assert untimed(metrics(stopped)) == untimed(metrics(straight))


def test_a_second_signal_ends_the_process_at_once(home, tmp_path):
    process = start(home, tmp_path / "run", "--max_iters=1000000", "--eval_interval=1000000")
    for line in process.stdout:
        if line.startswith("step"):
            break
    # stopped while both arrive, so that the first is not acted on in between
    process.send_signal(signal.SIGTERM)
    time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGINT)  # 0 where the first one's save was quicker


def test_a_second_training_in_a_folder_is_refused_with_the_first_ones_pid(home, tmp_path):
    first = start(home, tmp_path / "run", "--max_iters=1000000", "--eval_interval=50")
    try:
        for line in first.stdout:
            if "val loss" in line:
                break
        second = run(home, "train.py", *SHAPE, f"--out_dir={tmp_path}/run", "--max_iters=1000000", "--overwrite")
        assert second.returncode == 2 and f"process id {first.pid};" in second.stderr and second.stderr.count("\n") == 1
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    steps = max(row["iter"] for row in metrics(tmp_path / "run")) + 50
    finish(home, tmp_path / "run", f"--max_iters={steps}", "--resume")  # the lock of a dead process holds nobody up


def kill_until_done(home, out_dir, kills, max_iters, seed):
    """kill -9 at random moments of start-up and training, every other one as soon as a save is under way; then to the end.
    Returns the kills."""
    draw = random.Random(seed)
    survived = 0
    for i in range(kills):
        process = start(home, out_dir, f"--max_iters={max_iters}", *(["--resume"] if (out_dir / "config.json").exists() else []))
        if i % 10 == 9:
            time.sleep(draw.uniform(0, 2))
        else:
            while not process.stdout.readline().startswith("cost"):  # the last line before training
                assert process.poll() is None
            deadline = time.time() + draw.uniform(0, 0.5)
            while time.time() < deadline:
                time.sleep(0.0005)
                if i % 2 and any(out_dir.glob("checkpoints/.*")):
                    time.sleep(draw.uniform(0, 0.01))
                    break
        process.kill()
        output = process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), output
        assert "Traceback" not in output
        survived += process.returncode == -signal.SIGKILL
    finish(home, out_dir, f"--max_iters={max_iters}", *(["--resume"] if (out_dir / "config.json").exists() else []))
    return survived


def assert_survives(home, tmp_path, kills, max_iters):
    finish(home, tmp_path / "straight", f"--max_iters={max_iters}")
    survived = kill_until_done(home, tmp_path / "killed", kills, max_iters, seed=kills)
    assert weights(tmp_path / "killed", max_iters) == weights(tmp_path / "straight", max_iters)
    assert untimed(metrics(tmp_path / "killed")) == untimed(metrics(tmp_path / "straight"))
    print(f"survived {survived} kills of {kills}")
    return survived


@pytest.mark.slow
def test_killed_50_times_it_ends_with_the_same_weights(home, tmp_path):
    assert assert_survives(home, tmp_path, kills=50, max_iters=15000) == 50


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_the_earlier_checkpoints(home, small_disk):
    """Room for a few checkpoints of some 60 kB, all of which are to be kept."""
    done = run(home, "train.py", *SHAPE, f"--out_dir={small_disk}/run", "--keep_last=100", "--max_iters=1000")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and re.search("cannot write checkpoint.*[Nn]o space left", done.stderr)
    before = content(small_disk / "run" / "checkpoints")
    steps = sorted({name.split("/")[0] for name in before if name[0] == "0"})
    assert steps and not [name for name in before if name.startswith(".")]
    evaluated = run(home, "train.py", "--eval_only", f"--out_dir={small_disk}/run")
    assert evaluated.returncode == 0 and steps[-1] in evaluated.stdout
