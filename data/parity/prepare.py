"""Running parity: trained on 32 bits and tested on up to 128; see data/tasks.py.

Run: python data/parity/prepare.py    (seconds; train.py does it by itself when needed)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `config` and `data`

from base.errors import exit_on_bad_input
from data.tasks import parity, write_task

CELLS = [dict(length=16, asked_from=1), dict(length=32, asked_from=17)]
LONGER = [dict(length=64, asked_from=33), dict(length=128, asked_from=65)]


def main():
    write_task(Path(__file__).resolve().parent, parity, 3, "data/parity/prepare.py",
               train=[(50_000, dict(length=32, asked_from=1))], val=[(500, cell) for cell in CELLS], test=[(1000, cell) for cell in CELLS + LONGER])


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main()
