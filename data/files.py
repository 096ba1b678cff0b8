"""Reading and writing a data set's folder so that half of one is never taken for a whole one."""
import contextlib
import json
import re
from pathlib import Path

import numpy as np

from base.errors import BadInput
from base.files import write_file, writing

DATA = Path(__file__).resolve().parent


def data_sets():
    """The names of the data sets that are there or can be prepared."""
    return sorted({path.parent.name for path in [*DATA.glob("*/prepare.py"), *DATA.glob("*/meta.json")]})


def check_name(name):
    """A data set is named like a plain folder, and not like a module of data/. Raises BadInput."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise BadInput(f"{name!r} cannot name a data set; use up to 100 letters, digits, '_', '-' and '.', "
                       "the first a letter or digit")
    if (DATA / f"{name}.py").exists():
        raise BadInput(f"{name!r} cannot name a data set, as data/{name}.py is code; choose another name")


def how_to_prepare(name):
    """The end of many messages: the command that makes data/<name> whole again."""
    if (DATA / name / "prepare.py").exists():
        return f"prepare it again: python data/{name}/prepare.py"
    return f"prepare it again: python -m data.text --input FILE --name {name}"


@contextlib.contextmanager
def whole_with_meta(folder, tokenizer, meta):
    """Inside, put the token files into data/<name>, a folder; behind it come the tokenizer and `meta` (dict).

    meta.json comes last and an old one that differs goes first: a folder with a meta.json is whole. One that says the
    same stays, so that a second process preparing the same data does not pull it from under the first.
    """
    meta_json = json.dumps(meta, indent=2).encode()
    meta_path = folder / "meta.json"
    with writing(meta_path):
        if meta_path.exists() and meta_path.read_bytes() != meta_json:
            meta_path.unlink()
    yield
    write_file(folder / "tokenizer.json", tokenizer.to_json().encode())
    write_file(meta_path, meta_json)


def write_folder(folder, arrays, tokenizer, meta):
    """Write {"train.bin": token ids, ...}, the tokenizer and `meta` (dict) into data/<name>, a folder."""
    with whole_with_meta(folder, tokenizer, meta):
        for name, ids in arrays.items():
            write_file(folder / name, np.asarray(ids).astype(np.dtype(meta["dtype"]).newbyteorder("<")).tobytes())
    counts = ", ".join(f"{meta[f'{split}_tokens']:,} {split} tokens" for split in ("train", "val", "test") if f"{split}_tokens" in meta)
    print(f"wrote data/{folder.name}: {tokenizer.vocab_size:,} symbols, {counts}", flush=True)


def write_dataset(folder, splits, tokenizer, source_sha256, made_by):
    """Write {"train": (token ids, bytes of UTF-8), "val": ...} with its tokenizer into data/<name>, a folder."""
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    meta = {"vocab_size": tokenizer.vocab_size, "dtype": dtype}
    for split, (ids, n_bytes) in splits.items():
        meta |= {f"{split}_tokens": len(ids), f"{split}_bytes": n_bytes}
    meta |= {"tokenizer": tokenizer.name, "source_sha256": source_sha256, "made_by": made_by}
    if tokenizer.name == "char":
        meta["alphabet"] = tokenizer.alphabet
    write_folder(folder, {f"{split}.bin": ids for split, (ids, _) in splits.items()}, tokenizer, meta)


def write_text_dataset(folder, text, tokenizer, source_sha256, made_by):
    """Write a text as a data set: the first 90 % of its characters for training, the rest for validation."""
    cut = int(len(text) * 0.9)
    parts = {"train": text[:cut], "val": text[cut:]}
    splits = {split: (tokenizer.encode(part), len(part.encode())) for split, part in parts.items()}
    for split, (ids, _) in splits.items():
        if len(ids) < 2:  # one to predict from, one to predict
            raise BadInput(f"the text is too short: its {len(text)} characters leave {len(ids)} {split} tokens; "
                           f"each split needs block_size + 1")
    write_dataset(folder, splits, tokenizer, source_sha256, made_by)
