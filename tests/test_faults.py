"""Exact resume and what a run must survive: kills at any moment, full disks, a second training in
its folder."""
import builtins
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY, content, metrics, run, untimed

from base.errors import BadInput
from data import Dataset
from training import checkpoint

SHAPE = [*TINY, "--dropout=0.1", "--gradient_accumulation_steps=2", "--eval_interval=25",
         "--log_interval=8"]


def start(home, out_dir, *options):
    command = [sys.executable, "train.py", *SHAPE, f"--out_dir={out_dir}", *options]
    return subprocess.Popen(command, cwd=home, text=True,
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
    """With dropout and accumulation; SIGTERM comes within step 30, between the log lines of 24
    and 32."""
    command = [*SHAPE, f"--mixer={mixer}",
               "--max_iters=60"] + (["--performer_redraw=7"] if mixer == "performer" else [])
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
        second = run(home, "train.py", *SHAPE, f"--out_dir={tmp_path}/run", "--max_iters=1000000",
                     "--overwrite")
        assert second.returncode == 2
        assert f"process id {first.pid};" in second.stderr
        assert second.stderr.count("\n") == 1
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    steps = max(row["iter"] for row in metrics(tmp_path / "run")) + 50
    # the lock of a dead process holds nobody up
    finish(home, tmp_path / "run", f"--max_iters={steps}", "--resume")


def kill_until_done(home, out_dir, kills, max_iters, seed):
    """kill -9 at random moments of start-up and training, every other one as soon as a save is
    under way; then to the end. Returns the kills."""
    draw = random.Random(seed)
    survived = 0
    for i in range(kills):
        process = start(home, out_dir, f"--max_iters={max_iters}",
                        *(["--resume"] if (out_dir / "config.json").exists() else []))
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
    finish(home, out_dir, f"--max_iters={max_iters}",
           *(["--resume"] if (out_dir / "config.json").exists() else []))
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
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k",
                                                        "tmpfs", folder], capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_the_earlier_checkpoints(home, small_disk):
    """Room for a few checkpoints of some 60 kB, all of which are to be kept."""
    done = run(home, "train.py", *SHAPE, f"--out_dir={small_disk}/run", "--keep_last=100",
               "--max_iters=1000")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.search("cannot write checkpoint.*[Nn]o space left", done.stderr)
    before = content(small_disk / "run" / "checkpoints")
    steps = sorted({name.split("/")[0] for name in before if name[0] == "0"})
    assert steps and not [name for name in before if name.startswith(".")]
    evaluated = run(home, "train.py", "--eval_only", f"--out_dir={small_disk}/run")
    assert evaluated.returncode == 0 and steps[-1] in evaluated.stdout


# -- a fault at every operation of a save --------------------------------------------------------

OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")  # of the module os
TOKENIZER = '{"tokenizer": "char", "alphabet": "ab"}'


class Faults:
    """Counts the operations on files below `folder` and lets the one numbered `at` fail.

    kind: an errno, which that operation raises; "die", which ends the process in its place; or
    None. Of a write, half is done first."""

    def __init__(self, monkeypatch, folder, at=None, kind=None):
        self.folder, self.at, self.kind = str(folder), at, kind
        self.done = []
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))
        opened = self.opened(io.open)
        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(checkpoint, "save_file", self.saved(checkpoint.save_file))

    def happens(self, name):
        """Before an operation."""
        self.done.append(name)
        if len(self.done) - 1 == self.at:
            if self.kind == "die":
                os._exit(9)
            raise OSError(self.kind, os.strerror(self.kind), self.folder)

    def counted(self, name, function):
        def call(path, *rest, **options):
            if isinstance(path, int) or "dir_fd" in options or self.folder in os.fspath(path):
                self.happens(name)
            return function(path, *rest, **options)
        return call

    def opened(self, function):
        def call(path, mode="r", *rest, **options):
            ours = not isinstance(path, int) and self.folder in os.fspath(path)
            if not ours or mode.startswith("r"):
                return function(path, mode, *rest, **options)
            self.happens("open to write")
            return FaultyFile(function(path, mode, *rest, **options), self)
        return call

    def saved(self, function):
        """safetensors writes without Python: half of its file stands for a write that fails."""
        def call(tensors, path):
            function(tensors, path)
            if len(self.done) == self.at:
                os.truncate(path, os.path.getsize(path) // 2)
            self.happens("save_file")
        return call


class FaultyFile:
    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        if len(self.faults.done) == self.faults.at:
            self.file.write(content[:len(content) // 2])
            self.file.flush()
        self.faults.happens("write")
        return self.file.write(content)


def save_step(out_dir, step, val_loss=None):
    state = {"iter": step, "val_loss": val_loss, "best_val_loss": None, "tokens": 0, "seconds": 0.0,
             "wandb_id": None}
    weights = {"w": torch.full((50,), float(step))}
    checkpoint.save(out_dir, weights, {"m": torch.zeros(50)}, state, {"vocab_size": 2}, TOKENIZER,
                    2)


def run_with_checkpoints(out_dir):
    """Three steps of which 20 is damaged, so that it is written anew, and of which 10 is then to
    go; and what a killed process has left."""
    for step, val_loss in ((5, 1.0), (10, 3.0), (15, 2.0), (20, 4.0)):
        save_step(out_dir, step, val_loss)
    (out_dir / "checkpoints/00000020/model.safetensors").write_bytes(b"gone")
    (out_dir / "checkpoints/.00000020.new").mkdir()
    (out_dir / "checkpoints/.00000020.new/trainer.json").write_text("{")


def attempt(out_dir, monkeypatch, at, kind):
    """Saves step 20 with a fault. Returns the operations done; of a process that died, None."""
    def save():
        with monkeypatch.context() as patch:
            faults = Faults(patch, out_dir, at, kind)
            try:
                save_step(out_dir, 20, 0.5)
            except BadInput as error:
                assert "cannot write checkpoint" in str(error)
            return faults.done

    if kind != "die":
        return save()
    child = os.fork()
    if child == 0:
        save()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    return None


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, "die"], ids=["ENOSPC", "EIO", "die"])
def test_a_fault_at_every_operation_of_a_save(tmp_path, monkeypatch, kind):
    """What --resume then reads is whole, checkpoints that stay are as they were, the next save
    works."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power fails here: it only takes time
    run_with_checkpoints(tmp_path / "start")
    before = {name: data for name, data in content(tmp_path / "start/checkpoints").items()
              if name.startswith(("00000005", "00000015"))}
    assert len(before) == 12
    shutil.copytree(tmp_path / "start", tmp_path / "counted")
    operations = attempt(tmp_path / "counted", monkeypatch, None, None)
    assert set(operations) == {*OPERATIONS, "open to write", "write", "save_file"}
    for at, name in enumerate(operations):
        folder = shutil.copytree(tmp_path / "start", tmp_path / f"{at} {name}")
        attempt(folder, monkeypatch, at, kind)
        for step in ("00000005", "00000015"):
            now = content(folder / "checkpoints" / step)
            for path, data in now.items():
                assert before[f"{step}/{path}"] == data
            assert not now or len(now) == 6, (at, name, step)
        found = checkpoint.load(folder, fall_back=True)
        assert found.trainer["iter"] in (15, 20)
        assert found.model["w"].tolist() == [float(found.trainer["iter"])] * 50
        save_step(folder, 25, 0.25)
        left = [path.name for path in checkpoint.checkpoints(folder)]
        assert left[-1] == "00000025" and checkpoint.load(folder).trainer["iter"] == 25
        assert not list((folder / "checkpoints").glob(".*"))
        best = json.loads((folder / "checkpoints/best.json").read_text())
        assert best == {"folder": "00000025"}
    print(f"{len(operations)} operations of a save")
