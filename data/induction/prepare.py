"""Induction heads, small: 16, 32 or 64 tokens, of 32 symbols; see data/tasks.py.

Run: python data/induction/prepare.py    (seconds; train.py does it by itself when needed)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `config` and `data`

from base.errors import exit_on_bad_input
from data.tasks import induction, write_task

CELLS = [dict(length=length) for length in (16, 32, 64)]


def main():
    write_task(Path(__file__).resolve().parent, induction, 32, "data/induction/prepare.py",
               train=[(20_000, cell) for cell in CELLS], val=[(500, cell) for cell in CELLS], test=[(1000, cell) for cell in CELLS])


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main()
