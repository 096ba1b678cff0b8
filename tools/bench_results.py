"""cells.jsonl of bench.py: what was measured so far, a line for each cell and round."""
import fcntl
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from base.errors import BadInput
from base.files import JSON_BYTES, parse_json, read_bytes, writing
from tools.records import lines_of
from training.run_folder import open_plainly

Positive = Annotated[float, Field(gt=0, le=1e30)]
Bytes = Optional[Annotated[float, Field(ge=-1e30, le=1e30)]]


class Row(BaseModel):
    """A line of cells.jsonl: one cell in one round."""
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    cell: dict[str, Any]
    round: int
    time: Annotated[float, Field(ge=0, le=1e30)]
    cell_seconds: Positive


class FailedRow(Row):
    status: Literal["oom", "timeout", "error"]


class MeasuredRow(Row):
    status: Literal["ok"]
    ms: Positive
    ms_quantiles: Annotated[list[Positive], Field(min_length=1)]
    first_token_ms: Optional[Positive]
    peak_bytes: Bytes
    rise_bytes: Bytes
    state_bytes: Bytes
    flops_per_token: Optional[Positive]
    ceiling_flops_per_s: Optional[Positive]
    read_bytes_per_token: Optional[Positive] = None  # not in what earlier versions measured
    ceiling_bytes_per_s: Optional[Positive] = None
    parameters: Annotated[int, Field(ge=0, lt=2**53)]


ROW = TypeAdapter(Annotated[Union[FailedRow, MeasuredRow], Field(discriminator="status")])
REMEDY = "clear it with --overwrite"


class Results:
    """The rows of cells.jsonl, a line for every cell and round; no other benchmark has the file
    until this one is closed. BadInput if it is damaged, no plain file or in use."""

    def __init__(self, out_dir, overwrite):
        self.path = Path(out_dir) / "cells.jsonl"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open_plainly(self.path)
        try:
            self.lock()
            if overwrite:
                self.clear()
            self.rows = self.read()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def lock(self):
        """Two at a time would also disturb each other's figures."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{self.path.parent} is in use by another benchmark; wait for it, "
                           "or choose another --out_dir") from None
        except OSError:
            pass  # a file system without locks

    def clear(self):
        with writing(self.path):
            self.file.truncate(0)
            for path in self.path.parent.glob("*_batch*.png"):
                path.unlink()
            for name in ("results.csv", "results.json"):
                self.path.with_name(name).unlink(missing_ok=True)

    def read(self):
        content = read_bytes(self.path, JSON_BYTES, REMEDY)
        whole = content[:content.rfind(b"\n") + 1]  # the power may fail in the middle of a line
        with writing(self.path):
            self.file.truncate(len(whole))
            self.file.seek(0, 2)
        rows = rows_of(self.path, whole)
        return [row for row in rows if row["status"] != "error"]  # errors get another chance

    def add(self, row):
        with writing(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        self.rows.append(row)

    def of(self, cell):
        return [row for row in self.rows if row["cell"] == cell]

    def finished(self, cell, round, cell_seconds):
        """Whether a cell needs no measuring in a round. One that failed is done with, but for more
        time it gets another chance."""
        for row in self.of(cell):
            if row["status"] == "ok" and row["round"] == round:
                return True
            if row["status"] == "oom" or row["status"] == "error":
                return True
            if row["status"] == "timeout" and row["cell_seconds"] >= cell_seconds:
                return True
        return False


def rows_of(path, content):
    """The rows of a cells.jsonl with this content, but for a last line that is still being written;
    BadInput for what is none."""
    rows = []
    for number, line in lines_of(content):
        place = f"{path} is damaged: line {number}"
        try:
            row = parse_json(line)
            ROW.validate_python(row)
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join(map(str, detail["loc"]))
            what = f"{where[:100]}: {detail['msg'][:200]}"
            raise BadInput(f"{place}: {what}; {REMEDY}") from error
        except ValueError as error:
            raise BadInput(f"{place}: no valid JSON; {REMEDY}") from error
        rows.append(row)
    return rows
