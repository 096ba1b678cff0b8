"""A line when a run has become slow because its threads do not get the cores they ask for.

The threads of a step wait for each other: with one other program on one of two cores, two threads
take 2.4 to 3.3 times as long as one would. No number of threads is right both then and on a quiet
machine, so it is not changed, only said.
"""
import time
from pathlib import Path

import torch

WINDOW = 10         # seconds of training that are judged at a time
MOST_WAITING = 0.3  # of a second, in each, that the threads together may wait for a core
SLOWER = 3          # times as long as in the best window so far


def waited_for_cores():
    """Seconds that the threads of this process could have run and had no core, or None where the
    system does not tell (Linux does)."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, ValueError, IndexError):  # the thread has just ended
            continue
    return total / 1e9 if total else None


class Pace:
    """Is told of every step, and says a line, once, through `say`."""

    def __init__(self, say, device, clock=time.monotonic, waited=waited_for_cores):
        self.say = say
        self.threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.clock = clock
        self.waited = waited
        self.best = 0.0  # steps a second
        self.is_over = False
        self.restart()

    def restart(self):
        """After what was no training: an evaluation, a checkpoint."""
        self.steps = 0
        self.started = self.clock()
        self.waited_before = self.waited()

    def step(self):
        self.steps += 1
        seconds = self.clock() - self.started
        if self.is_over or seconds < WINDOW:
            return
        reason = self.slow_because(seconds)
        if reason:
            self.say(f"warning    {reason}; other programs compute here")
            self.is_over = True
        self.restart()

    def slow_because(self, seconds):
        """Why the window that ends now was slow, or None if it was not."""
        waited, speed = self.waited(), self.steps / seconds
        if self.threads > 1 and waited is not None and self.waited_before is not None:
            share = (waited - self.waited_before) / seconds
            if share > MOST_WAITING:
                return (f"in each second, {self.threads} threads have waited {share:.1f} s for a "
                        "core, which may take longer than fewer --threads would")
        if speed * SLOWER < self.best:
            return f"steps take {self.best / speed:.1f} times as long as before"
        self.best = max(self.best, speed)
        return None
