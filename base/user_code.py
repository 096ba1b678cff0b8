"""Errors in a user's own file: in one line with their place, where a traceback would show ours."""
import contextlib
import sysconfig
import traceback
from pathlib import Path

from base.errors import BadInput, is_out_of_memory

LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib"))


def in_words(error):
    """Type and text of an error in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def place(error, path=None):
    """Where an error was raised, "mine.py, line 12, in forward": the last line of its traceback that is in the file
    `path`, or, without a path, in no library. "" if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    if path is not None:
        own = Path(path).resolve()
        frames = [frame for frame in frames if Path(frame.filename).resolve() == own]
    else:
        frames = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    if not frames:
        return ""
    return f"{frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}"


def definition(function):
    """Where a function begins, "mine.py, line 9"; "" of one that is not written in Python."""
    code = getattr(function, "__code__", None)
    if code is None:
        return ""
    return f"{code.co_filename}, line {code.co_firstlineno}"


@contextlib.contextmanager
def blame(path, advice=""):
    """Inside, an error that was raised in a user's file `path`, or in what that called, becomes BadInput with the line
    there. Other errors pass, and so does a lack of memory. Without a path, all do."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        where = place(error, path) if path else ""
        if not where or is_out_of_memory(error):
            raise
        raise BadInput(f"mixer_file {where}: {in_words(error)}{advice}") from error
