"""training/pace.py, by a clock that the tests set."""
import os
import subprocess
import sys
import time

import pytest
import torch

from training.pace import WINDOW, Pace, waited_for_cores


class Machine:
    """A clock, the time that threads have waited for a core, and a Pace that goes by them."""

    def __init__(self, threads, device="cpu", tells=True):
        self.now, self.waited, self.said = 0.0, 0.0, []
        waited = (lambda: self.waited) if tells else (lambda: None)
        self.pace = Pace(self.said.append, torch.device(device), lambda: self.now, waited)
        self.pace.threads = threads if device == "cpu" else self.pace.threads

    def train(self, windows, step=0.1, waiting=0.0):
        for _ in range(round(windows * WINDOW / step)):
            self.now += step
            self.waited += step * waiting
            self.pace.step()


@pytest.mark.parametrize("threads, tells, waiting, words", [
    (2, True, 0.67, "2 threads have waited 0.7 s"), (2, True, 0.1, None),
    (1, True, 0.67, None), (2, False, 0.67, None)])
def test_threads_that_wait_for_a_core_are_said_so_once(threads, tells, waiting, words):
    """Of one thread there is nothing to say: none waits for it."""
    machine = Machine(threads, tells=tells)
    machine.train(3.5, waiting=waiting)
    assert len(machine.said) == (1 if words else 0)
    assert all(words in line and line.startswith("warning    ") for line in machine.said)


def test_a_run_that_has_become_slow_is_said_so_once():
    machine = Machine(threads=1)
    machine.train(3)
    machine.train(3, step=0.25)
    assert machine.said == []
    machine.train(3, step=0.4)
    [line] = machine.said
    assert "steps take 4.0 times as long as before; other programs" in line


def test_what_is_no_training_does_not_count():
    machine = Machine(threads=2)
    machine.train(2)
    for _ in range(10):
        machine.now += 100  # an evaluation
        machine.pace.restart()
        machine.train(1.2)
    assert machine.said == []


def test_a_gpu_has_no_threads_to_wait_for():
    machine = Machine(threads=2, device="cuda")
    machine.train(3, waiting=0.9)
    assert machine.said == []


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells")
def test_the_time_that_threads_wait_is_what_linux_says():
    """Of two processes on one core each waits half of the time."""
    core = min(os.sched_getaffinity(0))
    busy = "import time, sys; end = time.time() + 30\nwhile time.time() < end: pass"
    other = subprocess.Popen(["taskset", "-c", str(core), sys.executable, "-c", busy])
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core})
        waited, end = waited_for_cores(), time.monotonic() + 1
        while time.monotonic() < end:
            pass
        assert waited_for_cores() - waited > 0.2
    finally:
        os.sched_setaffinity(0, before)
        other.kill()
        other.wait()
