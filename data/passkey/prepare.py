"""Passkey retrieval, small: five digits in 64 or 128 tokens of filler, at four depths; see data/tasks.py.

Run: python data/passkey/prepare.py    (seconds; train.py does it by itself when needed)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `config` and `data`

from base.errors import exit_on_bad_input
from data.tasks import passkey, write_task

CELLS = [dict(length=length, depth=depth) for length in (64, 128) for depth in (0, 25, 50, 75)]


def main():
    write_task(Path(__file__).resolve().parent, passkey, 32, "data/passkey/prepare.py",
               train=[(10_000, cell) for cell in CELLS], val=[(500, cell) for cell in CELLS], test=[(1000, cell) for cell in CELLS])


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main()
