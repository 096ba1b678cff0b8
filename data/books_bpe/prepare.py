"""The books of data/books in 4,096 tokens of their own: a BPE vocabulary made from the training
authors, so that a small model has its parameters in its layers and not in a vocabulary.

    python data/books_bpe/prepare.py                  (the archive from GitHub, kept in data/books)
    python data/books_bpe/prepare.py --source PATH    (as data/books/prepare.py has it)

A few minutes. train.py runs the first by itself when needed.
"""
import sys
from pathlib import Path

# the repository, for `base` and `data`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import exit_on_bad_input
from data.books import prepare as books


def main(arguments=()):
    books.main(["--name=books_bpe", "--tokenizer=bpe", *arguments])


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main(sys.argv[1:])
