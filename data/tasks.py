"""The recall tasks: rows of tokens with questions in them, drawn from a seed; and their data sets.

    tokens, targets = mqar(np.random.default_rng(1), n=1000, vocab_size=64, length=64, pairs=8)
    python -m data.prepare mqar     (writes data/mqar: seconds; train.py does so when needed)

tokens and targets are (n, length). targets[i, t] is the answer due when tokens[i, :t + 1] have been
read, and 0 where none is due: token 0 pads rows and is never an answer. What sets a difficulty
(length, pairs, ...) is a cell, and accuracy is counted cell by cell.
"""
import math
from dataclasses import dataclass
from typing import Callable

import numpy as np

from base.errors import BadInput, printable
from data.files import SPLITS, check_ours, write_folder
from data.tokenizer import NumberTokenizer

SEED = 2024
MADE_BY = "data.prepare"
ROWS_AT_ONCE = 4096


# The tasks ---------------------------------------------------------------------------------------

def mqar(rng, n, vocab_size, length, pairs, power=0.01):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): pairs of keys and
    values, then each key once more, when its value is due. With vocab_size=16, length=12 and
    pairs=2:

        tokens    3 12  5  9  5  8  3 14 11  1 10  6     (3 -> 12, 5 -> 9; then 5 and 3 are asked)
        targets   .  .  .  .  9  . 12  .  .  .  .  .

    Keys are 1 .. V/2 - 1 and values V/2 .. V - 1, without repetition in a row. Behind the pairs
    every second place can hold a question; the i-th of them is chosen with a weight of
    i^(power - 1), so that most gaps are short. The places left over hold any token but the row's
    keys.

    Two deviations from the reference code: there the first pair has the first draw of a place, and
    so on, so that a place alone says something about its pair (enough for 0.16 of the answers at
    64 tokens; here which pair is asked for where is a random order); and there the places left over
    may hold keys too, with another answer beside.
    """
    half = vocab_size // 2
    start = 2 * pairs  # of the questions
    if pairs >= half or 4 * pairs > length:
        raise BadInput(f"mqar: {pairs} pairs need a vocabulary above {2 * pairs + 1} and rows of "
                       f"{4 * pairs} tokens or more, not {vocab_size} and {length}")
    keys = distinct(rng, n, pairs, 1, half)
    values = distinct(rng, n, pairs, half, vocab_size)
    row = np.arange(n)[:, None]

    # fillers everywhere, drawn again until none is a key of its row
    tokens = rng.integers(1, vocab_size, (n, length))
    is_key = np.zeros((n, vocab_size), bool)
    is_key[row, keys] = True
    collides = is_key[row, tokens]
    while collides.any():
        tokens[collides] = rng.integers(1, vocab_size, collides.sum())
        collides = is_key[row, tokens]

    tokens[:, 0:start:2] = keys
    tokens[:, 1:start:2] = values

    # the smallest of exponential variables over the weights are a weighted draw without repetition
    places = (length - start) // 2
    weights = np.arange(1, places + 1) ** (power - 1)
    order = (rng.exponential(size=(n, places)) / weights).argsort(1)
    # (n, pairs): where the key of each pair is asked for
    asked = start + 2 * rng.permuted(order[:, :pairs], axis=1)
    tokens[row, asked] = keys
    targets = np.zeros((n, length), int)
    targets[row, asked] = values
    return tokens, targets


def induction(rng, n, vocab_size, length):
    """Induction heads (Olsson et al. 2022, arXiv 2209.11895; as a task Dao et al. 2022,
    2212.14052): the trigger, token 1, stands once among random symbols 2 .. V - 1 and again at
    the end, when the symbol that followed it is due. With length=8:

        tokens    7  4  1  9  2  4  6  1
        targets   .  .  .  .  .  .  .  9
    """
    row = np.arange(n)
    tokens = rng.integers(2, vocab_size, (n, length))
    trigger = rng.integers(length - 2, size=n)
    tokens[row, trigger] = 1
    tokens[:, -1] = 1
    targets = np.zeros((n, length), int)
    targets[:, -1] = tokens[row, trigger + 1]
    return tokens, targets


def induction_all(rng, n, vocab_size, length, questions):
    """Induction without a trigger of its own: every symbol is one. The row begins with
    length - questions different symbols, 1 .. V - 1; then some of them follow in a random order,
    each once, and the symbol that followed it before is due. The last of the first part has none
    and is not asked for. With length=8 and questions=3:

        tokens    7  4  1  9  2  4  9  1
        targets   .  .  .  .  .  1  2  9

    So a state must hold all pairs of neighbours, and what was a value is a key.
    """
    row = np.arange(n)[:, None]
    body = length - questions
    if questions >= body or body >= vocab_size:
        raise BadInput(f"induction_all: {questions} questions on {body} different symbols need "
                       f"fewer questions and a vocabulary above {body}, not {vocab_size}")
    symbols = distinct(rng, n, body, 1, vocab_size)
    asked = distinct(rng, n, questions, 0, body - 1)
    targets = np.zeros((n, length), int)
    targets[:, body:] = symbols[row, asked + 1]
    return np.concatenate([symbols, symbols[row, asked]], axis=1), targets


def overwrite(rng, n, vocab_size, length, keys, writes):
    """Overwriting: pairs of a key and a value as in mqar, but keys come again with other values;
    then each key once, in a random order, when the value it was last given is due. With
    vocab_size=16, length=10, keys=2 and writes=4:

        tokens    3 12  5  9  3 14  3 10  5  3     (3 -> 12, then 14, then 10)
        targets   .  .  .  .  .  .  .  .  9 10

    Keys are 1 .. V/2 - 1 and values V/2 .. V - 1, none of which is written twice in a row. Of the
    writes one is for each key and the others for random ones, shuffled; length is
    2 writes + keys."""
    half = vocab_size // 2
    if keys > writes or max(keys, writes) >= half or length != 2 * writes + keys:
        raise BadInput(f"overwrite: {writes} writes to {keys} keys need as many keys at most, a "
                       f"vocabulary above {2 * writes + 1} and rows of {2 * writes + keys} tokens, "
                       f"not {vocab_size} and {length}")
    row = np.arange(n)[:, None]
    own = distinct(rng, n, keys, 1, half)
    again = rng.integers(keys, size=(n, writes - keys))
    each = np.broadcast_to(np.arange(keys), (n, keys))
    written = rng.permuted(np.concatenate([each, again], axis=1), axis=1)  # (n, writes): which key
    values = distinct(rng, n, writes, half, vocab_size)
    last = np.zeros((n, keys), int)
    for i in range(writes):
        last[row[:, 0], written[:, i]] = values[:, i]
    asked = rng.permuted(each, axis=1)
    tokens = np.zeros((n, length), int)
    tokens[:, 0:2 * writes:2] = own[row, written]
    tokens[:, 1:2 * writes:2] = values
    tokens[:, 2 * writes:] = own[row, asked]
    targets = np.zeros((n, length), int)
    targets[:, 2 * writes:] = last[row, asked]
    return tokens, targets


def copying(rng, n, vocab_size, length, symbols):
    """Selective copying: random symbols, 3 .. V - 1, among blanks, token 2; after the separator,
    token 1, the symbols are due in their order, each of them being the next token read. Without
    blanks if length = 2 symbols. With length=10 and symbols=3:

        tokens    2  7  2  2  4  7  2  1  7  4
        targets   .  .  .  .  .  .  .  7  4  7
    """
    row = np.arange(n)[:, None]
    drawn = rng.integers(3, vocab_size, (n, symbols))
    places = np.sort(distinct(rng, n, symbols, 0, length - symbols))
    tokens = np.full((n, length), 2)
    tokens[row, places] = drawn
    tokens[:, -symbols] = 1
    tokens[:, length - symbols + 1:] = drawn[:, :-1]
    targets = np.zeros((n, length), int)
    targets[:, -symbols:] = drawn
    return tokens, targets


def passkey(rng, n, vocab_size, length, depth, digits=5):
    """Passkey retrieval (Mohtashami and Jaggi 2023, arXiv 2305.16300): filler with a key in it,
    which is due at the end. With vocab_size=16, length=16 and digits=3:

        tokens   14 15 13  1  7  3 12 15 13 14 15 13 14  2  7  3
        targets   .  .  .  .  .  .  .  .  .  .  .  .  .  7  3 12

    Token 1 says that the key follows, token 2 asks for it, 3 .. 12 are the digits, and the filler
    is one sentence of the words 13 .. V - 1, over and over, from a random word on. The key starts
    at `depth` percent or up to 25 deeper."""
    row = np.arange(n)[:, None]
    words = vocab_size - 13
    body = length - digits  # the question and all digits but the last are read too
    first_word = rng.integers(words, size=(n, 1))
    tokens = 13 + (first_word + np.arange(length)) % words
    key = rng.integers(3, 13, (n, digits))
    places = body - digits  # where the key may start
    start = rng.integers(places * depth // 100, places * (depth + 25) // 100, (n, 1))
    tokens[row, start] = 1
    tokens[row, start + 1 + np.arange(digits)] = key
    tokens[:, body] = 2
    tokens[:, body + 1:] = key[:, :-1]
    targets = np.zeros((n, length), int)
    targets[:, body:] = key
    return tokens, targets


def parity(rng, n, vocab_size, length, asked_from):
    """Running parity: tokens 1 and 2 are the bits 0 and 1; after each bit from the asked_from-th on
    (counted from 1), 1 is due if there were evenly many ones so far, else 2. With asked_from=3:

        tokens    2  1  2  2  1  2
        targets   .  .  1  2  2  1
    """
    bits = rng.integers(2, size=(n, length))
    targets = 1 + bits.cumsum(1) % 2
    targets[:, :asked_from - 1] = 0
    return 1 + bits, targets


# of three things: as they were, with two of them swapped, turned
ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)]
PRODUCT = np.array([[ORDERS.index(tuple(a[i] for i in b)) for b in ORDERS] for a in ORDERS])


def s3(rng, n, vocab_size, length, asked_from, moves):
    """The word problem of S3, the orders of three things (as a task Liu et al. 2022, arXiv
    2210.10749; Merrill et al. 2024, 2404.08819): they change places, and how they stand is due.

    Token p puts at place i what stood at place ORDERS[p - 1][i]: 1 leaves all as it is, 2, 3 and 4
    swap two, and if moves=6 (or else 4) 5 and 6 turn all three. After each token from the
    asked_from-th on (counted from 1) the order of now is due, by its number in ORDERS. With
    asked_from=2:

        tokens    2  3  5  1  4
        targets   .  6  1  1  4     (0 2 1, then 2 0 1, then 0 1 2, the same, then 2 1 0)
    """
    tokens = rng.integers(1, 1 + moves, (n, length))
    targets = np.zeros((n, length), int)
    now = np.zeros(n, int)
    for t in range(length):
        now = PRODUCT[now, tokens[:, t] - 1]
        if t + 1 >= asked_from:
            targets[:, t] = 1 + now
    return tokens, targets


def distinct(rng, n, k, low, high):
    """(n, k) integers from low .. high - 1, no two in a row equal."""
    drawn = np.empty((n, k), int)
    for j in range(k):
        again = np.ones(n, bool)
        while again.any():
            drawn[again, j] = rng.integers(low, high, again.sum())
            again = (drawn[:, :j] == drawn[:, j:j + 1]).any(1)
    return drawn


# Their data sets ---------------------------------------------------------------------------------

@dataclass
class RecallSet:
    """What data/<name> is drawn from. A split is a list of (rows, cell), and a cell the arguments
    of `task` besides vocab_size."""
    task: Callable
    vocab_size: int
    train: list
    val: list
    test: list
    version: int = 1  # one more when the same cells are drawn anew


def alike(rows, cells):
    """As many rows of each cell."""
    return [(rows, cell) for cell in cells]


def mqar_cells(*sizes):
    """[(rows, cell)] from (rows, length, pairs)."""
    return [(rows, dict(length=length, pairs=pairs)) for rows, length, pairs in sizes]


MQAR = [dict(length=64, pairs=pairs) for pairs in (4, 8, 16)]
MQAR_PAPER = [(1000, 64, 4), (1000, 64, 8), (1000, 64, 16), (1000, 128, 32), (1000, 256, 64)]
INDUCTION = [dict(length=length) for length in (16, 32, 64)]
INDUCTION_PAPER = [dict(length=length) for length in (64, 128, 256, 512, 1024, 2048, 4096)]
COPYING = [dict(length=16, symbols=8), dict(length=32, symbols=16),
           dict(length=64, symbols=8), dict(length=64, symbols=16)]
COPYING_PAPER = [dict(length=256, symbols=16)]
PASSKEY = [dict(length=length, depth=depth) for length in (64, 128) for depth in (0, 25, 50, 75)]
PARITY = [dict(length=16, asked_from=1), dict(length=32, asked_from=17)]
PARITY_LONGER = [dict(length=64, asked_from=33), dict(length=128, asked_from=65)]
INDUCTION_ALL = [dict(length=symbols + 8, questions=8) for symbols in (12, 24, 48)]
OVERWRITE = [dict(length=2 * writes + 8, keys=8, writes=writes) for writes in (8, 16, 24)]
S3 = [dict(length=16, asked_from=1, moves=moves) for moves in (4, 6)]
S3_LONGER = [dict(length=32, asked_from=17, moves=moves) for moves in (4, 6)]

RECALL_SETS = {
    # those of a laptop's size
    "mqar": RecallSet(
        mqar, 64, alike(20_000, MQAR), alike(500, MQAR), alike(1000, MQAR), version=2),
    "induction": RecallSet(
        induction, 32, alike(20_000, INDUCTION), alike(500, INDUCTION), alike(1000, INDUCTION)),
    "induction_all": RecallSet(
        induction_all, 64, alike(20_000, INDUCTION_ALL), alike(500, INDUCTION_ALL),
        alike(1000, INDUCTION_ALL)),
    "overwrite": RecallSet(
        overwrite, 64, alike(20_000, OVERWRITE), alike(500, OVERWRITE), alike(1000, OVERWRITE)),
    "copying": RecallSet(
        copying, 32, alike(20_000, COPYING), alike(500, COPYING), alike(1000, COPYING)),
    "passkey": RecallSet(
        passkey, 32, alike(10_000, PASSKEY), alike(500, PASSKEY), alike(1000, PASSKEY)),
    # trained on 32 bits and tested on up to 128
    "parity": RecallSet(
        parity, 3, [(50_000, dict(length=32, asked_from=1))],
        alike(500, PARITY), alike(1000, PARITY + PARITY_LONGER)),
    # trained on 16 tokens and tested on 32, of which the second 16 count
    "s3": RecallSet(
        s3, 7, alike(50_000, S3), alike(500, S3), alike(1000, S3 + S3_LONGER)),

    # as zoology measures it now: as many rows of each difficulty to train and to test as in its
    # mqar_example_configs/original_mqar_configs.py; the rows to validate, apart from both, are ours
    "mqar_paper": RecallSet(
        mqar, 8192,
        mqar_cells((100_000, 64, 4), (20_000, 128, 8), (20_000, 256, 16), (20_000, 256, 32),
                   (20_000, 256, 64)),
        mqar_cells(*MQAR_PAPER),
        mqar_cells(*MQAR_PAPER, (1000, 512, 128), (1000, 1024, 256)), version=2),
    # as Gu and Dao 2023 (arXiv 2312.00752) have them; tests up to 16 times as long
    "induction_paper": RecallSet(
        induction, 16, [(100_000, dict(length=256))], [(1000, dict(length=256))],
        alike(500, INDUCTION_PAPER)),
    # in the size of MAD's (Poli et al. 2024, arXiv 2403.17844)
    "copying_paper": RecallSet(
        copying, 16, alike(12_800, COPYING_PAPER), alike(1280, COPYING_PAPER),
        alike(1280, COPYING_PAPER)),
}


def draw(task, rng, n, held_out, **cell):
    """tokens and targets (2, n, length) of n rows, none of which begins with a held-out one.

    held_out is {length: set of rows as bytes}. BadInput if there are not enough others."""
    both = np.stack(task(rng, n, **cell)).astype("<u2")
    for _ in range(100):
        known = np.zeros(n, bool)
        for length, rows in held_out.items():
            if length <= cell["length"]:
                known |= [row.tobytes() in rows for row in both[0, :, :length]]
        if not known.any():
            return both
        both[:, known] = np.stack(task(rng, known.sum(), **cell))
    raise BadInput(f"there are too few different rows of {cell} for each split to have its own; "
                   "ask for fewer or for longer ones")


def draw_split(task, vocab_size, seed, sizes, held_out):
    """tokens and targets (2, rows, longest length) of a split, a list of (rows, cell); held_out
    grows."""
    row_length = max(cell["length"] for _, cell in sizes)
    parts = []
    for i, (rows, cell) in enumerate(sizes):
        rng = np.random.default_rng([*seed, i])
        for start in range(0, rows, ROWS_AT_ONCE):
            n = min(ROWS_AT_ONCE, rows - start)
            both = draw(task, rng, n, held_out, vocab_size=vocab_size, **cell)
            padding = row_length - cell["length"]
            parts.append(np.pad(both, ((0, 0), (0, 0), (0, padding))))
    both = np.concatenate(parts, axis=1)
    first = 0
    for rows, cell in sizes:  # only now: rows of one split may be alike
        length = cell["length"]
        known = held_out.setdefault(length, set())
        for row in both[0, first:first + rows]:
            known.add(row[:length].tobytes())
        first += rows
    return both


def cells_of(sizes):
    """What meta.json says of a split, a list of (rows, cell)."""
    cells = []
    for rows, cell in sizes:
        name = " ".join(f"{key}={value}" for key, value in cell.items())
        cells.append({"name": name, "length": cell["length"], "rows": rows})
    return cells


def write_task(folder, task, vocab_size, made_by, train, val, test, version=1):
    """Write data/<name>, a folder, with `task` above; see RecallSet. Rows are padded to the longest
    of their split.

    Splits have seeds of their own, and no row that is trained on begins with a row to validate or
    to test."""
    arrays = {}
    held_out = {}  # {length: set of rows as bytes}
    for number, (split, sizes) in enumerate((("test", test), ("val", val), ("train", train))):
        tokens, targets = draw_split(task, vocab_size, [SEED, number], sizes, held_out)
        arrays[f"{split}.bin"] = tokens
        arrays[f"{split}_targets.bin"] = targets
    tokenizer = NumberTokenizer(vocab_size)
    meta = {"vocab_size": vocab_size, "dtype": "uint16", "row_length": arrays["train.bin"].shape[1]}
    for split in SPLITS:
        meta[f"{split}_tokens"] = arrays[f"{split}.bin"].size
    meta["cells"] = {"train": cells_of(train), "val": cells_of(val), "test": cells_of(test)}
    meta |= {"tokenizer": tokenizer.name, "seed": SEED, "version": version, "made_by": made_by}
    write_folder(folder, arrays, tokenizer, meta)


def write_recall_set(folder):
    """Write data/<name>, a folder named like an entry of RECALL_SETS."""
    check_ours(folder, MADE_BY)  # before rows are drawn, which takes seconds
    made = RECALL_SETS[folder.name]
    write_task(folder, made.task, made.vocab_size, MADE_BY, made.train, made.val, made.test,
               made.version)


def check_version(name, meta):
    """BadInput if meta.json says that data/<name>, one of RECALL_SETS, was drawn by an earlier
    version of its task."""
    if name not in RECALL_SETS or meta.get("made_by") not in (MADE_BY, f"data/{name}/prepare.py"):
        return
    found, version = meta.get("version", 1), RECALL_SETS[name].version
    if found != version:
        raise BadInput(f"data/{name} was drawn by version {printable(str(found)[:20])} of its "
                       f"task, this is {version}; prepare it again: python -m data.prepare {name}")


# What needs no recall ----------------------------------------------------------------------------

def guesses(name):
    """{kind of guess: (accuracy, loss in nats per answer)} on the test split of an entry of
    RECALL_SETS.

    "guess": any of the task's answers. "any value of the row" and "any value of its key", where a
    row has several: one of those."""
    made = RECALL_SETS[name]
    total, sums = 0, {}
    for rows, cell in made.test:
        answers, kinds = GUESSES[made.task](made.vocab_size, **cell)
        total += rows * answers
        for kind, chances in kinds.items():
            accuracy, loss = sums.get(kind, (0, 0))
            for choices, chance in chances.items():
                accuracy += rows * answers * chance / choices
                loss += rows * answers * chance * math.log(choices)
            sums[kind] = accuracy, loss
    return {kind: (accuracy / total, loss / total) for kind, (accuracy, loss) in sums.items()}


def alone(choices, answers=1):
    return answers, {"guess": {choices: 1}}


def mqar_guesses(vocab_size, length, pairs):
    return pairs, {"guess": {vocab_size - vocab_size // 2: 1}, "any value of the row": {pairs: 1}}


def overwrite_guesses(vocab_size, length, keys, writes):
    others = writes - keys  # each is to any key
    of_a_key = {}           # {1 + k: chance that k of the others are to that key}
    for k in range(others + 1):
        of_a_key[1 + k] = math.comb(others, k) * (keys - 1) ** (others - k) / keys ** others
    return keys, {"guess": {vocab_size - vocab_size // 2: 1}, "any value of the row": {writes: 1},
                  "any value of its key": of_a_key}


# of vocab_size and cell: how many answers a row has, and {kind of guess: {choices: its chance}}
GUESSES = {
    mqar: mqar_guesses,
    overwrite: overwrite_guesses,
    induction: lambda vocab_size, length: alone(vocab_size - 2),
    induction_all: lambda vocab_size, length, questions: alone(vocab_size - 1, questions),
    copying: lambda vocab_size, length, symbols: alone(vocab_size - 3, symbols),
    passkey: lambda vocab_size, length, depth: alone(10, 5),
    parity: lambda vocab_size, length, asked_from: alone(2, length - asked_from + 1),
    s3: lambda vocab_size, length, asked_from, moves: alone(6, length - asked_from + 1),
}
