"""What a terminal is shown: as wide as it is, and in colour where it has colours."""
import os
import shutil
import sys
import textwrap

CODES = {"green": "32", "red": "31", "blue": "34", "quiet": "2"}


def is_terminal():
    return sys.stdout.isatty()


def width():
    """Characters in a line of the terminal; COLUMNS in the environment overrides it."""
    return shutil.get_terminal_size().columns


def has_colours():
    """See https://no-color.org."""
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text, colour):
    """The text in a colour of CODES (None: as it is), where there are colours."""
    return f"\x1b[{CODES[colour]}m{text}\x1b[0m" if colour and has_colours() else text


def wrapped(text, indent="  "):
    """A long line as lines of the terminal's width; as it is where there is no terminal."""
    if not is_terminal():
        return text
    return textwrap.fill(text, max(40, width()), subsequent_indent=indent,
                         break_on_hyphens=False)


def fitting(widths, space, important, gap=2):
    """The names of the columns, in their order, that fit beside each other into `space` characters.
    widths: {name: characters}; those named in `important` go first, in that order."""
    chosen, left = [], space + gap
    for name in [*important, *(name for name in widths if name not in important)]:
        if name in widths and widths[name] + gap <= left:
            chosen.append(name)
            left -= widths[name] + gap
    return [name for name in widths if name in chosen]
