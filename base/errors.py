"""How a command ends when something is wrong: one line, status 2 for what the user can mend.

Scripts import this before anything else: what takes long to import may then be interrupted without
a traceback.
"""
import contextlib
import errno
import os
import re
import signal
import sys

from base.user_code import in_words, users_place

# Torch has no one type for a lack of memory; its sizes overflow where no memory would do.
LACK_OF_MEMORY = re.compile(
    "(out of|not enough|allocate) memory|Storage size calculation overflowed"
    "|integer multiplication overflow|invalid (buffer size|elem_size)|array is too big")


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one line.

    It names the thing, what is wrong with it, and what to do."""


def is_out_of_memory(error):
    return isinstance(error, MemoryError) or LACK_OF_MEMORY.search(str(error)) is not None


def printable(text):
    """A text from a file or a user with its control characters escaped.

    For a terminal to show and not to obey."""
    escaped = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    return "".join(escaped)


def is_our_script():
    """Whether Python was started on a script of this repository, and not on a test runner, say."""
    if sys.argv[:1] == ["-m"]:  # python -m data.text, which imports the package data before it
        return True
    script = getattr(sys.modules["__main__"], "__file__", None) or ""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.abspath(script).startswith(root + os.sep)


# until main() runs, Ctrl-C ends the process at once: Python's own handler would show where an
# import was. It may be ignored, as in a shell's background job; that stays.
if is_our_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def output_fault(error=None):
    """Why standard output takes no more, in words, or "". What cannot be written is dropped.

    error: what was raised. If that says that a device is full or broken, it may have been this
    one, with nothing left to write; a line break tells."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    try:
        sys.stdout.flush()
        if error is not None and error.errno in (errno.ENOSPC, errno.EIO):
            print(flush=True)
        return ""
    except OSError as fault:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"cannot write to standard output: {fault.strerror}"


def end(program, status, message):
    """Ends the program with one line on standard error."""
    rank = os.environ.get("RANK", "0")  # under torchrun
    of_rank = f" (rank {rank})" if rank != "0" else ""
    print(f"{program}{of_rank}: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)


def first_few(names):
    """The first five of a list of texts, and how many more there are."""
    listed = ", ".join(names[:5])
    return listed if len(names) <= 5 else f"{listed} and {len(names) - 5} more"


@contextlib.contextmanager
def exit_on_bad_input(program):
    """Around a script's main(): BadInput ends it in one line on standard error, with status 2.

    So do a lack of memory, an output that takes no more, and what a user's own mixer raises; Ctrl-C
    has status 130, and a reader of the output that has seen enough (`head`) status 1. Any other
    error is our bug."""
    if is_our_script() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # é for a terminal that knows ASCII only
    try:
        yield
        sys.stdout.flush()
    except BadInput as error:
        end(program, 2, output_fault(error) or str(error))
    except KeyboardInterrupt:
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            print("\r\x1b[K", end="", file=sys.stderr)  # over the ^C that the terminal has written
        end(program, 130, "interrupted")
    except BrokenPipeError:
        output_fault()
        sys.exit(1)
    except Exception as error:
        fault = output_fault(error) if isinstance(error, OSError) else ""
        if fault:
            end(program, 2, fault)
        if isinstance(error, (MemoryError, RuntimeError)) and is_out_of_memory(error):
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            end(program, 2, f"out of memory ({reason}); "
                "lower batch_size, block_size or the model's sizes")
        where = users_place(error)
        if not where:
            raise
        end(program, 2, f"mixer_file {where}: {in_words(error)}")
