"""Multi-query associative recall, small: 4, 8 or 16 pairs in 64 tokens, of 64 symbols; see data/tasks.py.

Run: python data/mqar/prepare.py    (seconds; train.py does it by itself when needed)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `config` and `data`

from base.errors import exit_on_bad_input
from data.tasks import mqar, write_task

CELLS = [dict(length=64, pairs=pairs) for pairs in (4, 8, 16)]


def main():
    write_task(Path(__file__).resolve().parent, mqar, 64, "data/mqar/prepare.py",
               train=[(20_000, cell) for cell in CELLS], val=[(500, cell) for cell in CELLS], test=[(1000, cell) for cell in CELLS])


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main()
