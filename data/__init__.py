"""Data sets: one folder each, data/<name>, with train.bin, val.bin, tokenizer.json and meta.json.

    dataset = load_dataset("shakespeare_char", block_size=256)    # prepares it if needed
    x, y = dataset.batch(seed=1337, step=0, n=12, block_size=256)

A folder with a prepare.py is prepared by it, recall tasks (data/tasks.py) by `python -m
data.prepare NAME`, and `python -m data.text` makes a data set from a text of your own.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
from data.dataset import Dataset, load_dataset

__all__ = ["Dataset", "load_dataset"]
