"""Errors in a user's own file: one line with their place, where a traceback would show ours."""
import sys
import sysconfig
import traceback
from pathlib import Path

LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib"))
files = set()  # resolved paths of what the user gave to be run, a --mixer_file


def in_words(error):
    """Type and text of an error, and its notes, in one line."""
    text = " ".join(str(error).split())[:300]
    notes = getattr(error, "__notes__", [])
    return "; ".join([f"{type(error).__name__}: {text}".removesuffix(": "), *notes])


def frames_of(error):
    """The traceback's entries, the last call last; of a syntax error the place in the text too."""
    frames = list(traceback.extract_tb(error.__traceback__))
    if isinstance(error, SyntaxError) and error.filename:
        frames.append(traceback.FrameSummary(error.filename, error.lineno, "<module>"))
    return frames


def users_place(error):
    """Where in a user's file an error came from, "mine.py, line 12, in forward": the last line of
    its traceback that is in one of `files`, or "" if none is."""
    return last([f for f in frames_of(error) if Path(f.filename).resolve() in files])


def place(error):
    """users_place, or the last line that is in no library."""
    outside = [f for f in frames_of(error) if not f.filename.startswith(LIBRARIES)]
    return users_place(error) or last(outside)


def sources_of(modules):
    """The source files of modules, by name, that are of no library."""
    found = [getattr(sys.modules[name], "__file__", None) for name in modules]
    return [Path(file) for file in found
            if file and Path(file).is_file() and not file.startswith(LIBRARIES)]


def last(frames):
    if not frames:
        return ""
    function = "" if frames[-1].name == "<module>" else f", in {frames[-1].name}"
    return f"{frames[-1].filename}, line {frames[-1].lineno}{function}"


def definition(function):
    """Where a function begins, "mine.py, line 9"; of one that is not written in Python, its
    name."""
    code = getattr(function, "__code__", None)
    if code is None:
        return getattr(function, "__qualname__", type(function).__name__)
    return f"{code.co_filename}, line {code.co_firstlineno}"
