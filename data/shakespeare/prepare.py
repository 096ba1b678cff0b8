"""Tiny Shakespeare by GPT-2's BPE: 50,257 tokens; 301,966 of the text to train on, 36,059 to
validate.

Run: python data/shakespeare/prepare.py    (seconds; train.py does it by itself when needed)
"""
import sys
from pathlib import Path

# the repository, for `base` and `data`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import exit_on_bad_input
from data.files import write_text_dataset
from data.sources import SHAKESPEARE_SHA256, gpt2, tiny_shakespeare


def main():
    folder = Path(__file__).resolve().parent
    text = tiny_shakespeare(folder)
    write_text_dataset(folder, text, gpt2(folder), SHAKESPEARE_SHA256,
                       "data/shakespeare/prepare.py")


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main()
