"""How a command ends when something is wrong: bad input in one line with status 2, a lack of memory likewise."""
import contextlib
import os
import re
import sys


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one line: the thing, what is wrong with it, what to do."""


def is_out_of_memory(error):
    """Torch has no one type for it."""
    known = "(out of|not enough|allocate) memory"
    return isinstance(error, MemoryError) or re.search(known, str(error)) is not None


def printable(text):
    """A text from a file or a user with its control characters escaped, for a terminal to show and not to obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_few(names):
    """The first five of a list of texts, and how many more there are."""
    listed = ", ".join(names[:5])
    return listed if len(names) <= 5 else f"{listed} and {len(names) - 5} more"


@contextlib.contextmanager
def exit_on_bad_input(program):
    """Inside, BadInput ends the program: one line on standard error, exit status 2. So does a lack of memory. Any other
    error is our bug."""
    try:
        yield
    except BadInput as error:
        rank = os.environ.get("RANK", "0")  # under torchrun
        of_rank = f" (rank {rank})" if rank != "0" else ""
        print(f"{program}{of_rank}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # who reads our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        print(f"{program}: out of memory ({printable(reason)}); "
              "lower batch_size, block_size or the model's sizes", file=sys.stderr)
        sys.exit(2)
