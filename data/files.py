"""Writing a data set's folder so that half of one is never taken for a whole one, nor two for one.

A folder data/<name> with a prepare.py gets its files one by one, each by a rename, meta.json last.
Any other folder is made anew beside its place and renamed as a whole. Both happen under a lock.
"""
import contextlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from base.errors import BadInput
from base.files import is_file, read_json, shown, sync, write_file, writing

DATA = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")
TOKEN_FILES = [f"{split}{kind}.bin" for split in SPLITS for kind in ("", "_targets")]
OWN_FILES = {*TOKEN_FILES, "tokenizer.json", "meta.json", "__pycache__"}
KEPT_FILE = "vocab.bpe"  # put there by the user, where sources.gpt2 asks for it


def check_name(name):
    """A data set is named like a plain folder, and not like a module of data/. Raises BadInput."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise BadInput(f"{name!r} cannot name a data set; use up to 100 letters, digits, "
                       "'_', '-' and '.', the first a letter or digit")
    if is_file(DATA / f"{name}.py"):
        raise BadInput(f"{name!r} cannot name a data set, as data/{name}.py is code; "
                       "choose another name")


# One writer at a time ----------------------------------------------------------------------------

@contextlib.contextmanager
def locked(folder, wait=True):
    """Inside, no other process writes data/<name>, a folder. Without `wait`, BadInput if one
    does."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    with writing(folder):
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise BadInput(f"{shown(folder)} is being prepared by another process; "
                           "wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()


def old_of(folder):
    """Where the former data/<name> stands while the new one is put in its place."""
    return folder.with_name(f".{folder.name}.old.tmp")


def is_leftover(name):
    """Whether a file of this name is one that write_file did not get to rename."""
    return re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", name) is not None


def remove(path):
    """Remove a file, a folder with all it holds, or a link, but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clean_up(folder):
    """Remove what killed processes left of data/<name>; an old one that has no new one comes back.

    Under the lock: nothing of this is still in use."""
    with writing(folder):
        if old_of(folder).exists() and not folder.exists():
            os.rename(old_of(folder), folder)
        remove(old_of(folder))
        for path in folder.parent.glob(f".{folder.name}.*.tmp"):
            unique_part = path.name.removeprefix(f".{folder.name}.").removesuffix(".tmp")
            if re.fullmatch("[0-9a-f]{32}", unique_part):
                remove(path)
        if folder.is_dir():
            for path in folder.iterdir():
                if is_leftover(path.name):
                    remove(path)


# Whose folder it is ------------------------------------------------------------------------------

def check_ours(folder, made_by):
    """BadInput unless data/<name> may be replaced by what `made_by`, a program, writes.

    It may if it is not there, or is a folder that this program made: its meta.json says so, or that
    the prepare.py did which older versions had in its place. Beside the files that we write it may
    hold a vocab.bpe, which is kept; any other file is the user's, and none of ours to remove.
    """
    name = shown(folder)
    remedy = f"move {name} away or choose another name"
    if folder.is_symlink():
        raise BadInput(f"{name} is a link, which is not written through; {remedy}")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BadInput(f"{name} is no folder; {remedy}")
    found = sorted(path.name for path in folder.iterdir() if not is_leftover(path.name))
    if not set(found) - {KEPT_FILE}:
        return
    if "prepare.py" in found:
        raise BadInput(f"{name} is there and was not made by {made_by}; {remedy}")
    if "meta.json" not in found:
        raise BadInput(f"{name} holds {found[0]}, and no meta.json says that {made_by} made it; "
                       f"{remedy}")
    maker = read_json(folder / "meta.json", remedy).get("made_by")
    if maker not in (made_by, f"data/{folder.name}/prepare.py"):
        raise BadInput(f"{name} is there and was not made by {made_by}; {remedy}")
    for file in found:
        if file not in OWN_FILES and file != KEPT_FILE:
            raise BadInput(f"{name} holds {file}, which {made_by} did not make; "
                           "move it elsewhere or choose another name")


# Writing -----------------------------------------------------------------------------------------

def to_json(meta):
    return json.dumps(meta, indent=2).encode()


@contextlib.contextmanager
def whole_with_meta(folder, tokenizer, meta):
    """Inside, put token files into data/<name>, a folder; behind it come tokenizer and `meta`
    (dict).

    meta.json comes last and an old one that differs goes first: a folder with a meta.json is whole.
    One that says the same stays, so that preparing the same data again does not pull it from under
    a process that reads them. To be used under the lock.
    """
    path = folder / "meta.json"
    with writing(path):
        if not is_file(path) or path.read_bytes() != to_json(meta):
            path.unlink(missing_ok=True)
    yield
    write_file(folder / "tokenizer.json", tokenizer.to_json().encode())
    write_file(path, to_json(meta))


def replace_folder(folder, contents):
    """Make data/<name>, a folder, of {file name: bytes}: under another name first, then renamed."""
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(folder):
            fresh.mkdir(parents=True)
            if is_file(folder / KEPT_FILE):
                shutil.copy(folder / KEPT_FILE, fresh)
        for name, content in contents.items():
            with writing(folder / name), open(fresh / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        with writing(folder):
            sync(fresh)
            if folder.exists():
                os.rename(folder, old_of(folder))
            os.rename(fresh, folder)
            sync(folder.parent)
            remove(old_of(folder))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_folder(folder, arrays, tokenizer, meta):
    """Write {"train.bin": token ids, ...}, the tokenizer and `meta` (dict) into data/<name>, a
    folder.

    BadInput if it holds anything that meta["made_by"] did not make."""
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    contents = {}
    for name, ids in arrays.items():
        contents[name] = np.asarray(ids, dtype).tobytes()
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        clean_up(folder)
        if is_file(folder / "prepare.py"):
            with whole_with_meta(folder, tokenizer, meta):
                for name, content in contents.items():
                    write_file(folder / name, content)
        else:
            check_ours(folder, meta["made_by"])
            contents["tokenizer.json"] = tokenizer.to_json().encode()
            contents["meta.json"] = to_json(meta)
            replace_folder(folder, contents)
    counts = [f"{meta[f'{split}_tokens']:,} {split} tokens"
              for split in SPLITS if f"{split}_tokens" in meta]
    print(f"wrote data/{folder.name}: {tokenizer.vocab_size:,} symbols, {', '.join(counts)}",
          flush=True)


def write_text_dataset(folder, text, tokenizer, source_sha256, made_by):
    """Write a text as a data set: the first 90 % of its characters to train on, the rest to
    validate.

    BadInput if it is too short."""
    cut = int(len(text) * 0.9)
    meta = {"vocab_size": tokenizer.vocab_size}
    meta["dtype"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    arrays = {}
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        ids = tokenizer.encode_to_numpy(part)
        if len(ids) < 2:  # one to predict from, one to predict
            raise BadInput(f"the text is too short: its {len(text)} characters leave {len(ids)} "
                           f"{split} tokens; each split needs block_size + 1")
        arrays[f"{split}.bin"] = ids
        meta[f"{split}_tokens"] = len(ids)
        meta[f"{split}_bytes"] = len(part.encode())
    meta |= {"tokenizer": tokenizer.name, "source_sha256": source_sha256, "made_by": made_by}
    if tokenizer.name == "char":
        meta["alphabet"] = tokenizer.alphabet
    write_folder(folder, arrays, tokenizer, meta)
