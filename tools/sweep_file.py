"""sweep.json: which runs of a sweep are there to compare, which are missing and which have failed.

It is there from the start and grows with each run. What an earlier sweep in the same folder has
said of other arms stays.
"""
import contextlib
import fcntl
import os
from pathlib import Path
from typing import Any, Optional, Union

from base.files import exists, read_json, write_json, writing
from tools.records import Sweep, find_record, holds_run, kept_record


class SweepFile(Sweep):
    """All of it."""
    config: Optional[str] = None
    tune: dict[str, list] = {}             # option -> the values that each arm began with
    seeds: Union[int, list[int]] = []      # once their number
    chosen: dict[str, Union[float, dict[str, Any]]] = {}  # arm -> {option: value}; once its rate


def read_sweep_file(folder):
    """The SweepFile of a folder, an empty one if there is none. BadInput if it is damaged."""
    path = Path(folder) / "sweep.json"
    if not exists(path):
        return SweepFile(runs=[], failed={})
    return read_json(path, "run the same tools.sweep once more", SweepFile)


@contextlib.contextmanager
def locked(folder):
    """Inside, no other sweep of this folder, which is made, changes what is in it."""
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_there(folder, name):
    """Whether there is a run of that name, or a record of one."""
    if holds_run(Path(folder) / name):
        return True
    return bool(find_record(folder, name) or kept_record(Path(folder).name, name))


def write_sweep_file(folder, now, prefixes, chosen_prefixes):
    """Writes what is known `now`, a SweepFile, and of what was there before: all of other arms than
    those whose runs begin with `prefixes`, and of these the runs with the values chosen now, which
    begin with `chosen_prefixes`."""
    with locked(folder):
        before = read_sweep_file(folder)
        chosen = {arm: values for arm, values in before.chosen.items() if arm not in now.chosen}
        kept = []
        for name in before.runs:
            is_current = name.startswith(chosen_prefixes) or not name.startswith(prefixes)
            is_new = name not in now.runs and name not in now.missing
            if is_current and is_new and is_there(folder, name):
                kept.append(name)
        missing = [name for name in before.missing if not name.startswith(prefixes)]
        failed = {name: error for name, error in before.failed.items()
                  if not Path(name).name.startswith(prefixes)}
        write_json(Path(folder) / "sweep.json", {
            "config": now.config,
            "tune": now.tune,
            "seeds": now.seeds,
            "chosen": chosen | now.chosen,
            "runs": kept + now.runs,
            "missing": missing + now.missing,
            "failed": failed | now.failed,
        })
