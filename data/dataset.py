"""Loads a data set: checks all of its files, then serves random training batches and fixed validation windows.

B rows, T = block_size tokens a row.
"""
import functools
import importlib.util

import numpy as np
import torch

from config import BadInput
from data.files import DATA, check_name, how_to_prepare, read_json, shown
from data.tokenizer import CharTokenizer, load_tokenizer

SCAN = 2**22  # tokens checked at a time, so that a large file never sits in memory


def load_dataset(name, block_size):
    """The data set data/<name>, prepared if needed and possible. BadInput if anything about it is wrong."""
    check_name(name)
    folder = DATA / name
    if not (folder / "meta.json").exists():
        prepare(folder)
    meta = read_meta(folder)
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
        known = sorted({p.parent.name for p in [*DATA.glob("*/prepare.py"), *DATA.glob("*/meta.json")]})
        raise BadInput(f"no data set {name!r}; have {', '.join(known)}; "
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
    for key in ("vocab_size", "train_tokens", "val_tokens", "val_bytes"):
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


class Dataset:
    """The two splits of a data set as arrays on disk, with what meta.json says of them."""

    def __init__(self, folder, meta):
        self.folder = folder
        self.name = folder.name
        self.meta = meta
        self.vocab_size = meta["vocab_size"]
        self.bytes_per_token = meta["val_bytes"] / meta["val_tokens"]  # of the validation split, for bits per byte
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self.train = open_tokens(folder / "train.bin", meta["train_tokens"], dtype, self.vocab_size)
        self.val = open_tokens(folder / "val.bin", meta["val_tokens"], dtype, self.vocab_size)

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
