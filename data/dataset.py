"""Loads a data set: checks all of its files, then serves random training batches and fixed ones to evaluate on.

B rows, T = block_size tokens a row; rows with answers have their own length.
"""
import functools
import importlib.util
import math

import numpy as np
import torch

from base.command_line import nearest
from base.errors import BadInput
from base.files import read_json, shown
from data.files import DATA, check_name, data_sets, how_to_prepare
from data.tokenizer import CharTokenizer, load_tokenizer

SCAN = 2**22  # tokens checked at a time, so that a large file never sits in memory


def load_dataset(name, block_size):
    """The data set data/<name>, prepared if needed and possible. BadInput if anything about it is wrong."""
    check_name(name)
    folder = DATA / name
    if not (folder / "meta.json").exists():
        prepare(folder)
    meta = read_meta(folder)
    if "row_length" in meta:
        if block_size < meta["row_length"]:
            raise BadInput(f"data/{name}: its rows have {meta['row_length']} tokens and must not be cut; "
                           f"set block_size={meta['row_length']}, not {block_size}")
        return Rows(folder, meta)
    for split in ("train", "val"):
        n = meta[f"{split}_tokens"]
        if n < block_size + 1:  # block_size inputs, and a target for the last of them
            raise BadInput(f"data/{name}: its {split} split has {n} tokens, and block_size={block_size} needs {block_size + 1}; "
                           "use a longer text or a smaller block_size")
    return Dataset(folder, meta)


def prepare(folder):
    """Run data/<name>/prepare.py in this process: its main(), which takes no arguments."""
    name, script = folder.name, folder / "prepare.py"
    if not script.exists():
        if folder.exists():
            raise BadInput(f"data/{name} has no meta.json: its preparation did not finish; {how_to_prepare(name)}")
        raise BadInput(f"no data set {name!r}{nearest(name, data_sets(), '')}; have {', '.join(data_sets())}; "
                       f"to add your own text: python -m data.text --input FILE --name {name}")
    print(f"preparing data/{name} ...", flush=True)
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "main"):
        raise BadInput(f"data/{name}/prepare.py has no main(); put its work into one that writes meta.json last")
    module.main()


def read_meta(folder):
    """meta.json with the keys that we need, of the right types. Raises BadInput."""
    again = how_to_prepare(folder.name)
    meta = read_json(folder / "meta.json", again)
    for key in ("vocab_size", "train_tokens", "val_tokens", "row_length" if "row_length" in meta else "val_bytes"):
        value = meta.get(key)
        if type(value) is not int or value < 1:
            raise BadInput(f"data/{folder.name}/meta.json is damaged: {key} is {value!r}, not a positive integer; {again}")
    if meta.get("dtype") not in ("uint16", "uint32"):
        raise BadInput(f"data/{folder.name}/meta.json is damaged: dtype is {meta.get('dtype')!r}, not uint16 or uint32; {again}")
    return meta


def open_tokens(path, n, dtype, vocab_size):
    """The tokens of a .bin file, (n,), left on disk. BadInput if it is not n tokens below vocab_size."""
    again = how_to_prepare(path.parent.name)
    try:
        size = path.stat().st_size
        if size != n * dtype.itemsize:
            raise BadInput(f"{shown(path)} has {size:,} bytes, and meta.json says {n:,} tokens of {dtype.itemsize}; {again}")
        tokens = np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise BadInput(f"cannot read {shown(path)}: {error.strerror}; {again}") from error
    if vocab_size <= np.iinfo(dtype).max:
        for start in range(0, n, SCAN):
            highest = tokens[start:start + SCAN].max()
            if highest >= vocab_size:
                raise BadInput(f"{shown(path)} holds the token {highest}, and the vocabulary ends at {vocab_size - 1}; {again}")
    return tokens


def read_cells(folder, meta):
    """{split: cells} of meta.json, a cell being {"name": its difficulty, "length": tokens, "rows": number}. Raises BadInput."""
    try:
        cells = {split: [(cell["name"], cell["length"], cell["rows"]) for cell in meta["cells"][split]] for split in meta["cells"]}
        for split, of_split in cells.items():
            length = max(length for _, length, _ in of_split)
            assert meta[f"{split}_tokens"] == length * sum(rows for _, _, rows in of_split) and (split != "train" or length == meta["row_length"])
            assert all(type(name) is str and type(n) is int and type(rows) is int and min(n, rows) > 0 for name, n, rows in of_split)
        assert {"train", "val"} <= cells.keys()
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"data/{folder.name}/meta.json is damaged: its cells do not add up to its tokens; {how_to_prepare(folder.name)}") from error
    return cells


class Dataset:
    """The two splits of a text as arrays on disk, with what meta.json says of them."""

    def __init__(self, folder, meta):
        self.set_up(folder, meta)
        self.bytes_per_token = meta["val_bytes"] / meta["val_tokens"]  # of the validation split, for bits per byte
        self.cells = {"val": [None]}  # a text is of one difficulty
        self.train, self.val = self.open("train.bin", meta["train_tokens"]), self.open("val.bin", meta["val_tokens"])

    def set_up(self, folder, meta):
        self.folder, self.name, self.meta, self.vocab_size = folder, folder.name, meta, meta["vocab_size"]

    def open(self, file, n):
        return open_tokens(self.folder / file, n, np.dtype(self.meta["dtype"]).newbyteorder("<"), self.vocab_size)

    def size(self):
        return f"{len(self.train):,} tokens to train on, {len(self.val):,} to validate"

    @functools.cached_property
    def tokenizer(self):
        path = self.folder / "tokenizer.json"
        if not path.exists() and isinstance(self.meta.get("alphabet"), str):  # for characters the alphabet says it all
            tokenizer = CharTokenizer(self.meta["alphabet"])
        else:
            tokenizer = load_tokenizer(path)
        if tokenizer.vocab_size != self.vocab_size:
            raise BadInput(f"{shown(path)} has {tokenizer.vocab_size} symbols, and meta.json says {self.vocab_size}; "
                           f"{how_to_prepare(self.name)}")
        return tokenizer

    def batch(self, seed, step, n, block_size):
        """n random windows of the training split: inputs x and targets y, both int64 (n, T).

        They depend on the arguments alone: every mixer sees the same rows, and processes that share a step draw all of
        its rows and take their own slice.
        """
        starts = np.random.default_rng([seed, step]).integers(len(self.train) - block_size, size=(n, 1))
        tokens = self.train.view(np.ndarray)  # memmap's own indexing is slower
        x = starts + np.arange(block_size)    # positions (n, T)
        return torch.from_numpy(tokens[x].astype(np.int64)), torch.from_numpy(tokens[x + 1].astype(np.int64))

    def val_batches(self, block_size, rows, max_tokens=None):
        """The validation split as consecutive windows: yields inputs x and targets y, both int64 (B, T), B <= rows.

        Every token but the first is a target exactly once; what is left over at the end comes as a last (1, rest) window.
        If that is more than max_tokens targets: max_tokens // block_size windows (at least one), evenly spread, always the same.
        """
        full, rest = divmod(len(self.val) - 1, block_size)
        whole = max_tokens is None or len(self.val) - 1 <= max_tokens
        take = full if whole else min(full, max(1, max_tokens // block_size))
        starts = np.arange(take) * full // take * block_size
        tokens = self.val.view(np.ndarray)
        for i in range(0, take, rows):
            positions = starts[i:i + rows, None] + np.arange(block_size + 1)
            window = torch.from_numpy(tokens[positions].astype(np.int64))  # (B, T + 1)
            yield window[:, :-1].contiguous(), window[:, 1:].contiguous()
        if whole and rest:
            window = torch.from_numpy(tokens[-rest - 1:].astype(np.int64))[None]  # (1, rest + 1)
            yield window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def eval_batches(self, split, block_size, rows, max_tokens=None):
        """What an evaluation on a split reads: yields x, y and the number of the difficulty cell that they belong to."""
        for x, y in self.val_batches(block_size, rows, max_tokens):
            yield x, y, 0


class Rows(Dataset):
    """Rows with answers: tokens (rows, row length) of each split on disk, and beside each token the answer due there, or 0.

    Evaluation goes through them cell by cell, where a cell is all rows of one difficulty; `cells` names those of each split."""
    bytes_per_token = None

    def __init__(self, folder, meta):
        self.set_up(folder, meta)
        self.sizes = read_cells(folder, meta)  # {split: [(name, length, rows)]}
        self.cells = {split: [name for name, _, _ in cells] for split, cells in self.sizes.items()}
        self.splits = {}
        for split, cells in self.sizes.items():
            shape = -1, max(length for _, length, _ in cells)
            self.splits[split] = [self.open(file, meta[f"{split}_tokens"]).reshape(shape) for file in (f"{split}.bin", f"{split}_targets.bin")]
        self.train, self.val = self.splits["train"][0], self.splits["val"][0]

    def size(self):
        return f"{len(self.train):,} rows of {self.meta['row_length']} tokens to train on, {len(self.val):,} to validate"

    def rows(self, split, which, length=None):
        """Inputs x and targets y, -1 where no answer is due, both int64 (B, length), of the rows numbered or sliced `which`."""
        x, y = (torch.from_numpy(array.view(np.ndarray)[which, :length].astype(np.int64)) for array in self.splits[split])
        return x, torch.where(y == 0, -1, y)

    def batch(self, seed, step, n, block_size):
        """n random rows to train on: x and y, both int64 (n, row_length). They depend on seed and step alone."""
        return self.rows("train", np.random.default_rng([seed, step]).integers(len(self.train), size=n))

    def eval_batches(self, split, block_size, rows, max_tokens=None):
        """The rows of a split: yields x, y, both (B, the cell's length), B <= rows, and the cell's number. If that is more than
        max_tokens: the same share of each cell, at least a row, always the same."""
        share = min(1, (max_tokens or math.inf) / sum(length * n for _, length, n in self.sizes[split]))
        first = 0
        for number, (_, length, n) in enumerate(self.sizes[split]):
            end = first + max(1, int(share * n))
            for i in range(first, end, rows):
                yield *self.rows(split, slice(i, min(i + rows, end)), length), number
            first += n

    def val_batches(self, block_size, rows, max_tokens=None):
        for x, y, _ in self.eval_batches("val", block_size, rows, max_tokens):
            yield x, y
