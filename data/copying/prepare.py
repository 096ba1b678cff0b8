"""Copying, small: 8 or 16 of 29 symbols, alone or among blanks, in up to 64 tokens; see data/tasks.py.

Run: python data/copying/prepare.py    (seconds; train.py does it by itself when needed)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `config` and `data`

from base.errors import exit_on_bad_input
from data.tasks import copying, write_task

CELLS = [dict(length=length, symbols=symbols) for length, symbols in ((16, 8), (32, 16), (64, 8), (64, 16))]


def main():
    write_task(Path(__file__).resolve().parent, copying, 32, "data/copying/prepare.py",
               train=[(20_000, cell) for cell in CELLS], val=[(500, cell) for cell in CELLS], test=[(1000, cell) for cell in CELLS])


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main()
