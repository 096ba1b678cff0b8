"""The recall tasks: an oracle that reads each row from its start agrees with every answer; splits
share nothing; batches are whole rows; accuracy is counted right; the scripts take them as they take
a text."""
import hashlib
import inspect
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import content, copy_repository, metrics, run

import train as train_script
from base.errors import BadInput
from data import dataset, files, load_dataset, prepare, tasks
from data.tokenizer import NumberTokenizer, load_tokenizer
from mixers import MIXERS
from training.machine import Machine
from training.parallel import World

SMALL = sorted(name for name in tasks.RECALL_SETS if not name.endswith("_paper"))
TINY = ["--dataset=recall", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=12",
        "--batch_size=12", "--device=cpu", "--learning_rate=0.01", "--warmup_iters=5"]


def draw(task, n=200, seed=0, **cell):
    return task(np.random.default_rng(seed), n, **cell)


# -- the answers ----------------------------------------------------------------------------------

# what is due when these tokens have been read, 0 for nothing: each oracle sees no more than that

def solve_mqar(read, vocab_size, length, pairs):
    keys, values = read[0:2 * pairs:2], read[1:2 * pairs:2]
    return dict(zip(keys, values)).get(read[-1], 0) if len(read) > 2 * pairs else 0


def solve_induction(read, vocab_size, length):
    return read[read.index(1) + 1] if read.count(1) == 2 else 0


def solve_induction_all(read, vocab_size, length, questions):
    return read[read.index(read[-1]) + 1] if len(read) > length - questions else 0


def solve_overwrite(read, vocab_size, length, keys, writes):
    written = dict(zip(read[0:2 * writes:2], read[1:2 * writes:2]))  # the last one wins
    return written[read[-1]] if len(read) > 2 * writes else 0


def solve_s3(read, vocab_size, length, asked_from, moves):
    things = "abc"
    orders = [things, "acb", "bac", "cba", "bca", "cab"]
    for token in read:
        order = orders[token - 1]
        things = "".join(things["abc".index(letter)] for letter in order)
    return 1 + orders.index(things) if len(read) >= asked_from else 0


def solve_copying(read, vocab_size, length, symbols):
    return [token for token in read if token > 2][len(read) - 1 - read.index(1)] if 1 in read else 0


def solve_passkey(read, vocab_size, length, depth):
    return read[read.index(1) + len(read) - read.index(2)] if 2 in read else 0


def solve_parity(read, vocab_size, length, asked_from):
    return [1, 2][read.count(2) % 2] if len(read) >= asked_from else 0


CELLS = [
    (tasks.mqar, solve_mqar, dict(vocab_size=64, length=64, pairs=1)),
    (tasks.mqar, solve_mqar, dict(vocab_size=64, length=64, pairs=16)),
    (tasks.mqar, solve_mqar, dict(vocab_size=18, length=33, pairs=8)),
    (tasks.induction, solve_induction, dict(vocab_size=32, length=64)),
    (tasks.induction, solve_induction, dict(vocab_size=4, length=3)),
    (tasks.induction_all, solve_induction_all, dict(vocab_size=64, length=56, questions=8)),
    (tasks.induction_all, solve_induction_all, dict(vocab_size=5, length=6, questions=2)),
    (tasks.overwrite, solve_overwrite, dict(vocab_size=64, length=60, keys=4, writes=28)),
    (tasks.overwrite, solve_overwrite, dict(vocab_size=18, length=24, keys=8, writes=8)),
    (tasks.overwrite, solve_overwrite, dict(vocab_size=18, length=17, keys=1, writes=8)),
    (tasks.copying, solve_copying, dict(vocab_size=32, length=16, symbols=8)),
    (tasks.copying, solve_copying, dict(vocab_size=5, length=40, symbols=7)),
    (tasks.passkey, solve_passkey, dict(vocab_size=32, length=64, depth=0)),
    (tasks.passkey, solve_passkey, dict(vocab_size=32, length=32, depth=75)),
    (tasks.parity, solve_parity, dict(vocab_size=3, length=32, asked_from=1)),
    (tasks.parity, solve_parity, dict(vocab_size=3, length=32, asked_from=17)),
    (tasks.s3, solve_s3, dict(vocab_size=7, length=32, asked_from=1, moves=4)),
    (tasks.s3, solve_s3, dict(vocab_size=7, length=32, asked_from=17, moves=6)),
]
IDS = [f"{task.__name__}-{i}" for i, (task, _, _) in enumerate(CELLS)]


@pytest.mark.parametrize("task, solve, cell", CELLS, ids=IDS)
def test_an_oracle_that_reads_from_the_start_agrees_with_every_answer(task, solve, cell):
    tokens, targets = draw(task, **cell)
    assert tokens.shape == targets.shape == (200, cell["length"])
    assert tokens.min() >= 1 and targets.min() >= 0
    assert max(tokens.max(), targets.max()) < cell["vocab_size"]
    assert (targets > 0).any(axis=1).all()
    for row, due in zip(tokens.tolist(), targets.tolist()):
        assert due == [solve(row[:t + 1], **cell) for t in range(len(row))]


@pytest.mark.parametrize("task, solve, cell", CELLS, ids=IDS)
def test_a_seed_gives_the_same_rows_and_another_seed_others(task, solve, cell):
    first, again, other = draw(task, **cell), draw(task, **cell), draw(task, seed=1, **cell)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


EXAMPLES = [
    (tasks.mqar, solve_mqar, dict(vocab_size=16, length=12, pairs=2)),
    (tasks.induction, solve_induction, dict(vocab_size=16, length=8)),
    (tasks.induction_all, solve_induction_all, dict(vocab_size=16, length=8, questions=3)),
    (tasks.overwrite, solve_overwrite, dict(vocab_size=16, length=10, keys=2, writes=4)),
    (tasks.copying, solve_copying, dict(vocab_size=16, length=10, symbols=3)),
    (tasks.parity, solve_parity, dict(vocab_size=3, length=6, asked_from=3)),
    (tasks.s3, solve_s3, dict(vocab_size=7, length=5, asked_from=2, moves=6)),
]


@pytest.mark.parametrize("task, solve, cell", EXAMPLES)
def test_the_rows_that_docstrings_draw(task, solve, cell):
    drawn = re.search(r"tokens ([ \d]+).*\n +targets ([ .\d]+)", inspect.getdoc(task))
    tokens = [int(word) for word in drawn[1].split()]
    targets = [0 if word == "." else int(word) for word in drawn[2].split()]
    assert len(tokens) == cell["length"] and max(tokens) < cell["vocab_size"]
    assert targets == [solve(tokens[:t + 1], **cell) for t in range(len(tokens))]


def test_mqar_keys_stand_twice_values_once_each_in_its_half():
    tokens, targets = draw(tasks.mqar, vocab_size=64, length=64, pairs=8)
    keys, values = tokens[:, 0:16:2], tokens[:, 1:16:2]
    assert keys.max() < 32 <= values.min()
    for row, due, own, answers in zip(tokens, targets, keys, values):
        assert len(set(own)) == len(set(answers)) == 8
        assert all((row == key).sum() == 2 for key in own)  # no filler is a live key
        assert sorted(due[due > 0]) == sorted(answers) and (due > 0).sum() == 8
    fillers = tokens[:, 16:][targets[:, 16:] == 0]
    assert set(fillers) == set(range(1, 64))  # yet anything else


def test_mqar_gaps_follow_the_power_law():
    _, targets = draw(tasks.mqar, n=20000, vocab_size=64, length=42, pairs=1)
    counts = (targets > 0).sum(0)
    assert counts[:2].sum() == counts[3::2].sum() == 0  # every second place behind the pair
    weights = np.arange(1, 21) ** -0.99
    expected = 20000 * weights / weights.sum()
    assert (np.abs(counts[2::2] - expected) < 5 * np.sqrt(expected)).all()


def test_induction_triggers_and_copied_symbols_stand_anywhere():
    tokens, _ = draw(tasks.induction, n=2000, vocab_size=8, length=12)
    assert set((tokens[:, :-1] == 1).argmax(1)) == set(range(10))
    tokens, _ = draw(tasks.copying, n=2000, vocab_size=8, length=12, symbols=3)
    assert ((tokens[:, :9] > 2).sum(0) > 500).all()  # a third of the rows has one there
    tokens, _ = draw(tasks.copying, vocab_size=8, length=12, symbols=6)
    assert (tokens != 2).all()


@pytest.mark.parametrize("depth", [0, 25, 50, 75])
def test_passkeys_stand_at_their_depth(depth):
    tokens, _ = draw(tasks.passkey, n=2000, vocab_size=32, length=65, depth=depth)
    starts = (tokens == 1).argmax(1)  # of 55 places
    expected = range(55 * depth // 100, 55 * (depth + 25) // 100)
    assert (tokens == 1).sum() == 2000 and set(starts) == set(expected)


def asked_pairs(pairs, n, seed=0):
    """How often the i-th pair is asked for at a place: (length, pairs), of n rows of 64 tokens."""
    tokens, targets = draw(tasks.mqar, n=n, seed=seed, vocab_size=64, length=64, pairs=pairs)
    row, place = np.nonzero(targets)
    pair = (tokens[row, 1:2 * pairs:2] == targets[row, place][:, None]).argmax(1)
    counts = np.zeros((64, pairs))
    np.add.at(counts, (place, pair), 1)
    return counts


@pytest.mark.parametrize("pairs", [4, 16])
def test_an_mqar_place_says_nothing_of_its_pair(pairs):
    """Chi-square of each place's pairs against even ones. As the reference code draws them, the
    first pair in the first place above all, it is 19 and 460 times what chance leaves."""
    counts = asked_pairs(pairs, n=20000)
    counts = counts[counts.sum(1) > 100]
    expected = counts.sum(1, keepdims=True) / pairs
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) * (pairs - 1)
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_what_mqar_needs_no_recall_for():
    """The figures of guessing: any of the row's values, and the value most often due at that place,
    which is no better now."""
    right = answers = 0
    for pairs in (4, 8, 16):
        often = asked_pairs(pairs, n=4000).argmax(1)
        fresh = asked_pairs(pairs, n=4000, seed=1)
        right += fresh[np.arange(64), often].sum()
        answers += fresh.sum()
    assert answers == 4000 * (4 + 8 + 16)
    accuracy, _ = tasks.guesses("mqar")["any value of the row"]
    assert accuracy == 3 / 28
    assert right / answers == pytest.approx(accuracy, abs=3e-3)


def guessed(name, candidates):
    """The accuracy and loss of an even guess among candidates(row, t, cell), a list, of answers of
    small draws of a test split's cells."""
    right, loss = [], []
    made = tasks.RECALL_SETS[name]
    for _, cell in made.test:
        tokens, targets = draw(made.task, n=300, vocab_size=made.vocab_size, **cell)
        for row, due in zip(tokens.tolist(), targets.tolist()):
            for t in np.flatnonzero(due):
                some = candidates(row, t, cell)
                right.append(some.count(due[t]) / len(some))
                loss.append(-math.log(right[-1]))
    return sum(right) / len(right), sum(loss) / len(loss)


def test_guesses_at_overwritten_values():
    def of_the_row(row, t, cell):
        return row[1:2 * cell["writes"]:2]

    def of_its_key(row, t, cell):
        return [row[i + 1] for i in range(0, 2 * cell["writes"], 2) if row[i] == row[t]]
    exact = tasks.guesses("overwrite")
    assert exact["any value of the row"] == pytest.approx(guessed("overwrite", of_the_row))
    drawn = guessed("overwrite", of_its_key)
    assert exact["any value of its key"] == pytest.approx(drawn, rel=0.03)


@pytest.mark.parametrize("name", tasks.RECALL_SETS)
def test_a_guess_is_one_of_all_answers_there_are(name):
    made = tasks.RECALL_SETS[name]
    answers = set()
    for _, cell in made.test:
        _, targets = draw(made.task, n=20000 // cell["length"], vocab_size=made.vocab_size, **cell)
        answers |= set(np.unique(targets)) - {0}
    accuracy, loss = tasks.guesses(name)["guess"]
    assert loss == pytest.approx(math.log(1 / accuracy))
    if made.vocab_size < 100:  # or else few of them come up in a test
        assert 1 / accuracy == pytest.approx(len(answers))


def test_induction_of_any_symbol_asks_every_place_but_the_last():
    cell = dict(vocab_size=64, length=20, questions=8)
    tokens, targets = draw(tasks.induction_all, n=2000, **cell)
    body, asked = tokens[:, :12], tokens[:, 12:]
    assert all(len(set(row)) == 12 for row in body) and all(len(set(row)) == 8 for row in asked)
    places = (body[:, :, None] == asked[:, None]).argmax(1)  # (2000, 8)
    counts = np.bincount(places.ravel(), minlength=12)
    assert counts[11] == 0 and (abs(counts[:11] - 16000 / 11) < 5 * math.sqrt(16000 / 11)).all()
    assert (targets[:, 12:] == np.take_along_axis(body, places + 1, 1)).all()


def test_overwritten_keys_are_any_and_their_values_differ():
    cell = dict(vocab_size=64, length=60, keys=4, writes=28)
    tokens, _ = draw(tasks.overwrite, n=1000, **cell)
    keys, values, asked = tokens[:, 0:56:2], tokens[:, 1:56:2], tokens[:, 56:]
    assert keys.max() < 32 <= values.min()
    for written, given, questions in zip(keys, values, asked):
        assert set(written) == set(questions) and len(set(questions)) == 4
        assert len(set(given)) == 28
    # which question is about the last key written: any, alike
    place = (asked == keys[:, -1:]).argmax(1)
    assert (abs(np.bincount(place) - 250) < 5 * math.sqrt(250)).all()


def test_the_products_of_s3_are_a_group_s():
    """Each row and column holds every order once, the first changes nothing, swaps undo
    themselves, and brackets do not matter; but which of two comes first does."""
    P = tasks.PRODUCT
    for line in (*P, *P.T):
        assert sorted(line) == [0, 1, 2, 3, 4, 5]
    assert list(P[0]) == list(P[:, 0]) == [0, 1, 2, 3, 4, 5]
    assert list(P.diagonal()) == [0, 0, 0, 0, 5, 4]
    assert np.array_equal(P[P], P[:, P]) and not np.array_equal(P, P.T)


def test_what_copying_needs_no_recall_for():
    """Likewise: the most frequent of the symbols that are still due, whose order is not known."""
    right = answers = 0
    rows = np.arange(1000)
    for length, symbols in ((16, 8), (32, 16), (64, 8), (64, 16)):
        _, targets = draw(tasks.copying, n=1000, vocab_size=32, length=length, symbols=symbols)
        left = np.zeros((1000, 32))
        np.add.at(left, (rows[:, None], targets[:, -symbols:]), 1)
        for due in targets[:, -symbols:].T:
            largest = left == left.max(1, keepdims=True)
            right += (largest[rows, due] / largest.sum(1)).sum()  # one of the largest is guessed
            left[rows, due] -= 1
            answers += 1000
    assert right / answers == pytest.approx(0.32, abs=5e-3)


def test_mqar_needs_room_for_its_pairs():
    for cell in (dict(vocab_size=18, length=64, pairs=9), dict(vocab_size=64, length=30, pairs=8)):
        with pytest.raises(BadInput, match="need a vocabulary above"):
            draw(tasks.mqar, **cell)


@pytest.mark.parametrize("task, cell", [
    (tasks.induction_all, dict(vocab_size=12, length=20, questions=8)),
    (tasks.induction_all, dict(vocab_size=64, length=20, questions=10)),
    (tasks.overwrite, dict(vocab_size=64, length=12, keys=5, writes=4)),
    (tasks.overwrite, dict(vocab_size=18, length=22, keys=4, writes=9)),
    (tasks.overwrite, dict(vocab_size=64, length=13, keys=4, writes=4))])
def test_the_others_too(task, cell):
    with pytest.raises(BadInput, match=f"{task.__name__}: .* need .* a vocabulary above"):
        draw(task, **cell)


# -- the files ------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A copy of the repository, in which load_dataset prepares the sets of a laptop's size."""
    return copy_repository(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def load(prepared, monkeypatch):
    for module in (files, dataset):
        monkeypatch.setattr(module, "DATA", prepared / "data")
    monkeypatch.setattr("base.files.ROOT", prepared)
    return lambda name: load_dataset(name, 2048)


def parts(data, split):
    """[(length, tokens (rows, length), targets)] of each cell, by the files and meta.json alone."""
    cells = data.meta["cells"][split]
    shape = -1, max(cell["length"] for cell in cells)
    tokens = np.fromfile(data.folder / f"{split}.bin", "<u2").reshape(shape)
    targets = np.fromfile(data.folder / f"{split}_targets.bin", "<u2").reshape(shape)
    found, start = [], 0
    for cell in cells:
        rows, length = slice(start, start + cell["rows"]), cell["length"]
        # padding, and nothing due there
        assert not tokens[rows, length:].any() and not targets[rows, length:].any()
        found.append((length, tokens[rows, :length], targets[rows, :length]))
        start += cell["rows"]
    assert start == len(tokens) and tokens.size == data.meta[f"{split}_tokens"]
    return found


def rows_of(data, split):
    """The rows of a split, a set of (length, bytes)."""
    found = set()
    for length, tokens, _ in parts(data, split):
        found |= {(length, row.tobytes()) for row in tokens}
    return found


@pytest.mark.parametrize("name", SMALL)
def test_no_row_to_validate_or_to_test_is_trained_on(name, load):
    data = load(name)
    val, test = rows_of(data, "val"), rows_of(data, "test")
    assert not val & test
    for trained, tokens, _ in parts(data, "train"):
        for length in {length for length, _ in val | test if length <= trained}:
            beginnings = {(length, row[:length].tobytes()) for row in tokens}
            assert not beginnings & (val | test)


SHA256 = {  # of all .bin files; whoever changes rows raises the version of their set
    "induction_all": "70b9699d4277ba10623063eef77cde839d9230eadb4f9552e6809170815a6d45",
    "overwrite": "2c94ca8fd1a53441a8796c1d1b59241073fdc96ea2bd9e8171b41297f625d88e",
    "s3": "8cccd7f8421e1a0e8e3937df5447e773c1337772fe7a42b32d33f7a49d4bb72a",
    "copying": "4a50c14e09c004b0c8239dcabf6b2ecaeadd8c0c6ee9394ae1515d5acd69e879",
    "induction": "27564f258f97ed9b16735107919be7e848c99904a31dadd7d685a9c64fa0c190",
    "mqar": "7874f7ddf7e18effc0aeebdbdcfd5fff27459bb746cf714a5213199f64cdeba9",
    "parity": "b2a1e1f704980a20ee6968d256f7a3076ce02d1b20200919dec82537fb99a24b",
    "passkey": "821a92c742df8a69b9f4e13be596010121fea8a392ff72aaaceca7323eea3e4b",
}


@pytest.mark.parametrize("name", SMALL)
def test_the_rows_are_those_they_have_always_been(name, load):
    digest = hashlib.sha256()
    for path in sorted(load(name).folder.glob("*.bin")):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == SHA256[name]


def test_prepared_by_hand_and_again(load, prepared):
    folder = prepared / "data" / "mqar"
    done = run(prepared, "-m", "data.prepare", "mqar")
    assert done.returncode == 0 and done.stderr == "", done
    assert done.stdout.startswith("wrote data/mqar: 64 symbols, 3,840,000 train tokens")
    before = content(folder)
    assert set(before) == {"meta.json", "tokenizer.json", "train.bin", "train_targets.bin",
                           "val.bin", "val_targets.bin", "test.bin", "test_targets.bin"}

    # as older versions left it
    meta = json.loads(before["meta.json"])
    assert meta["made_by"] == "data.prepare"
    (folder / "meta.json").write_text(json.dumps(meta | {"made_by": "data/mqar/prepare.py"}))
    prepare.main(["mqar"])
    assert content(folder) == before

    (folder / "meta.json").write_text(json.dumps(meta | {"made_by": "data.text"}))
    with pytest.raises(BadInput, match="data/mqar is there and was not made by data.prepare; move"):
        prepare.main(["mqar"])
    (folder / "meta.json").write_bytes(before["meta.json"])

    for name, message in (("mine", "data/mine does not prepare itself; give its text: python -m"),
                          ("../mqar", "'../mqar' cannot name a data set")):
        with pytest.raises(BadInput, match=message):
            prepare.main([name])


def test_a_set_of_an_earlier_version_is_not_taken_for_the_present_one(load):
    """It has the same name and sizes, and other rows."""
    path = load("mqar").folder / "meta.json"
    whole = path.read_bytes()
    meta = json.loads(whole)
    assert meta["version"] == tasks.RECALL_SETS["mqar"].version == 2
    for made_by, version in (("data.prepare", 1), ("data/mqar/prepare.py", None),
                             ("data.prepare", "2\x1b[0m")):
        path.write_text(json.dumps(meta | {"made_by": made_by, "version": version}))
        with pytest.raises(BadInput, match="data/mqar was drawn by version .* this is 2; prepare it"
                                           " again: python -m data.prepare mqar$") as error:
            load("mqar")
        assert "\x1b" not in str(error.value)
    del meta["version"]  # as all were before
    path.write_text(json.dumps(meta))
    with pytest.raises(BadInput, match="drawn by version 1 of its task"):
        load("mqar")
    path.write_bytes(whole)
    load("mqar")


def test_a_damaged_recall_set_says_how_to_prepare_it(data):
    make("mqar", tasks.mqar, 16, PAIRS, PAIRS, PAIRS)
    (data / "mqar" / "val.bin").unlink()
    with pytest.raises(BadInput, match="; prepare it again: python -m data.prepare mqar"):
        load_dataset("mqar", 12)


@pytest.mark.parametrize("name", SMALL)
def test_the_sets_hold_what_their_tasks_draw(name, load):
    data = load(name)
    task, solve = getattr(tasks, name), globals()[f"solve_{name}"]
    for split in ("train", "val", "test"):
        for cell, (length, tokens, targets) in zip(data.meta["cells"][split], parts(data, split)):
            arguments = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", cell["name"])}
            assert tokens.min() > 0 and tokens.max() < data.vocab_size
            for row, due in zip(tokens[:5].tolist(), targets[:5].tolist()):
                solved = [solve(row[:t + 1], data.vocab_size, **arguments) for t in range(length)]
                assert due == solved
            drawn, _ = draw(task, 1, vocab_size=data.vocab_size, **arguments)
            assert drawn.shape == (1, length)


def make(name, task, vocab_size, train, val, test):
    tasks.write_task(files.DATA / name, task, vocab_size, "tests", train, val, test)
    return load_dataset(name, 2048)


@pytest.fixture
def data(monkeypatch, tmp_path):
    """An empty data/ of its own for this process."""
    (tmp_path / "data").mkdir()
    for module in (files, dataset):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    monkeypatch.setattr("base.files.ROOT", tmp_path)
    return tmp_path / "data"


PAIRS = [(20, dict(length=12, pairs=2))]


def test_rows_of_a_small_space_are_kept_apart(data):
    """128 rows of 7 bits, 40 of them held out: no training row, of 7 or of 9 bits, begins with one
    of those."""
    short, long = dict(length=7, asked_from=1), dict(length=9, asked_from=8)
    train = [(300, short), (300, long)]
    bits = make("bits", tasks.parity, 3, train, [(20, short)], [(20, short)])
    held_out = {row for _, row in rows_of(bits, "val") | rows_of(bits, "test")}
    drawn = {row[:7].tobytes() for _, tokens, _ in parts(bits, "train") for row in tokens}
    assert 30 <= len(held_out) <= 40 and not held_out & drawn and len(drawn) > 70
    shortest = dict(length=2, asked_from=1)
    with pytest.raises(BadInput, match="too few different rows of .*length.* for each split"):
        make("few", tasks.parity, 3, [(10, shortest)], [(50, shortest)], [(50, shortest)])
    assert not (data / "few").exists()


def test_writing_again_gives_the_same_bytes(data):
    first = content(make("one", tasks.mqar, 16, PAIRS, PAIRS, PAIRS).folder)
    second = content(make("two", tasks.mqar, 16, PAIRS, PAIRS, PAIRS).folder)
    assert first == second and len(first) == 8


def test_every_cell_of_every_split_has_a_seed_of_its_own(data, monkeypatch):
    states, draw = [], tasks.draw

    def noted(task, rng, *more, **cell):
        states.append(str(rng.bit_generator.state))
        return draw(task, rng, *more, **cell)

    monkeypatch.setattr(tasks, "draw", noted)
    cells = [(9, dict(length=12, pairs=2)), (9, dict(length=12, pairs=3))]
    make("two", tasks.mqar, 16, cells, cells, cells)
    assert len(states) == len(set(states)) == 6


# -- batches --------------------------------------------------------------------------------------

@pytest.fixture
def mixed(data):
    """Rows of 12 and 8 tokens."""
    long, short, longest = (dict(length=12, pairs=2), dict(length=8, pairs=1),
                            dict(length=20, pairs=4))
    return make("mixed", tasks.mqar, 16, [(60, long), (60, short)], [(7, long), (7, short)],
                [(5, long), (3, longest)])


def test_a_batch_is_whole_rows_from_everywhere(mixed):
    tokens = np.fromfile(mixed.folder / "train.bin", "<u2").reshape(120, 12)
    targets = np.fromfile(mixed.folder / "train_targets.bin", "<u2").reshape(120, 12)
    number = {row.tobytes(): i for i, row in enumerate(tokens)}
    x, y = mixed.batch(seed=3, step=7, n=300, block_size=12)
    assert x.shape == y.shape == (300, 12) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    drawn = [number[row.numpy().astype("<u2").tobytes()] for row in x]
    assert len(set(drawn)) > 100 and drawn != sorted(drawn)
    assert 60 < sum(i < 60 for i in drawn) < 240
    due = targets[drawn].astype(np.int64)
    assert torch.equal(y, torch.from_numpy(np.where(due == 0, -1, due)))


def test_a_batch_depends_on_seed_and_step_alone(mixed):
    first = mixed.batch(1, 2, 4, 12)[0]
    mixed.batch(1, 3, 4, 12)
    assert torch.equal(first, mixed.batch(1, 2, 4, 12)[0])
    for seed, step in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(first, mixed.batch(seed, step, 4, 12)[0])


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_an_evaluation_reads_every_row_once_cell_by_cell_and_no_padding(mixed, rows):
    for split, lengths in (("val", [12, 8]), ("test", [12, 20])):
        read = [[], []]
        for x, y, cell in mixed.eval_batches(split, 12, rows):
            assert x.shape == y.shape == (len(x), lengths[cell]) and 0 < len(x) <= rows
            read[cell] += zip(x.tolist(), y.tolist())
        for found, (_, tokens, targets) in zip(read, parts(mixed, split)):
            answers = np.where(targets == 0, -1, targets.astype(int))
            assert found == list(zip(tokens.tolist(), answers.tolist()))
    for (x, _), (same, _, _) in zip(mixed.val_batches(12, rows),
                                    mixed.eval_batches("val", 12, rows), strict=True):
        assert torch.equal(x, same)


def test_a_capped_evaluation_reads_the_same_share_of_every_cell(mixed):
    for max_tokens, expected in ((140, [7, 7]), (139, [6, 6]), (70, [3, 3]), (1, [1, 1])):
        rows = [0, 0]
        for x, _, cell in mixed.eval_batches("val", 12, 4, max_tokens):
            rows[cell] += len(x)
        assert rows == expected


# -- counting -------------------------------------------------------------------------------------

class Fixed(torch.nn.Module):
    """A model that says 5 with probability 0.5, else each of the other 15 alike."""

    def forward(self, idx, targets):
        logits = torch.full((*idx.shape, 16), 0.0)
        logits[..., 5] = math.log(15)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                                 ignore_index=-1)
        return logits, loss


def evaluate(data, split="val", block_size=12, pos="learned", eval_tokens=2**20):
    options = SimpleNamespace(block_size=block_size, pos=pos, eval_tokens=eval_tokens)
    machine = Machine(torch.device("cpu"), torch.no_grad(), World())
    return train_script.evaluate(Fixed(), data, options, machine, split)


def test_accuracy_and_loss_by_hand(data):
    """Four answers of two cells, three of them 5: each counts alike, whatever its batch or cell."""
    one, three = dict(length=6, pairs=1), dict(length=12, pairs=3)
    made = make("mixed", tasks.mqar, 16, [(3, one)], [(1, one), (1, three)], [(1, one)])
    targets = np.zeros((2, 12), "<u2")
    targets[0, 4] = 9
    targets[1, [6, 8, 10]] = 5
    targets.tofile(made.folder / "val_targets.bin")
    result = evaluate(load_dataset("mixed", 12))
    assert result.accuracy == 0.75 and result.bpb is None
    assert result.by_cell == {"length=6 pairs=1": 0.0, "length=12 pairs=3": 1.0}
    assert result.loss == pytest.approx((3 * math.log(2) + math.log(30)) / 4)


def test_rows_that_learned_positions_do_not_reach_are_left_out(mixed):
    assert evaluate(mixed, "test").by_cell["length=20 pairs=4"] is None
    assert evaluate(mixed, "test", pos="rope").by_cell["length=20 pairs=4"] is not None


# -- the scripts ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def recall(home):
    """A run on home's data set `recall`."""
    folder = home / "out" / "recall"
    done = run(home, "train.py", *TINY, "--max_iters=20", "--eval_interval=10", "--log_interval=5",
               f"--out_dir={folder}")
    assert done.returncode == 0 and done.stderr == "", done
    return folder, done.stdout


ACCURACY = ("val_accuracy", "val_accuracy_by_cell")


def said_of(row):
    """What a script prints of a row of metrics with an evaluation."""
    return (f"val loss {row['val_loss']:.4f} nats per answer | "
            f"accuracy {row['val_accuracy']:.4f}")


def test_a_run_logs_its_accuracy(recall, trained):
    folder, out = recall
    rows = metrics(folder)
    for row in rows:
        assert row["val_bpb"] is None
        absent = {key: row[key] is None for key in ("val_loss", *ACCURACY)}
        assert len(set(absent.values())) == 1
    evals = [row for row in rows if row["val_loss"]]
    assert len(evals) == 2
    for row in evals:
        assert set(row["val_accuracy_by_cell"]) == {"length=12 pairs=1", "length=12 pairs=3"}
    assert said_of(evals[-1]) in out
    hard = evals[-1]["val_accuracy_by_cell"]["length=12 pairs=3"]
    assert f"length=12 pairs=3: {hard:.4f}" in out
    assert "recall: 200 rows of 12 tokens to train on, 40 to validate" in out
    for row in metrics(trained):
        assert row["val_accuracy"] is row["val_accuracy_by_cell"] is None


def test_the_test_split_is_evaluated_when_asked_for(recall, train):
    folder, _ = recall
    last = metrics(folder)[-1]
    out = train("--eval_only", f"--out_dir={folder}")
    assert said_of(last) in out
    out = train("--eval_only", "--eval_split=test", f"--out_dir={folder}")
    total = re.search(r"test loss [\d.]+ nats per answer \| accuracy ([\d.]+)", out)
    cells = re.findall(r"^length=12 pairs=(\d) +([\d.]+)$", out, re.MULTILINE)
    assert [pairs for pairs, _ in cells] == ["1", "3"] and "changed" not in out
    mean = (20 * float(cells[0][1]) + 60 * float(cells[1][1])) / 80
    assert float(total[1]) == pytest.approx(mean, abs=1e-4)


def test_the_test_split_of_a_text_and_of_a_training_run(train, recall, trained):
    line = train.refuses("--eval_only", "--eval_split=test", f"--out_dir={trained}")
    assert "data/letters has no test split" in line
    assert "--eval_only" in train.refuses(*TINY, "--eval_split=test", "--out_dir=new")


def test_each_answer_counts_alike_in_a_step_of_several_batches(train):
    """Rows of one pair and of three: the mean over micro-batches is not the mean over answers."""
    train(*TINY, "--max_iters=5", "--log_interval=1", "--out_dir=whole")
    train(*TINY, "--max_iters=5", "--log_interval=1", "--batch_size=2",
          "--gradient_accumulation_steps=6", "--out_dir=parts")
    whole = [row["train_loss"] or row["val_loss"] for row in metrics("whole")]
    parts = [row["train_loss"] or row["val_loss"] for row in metrics("parts")]
    assert len(whole) == 6 and parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mixer_trains_on_rows(mixer, train):
    train(*TINY, f"--mixer={mixer}", "--max_iters=3", "--out_dir=run")
    assert 0 <= metrics("run")[-1]["val_accuracy"] <= 1


def test_rows_are_not_cut(train):
    line = train.refuses(*TINY, "--block_size=11", "--out_dir=run")
    assert "data/recall: its rows have 12 tokens" in line and "block_size=12" in line


def test_a_run_continues_a_row(recall, sample):
    folder, _ = recall
    out = sample(f"--out_dir={folder}", "--start=3 12 3", "--max_new_tokens=2", "--num_samples=1")
    assert re.fullmatch(r"3 12 3 \d+ \d+ \n---------------\n", out)
    assert "--start='" in sample.refuses(f"--out_dir={folder}")
    for start, wrong in (("3 x", "x"), ("3 16", "16"), ("-1", "-1"), (" ", "' '"),
                         ("3 " + "9" * 5000, "999")):
        line = sample.refuses(f"--out_dir={folder}", f"--start={start}")
        assert wrong in line and "numbers from 0 to 15" in line


# -- damage ---------------------------------------------------------------------------------------

def change(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("old, new", [
    ('"rows": 60', '"rows": 61'), ('"rows": 7', '"rows": -7'), ('"rows": 7', '"rows": "7"'),
    ('"length": 12', '"length": 6'), ('"val": [', '"valid": ['), ('"name"', '"title"'),
    ('"cells": {', '"cells": 3, "were": {'), ('"cells": {', '"cells": [1], "were": {'),
    ('"val": [', '"val": [1], "other": ['), ('"val": [', '"val": [], "other": ['),
    ('"test": [', '"../../outside": ['), ('"rows": 60', '"rows": %d' % 10**30),
    ('"row_length": 12', '"row_length": 11'), ('"row_length": 12', '"row_length": null')])
def test_damaged_cells(mixed, old, new):
    change(mixed.folder / "meta.json", old, new)
    with pytest.raises(BadInput, match="data/mixed/meta.json is damaged: .*prepare it again"):
        load_dataset("mixed", 12)


def test_damaged_rows(mixed):
    path = mixed.folder / "val_targets.bin"
    whole = path.read_bytes()
    for damaged, message in ((whole[:-2], "val_targets.bin has 334 bytes"),
                             (whole[:-2] + b"\x10\x00", "holds the token 16")):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=message):
            load_dataset("mixed", 12)
    path.unlink()
    with pytest.raises(BadInput, match="cannot read data/mixed/val_targets.bin"):
        load_dataset("mixed", 12)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_rows_without_an_answer(split, mixed):
    path = mixed.folder / f"{split}_targets.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(BadInput, match=f"{split}_targets.bin: row 0 has no answer due.*prepare"):
        load_dataset("mixed", 12)
    row = len(whole) // len(mixed.splits[split][0])
    path.write_bytes(whole[:row] + bytes(row) + whole[2 * row:])
    with pytest.raises(BadInput, match=f"{split}_targets.bin: row 1 has no answer due"):
        load_dataset("mixed", 12)


def test_the_numbers_of_a_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(NumberTokenizer(16).to_json())
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 16
    assert tokenizer.encode(tokenizer.decode([0, 15, 7])) == [0, 15, 7]
    assert tokenizer.decode_bytes([1]) + tokenizer.decode_bytes([12]) == b"1 12 "
    assert tokenizer.decode_bytes([1, 12]) == b"1 12 "
    for wrong in ("null", "0", '"16"', "true"):
        path.write_text('{"tokenizer": "numbers", "vocab_size": %s}' % wrong)
        with pytest.raises(BadInput, match="tokenizer.json is damaged: vocab_size: "):
            load_tokenizer(path)


# -- what can be learnt ---------------------------------------------------------------------------

def accuracy_of(cwd, name, *arguments):
    """Trains configs/<name>.py and returns the accuracy on the test split."""
    done = run(cwd, "train.py", f"configs/{name}.py", *arguments, "--out_dir=out/learnt",
               "--overwrite", timeout=400)
    assert done.returncode == 0, done
    done = run(cwd, "train.py", "--eval_only", "--eval_split=test", "--out_dir=out/learnt")
    print(done.stdout)
    return float(re.search(r"test loss .* accuracy ([\d.]+)", done.stdout)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mqar", "induction"])
def test_softmax_recalls(name, prepared):
    assert accuracy_of(prepared, name) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name, choices, answers", [("mqar", 32, 28_000), ("induction", 30, 3000)])
def test_without_a_mixer_there_is_nothing_but_chance(name, choices, answers, prepared):
    """The question and its position say nothing about the answer, one of `choices` alike."""
    chance = 1 / choices
    accuracy = accuracy_of(prepared, name, "--mixer=pelican", "--max_iters=200")
    assert abs(accuracy - chance) < 5 * math.sqrt(chance / answers)
