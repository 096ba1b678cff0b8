"""Tiny Shakespeare by characters: 65 of them; 1,003,854 tokens to train on, 111,540 to validate.

Run: python data/shakespeare_char/prepare.py    (seconds; train.py does it by itself when needed)
"""
import sys
from pathlib import Path

# the repository, for `base` and `data`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import exit_on_bad_input
from data.files import write_text_dataset
from data.sources import SHAKESPEARE_SHA256, tiny_shakespeare
from data.tokenizer import char_tokenizer_of


def main():
    folder = Path(__file__).resolve().parent
    text = tiny_shakespeare(folder)
    write_text_dataset(folder, text, char_tokenizer_of(text), SHAKESPEARE_SHA256,
                       "data/shakespeare_char/prepare.py")


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main()
