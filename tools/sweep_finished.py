"""Finished runs, wherever they are: one that was trained for one sweep serves every other.

A run is known by its options, its data, the weights that it starts from (init_from) and its code,
the latter by its first losses (see tools/numerics.py). Looked through are the sweep's own folder,
those of out/sweeps and out/claims, and the records in results/. Runs that were recorded before
first losses were, or whose weights to start from are gone, are only found under their own name, in
the sweep's folder and in results/<name of the sweep>.
"""
import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from base.errors import BadInput
from base.files import parse_json, read_json
from config import Options
from mixers import load_mixer_file
from tools import records
from tools.numerics import agree, first_losses
from tools.records import holds_run, inside, is_records_file, lines_of, read_file, read_run, unpack
from tools.score import read_scores
from tools.sweep_runs import difference
from training.device import choose_device, choose_dtype

PLACES = ("out/sweeps", "out/claims")
BUCKET = ("mixer", "seed", "dataset", "max_iters", "learning_rate")  # options that must be equal
DAMAGE = (BadInput, ValueError, KeyError, TypeError)  # of files that may be anybody's


@dataclass(frozen=True)
class Entry:
    """A run in the index; what else its files hold is read when it is asked for."""
    name: str
    source: Path   # its folder, or the file of records
    folder: Path   # of its sweep
    config: dict


class FinishedRuns:
    """The index of all finished runs around a sweep's folder, made when it is first asked."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.entries = None  # bucket -> [Entry]
        self.read_file = lru_cache(8)(read_file)

    def find(self, run, data_sha256, on_cpu):
        """The Record of a finished run with the options of `run`, on data with this checksum and of
        this code, or None. on_cpu: whether it would be trained on a CPU."""
        wanted = run.options()
        if self.entries is None:
            self.entries = index(self.folder)
        for entry in self.entries.get(bucket(wanted), []):
            if difference(wanted, entry.config, data_sha256):
                continue
            if wanted["mixer_file"] != entry.config.get("mixer_file"):
                continue
            record = self.read(entry)
            if record is None or not record.reached(wanted["max_iters"]):
                continue
            if self.is_the_same(record, entry, run, on_cpu):
                return record
        return None

    def own_folders(self):
        """Where a sweep's own records are."""
        return self.folder, records.RESULTS / self.folder.name

    def read(self, entry):
        """The Record of an Entry, or None if it is damaged."""
        try:
            if not is_records_file(entry.source):
                return read_run(entry.source)
            [record] = [r for r in self.read_file(entry.source) if r.name == entry.name]
            return record
        except DAMAGE:
            return None

    def is_the_same(self, record, entry, run, on_cpu):
        """Whether a record of the same options is of the same code and precision."""
        recorded = record.scores.get("first_losses")
        if recorded is None:
            return entry.folder in self.own_folders() and record.name == Path(run.folder).name
        if on_cpu and record.config["dtype"] != dtype_on_cpu(run):
            return False
        return agree(recorded, losses_of(run))

    def check_code(self, run, record):
        """BadInput if a finished run in its own folder is of other code."""
        recorded = record.scores.get("first_losses")
        if recorded is not None and not agree(recorded, losses_of(run)):
            raise BadInput(f"{run.folder} was run with other code: its first losses are "
                           f"{in_words(recorded)}, and now {in_words(losses_of(run))}; "
                           "choose another --out_dir, or move it away")


def is_cpu(device):
    """Whether an option `device` means a CPU. A GPU is not tried: it would be in use, a little, as
    long as the experiment goes on."""
    if device.startswith("cuda"):
        return False
    if device == "auto":
        return not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return choose_device(device).type == "cpu"


def dtype_on_cpu(run):
    options = run.options()
    dtype = choose_dtype(options["dtype"], torch.device("cpu"), options["n_embd"])
    return str(dtype).removeprefix("torch.")


@cache  # for all experiments of a process: it has one code
def losses_of(run):
    """The first losses of a run as the code now is."""
    options = Options(**run.options())
    if options.mixer_file:
        load_mixer_file(options.mixer_file)  # another file's mixer may have the name by now
    return first_losses(options)


def in_words(losses):
    return "unknown" if losses is None else ", ".join(f"{loss:.4f}" for loss in losses)


# The index ----------------------------------------------------------------------------------------

def index(folder):
    """{bucket: [Entry]}, those of the folder itself first."""
    folders = [folder, records.RESULTS / folder.name]
    for place in (*map(Path, PLACES), records.RESULTS, records.RESULTS / "claims"):
        folders += inside(place)
    entries = {}
    for sweep in dict.fromkeys(folders):
        for path in inside(sweep):
            for entry in entries_at(path, sweep):
                entries.setdefault(bucket(entry.config), []).append(entry)
    return entries


def entries_at(path, sweep):
    """The Entries of a run's folder, if it is scored, or of a file of records; none of what is
    neither, or damaged: another sweep's folder is not this one's business."""
    try:
        if is_records_file(path):
            found = [Entry(line["run"], path, sweep, line["value"]) for line in config_lines(path)]
        elif holds_run(path) and read_scores(path):
            found = [Entry(path.name, path, sweep, read_json(path / "config.json", ""))]
        else:
            return []
        return [entry for entry in found if bucket(entry.config)]
    except DAMAGE:
        return []


def config_lines(path):
    """The lines of a file of records that hold a config; the others are not looked at."""
    start = b'{"kind": "config"'
    return [parse_json(line) for _, line in lines_of(unpack(path)) if line.startswith(start)]


def bucket(config):
    return tuple(json.dumps(config[name]) for name in BUCKET)
