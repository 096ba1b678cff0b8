"""What the runs of a sweep are at: on a terminal a line each, drawn anew every second.

    softmax-lr0.004-seed1  1200/2000  loss 1.5312  val 1.6120  3 min left
    lln-lr0.004-seed1      starts
    2 running, 7 waiting, about 12 min left

A log file or a pipe gets none of this. All of it is read from what the runs write themselves, the
ends of their metrics.jsonl.
"""
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Optional

from base.errors import printable
from base.files import parse_json
from base.terminal import Lines, fitting, height, width
from tools.sweep_cost import SECONDS_AROUND, time_left

EVERY = 1.0    # seconds
TAIL = 2**15   # bytes at the end of a metrics.jsonl that are read, some hundred lines
IMPORTANT = ("run", "step", "left", "val")  # what a narrow terminal shows, the most wanted first


@dataclass
class Progress:
    """Of a run that goes; of one that has said nothing yet step is 0."""
    step: int
    steps: int                   # of the whole run
    seconds: float               # so far
    train_loss: Optional[float]  # nats, as the last lines have it
    val_loss: Optional[float]

    def seconds_of(self, steps):
        """About how long so many steps take, as the run goes; step must not be 0."""
        return self.seconds / self.step * steps

    def left(self):
        return self.seconds_of(max(0, self.steps - self.step))


class Watch:
    """Of runs that are being carried out, see sweep_runs.carry_out."""

    def __init__(self, to_come=0):
        """to_come: runs that follow these ones, for the time left."""
        self.to_come = to_come
        self.lines = Lines()
        self.next = 0.0

    def show(self, running, waiting, at_once):
        """running: the Runs under way. waiting: how many are not. at_once: that go at a time."""
        if self.lines.shown and time.monotonic() >= self.next:
            self.next = time.monotonic() + EVERY
            found = {Path(run.folder).name: progress_of(run) for run in running}
            self.lines.draw(in_lines(found, waiting, self.to_come, at_once))

    def clear(self):
        """Before something else is printed."""
        self.lines.clear()
        self.next = 0.0

    def say(self, line):
        self.clear()
        print(line, flush=True)


def progress_of(run):
    """The Progress of a run, from the end of its metrics.jsonl."""
    found = Progress(0, run.options()["max_iters"], 0.0, None, None)
    for line in last_lines(Path(run.folder) / "metrics.jsonl"):
        try:
            row = parse_json(line)
            found.step, found.seconds = int(row["iter"]), float(row["seconds"])
            for name in ("train_loss", "val_loss"):
                if row[name] is not None:
                    setattr(found, name, float(row[name]))
        except (ValueError, KeyError, TypeError):
            continue  # half of a line, or none of ours
    return found


def last_lines(path):
    """The lines, bytes, at the end of a file, the first of them perhaps in part; none if it cannot
    be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            file.seek(max(0, os.fstat(handle).st_size - TAIL))
            return file.read(TAIL).splitlines()
    except OSError:
        return []


def in_lines(found, waiting, to_come, at_once):
    """What is shown of {name of a run: its Progress}, those that are furthest first where there is
    no room for all."""
    room = max(1, height() - 3)
    furthest = sorted(found, key=lambda name: found[name].step, reverse=True)[:room]
    names = [name for name in found if name in furthest]
    rows = [cells_of(name, found[name]) for name in names]
    widths = {}
    for row in rows:
        for key, cell in row.items():
            widths[key] = max(widths.get(key, 0), len(cell))
    shown = fitting(widths, width() - 1, IMPORTANT)
    lines = ["  ".join(row.get(key, "").ljust(widths[key]) for key in shown).rstrip()
             for row in rows]
    return [*lines, summary(found, waiting, to_come, at_once)]


def cells_of(name, run):
    """{column: text} of a run's line."""
    cells = {"run": printable(name)}
    if run.step == 0:
        return cells | {"step": "starts"}
    cells["step"] = f"{run.step}/{run.steps}"
    if run.train_loss is not None:
        cells["loss"] = f"loss {run.train_loss:.4f}"
    if run.val_loss is not None:
        cells["val"] = f"val {run.val_loss:.4f}"
    cells["left"] = time_left(run.left()).removeprefix("about ")
    if run.step >= run.steps:
        cells["left"] = "is scored"
    return cells


def summary(found, waiting, to_come, at_once):
    """The last line: how many run and wait, and how long all will take, as those that run do."""
    words = [f"{len(found)} running"]
    if waiting + to_come:
        words.append(f"{waiting + to_come} waiting")
    begun = [run for run in found.values() if run.step]
    if begun:
        whole = mean(run.seconds_of(run.steps) for run in begun) + SECONDS_AROUND
        left = [run.left() + SECONDS_AROUND if run.step else whole for run in found.values()]
        seconds = (sum(left) + (waiting + to_come) * whole) / at_once
        words.append(time_left(max([seconds, *left])))
    return ", ".join(words)
