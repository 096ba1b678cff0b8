"""Multi-query associative recall as zoology measures it now: 8,192 symbols, tests up to 256 pairs in 1,024 tokens.

As many rows of each difficulty to train and to test as in its mqar_example_configs/original_mqar_configs.py; the rows to
validate, apart from both, are ours, and so are the fillers, which are never a key of the row.

Run: python data/mqar_paper/prepare.py    (train.py does it by itself when needed)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `config` and `data`

from base.errors import exit_on_bad_input
from data.tasks import mqar, write_task

TRAIN = [(100_000, 64, 4), (20_000, 128, 8), (20_000, 256, 16), (20_000, 256, 32), (20_000, 256, 64)]
VAL = [(1000, 64, 4), (1000, 64, 8), (1000, 64, 16), (1000, 128, 32), (1000, 256, 64)]
TEST = VAL + [(1000, 512, 128), (1000, 1024, 256)]


def main():
    train, val, test = ([(rows, dict(length=length, pairs=pairs)) for rows, length, pairs in split] for split in (TRAIN, VAL, TEST))
    write_task(Path(__file__).resolve().parent, mqar, 8192, "data/mqar_paper/prepare.py", train, val, test)


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main()
