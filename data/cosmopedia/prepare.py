"""Cosmopedia-100k by GPT-2's BPE: 100,000 synthetic textbook chapters, stories and articles, one in 200 to validate.

    python data/cosmopedia/prepare.py                 (from the hub, which takes: pip install datasets)
    python data/cosmopedia/prepare.py --source PATH   (a .parquet or .jsonl file, or a folder of them, with a `text` column)

About 5 to 10 MB of text a second and core. train.py runs the first by itself when needed. After an interruption the same command goes
on behind the last batch written. Memory holds one batch of documents, or the largest document.
"""
import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `config` and `data`

from base.errors import BadInput, exit_on_bad_input

import numpy as np
from tqdm import tqdm

from base.command_line import Parser
from base.files import read_json, shown, write_file, writing
from data.files import whole_with_meta
from data.sources import gpt2

HUB = "HuggingFaceTB/cosmopedia-100k"
KINDS = (".parquet", ".jsonl")
OWN_FILES = "give its files: python data/cosmopedia/prepare.py --source PATH"
VAL_HASHES = 2**64 // 200  # validation has the documents whose sha256, its first 8 bytes as a number, is below: 0.5 %
BATCH = 2**22              # characters between two points that an interrupted preparation can go on from: about a second
HUGE = 2**20               # bytes; documents from here on are counted, as the largest one decides the memory needed
COUNTS = ("train_tokens", "train_bytes", "train_documents", "val_tokens", "val_bytes", "val_documents",
          "empty_documents", "non_string_documents", "huge_documents")


# -- reading ----------------------------------------------------------------------------------------------------------

class Files:
    """The `text` of each row of .parquet and .jsonl files. BadInput if a file cannot be read or has no such column."""

    def __init__(self, path):
        self.name = str(path)
        if not path.exists():
            raise BadInput(f"--source {path} does not exist; give a .parquet or .jsonl file, or a folder of them")
        self.paths = [p for p in sorted(path.rglob("*")) if p.suffix in KINDS and p.is_file()] if path.is_dir() else [path]
        if not self.paths or self.paths[0].suffix not in KINDS:
            raise BadInput(f"--source {path} is no .parquet or .jsonl file, nor a folder with one")
        n_rows = [first_look(p) for p in self.paths]  # bad files are refused before anything is written
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
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise BadInput(f"reading {path} takes the library pyarrow: pip install pyarrow") from error
    try:  # these settings read a part of a row group at a time, the defaults all of it
        file = pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from error
    if "text" not in file.schema_arrow.names:
        raise BadInput(f"{path} has no column `text`; has {', '.join(file.schema_arrow.names)}")
    return file


def parquet_texts(path):
    with open_parquet(path) as file:
        import pyarrow
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
    """The `text` of each row of the data set on the hub. `datasets` keeps what it downloads, so that it does so once."""
    name = HUB

    def __init__(self):
        print(f"fetching {HUB}", flush=True)
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise BadInput(f"{HUB} comes through the library datasets: pip install datasets, or {OWN_FILES}") from error
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # otherwise two lines for each attempt
        try:
            self.rows = load_dataset(HUB, split="train")
        except Exception as error:  # those of four libraries; in each case the reason and the way out matter
            raise BadInput(f"cannot get {HUB} ({type(error).__name__}: {error}); try again with a network, or {OWN_FILES}") from error
        if "text" not in self.rows.column_names:
            raise BadInput(f"{HUB} has no column `text`; has {', '.join(self.rows.column_names)}; {OWN_FILES}")
        self.n_rows = len(self.rows)

    def texts(self):
        for row in self.rows.select_columns(["text"]):
            yield row["text"]

    def sha256(self):
        return None  # the files are not at hand, only their rows


# -- tokens -----------------------------------------------------------------------------------------------------------

def utf8(text):
    """The bytes of a text; half of a surrogate pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def encode(text, tokenizer):
    """(sha256 of a text, its length in bytes, its ids and end-of-text), or in a word what else it is: empty, non_string."""
    if not isinstance(text, str):
        return "non_string"
    if not text.strip():
        return "empty"
    content = utf8(text)
    ids = tokenizer.encoding.encode_to_numpy(content.decode(), disallowed_special=())  # as encode_ordinary, without Python's integers
    return hashlib.sha256(content).digest(), len(content), np.append(ids, tokenizer.special_tokens["<|endoftext|>"]).astype("<u2")


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


class Progress:
    """What is done so far: rows read, counts, a digest of the documents. Saved with each batch."""

    def __init__(self, folder, val_hashes):
        self.path = folder / "progress.json.tmp"
        self.bins = {split: folder / f"{split}.bin.tmp" for split in ("train", "val")}
        self.digest = hashlib.sha256()  # of the sha256 of each document, in order
        self.done = {"rows": 0, "val_hashes": val_hashes, "lowest_hash": 2**64} | dict.fromkeys(COUNTS, 0)

    def take_up(self, texts):
        """Skip the rows of `texts` that an interrupted preparation has done. False if they are others now or their tokens are gone."""
        if not self.path.exists():
            return False
        saved = read_json(self.path, "remove it")
        if saved.keys() != self.done.keys() | {"digest"}:
            return False
        rows = 0
        for rows, text in enumerate(itertools.islice(texts, saved["rows"]), 1):
            if isinstance(text, str) and text.strip():
                self.digest.update(hashlib.sha256(utf8(text)).digest())
        same = (rows, self.done["val_hashes"], self.digest.hexdigest()) == (saved["rows"], saved["val_hashes"], saved.pop("digest"))
        self.done = saved
        return same and all(p.exists() and p.stat().st_size >= 2 * saved[f"{split}_tokens"] for split, p in self.bins.items())

    def add(self, row):
        """Count what `encode` made of a row. The split it goes to, or None."""
        self.done["rows"] += 1
        if isinstance(row, str):
            self.done[f"{row}_documents"] += 1
            return None
        sha256, n_bytes, ids = row
        number = int.from_bytes(sha256[:8])
        split = "val" if number < self.done["val_hashes"] else "train"
        self.digest.update(sha256)
        self.done["lowest_hash"] = min(self.done["lowest_hash"], number)
        self.done["huge_documents"] += n_bytes >= HUGE
        for what, n in (("tokens", len(ids)), ("bytes", n_bytes), ("documents", 1)):
            self.done[f"{split}_{what}"] += n
        return split

    def remove(self):
        for path in (self.path, *self.bins.values()):
            path.unlink(missing_ok=True)

    def save(self):
        write_file(self.path, json.dumps(self.done | {"digest": self.digest.hexdigest()}).encode())


def tokenize(source, limit, tokenizer, folder, val_hashes, workers):
    """Write train.bin.tmp and val.bin.tmp, from the start or from where an interrupted preparation got to. Its Progress."""
    texts = itertools.islice(source.texts(), limit)
    progress = Progress(folder, val_hashes)
    if progress.take_up(texts):
        print(f"going on after {progress.done['rows']:,} rows", flush=True)
    else:
        texts = itertools.islice(source.texts(), limit)
        progress = Progress(folder, val_hashes)
    total = source.n_rows if limit is None else min(limit, source.n_rows or limit)
    bar = tqdm(total=total, initial=progress.done["rows"], unit="document", disable=not sys.stderr.isatty())
    with writing(folder), contextlib.ExitStack() as stack, bar:
        bins = {split: stack.enter_context(open(path, "ab")) for split, path in progress.bins.items()}
        for split, file in bins.items():
            file.truncate(2 * progress.done[f"{split}_tokens"])
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        for batch in batches(texts):
            for row in pool.map(partial(encode, tokenizer=tokenizer), batch):
                if split := progress.add(row):
                    bins[split].write(row[2].tobytes())
            for file in bins.values():
                file.flush()
                os.fsync(file.fileno())
            progress.save()
            bar.update(len(batch))
    return progress


def prepare(source, limit, folder, workers=os.cpu_count()):
    """Write the data set: train.bin and val.bin once both are whole, then meta.json. BadInput if there are too few documents."""
    with writing(folder), open(folder / "lock.tmp", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
        except BlockingIOError:
            raise BadInput(f"{shown(folder)} is being prepared by another process; wait for it or stop it") from None
        start, tokenizer = time.monotonic(), gpt2(folder)
        progress = tokenize(source, limit, tokenizer, folder, VAL_HASHES, workers)
        if not progress.done["val_documents"]:  # of some hundreds: then the one with the lowest hash
            progress = tokenize(source, limit, tokenizer, folder, progress.done["lowest_hash"] + 1, workers)
        done = progress.done
        if not done["train_documents"]:
            progress.remove()
            raise BadInput(f"{source.name} is too short: of its {done['rows']} rows {done['val_documents']} have text ({left_out(done)}); "
                           "it takes two different ones, to train on and to validate")
        finish(source, limit, tokenizer, folder, progress)
    print(f"wrote {shown(folder)} in {time.monotonic() - start:.0f} s: "
          + ", ".join(f"{done[f'{split}_tokens']:,} {split} tokens of {done[f'{split}_documents']:,} documents" for split in ("train", "val"))
          + f"; {left_out(done)}, {done['huge_documents']} of a megabyte or more", flush=True)


def left_out(done):
    return f"left out: {done['empty_documents']} empty, {done['non_string_documents']} no text"


def finish(source, limit, tokenizer, folder, progress):
    """Put the new files in place of the old ones."""
    documents_sha256 = progress.digest.hexdigest()
    meta = {"vocab_size": tokenizer.vocab_size, "dtype": "uint16"} | {name: progress.done[name] for name in COUNTS}
    meta |= {"tokenizer": tokenizer.name, "source": source.name, "limit": limit, "source_sha256": source.sha256() or documents_sha256,
             "documents_sha256": documents_sha256, "made_by": "data/cosmopedia/prepare.py"}
    with whole_with_meta(folder, tokenizer, meta):
        for split, path in progress.bins.items():
            os.replace(path, folder / f"{split}.bin")
    progress.remove()


def main(arguments=()):
    parser = Parser(prog="data/cosmopedia/prepare.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--source", type=Path, metavar="PATH", help="a .parquet or .jsonl file, or a folder of them [default: the hub]")
    parser.add_argument("--limit", type=int, metavar="N", help="read the first N rows alone")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        raise BadInput(f"--limit={options.limit}: give 1 or more")
    prepare(Files(options.source) if options.source else Hub(), options.limit, Path(__file__).resolve().parent)


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main(sys.argv[1:])
