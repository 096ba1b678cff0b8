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


def height():
    """Lines that the terminal shows; LINES in the environment overrides it."""
    return shutil.get_terminal_size().lines


def obeys_codes():
    """Whether there is a terminal that colours and moves its cursor when told to."""
    return is_terminal() and os.environ.get("TERM") != "dumb"


def has_colours():
    """See https://no-color.org."""
    return obeys_codes() and not os.environ.get("NO_COLOR")


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


class Lines:
    """Lines at the end of what a terminal shows, drawn anew in place; elsewhere nothing is shown.

    The cursor stands before the first of them: what is to be printed above them is printed after
    clear(), and clear() is right at any time, also if drawing was interrupted."""

    def __init__(self):
        self.shown = obeys_codes()

    def draw(self, lines):
        """Each is cut to the terminal's width, and their number to its height."""
        if not self.shown or not lines:
            return
        lines = [line[:width() - 1] for line in lines[:height() - 1]]
        up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
        self.write("\r\x1b[J" + "\n".join(lines) + up + "\r")

    def clear(self):
        if self.shown:
            self.write("\r\x1b[J")

    def write(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()
