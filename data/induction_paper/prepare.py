"""Induction heads as Gu and Dao 2023 (arXiv 2312.00752) have them: 256 tokens of 16 symbols, tests up to 16 times as long.

Run: python data/induction_paper/prepare.py    (train.py does it by itself when needed)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `config` and `data`

from base.errors import exit_on_bad_input
from data.tasks import induction, write_task

LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096]


def main():
    write_task(Path(__file__).resolve().parent, induction, 16, "data/induction_paper/prepare.py",
               train=[(100_000, dict(length=256))], val=[(1000, dict(length=256))], test=[(500, dict(length=length)) for length in LENGTHS])


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main()
