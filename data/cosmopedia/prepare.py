"""Cosmopedia-100k by GPT-2's BPE: 100,000 synthetic textbook chapters, stories and articles.

    python data/cosmopedia/prepare.py                 (from the hub)
    python data/cosmopedia/prepare.py --source PATH   (a .parquet or .jsonl file with a `text`
                                                       column, or a folder of them)

One document in 200 is for validation. About 5 to 10 MB of text a second and core. train.py runs
the first by itself when needed. After an interruption the same command goes on behind the last
batch written. Memory holds one batch of documents, or the largest document.
"""
import contextlib
import hashlib
import itertools
import json
import logging
import os
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

# the repository, for `base` and `data`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import BadInput, exit_on_bad_input

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from base.command_line import Parser
from base.files import exists, is_file, read_json, shown, write_file, writing
from data.files import clean_up, locked, whole_with_meta
from data.sources import gpt2

HUB = "HuggingFaceTB/cosmopedia-100k"
KINDS = (".parquet", ".jsonl")
OWN_FILES = "give its files: python data/cosmopedia/prepare.py --source PATH"
# validation has the documents whose sha256, its first 8 bytes as a number, is below: 0.5 %
VAL_HASHES = 2**64 // 200
# characters between two points that an interrupted preparation can go on from: about a second
BATCH = 2**22
HUGE = 2**20  # bytes; documents from here on are counted, as the largest decides the memory needed


# Reading -----------------------------------------------------------------------------------------

class Files:
    """The `text` of each row of .parquet and .jsonl files.

    BadInput if a file cannot be read or has no such column."""

    def __init__(self, path):
        self.name = str(path)
        if not exists(path):
            raise BadInput(f"--source {path} does not exist; give a .parquet or .jsonl file, or a "
                           "folder of them")
        self.paths = files_below(path)
        if not self.paths:
            raise BadInput(f"--source {path} is no .parquet or .jsonl file, nor a folder with one")
        n_rows = [first_look(p) for p in self.paths]  # bad ones are refused before we write
        self.n_rows = None if None in n_rows else sum(n_rows)

    def texts(self):
        for path in self.paths:
            yield from parquet_texts(path) if path.suffix == ".parquet" else jsonl_texts(path)

    def sha256(self):
        """That of the files' bytes, one file after the other: `cat FILES | sha256sum`."""
        digest = hashlib.sha256()
        for path in self.paths:
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        return digest.hexdigest()


def files_below(path):
    """The regular files of our kinds in a folder and the folders below it, sorted; or one such
    file."""
    candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [p for p in candidates if p.suffix in KINDS and is_file(p)]


def first_look(path):
    """The number of rows of a .parquet file; of a .jsonl file it takes reading it all: None."""
    if path.suffix == ".parquet":
        with open_parquet(path) as file:
            return file.metadata.num_rows
    next(jsonl_texts(path), None)
    return None


def unreadable(path, error, where=""):
    reason = getattr(error, "strerror", None) or error
    return BadInput(f"cannot read {path}{where}: {reason}; give a whole {path.suffix} file")


def open_parquet(path):
    import pyarrow.parquet  # takes a while
    try:  # these settings read a part of a row group at a time, the defaults all of it
        file = pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from error
    if "text" not in file.schema_arrow.names:
        raise BadInput(f"{path} has no column `text`; has {', '.join(file.schema_arrow.names)}")
    return file


def parquet_texts(path):
    import pyarrow
    with open_parquet(path) as file:
        try:
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                yield from batch.column(0).to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise unreadable(path, error) from error


def jsonl_texts(path):
    """The first row has to have a `text`; where a later one has none, it is null."""
    number, first = 0, True
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no JSON object")
                if first and "text" not in row:
                    raise BadInput(f"{path} has no column `text`; has {', '.join(row)}")
                first = False
                yield row.get("text")
    except BadInput:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error, f", line {number}" if number else "") from error


class Hub:
    """The `text` of each row of the data set on the hub, through the library `datasets`.

    It keeps what it downloads, so that it does so once. With a limit it streams instead: no more is
    fetched than is read."""
    name = HUB

    def __init__(self, limit):
        print(f"fetching {HUB}", flush=True)
        import datasets  # takes a second
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # else two lines an attempt
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        datasets.config.STREAMING_READ_MAX_RETRIES = 2  # its own 20 take minutes
        with answers_of_the_hub():
            self.rows = datasets.load_dataset(HUB, split="train", streaming=limit is not None)
        columns = self.rows.column_names
        if columns is not None and "text" not in columns:
            raise BadInput(f"{HUB} has no column `text`; has {', '.join(columns)}; {OWN_FILES}")
        self.n_rows = len(self.rows) if limit is None else None

    def texts(self):
        with answers_of_the_hub():
            for row in self.rows.select_columns(["text"]):
                yield row["text"]

    def sha256(self):
        return None  # the files are not at hand, only their rows


@contextlib.contextmanager
def answers_of_the_hub():
    """Inside, any error but BadInput is one of the hub, the network or its files."""
    try:
        yield
    except Exception as error:  # those of four libraries: in each case reason and way out matter
        root = error
        while root.__cause__ is not None:  # the first to go wrong says most
            root = root.__cause__
        reason = f"{type(root).__name__}: {root}"[:400]
        raise BadInput(f"cannot get {HUB} ({reason}); try again with a network, or "
                       f"{OWN_FILES}") from error


# Tokens ------------------------------------------------------------------------------------------

def utf8(text):
    """The bytes of a text; half of a surrogate pair, which JSON can spell, becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


class Document(NamedTuple):
    sha256: bytes
    n_bytes: int     # of the text in UTF-8
    ids: np.ndarray  # its tokens and end-of-text, little-endian uint16


def encode(text, tokenizer):
    """The Document of a text, or in a word what else it is: empty, non_string."""
    if not isinstance(text, str):
        return "non_string"
    if not text.strip():
        return "empty"
    content = utf8(text)
    ids = tokenizer.encode_to_numpy(content.decode())
    ids = np.append(ids, tokenizer.special_tokens["<|endoftext|>"]).astype("<u2")
    return Document(hashlib.sha256(content).digest(), len(content), ids)


def batches(texts):
    """Lists of consecutive texts, together BATCH characters or just above."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += 1 + (len(text) if isinstance(text, str) else 0)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


Count = Annotated[int, Field(ge=0)]


class SplitCounts(BaseModel):
    tokens: Count
    bytes: Count
    documents: Count


class Done(BaseModel):
    """What is done so far, as saved with each batch."""
    model_config = ConfigDict(extra="forbid")
    rows: Count  # read, with or without text
    train: SplitCounts
    val: SplitCounts
    empty_documents: Count
    non_string_documents: Count
    huge_documents: Count
    val_hashes: Count   # documents with a hash below are for validation
    lowest_hash: Count  # of all documents
    digest: str         # sha256 of the sha256 of each document, in order


def nothing_done(val_hashes):
    none = dict(tokens=0, bytes=0, documents=0)
    return Done(rows=0, train=none, val=none, empty_documents=0, non_string_documents=0,
                huge_documents=0, val_hashes=val_hashes, lowest_hash=2**64, digest="")


class Progress:
    """A preparation under way: what is done, and the files that it writes until all is."""

    def __init__(self, folder, val_hashes):
        self.path = folder / "progress.json.tmp"
        self.bins = {split: folder / f"{split}.bin.tmp" for split in ("train", "val")}
        self.digest = hashlib.sha256()
        self.done = nothing_done(val_hashes)

    def take_up(self, texts):
        """Skip the rows of `texts` that an interrupted preparation has done.

        False if there is none, if they are others now, or if their tokens are gone."""
        if not is_file(self.path):
            return False
        try:
            saved = read_json(self.path, "remove it", Done)
        except BadInput:  # of another version, say
            return False
        rows = 0
        for rows, text in enumerate(itertools.islice(texts, saved.rows), 1):
            if isinstance(text, str) and text.strip():
                self.digest.update(hashlib.sha256(utf8(text)).digest())
        same = (rows == saved.rows and saved.val_hashes == self.done.val_hashes
                and saved.digest == self.digest.hexdigest())
        self.done = saved
        return same and all(holds_tokens(path, getattr(saved, split).tokens)
                            for split, path in self.bins.items())

    def add(self, row):
        """Count what `encode` made of a row. The split it goes to, or None."""
        done = self.done
        done.rows += 1
        if row == "empty":
            done.empty_documents += 1
            return None
        if row == "non_string":
            done.non_string_documents += 1
            return None
        number = int.from_bytes(row.sha256[:8], "big")
        split = "val" if number < done.val_hashes else "train"
        self.digest.update(row.sha256)
        done.lowest_hash = min(done.lowest_hash, number)
        done.huge_documents += row.n_bytes >= HUGE
        counts = getattr(done, split)
        counts.tokens += len(row.ids)
        counts.bytes += row.n_bytes
        counts.documents += 1
        return split

    def remove(self):
        for path in (self.path, *self.bins.values()):
            path.unlink(missing_ok=True)

    def save(self):
        self.done.digest = self.digest.hexdigest()
        write_file(self.path, self.done.model_dump_json().encode())


def holds_tokens(path, n):
    """Whether a file of ours has n tokens or more. One with another name too may be someone
    else's."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size >= 2 * n


def open_bin(path, n):
    """A token file to go on with after n tokens. A link or a pipe in its place is an OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    file = open(os.open(path, flags, 0o666), "ab")
    file.truncate(2 * n)
    return file


def tokenize(source, limit, tokenizer, folder, val_hashes, workers):
    """Write train.bin.tmp and val.bin.tmp, from the start or from where an interrupted preparation
    got to. Its Progress."""
    texts = itertools.islice(source.texts(), limit)
    progress = Progress(folder, val_hashes)
    if progress.take_up(texts):
        print(f"going on after {progress.done.rows:,} rows", flush=True)
    else:
        texts = itertools.islice(source.texts(), limit)
        progress = Progress(folder, val_hashes)
        with writing(folder):
            progress.remove()
    total = source.n_rows if limit is None else min(limit, source.n_rows or limit)
    bar = tqdm(total=total, initial=progress.done.rows, unit="document",
               disable=not sys.stderr.isatty())

    def encode_one(text):
        return encode(text, tokenizer)

    with writing(folder), contextlib.ExitStack() as stack, bar:
        files = {}
        for split, path in progress.bins.items():
            n = getattr(progress.done, split).tokens
            files[split] = stack.enter_context(open_bin(path, n))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        for batch in batches(texts):
            for row in pool.map(encode_one, batch):
                split = progress.add(row)
                if split:
                    files[split].write(row.ids.tobytes())
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            progress.save()
            bar.update(len(batch))
    return progress


def prepare(source, limit, folder, workers=os.cpu_count()):
    """Write the data set: train.bin and val.bin once both are whole, then meta.json.

    BadInput if there are too few documents, or if another process is at it."""
    with locked(folder, wait=False):
        start = time.monotonic()
        clean_up(folder)
        tokenizer = gpt2(folder)
        progress = tokenize(source, limit, tokenizer, folder, VAL_HASHES, workers)
        if not progress.done.val.documents:  # of some hundreds: then the one with the lowest hash
            val_hashes = progress.done.lowest_hash + 1
            progress = tokenize(source, limit, tokenizer, folder, val_hashes, workers)
        done = progress.done
        if not done.train.documents:
            progress.remove()
            raise BadInput(f"{source.name} is too short: of its {done.rows} rows "
                           f"{done.val.documents} have text ({left_out(done)}); it takes two "
                           "different ones, to train on and to validate")
        finish(source, limit, tokenizer, folder, progress)
    print(f"wrote {shown(folder)} in {time.monotonic() - start:.0f} s: "
          f"{done.train.tokens:,} train tokens of {done.train.documents:,} documents, "
          f"{done.val.tokens:,} val tokens of {done.val.documents:,} documents; "
          f"{left_out(done)}, {done.huge_documents} of a megabyte or more", flush=True)


def left_out(done):
    return f"left out: {done.empty_documents} empty, {done.non_string_documents} no text"


def finish(source, limit, tokenizer, folder, progress):
    """Put the new files in place of the old ones."""
    done = progress.done
    documents_sha256 = progress.digest.hexdigest()
    meta = {"vocab_size": tokenizer.vocab_size, "dtype": "uint16"}
    for split, counts in (("train", done.train), ("val", done.val)):
        meta[f"{split}_tokens"] = counts.tokens
        meta[f"{split}_bytes"] = counts.bytes
        meta[f"{split}_documents"] = counts.documents
    meta["empty_documents"] = done.empty_documents
    meta["non_string_documents"] = done.non_string_documents
    meta["huge_documents"] = done.huge_documents
    meta["tokenizer"] = tokenizer.name
    meta["source"] = source.name
    meta["limit"] = limit
    meta["source_sha256"] = source.sha256() or documents_sha256
    meta["documents_sha256"] = documents_sha256
    meta["made_by"] = "data/cosmopedia/prepare.py"
    with whole_with_meta(folder, tokenizer, meta):
        for split, path in progress.bins.items():
            with writing(folder):
                os.replace(path, folder / f"{split}.bin")
    progress.remove()


def main(arguments=()):
    parser = Parser(prog="data/cosmopedia/prepare.py", description=__doc__.split("\n")[0],
                    allow_abbrev=False)
    parser.add_argument("--source", type=Path, metavar="PATH",
                        help="a .parquet or .jsonl file, or a folder of them [default: the hub]")
    parser.add_argument("--limit", type=int, metavar="N", help="read the first N rows alone")
    options = parser.parse_args(arguments)
    limit = options.limit
    if limit is not None and limit < 1:
        raise BadInput(f"--limit={limit}: give 1 or more")
    source = Files(options.source) if options.source else Hub(limit)
    prepare(source, limit, Path(__file__).resolve().parent)


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main(sys.argv[1:])
