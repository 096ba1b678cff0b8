"""What runs leave behind, without their weights: one file for each arm of a sweep.

    results/<sweep>/<arm>.jsonl.gz     for example results/shakespeare/softmax.jsonl.gz
    results/<sweep>/sweep.json         as tools/sweep.py wrote it, where there was one

An arm is what was run with several seeds and rates: its name is that of its runs up to -lr<rate> or
-seed<number>. The file is gzip of JSON lines, each of one kind, the runs one after the other in the
order of their seeds and of each first the config, then the metrics as they came, then the scores if
there are any:

    {"kind": "config", "run": "softmax-lr0.001-seed1", "value": {...}}    config.json
    {"kind": "metrics", "run": "softmax-lr0.001-seed1", "value": {...}}   a line of metrics.jsonl
    {"kind": "scores", "run": "softmax-lr0.001-seed1", "value": {...}}    scores.json

Equal records are equal bytes: gzip's time stamp is 0 and no file name is in it. To look into one:
zcat results/shakespeare/softmax.jsonl.gz | head

    for record in read_records("results/shakespeare"): ...      and of run folders and sweeps alike

What is read may be from anybody: sizes are limited, also unpacked, and every line is checked.
"""
import gzip
import io
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Optional, Union

from pydantic import Field, TypeAdapter, ValidationError

from base.errors import BadInput
from base.files import JSON_BYTES, ROOT, exists, is_file, parse_json, read_bytes, read_json
from base.files import shown as path_in_words
from base.files import write_file
from tools.score import Count, Lenient, Measured, Scores, read_scores

RESULTS = ROOT / "results"
SUFFIX = ".jsonl.gz"
PACKED_BYTES = 2**24    # the largest file of records that is read; ours have less than 2**19
UNPACKED_BYTES = 2**26  # the most that one may unpack to
REMEDY = "leave it out, or get it anew"

# one part of a path, and none that is hidden or leads upwards
RunName = Annotated[str, Field(pattern=r"^[^./\x00][^/\x00]*$", max_length=255)]


# What is in them ------------------------------------------------------------------------------

class RunConfig(Lenient):
    """What comparing needs of a run's config.json; the options of the model are checked by it."""
    mixer: Annotated[str, Field(max_length=1000)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    max_iters: Count
    learning_rate: Annotated[float, Field(ge=0, le=1e30)]
    dtype: Literal["float32", "bfloat16"]
    dataset: str
    block_size: Annotated[int, Field(ge=1, lt=2**31)]
    eval_tokens: Count
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    n_layer: Annotated[int, Field(ge=1, lt=2**16)] = 1  # each has an entry in lists
    allow_leak: bool = False


class Row(Lenient):
    """What comparing needs of a line of metrics.jsonl."""
    iter: Count
    train_loss: Optional[Measured] = None
    val_loss: Optional[Measured] = None
    flops: Optional[Measured] = None
    seconds: Optional[Measured] = None
    tokens_per_s: Optional[Measured] = None
    peak_bytes: Optional[Measured] = None


class Sweep(Lenient):
    """What sweep.json says of its runs: their names, and of failed ones {folder: error}."""
    runs: list[RunName]
    missing: list[RunName] = []
    failed: dict[str, str]


class Line(Lenient):
    run: RunName


class ConfigLine(Line):
    kind: Literal["config"]
    value: RunConfig


class MetricsLine(Line):
    kind: Literal["metrics"]
    value: Row


class ScoresLine(Line):
    kind: Literal["scores"]
    value: Scores


RUN_NAME = TypeAdapter(RunName)
LINE = TypeAdapter(Annotated[
    Union[ConfigLine, MetricsLine, ScoresLine], Field(discriminator="kind")])


@dataclass
class Record:
    """What a run left behind; config, metrics and scores are as they stand in its files."""
    name: str                # of the run
    source: Path             # the run's folder, or the file of records
    config: dict
    metrics: list[dict]
    scores: Optional[dict]   # None: not scored, or not for the newest checkpoint

    def reached(self, steps):
        """Whether it was trained and scored that far."""
        return self.scores is not None and self.scores["iter"] >= steps

    def seconds(self):
        """Of training and evaluation, over all resumes."""
        return max([row.get("seconds") or 0 for row in self.metrics], default=0)

    def __str__(self):
        """As messages name it."""
        inside = f": {self.name}" if is_records_file(self.source) else ""
        return f"{path_in_words(self.source)}{inside}"


# Reading --------------------------------------------------------------------------------------

def read_records(path):
    """The records at a path, a list of Record: of a run's folder, of a file of records, of a sweep
    (those it names), or of a folder of run folders and files of records.

    BadInput if there is none, or one is damaged."""
    path = Path(path)
    if is_records_file(path):
        return read_file(path)
    if holds_run(path):
        return [read_run(path)]
    if exists(path / "sweep.json"):
        return [record_of(path, run) for run in read_sweep(path).runs]
    records = []
    for inner in inside(path):
        if is_records_file(inner):
            records += read_file(inner)
        elif holds_run(inner):
            records.append(read_run(inner))
    return records


def scored_runs(folder):
    """The Records of all scored runs in a folder, also those that its sweep.json does not name, as
    they chose the learning rates. What failed or is damaged is left out."""
    records = []
    for path in inside(Path(folder)):
        if is_records_file(path) or holds_run(path):
            try:
                records += read_records(path)
            except BadInput:
                continue
    return [record for record in records if record.scores is not None]


def record_of(sweep, run):
    """The Record of a run of a sweep: its folder's, or that of the files beside, or of results/."""
    folder = Path(sweep)
    if holds_run(folder / run):
        return read_run(folder / run)
    record = find_record(folder, run) or kept_record(folder.name, run)
    if record is None:
        raise BadInput(f"{path_in_words(folder)}/sweep.json names {run}, which is not there; "
                       "run the same tools.sweep once more")
    return record


def kept_record(sweep, run):
    """The Record that results/<sweep> has of the run of that name, or None: a fresh clone need not
    train it anew. Whether it was run with the same options is for the caller to ask, and whether
    it went as far, Record.reached. BadInput if it is damaged."""
    return find_record(RESULTS / sweep, run)


def find_record(folder, run):
    """The Record of the run of that name in a folder of files of records, or None."""
    path = Path(folder) / (arm_of(run) + SUFFIX)
    if not is_file(path):
        return None
    for record in read_file(path):
        if record.name == run:
            return record
    return None


def arm_of(run):
    """softmax of softmax-lr0.001-seed1: what all rates and seeds have in common."""
    return re.sub(r"(-lr[0-9.e+-]+.*)?-seed\d+$", "", run)


def is_records_file(path):
    return Path(path).name.endswith(SUFFIX)


def holds_run(folder):
    """Whether a folder is a run's; whether the run is whole, reading it tells."""
    names = ("config.json", "metrics.jsonl", "checkpoints")
    return any(exists(folder / name) for name in names)


def inside(folder):
    """The paths in a folder, sorted; none if it cannot be read."""
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except (OSError, ValueError):
        return []


def read_sweep(folder):
    """The Sweep of a folder's sweep.json. BadInput if it is damaged."""
    path = Path(folder) / "sweep.json"
    remedy = "run the same tools.sweep once more"
    return checked_by(Sweep.model_validate, read_json(path, remedy), path, remedy)


def read_run(folder):
    """The Record of a run's folder. BadInput if its config.json or metrics.jsonl is damaged."""
    folder = Path(folder)
    config = read_json(folder / "config.json", REMEDY)
    checked_by(RunConfig.model_validate, config, folder / "config.json")
    path = folder / "metrics.jsonl"
    metrics = []
    for number, line in lines_of(read_bytes(path, JSON_BYTES, REMEDY)):
        row = parsed(line, number, path)
        checked_by(Row.model_validate, row, f"{path_in_words(path)}, line {number}")
        metrics.append(row)
    name = Path(os.path.abspath(folder)).name
    return Record(name, folder, config, metrics, read_scores(folder))


def read_file(path):
    """The Records in a file of them, in its order. BadInput if it is damaged."""
    path = Path(path)
    records = {}
    for number, line in lines_of(unpack(path)):
        place = f"{path_in_words(path)}, line {number}"
        content = parsed(line, number, path)
        checked_by(LINE.validate_python, content, place)
        name, kind, value = content["run"], content["kind"], content["value"]
        record = records.get(name)
        if (kind == "config") != (record is None) or (record and record.scores is not None):
            raise BadInput(f"{place}: {kind} of run {name} where it is not expected; {REMEDY}")
        if kind == "config":
            records[name] = Record(name, path, config=value, metrics=[], scores=None)
        elif kind == "metrics":
            record.metrics.append(value)
        else:
            record.scores = value
    return list(records.values())


def unpack(path):
    """The bytes in a gzip file. BadInput if it is none, or is or becomes too large."""
    packed = read_bytes(path, PACKED_BYTES, REMEDY)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            content = file.read(UNPACKED_BYTES + 1)  # of a bomb no more than that is ever made
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path_in_words(path)} is damaged: {error}; {REMEDY}") from error
    if len(content) > UNPACKED_BYTES:
        raise BadInput(f"{path_in_words(path)} unpacks to more than {UNPACKED_BYTES:,} bytes; "
                       f"{REMEDY}")
    return content


def lines_of(content):
    """(number from 1, line) of bytes. What no line break ends is still being written."""
    lines = content.split(b"\n")[:-1]
    return enumerate(lines, start=1)


def parsed(line, number, path):
    """The value in a line of JSON. BadInput, naming the place, if it is none."""
    try:
        return parse_json(line)
    except ValueError as error:
        raise BadInput(f"{path_in_words(path)}, line {number}: no valid JSON; {REMEDY}") from error


def checked_by(validate, content, place, remedy=REMEDY):
    """What a pydantic type makes of a value. BadInput, naming the place, if it does not fit."""
    try:
        return validate(content)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(map(str, detail["loc"]))
        what = f"{where}: {detail['msg']}" if where else detail["msg"]
        if isinstance(place, Path):
            place = path_in_words(place)
        raise BadInput(f"{place} is damaged: {what[:300]}; {remedy}") from error


# Writing --------------------------------------------------------------------------------------

def write_records(folder, records):
    """Writes records into a folder: contents_of. Returns the paths."""
    contents = contents_of(folder, records)
    for path, content in contents.items():
        write_file(path, content)
    return list(contents)


def contents_of(folder, records):
    """{path: bytes} of the files of records, one for each arm, that a folder is to hold. What such
    a file holds already stays in it, and a run of the same name is replaced.

    BadInput if that one is of another run."""
    arms = {}
    for record in records:
        checked_by(RUN_NAME.validate_python, record.name, record, "give its folder another name")
        arms.setdefault(arm_of(record.name), []).append(record)
    contents = {}
    for arm, of_arm in arms.items():
        path = Path(folder) / (arm + SUFFIX)
        contents[path] = packed(earlier_and(of_arm, path))
    return contents


def earlier_and(records, path):
    """The records that a file holds, those of `records` in their place or after them."""
    by_name = {}
    if exists(path):
        by_name = {record.name: record for record in read_file(path)}
    for record in records:
        earlier = by_name.get(record.name)
        if earlier is not None and earlier.config != record.config:
            raise BadInput(f"{path_in_words(path)} has {record.name} of another run; "
                           "choose another folder, or move it away")
        by_name[record.name] = record
    return by_name.values()


def packed(records):
    """The bytes of a file of records."""
    lines = []
    for record in sorted(records, key=order):
        lines.append({"kind": "config", "run": record.name, "value": record.config})
        for row in record.metrics:
            lines.append({"kind": "metrics", "run": record.name, "value": row})
        if record.scores is not None:
            lines.append({"kind": "scores", "run": record.name, "value": record.scores})
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    if len(text) > UNPACKED_BYTES:
        names = ", ".join(record.name for record in records)
        raise BadInput(f"the records of {names} are larger than what is read back, "
                       f"{UNPACKED_BYTES:,} bytes; log less often, or keep them apart")
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(text.encode())
    return buffer.getvalue()


def order(record):
    """By seed, so that seed 10 comes after seed 2."""
    return record.config["seed"], record.name
