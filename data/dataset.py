"""Loads a data set: checks its files, then serves random training batches and fixed ones to
evaluate.

B rows, T = block_size tokens a row; rows with answers have their own length.
"""
import functools
import importlib.util
import math
import stat
from typing import Annotated, Literal, NamedTuple, Optional, Union

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from base.command_line import nearest
from base.errors import BadInput
from base.files import exists, is_file, read_json, shown
from data.files import DATA, check_name, clean_up, locked, old_of
from data.tasks import RECALL_SETS, check_version, write_recall_set
from data.tokenizer import char_tokenizer, load_tokenizer

SCAN = 2**22  # tokens checked at a time, so that a large file never sits in memory


def load_dataset(name, block_size, holdout=0.0):
    """The data set data/<name>, prepared if needed and possible; of a text the last share `holdout`
    of the training split takes the place of the validation split. BadInput if anything is wrong."""
    check_name(name)
    folder = DATA / name
    if not exists(folder / "meta.json"):
        prepare(folder)
    meta = read_meta(folder)
    check_version(name, meta)
    if "row_length" in meta:
        dataset = open_rows(folder, meta, block_size)
    else:
        dataset = open_text(folder, meta, block_size)
    if holdout:
        dataset.hold_out(holdout, block_size)
    if read_meta(folder) != meta:
        raise BadInput(f"data/{name} was prepared anew while it was read; start again")
    return dataset


def open_text(folder, meta, block_size):
    for split in ("train", "val"):
        n = meta[f"{split}_tokens"]
        if n < block_size + 1:  # block_size inputs, and a target for the last of them
            raise BadInput(f"data/{folder.name}: its {split} split has {n} tokens, and "
                           f"block_size={block_size} needs {block_size + 1}; "
                           "use a longer text or a smaller block_size")
    return Dataset(folder, meta)


def open_rows(folder, meta, block_size):
    row_length = meta["row_length"]
    if block_size < row_length:
        raise BadInput(f"data/{folder.name}: its rows have {row_length} tokens and must not be "
                       f"cut; set block_size={row_length}, not {block_size}")
    return Rows(folder, meta)


# Preparing ---------------------------------------------------------------------------------------

def how_to_prepare(name):
    """The end of many messages: the command that makes data/<name> whole again."""
    if is_file(DATA / name / "prepare.py"):
        return f"prepare it again: python data/{name}/prepare.py"
    if name in RECALL_SETS:
        return f"prepare it again: python -m data.prepare {name}"
    if name.startswith("books_"):
        return f"prepare it again: python data/books/prepare.py --name={name} --tokenizer=..."
    return f"prepare it again: python -m data.text --input FILE --name {name}"


def dataset_names():
    """The data sets that are there or prepare themselves, sorted."""
    paths = [*DATA.glob("*/prepare.py"), *DATA.glob("*/meta.json")]
    return sorted({path.parent.name for path in paths} | set(RECALL_SETS))


def prepare(folder):
    """Make data/<name>, a folder without meta.json: by its prepare.py, or if it is a recall
    task."""
    name = folder.name
    if old_of(folder).exists():  # a killed process was about to put a new one in its place
        with locked(folder):
            clean_up(folder)
        if exists(folder / "meta.json"):
            return
    if prepares_itself(folder):
        print(f"preparing data/{name} ...", flush=True)
        with locked(folder):
            if not exists(folder / "meta.json"):  # or else another process was faster
                prepare_again(folder)
    elif exists(folder):
        raise BadInput(f"data/{name} has no meta.json: it is no data set, or its preparation did "
                       f"not finish; remove it and {how_to_prepare(name)}")
    else:
        names = dataset_names()
        raise BadInput(f"no data set {name!r}{nearest(name, names, '')}; have {', '.join(names)}; "
                       f"to add your own text: python -m data.text --input FILE --name {name}")


def prepares_itself(folder):
    return is_file(folder / "prepare.py") or folder.name in RECALL_SETS


def prepare_again(folder):
    """Make data/<name>, a folder that prepares itself, whether or not it is there."""
    if is_file(folder / "prepare.py"):
        run_prepare(folder / "prepare.py")
    else:
        write_recall_set(folder)


def run_prepare(script):
    """Run a prepare.py in this process: its main(), which takes no arguments."""
    name = script.parent.name
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "main"):
        raise BadInput(f"data/{name}/prepare.py has no main(); "
                       "put its work into one that writes meta.json last")
    module.main()


# Checking what is on disk ------------------------------------------------------------------------

Count = Annotated[int, Field(ge=1, le=2**62)]


class CellMeta(BaseModel):
    """All rows of one difficulty: what makes it up, such as "length=64 pairs=4"."""
    name: str
    length: Count
    rows: Count


class Meta(BaseModel):
    """meta.json: what we read of it."""
    model_config = ConfigDict(extra="allow")
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    dtype: Literal["uint16", "uint32"]
    train_tokens: Count
    val_tokens: Count


class DocumentMeta(BaseModel):
    author: Annotated[str, Field(max_length=200)]
    tokens: Count


class TextMeta(Meta):
    val_bytes: Count
    val_documents: Union[list[DocumentMeta], int, None] = None  # in their order, or how many
    test_tokens: Optional[Count] = None
    test_bytes: Optional[Count] = None
    alphabet: Optional[str] = None


class RowsMeta(Meta):
    row_length: Count
    cells: dict[Literal["train", "val", "test"], Annotated[list[CellMeta], Field(min_length=1)]]


def read_meta(folder):
    """meta.json of data/<name>, a dict, with the keys that we need, of the right types.
    BadInput."""
    path = folder / "meta.json"
    remedy = how_to_prepare(folder.name)
    schema = RowsMeta if "row_length" in read_json(path, remedy) else TextMeta
    return read_json(path, remedy, schema).model_dump(exclude_unset=True)


def open_tokens(path, n, dtype, vocab_size):
    """The tokens of a .bin file, (n,), left on disk. BadInput if it is not n tokens below
    vocab_size."""
    remedy = how_to_prepare(path.parent.name)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{shown(path)} is no regular file; {remedy}")
        if status.st_size != n * dtype.itemsize:
            raise BadInput(f"{shown(path)} has {status.st_size:,} bytes, and meta.json says "
                           f"{n:,} tokens of {dtype.itemsize}; {remedy}")
        tokens = np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise BadInput(f"cannot read {shown(path)}: {error.strerror}; {remedy}") from error
    if vocab_size <= np.iinfo(dtype).max:
        for start in range(0, n, SCAN):
            highest = tokens[start:start + SCAN].max()
            if highest >= vocab_size:
                raise BadInput(f"{shown(path)} holds the token {highest}, and the vocabulary ends "
                               f"at {vocab_size - 1}; {remedy}")
    return tokens


class Cell(NamedTuple):
    """All rows of a split that are of one difficulty. They stand one after the other."""
    name: str
    length: int  # tokens of a row, without padding
    rows: int


def read_cells(folder, meta):
    """{split: [Cell]} of meta.json. BadInput if they do not add up to its tokens."""
    cells = {}
    for split, of_split in meta["cells"].items():
        cells[split] = [Cell(cell["name"], cell["length"], cell["rows"]) for cell in of_split]
    fits = "train" in cells and "val" in cells
    for split in cells:
        longest = max(cell.length for cell in cells[split])
        n_tokens = longest * sum(cell.rows for cell in cells[split])
        fits = fits and meta.get(f"{split}_tokens") == n_tokens
        if split == "train":
            fits = fits and longest == meta["row_length"]
    if not fits:
        raise BadInput(f"data/{folder.name}/meta.json is damaged: its cells do not add up to its "
                       f"tokens; {how_to_prepare(folder.name)}")
    return cells


def check_answers(path, targets):
    """BadInput if a row of `targets` (rows, length), 0 where no answer is due, has no answer at
    all."""
    rows_at_once = max(1, SCAN // targets.shape[1])
    for start in range(0, len(targets), rows_at_once):
        answered = targets[start:start + rows_at_once].any(axis=1)
        if not answered.all():
            raise BadInput(f"{shown(path)}: row {start + answered.argmin()} has no answer due, so "
                           f"there is nothing to learn from it; {how_to_prepare(path.parent.name)}")


# Serving it --------------------------------------------------------------------------------------

def window_starts(n_tokens, block_size, max_tokens=None):
    """(where the full windows of a split begin, (n,); the targets left over at its end), see
    Dataset.windows. Of a part of the windows nothing is left over."""
    n_targets = n_tokens - 1
    full, rest = divmod(n_targets, block_size)
    if max_tokens is None or n_targets <= max_tokens:
        return np.arange(full) * block_size, rest
    take = min(full, max(1, max_tokens // block_size))
    return np.arange(take) * full // take * block_size, 0


class Dataset:
    """The two splits of a text as arrays on disk, with what meta.json says of them."""

    def __init__(self, folder, meta):
        self.set_up(folder, meta)
        # of the validation split, for bits per byte
        self.bytes_per_token = meta["val_bytes"] / meta["val_tokens"]
        self.cells = {"val": [None]}  # a text is of one difficulty
        self.train = self.open("train.bin", meta["train_tokens"])
        self.val = self.open("val.bin", meta["val_tokens"])
        if meta.get("test_tokens") and meta.get("test_bytes"):
            self.cells["test"] = [None]
            self.test = self.open("test.bin", meta["test_tokens"])
            self.test_bytes_per_token = meta["test_bytes"] / meta["test_tokens"]

    def set_up(self, folder, meta):
        self.folder = folder
        self.name = folder.name
        self.meta = meta
        self.vocab_size = meta["vocab_size"]

    def open(self, file, n):
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        return open_tokens(self.folder / file, n, dtype, self.vocab_size)

    def hold_out(self, share, block_size):
        """Takes that share of the training split, at its end, for the validation split. BadInput if
        either is then too short."""
        n = round(share * len(self.train))
        if not block_size < n < len(self.train) - block_size:
            raise BadInput(f"data/{self.name}: holdout={share} takes {n} of its {len(self.train)} "
                           f"training tokens, and block_size={block_size} needs "
                           f"{block_size + 1} in each part; choose another share")
        self.train, self.val = self.train[:-n], self.train[-n:]

    def size(self):
        return f"{len(self.train):,} tokens to train on, {len(self.val):,} to validate"

    def val_authors(self, positions):
        """The author of the validation split's tokens at such positions, [name]; None where
        meta.json does not name the authors."""
        documents = self.meta.get("val_documents")
        if not isinstance(documents, list):
            return None
        ends = np.cumsum([document["tokens"] for document in documents])
        if ends[-1] != len(self.val):
            raise BadInput(f"data/{self.name}/meta.json is damaged: its val_documents have "
                           f"{ends[-1]:,} tokens and the split {len(self.val):,}; "
                           f"{how_to_prepare(self.name)}")
        numbers = np.searchsorted(ends, positions, side="right")
        return [documents[number]["author"] for number in numbers]

    @functools.cached_property
    def tokenizer(self):
        """What made the tokens out of text. BadInput if its file is damaged or of another data
        set."""
        path = self.folder / "tokenizer.json"
        alphabet = self.meta.get("alphabet")
        remedy = how_to_prepare(self.name)
        if alphabet is not None and not exists(path):  # for characters it says it all
            tokenizer = char_tokenizer(alphabet, self.folder / "meta.json", remedy)
        else:
            tokenizer = load_tokenizer(path)
        if tokenizer.vocab_size != self.vocab_size:
            raise BadInput(f"{shown(path)} has {tokenizer.vocab_size} symbols, and meta.json says "
                           f"{self.vocab_size}; {remedy}")
        return tokenizer

    def batch(self, seed, step, n, block_size):
        """n random windows of the training split: inputs x and targets y, both int64 (n, T).

        They depend on the arguments alone: every mixer sees the same rows, and processes that share
        a step draw all of its rows and take their own slice.
        """
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(len(self.train) - block_size, size=(n, 1))
        positions = starts + np.arange(block_size)  # (n, T)
        tokens = self.train.view(np.ndarray)        # memmap's own indexing is slower
        x = torch.from_numpy(tokens[positions].astype(np.int64))
        y = torch.from_numpy(tokens[positions + 1].astype(np.int64))
        return x, y

    def val_batches(self, block_size, rows, max_tokens=None):
        """The windows of the validation split."""
        return self.windows(self.val, block_size, rows, max_tokens)

    def windows(self, tokens, block_size, rows, max_tokens=None):
        """Tokens (n,) as consecutive windows: x and y, both int64 (B, T), B <= rows.

        Every token but the first is a target exactly once; what is left over at the end comes as a
        last (1, rest) window. If that is more than max_tokens targets: max_tokens // block_size
        windows (at least one), evenly spread, always the same.
        """
        starts, rest = window_starts(len(tokens), block_size, max_tokens)
        tokens = tokens.view(np.ndarray)
        for i in range(0, len(starts), rows):
            positions = starts[i:i + rows, None] + np.arange(block_size + 1)
            window = torch.from_numpy(tokens[positions].astype(np.int64))  # (B, T + 1)
            yield window[:, :-1].contiguous(), window[:, 1:].contiguous()
        if rest:
            window = torch.from_numpy(tokens[-rest - 1:].astype(np.int64))[None]  # (1, rest + 1)
            yield window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def eval_batches(self, split, block_size, rows, max_tokens=None):
        """What an evaluation on a split reads: yields x, y and the number of their difficulty
        cell."""
        tokens = self.test if split == "test" else self.val
        for x, y in self.windows(tokens, block_size, rows, max_tokens):
            yield x, y, 0


class Rows(Dataset):
    """Rows with answers: of each split tokens (rows, row length) and, beside each, the answer due
    or 0.

    Evaluation goes through them cell by cell; `cells` names those of each split, `sizes` has
    them."""
    bytes_per_token = None

    def __init__(self, folder, meta):
        self.set_up(folder, meta)
        self.sizes = read_cells(folder, meta)
        self.cells = {}   # {split: [name]}
        self.splits = {}  # {split: (tokens, targets), both (rows, row length)}
        for split, cells in self.sizes.items():
            self.cells[split] = [cell.name for cell in cells]
            n = meta[f"{split}_tokens"]
            row_length = max(cell.length for cell in cells)
            tokens = self.open(f"{split}.bin", n).reshape(-1, row_length)
            targets = self.open(f"{split}_targets.bin", n).reshape(-1, row_length)
            check_answers(folder / f"{split}_targets.bin", targets)
            self.splits[split] = tokens, targets
        self.train = self.splits["train"][0]
        self.val = self.splits["val"][0]

    def hold_out(self, share, block_size):
        raise BadInput(f"holdout is of a text, and data/{self.name} is a recall task, whose val "
                       "split is there to choose by; leave it out")

    def size(self):
        row_length = self.meta["row_length"]
        return (f"{len(self.train):,} rows of {row_length} tokens to train on, "
                f"{len(self.val):,} to validate")

    def rows(self, split, which, length=None):
        """The rows numbered or sliced `which`: inputs x and targets y, both int64 (B, length).

        y is -1 where no answer is due."""
        tokens, targets = self.splits[split]
        x = torch.from_numpy(tokens.view(np.ndarray)[which, :length].astype(np.int64))
        y = torch.from_numpy(targets.view(np.ndarray)[which, :length].astype(np.int64))
        return x, torch.where(y == 0, -1, y)

    def batch(self, seed, step, n, block_size):
        """n random rows to train on: x and y, both int64 (n, row_length). By seed and step
        alone."""
        rng = np.random.default_rng([seed, step])
        return self.rows("train", rng.integers(len(self.train), size=n))

    def eval_batches(self, split, block_size, rows, max_tokens=None):
        """The rows of a split: yields x, y, both (B, the cell's length), B <= rows, and its number.

        If that is more than max_tokens: the same share of each cell, at least a row, always the
        same."""
        n_tokens = sum(cell.length * cell.rows for cell in self.sizes[split])
        share = min(1, (max_tokens or math.inf) / n_tokens)
        first = 0
        for number, cell in enumerate(self.sizes[split]):
            end = first + max(1, int(share * cell.rows))
            for start in range(first, end, rows):
                x, y = self.rows(split, slice(start, min(start + rows, end)), cell.length)
                yield x, y, number
            first += cell.rows

    def val_batches(self, block_size, rows, max_tokens=None):
        for x, y, _ in self.eval_batches("val", block_size, rows, max_tokens):
            yield x, y
