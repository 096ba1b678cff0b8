"""Reading and writing files.

Half of one is never taken for a whole one, and no link or pipe is taken for a file.
"""
import contextlib
import json
import math
import os
import stat
import uuid
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from base.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
JSON_BYTES = 2**26  # the largest JSON file that is read; no file of ours comes near
JSON_DEPTH = 64     # objects and lists within each other; more would exhaust Python's stack


def shown(path):
    """A path as messages name it: from the repository on, if below it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def exists(path):
    """Whether there is something at a path.

    Not if its name is too long, or a folder above it is closed to us."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def is_file(path):
    """Whether a path names a regular file that can be looked at."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def writing(path):
    """Inside, a full or read-only disk and the like become one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot write {shown(path)}: {error.strerror}; "
                       "check the free space and the permissions") from error


def sync(path):
    """Returns when a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path, content):
    """Writes bytes under a name of this process's own, then renames: `path` is whole or absent.

    A link at `path` is replaced, not followed. Folders above are made. BadInput if it cannot be
    written."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    """write_file of a JSON value. Numbers must be finite: ValueError."""
    write_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_bytes(path, at_most, remedy):
    """The content of a regular file of up to `at_most` bytes.

    BadInput for a pipe, a folder or a larger file."""
    try:
        # opening a pipe must not wait for a writer
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise BadInput(f"{shown(path)} is no regular file; {remedy}")
            if status.st_size > at_most:
                raise BadInput(f"{shown(path)} has {status.st_size:,} bytes, at most {at_most:,} "
                               f"are read; {remedy}")
            return file.read()
    except OSError as error:
        raise BadInput(f"cannot read {shown(path)}: {error.strerror}; {remedy}") from error


def read_json(path, remedy, schema=None):
    """The JSON object in a file: a dict, or what the pydantic type `schema` makes of it.

    BadInput, naming the file, what is wrong with it and `remedy`, if there is none or it does not
    fit the schema."""
    damaged = f"{shown(path)} is damaged"
    try:
        content = parse_json(read_bytes(path, JSON_BYTES, remedy))
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{damaged}: no valid JSON; {remedy}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{damaged}: no JSON object; {remedy}")
    if schema is None:
        return content
    try:
        return TypeAdapter(schema).validate_python(content, strict=True)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise BadInput(f"{damaged}: {where}: {detail['msg']}; {remedy}") from error


def parse_json(content):
    """The value in JSON bytes or text.

    ValueError for what is none, NaN, infinity, or nested too deeply."""
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    def finite(digits):  # 1e999 is valid JSON, and infinite
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    try:
        value = json.loads(content, parse_constant=refuse, parse_float=finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(JSON_DEPTH):
        inner = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        if not inner:
            return value
        level = inner
    raise ValueError("nested too deeply")
