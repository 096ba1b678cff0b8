"""The recall tasks: rows of tokens with questions in them, drawn from a seed; and the writer of their data sets.

    tokens, targets = mqar(np.random.default_rng(1), n=1000, vocab_size=64, length=64, pairs=8)    # both (1000, 64)

targets[i, t] is the answer due when tokens[i, :t + 1] have been read, and 0 where none is due: token 0 pads rows and is
never an answer. What sets a difficulty (length, pairs, ...) is a cell, and accuracy is counted cell by cell.
"""
import numpy as np

from base.errors import BadInput
from data.files import write_folder
from data.tokenizer import NumberTokenizer

SEED = 2024
ROWS_AT_ONCE = 4096


# The tasks -----------------------------------------------------------------------------------------------------------

def mqar(rng, n, vocab_size, length, pairs, power=0.01):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): `pairs` keys with their values, then each key
    once more, when its value is due.

    Keys are 1 .. V/2 - 1 and values V/2 .. V - 1, without repetition in a row. Behind the pairs every second place can
    hold a question; the i-th of them is chosen with a weight of i^(power - 1), so that most gaps are short; they are drawn for one
    pair after the other, as in the reference, so that a place alone says a little about its pair (tests/test_tasks.py). The places
    left over hold any token but the row's keys: in the reference code they may be keys, with another answer beside them."""
    half, start = vocab_size // 2, 2 * pairs
    if pairs >= half or 4 * pairs > length:
        raise BadInput(f"mqar: {pairs} pairs need a vocabulary above {2 * pairs + 1} and rows of {4 * pairs} tokens or more, not {vocab_size} and {length}")
    keys, values = distinct(rng, n, pairs, 1, half), distinct(rng, n, pairs, half, vocab_size)
    tokens, targets, row = rng.integers(1, vocab_size, (n, length)), np.zeros((n, length), int), np.arange(n)[:, None]
    is_key = np.zeros((n, vocab_size), bool)
    is_key[row, keys] = True
    while (again := is_key[row, tokens]).any():
        tokens[again] = rng.integers(1, vocab_size, again.sum())
    tokens[:, 0:start:2], tokens[:, 1:start:2] = keys, values
    weights = np.arange(1, (length - start) // 2 + 1) ** (power - 1)
    # the smallest of exponential variables over the weights are a weighted draw without repetition
    asked = start + 2 * (rng.exponential(size=(n, len(weights))) / weights).argsort(1)[:, :pairs]
    tokens[row, asked], targets[row, asked] = keys, values
    return tokens, targets


def induction(rng, n, vocab_size, length):
    """Induction heads (Olsson et al. 2022, arXiv 2209.11895; as a task Dao et al. 2022, arXiv 2212.14052): the trigger,
    token 1, stands once among random symbols 2 .. V - 1 and again at the end, when the symbol that followed it is due."""
    tokens, targets, row = rng.integers(2, vocab_size, (n, length)), np.zeros((n, length), int), np.arange(n)
    trigger = rng.integers(length - 2, size=n)
    tokens[row, trigger] = tokens[:, -1] = 1
    targets[:, -1] = tokens[row, trigger + 1]
    return tokens, targets


def copying(rng, n, vocab_size, length, symbols):
    """Selective copying: `symbols` random symbols, 3 .. V - 1, among blanks, token 2; after the separator, token 1, the
    symbols are due in their order, each of them being the next token read. Without blanks if length = 2 symbols."""
    tokens, targets, row = np.full((n, length), 2), np.zeros((n, length), int), np.arange(n)[:, None]
    drawn = rng.integers(3, vocab_size, (n, symbols))
    tokens[row, np.sort(distinct(rng, n, symbols, 0, length - symbols))] = drawn
    tokens[:, -symbols] = 1
    tokens[:, length - symbols + 1:] = drawn[:, :-1]
    targets[:, -symbols:] = drawn
    return tokens, targets


def passkey(rng, n, vocab_size, length, depth, digits=5):
    """Passkey retrieval (Mohtashami and Jaggi 2023, arXiv 2305.16300): filler with a key in it, which is due at the end.

    Token 1 says that the key follows, token 2 asks for it, 3 .. 12 are the digits, and the filler is one sentence of the
    words 13 .. V - 1, over and over, from a random word on. The key starts at `depth` percent or up to 25 deeper."""
    words, body = vocab_size - 13, length - digits  # the question and all digits but the last are read too
    tokens, targets, row = np.empty((n, length), int), np.zeros((n, length), int), np.arange(n)[:, None]
    tokens[:] = 13 + (rng.integers(words, size=(n, 1)) + np.arange(length)) % words
    key = rng.integers(3, 13, (n, digits))
    places = body - digits  # where the key may start
    start = rng.integers(places * depth // 100, places * (depth + 25) // 100, (n, 1))
    tokens[row, start] = 1
    tokens[row, start + 1 + np.arange(digits)] = key
    tokens[:, body] = 2
    tokens[:, body + 1:] = key[:, :-1]
    targets[:, body:] = key
    return tokens, targets


def parity(rng, n, vocab_size, length, asked_from):
    """Running parity: tokens 1 and 2 are the bits 0 and 1; after each bit from the asked_from-th on (counted from 1), 1 is
    due if there were evenly many ones so far, else 2."""
    bits = rng.integers(2, size=(n, length))
    targets = 1 + bits.cumsum(1) % 2
    targets[:, :asked_from - 1] = 0
    return 1 + bits, targets


def distinct(rng, n, k, low, high):
    """(n, k) integers from low .. high - 1, no two in a row equal."""
    drawn = np.empty((n, k), int)
    for j in range(k):
        again = np.ones(n, bool)
        while again.any():
            drawn[again, j] = rng.integers(low, high, again.sum())
            again = (drawn[:, :j] == drawn[:, j:j + 1]).any(1)
    return drawn


# Their data sets -----------------------------------------------------------------------------------------------------

def draw(task, rng, n, held_out, **cell):
    """tokens and targets (2, n, length) of n rows, none of which begins with a held-out one, {length: rows as bytes}."""
    both = np.stack(task(rng, n, **cell)).astype("<u2")
    for _ in range(100):
        known = np.zeros(n, bool)
        for length, rows in held_out.items():
            if length <= cell["length"]:
                known |= [row.tobytes() in rows for row in both[0, :, :length]]
        if not known.any():
            return both
        both[:, known] = np.stack(task(rng, known.sum(), **cell))
    raise BadInput(f"there are too few different rows of {cell} for each split to have its own; ask for fewer or for longer ones")


def write_task(folder, task, vocab_size, made_by, train, val, test):
    """Write data/<name>, a folder, with `task` above. Each split is a list of (rows, cell), a cell being the task's
    arguments besides vocab_size. Rows are padded to the longest of their split.

    Splits have seeds of their own, and no row that is trained on begins with a row to validate or to test."""
    held_out, arrays, cells = {}, {}, {}  # held_out: length -> rows as bytes
    for number, (split, sizes) in enumerate({"test": test, "val": val, "train": train}.items()):
        row_length = max(cell["length"] for _, cell in sizes)
        drawn = []
        for i, (rows, cell) in enumerate(sizes):
            rng = np.random.default_rng([SEED, number, i])
            for start in range(0, rows, ROWS_AT_ONCE):
                both = draw(task, rng, min(ROWS_AT_ONCE, rows - start), held_out, vocab_size=vocab_size, **cell)
                drawn.append(np.pad(both, ((0, 0), (0, 0), (0, row_length - cell["length"]))))
        tokens, targets = np.concatenate(drawn, axis=1)
        arrays |= {f"{split}.bin": tokens, f"{split}_targets.bin": targets}
        cells[split] = [{"name": " ".join(f"{key}={value}" for key, value in cell.items()), "length": cell["length"], "rows": rows}
                        for rows, cell in sizes]
        ends = np.repeat([cell["length"] for cell in cells[split]], [cell["rows"] for cell in cells[split]])
        for row, end in zip(tokens, ends.tolist()):
            held_out.setdefault(end, set()).add(row[:end].tobytes())
    tokenizer = NumberTokenizer(vocab_size)
    meta = {"vocab_size": vocab_size, "dtype": "uint16", "row_length": arrays["train.bin"].shape[1]}
    meta |= {f"{split}_tokens": arrays[f"{split}.bin"].size for split in ("train", "val", "test")}
    meta |= {"cells": {split: cells[split] for split in ("train", "val", "test")}, "tokenizer": tokenizer.name, "seed": SEED, "made_by": made_by}
    write_folder(folder, arrays, tokenizer, meta)
