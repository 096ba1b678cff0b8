"""How a command ends when something is wrong: bad input in one line with status 2, a lack of memory likewise."""
import contextlib
import os
import re
import sys

from base.user_code import in_words, users_place


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one line: the thing, what is wrong with it, what to do."""


def is_out_of_memory(error):
    """Torch has no one type for it."""
    known = "(out of|not enough|allocate) memory"
    return isinstance(error, MemoryError) or re.search(known, str(error)) is not None


def printable(text):
    """A text from a file or a user with its control characters escaped, for a terminal to show and not to obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def exit_on_bad_input(program):
    """Inside, BadInput ends the program: one line on standard error, exit status 2. So do a lack of
    memory and what a user's own mixer raises. Any other error is our bug."""
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
    except Exception as error:
        if isinstance(error, (MemoryError, RuntimeError)) and is_out_of_memory(error):
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            print(f"{program}: out of memory ({printable(reason)}); "
                  "lower batch_size, block_size or the model's sizes", file=sys.stderr)
            sys.exit(2)
        where = users_place(error)
        if not where:
            raise
        line = f"{program}: mixer_file {where}: {in_words(error)}"
        print(printable(" ".join(line.split())), file=sys.stderr)
        sys.exit(2)
