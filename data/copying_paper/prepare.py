"""Selective copying in the size of MAD's (Poli et al. 2024, arXiv 2403.17844): 16 symbols in 256 tokens, a vocabulary of 16.

Run: python data/copying_paper/prepare.py    (train.py does it by itself when needed)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `config` and `data`

from base.errors import exit_on_bad_input
from data.tasks import copying, write_task

CELLS = [dict(length=256, symbols=16)]


def main():
    write_task(Path(__file__).resolve().parent, copying, 16, "data/copying_paper/prepare.py",
               train=[(12_800, cell) for cell in CELLS], val=[(1280, cell) for cell in CELLS], test=[(1280, cell) for cell in CELLS])


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main()
