"""What tools/report.py finds in folders, and what it makes of them: the types, and the reading.

What is read may be from anybody: sizes are limited, and every value is checked.
"""
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import Field, TypeAdapter, ValidationError

from base.errors import BadInput
from base.files import JSON_BYTES, exists, is_file, parse_json, read_bytes, read_json, shown
from tools.bench_results import ROW
from tools.compare_arms import is_diverged, is_tuning
from tools.records import REMEDY, Sweep, holds_run, inside, is_records_file, lines_of
from tools.records import read_records, read_run, read_sweep
from tools.report_claims import Claim, read_claim
from tools.score import Count, Lenient

DEPTH = 3               # how far below a folder of the command line it is looked for more
MATRIX_BYTES = 2**28    # the largest file of attention matrices that is read
RUNNING = 5 * 60        # seconds without a word after which a run no longer counts as running
WHAT_TO_NAME = "name run folders, sweeps, records or benches: python -m tools.report out/sweeps/x"


@dataclass
class Runs:
    """The runs of a sweep or a folder, or those that were named one by one."""
    title: str
    finished: list = field(default_factory=list)  # Records to compare
    tuning: list = field(default_factory=list)    # Records that chose options
    others: list = field(default_factory=list)    # Records not at their end, or not scored
    sweep: Optional[Sweep] = None
    claim: Optional[Claim] = None
    notes: list = field(default_factory=list)     # on what was left out


@dataclass
class Section:
    """A part of the page. `table` is a list of {column: text}, of which "mixer" names the arm."""
    title: str
    sentence: str = ""
    status: list = field(default_factory=list)      # what runs, and the time left
    table: list = field(default_factory=list)
    curves: Optional[dict] = None
    figures: list = field(default_factory=list)
    maps: Optional[dict] = None
    notes: list = field(default_factory=list)       # what was not equal
    provenance: dict = field(default_factory=dict)  # what: text


@dataclass
class Bench:
    folder: Path
    rows: list  # of cells.jsonl, those that were measured


@dataclass
class Inspection:
    folder: Path
    report: dict    # attention.json
    matrices: dict  # name -> array, as tools/inspect_attention.py writes them


class Cell(Lenient):
    mode: str
    batch: Annotated[int, Field(ge=1, lt=2**31)]
    length: Annotated[int, Field(ge=1, lt=2**31)]
    mixer: str
    machine: str = ""
    device: str = ""
    threads: Count = 0
    dtype: str = ""


class Layer(Lenient):
    layer: Count
    mixer: str
    no_matrix: Optional[str]


class Attention(Lenient):
    checkpoint: str
    tokens: Annotated[list[str], Field(min_length=2, max_length=2**12)]
    layers: list[Layer]


CELL = TypeAdapter(Cell)


# Finding --------------------------------------------------------------------------------------

def read_all(names):
    """What there is in the paths: a list of Runs, Bench and Inspection. BadInput for a path in
    which there is nothing, or that is damaged."""
    found, single = [], []
    for name in names:
        path = Path(name)
        before = len(found) + len(single)
        gather(path, found, single, DEPTH)
        if len(found) + len(single) == before:
            raise BadInput(f"nothing to report on in {shown(path)}; {WHAT_TO_NAME}")
    return by_data(single) + found


def gather(path, found, single, depth):
    """Adds what is at a path to `found`, and a run that stands by itself to `single`."""
    if is_records_file(path):
        single += read_records(path)
        return
    if exists(path / "cells.jsonl"):
        found.append(read_bench(path))
        return
    if exists(path / "attention.json"):
        found.append(read_inspection(path))
        return
    if holds_run(path):
        single.append(read_run(path))
        if exists(path / "inspect" / "attention.json"):
            found.append(read_inspection(path / "inspect"))
        return
    runs = [inner for inner in inside(path) if is_records_file(inner) or holds_run(inner)]
    if runs or exists(path / "sweep.json") or exists(path / "claim.json"):
        found.append(read_runs(path))
    for inner in inside(path):
        if inner in runs:
            if exists(inner / "inspect" / "attention.json"):
                found.append(read_inspection(inner / "inspect"))
        elif depth > 0 and inner.is_dir():
            gather(inner, found, single, depth - 1)


def by_data(records):
    """Runs that were named one by one, those together that can be compared: a list of Runs."""
    groups = {}
    for record in records:
        config = record.config
        title = f"{config['dataset']}, {config['block_size']} tokens of context"
        groups.setdefault((title, config["eval_tokens"]), []).append(record)
    found = []
    for (title, _), of_group in groups.items():
        runs = Runs(title)
        for record in of_group:
            put(record, runs)
        found.append(runs)
    return found


# Runs -----------------------------------------------------------------------------------------

def read_runs(folder):
    """The Runs of a sweep's folder, or of one of run folders and files of records.

    A run that the sweep does not name yet may be half written: it is left out with a note."""
    runs = Runs(str(shown(folder)))
    if exists(folder / "claim.json"):
        runs.claim = read_claim(folder)
    named = []
    if exists(folder / "sweep.json"):
        runs.sweep = read_sweep(folder)
        named = read_records(folder)
    for record in named:
        put(record, runs)
    names = {record.name for record in named}
    for path in inside(folder):
        if not is_records_file(path) and not holds_run(path):
            continue
        try:
            of_path = read_records(path)
        except BadInput as error:
            if not runs.sweep:
                raise
            runs.notes.append(str(error))
            continue
        for record in of_path:
            if record.name not in names:
                put(record, runs, is_named=runs.sweep is None)
    return runs


def put(record, runs, is_named=True):
    """Puts a Record where it belongs; a sweep's run at a rate that was not chosen is left out."""
    if not is_finished(record):
        runs.others.append(record)
    elif is_tuning(record) or record.scores["report"] is None:
        runs.tuning.append(record)
    elif is_named:
        runs.finished.append(record)


def is_finished(record):
    """Whether a run has scores of its end; one that diverged has come to its own."""
    if record.scores is None:
        return False
    return is_diverged(record) or record.reached(record.config["max_iters"])


def is_running(record):
    """Whether a run that has not ended has said something of late."""
    try:
        written = (record.source / "metrics.jsonl").stat().st_mtime
    except OSError:  # a file of records
        return False
    return time.time() - written < RUNNING


def steps_done(record):
    return max([row["iter"] for row in record.metrics], default=0)


# Benches and inspections ----------------------------------------------------------------------

def read_bench(folder):
    """The Bench of a folder's cells.jsonl. BadInput if it is damaged."""
    path = folder / "cells.jsonl"
    rows = []
    for number, line in lines_of(read_bytes(path, JSON_BYTES, REMEDY)):
        try:
            row = parse_json(line)
            ROW.validate_python(row)
            CELL.validate_python(row["cell"])
        except ValueError as error:  # pydantic's too
            raise BadInput(f"{shown(path)} is damaged, line {number}; {REMEDY}") from error
        if row["status"] == "ok":
            rows.append(row)
    return Bench(folder, rows)


def read_inspection(folder):
    """The Inspection of a folder. BadInput if it is damaged."""
    report = read_json(folder / "attention.json", REMEDY)
    path = folder / "attention.safetensors"
    remedy = "run tools.inspect_attention once more"
    try:
        Attention.model_validate(report)
        matrices = {}
        if is_file(path):
            matrices = safetensors.numpy.load(read_bytes(path, MATRIX_BYTES, remedy))
    except (ValidationError, safetensors.SafetensorError, ValueError, KeyError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{shown(folder)} is damaged: {type(error).__name__}; {remedy}") from error
    for name, matrix in matrices.items():
        square = matrix.ndim in (2, 3) and matrix.shape[-1] == matrix.shape[-2]
        if not square or not np.issubdtype(matrix.dtype, np.floating):
            raise BadInput(f"{shown(path)} is damaged: {name[:60]} is no square matrix; {remedy}")
    return Inspection(folder, report, matrices)
