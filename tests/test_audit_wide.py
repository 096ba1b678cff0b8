"""The audit's wider questions: each planted fault is asked the one that catches it, and honest
mixers the ones that are likeliest to accuse them."""
import dataclasses
import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT, TINY, metrics, run
from honest import HONEST
from honest_wide import HONEST_WIDE
from planted import PLANTED, Honest
from planted_calls import PLANTED_CALLS
from planted_rare import PLANTED_RARE
from planted_wide import PLANTED_WIDE, Running
from test_audit import CHECK_OF as FIRST
from test_audit import make

from mixers import MIXERS
from tools import audit
from tools.audit_around import used
from tools.audit_leaks import causality
from tools.audit_lengths import FURTHER, lengths
from tools.audit_state import PIECES, SMALL_PIECES, SPLITS, decode, split
from tools.audit_subject import SKELETONS, named
from tools.audit_wide import batches, sizes
from training.leaks import find_leak

WIDE_FILE = ROOT / "tests" / "planted_wide.py"
FAULTS = PLANTED_WIDE | PLANTED_RARE | PLANTED_CALLS


@pytest.fixture
def planted():
    """The faulty mixers and the honest ones are registered for the time of a test."""
    before = dict(MIXERS)
    MIXERS.update({name: mixer for name, (mixer, _) in (HONEST | PLANTED | HONEST_WIDE
                                                        | FAULTS).items()})
    MIXERS["running"] = Running
    yield
    MIXERS.clear()
    MIXERS.update(before)


def fewer_lengths(subject):
    return lengths(subject, every=220, further=(288, 384, 512, 513, 608, 743, 1100))


def fewer_sizes(subject):
    return sizes(subject, T=66)


def less_used(subject):
    return used(subject, steps=101, calls=301, steps_told=1001)


def less_decoded(subject):
    return decode(subject, single=210, pieces=PIECES[3:4])


def fewer_rows(subject):
    return batches(subject, rows=33)


def rough_chunks(subject):
    return causality(subject, lengths=(66,), rough_lengths=(256,))


def other_splits(subject):
    return split(subject, [SMALL_PIECES, SPLITS[-1]])


CHECK_OF = FIRST | {
    "suffix": rough_chunks,
    "split": other_splits,
    "before": audit.before,
    "lengths": fewer_lengths,
    "onward": fewer_lengths,
    "chance": audit.chance,
    "inputs": audit.inputs,
    "batches": fewer_rows,
    "sizes": fewer_sizes,
    "modes": audit.modes,
    "compiled": audit.compiled,
    "decode": less_decoded,
    "declared": less_decoded,
    "ready": audit.ready,
    "carried": audit.carried,
    "derivative": audit.derivative,
    "backward": audit.derivative,
    "slopes": audit.rough_gradients,
    "used": less_used,
    "saved": audit.saved,
    "process": audit.processes,
    "seeds": audit.seeds,
    "flops": audit.flops,
    "aside": audit.aside,
}
# half a second and more
SLOW = {"lengths", "onward", "sizes", "used", "compiled", "process", "suffix"}
SLOW_FAULTS = {"by_length", "forgets_rows", "grows", "shared_table", "stale_weights",
               "with_weights"}


def one_skeleton(name):
    """The subject in the first skeleton, where a question does not choose its own."""
    subject = named(name, str(WIDE_FILE))
    build = subject.build
    return dataclasses.replace(
        subject, build=lambda **options: build(**dict(skeletons=SKELETONS[:1]) | options))


def failed(subject, names):
    checks = list(dict.fromkeys(CHECK_OF[name] for name in names))
    rows = list(audit.audit(subject, checks))
    assert rows
    return {row.check: row for row in rows if row.passed is False}


def by_speed():
    found = []
    for name, (_, checks) in FAULTS.items():
        slow = SLOW & set(checks.split()) or name in SLOW_FAULTS
        found.append(pytest.param(name, marks=[pytest.mark.slow] if slow else []))
    return found


@pytest.mark.parametrize("mixer", by_speed())
def test_a_planted_fault_is_found_by_the_check_it_is_for(mixer, planted):
    expected = FAULTS[mixer][1].split()
    found = failed(one_skeleton(mixer), expected)
    assert set(expected) <= found.keys()


def test_every_wider_check_has_a_planted_fault():
    found = {check for _, checks in FAULTS.values() for check in checks.split()}
    assert found >= CHECK_OF.keys() - FIRST.keys()


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
def test_long_lengths_leave_every_remainder(n):
    assert {T % n for T in FURTHER if T > 500} == set(range(n))


@pytest.mark.parametrize("mixer", ["every_96", "in_the_module", "ring", "sign_flipped"])
def test_what_hides_from_train_needs_the_audit(mixer, planted):
    assert find_leak(make(mixer)) is None


def test_training_refuses_what_only_the_first_tokens_see(planted):
    assert "later token" in find_leak(make("mirrored_start"))


@pytest.mark.parametrize("mixer", HONEST_WIDE)
def test_no_honest_mixer_is_refused_by_training(mixer, planted):
    assert find_leak(make(mixer), torch.float32) is None
    assert find_leak(make(mixer), torch.float32, trained=True) is None


@pytest.mark.slow
@pytest.mark.parametrize("mixer", HONEST_WIDE)
def test_no_honest_mixer_fails_the_checks_that_are_likeliest_to_accuse_it(mixer, planted):
    assert not failed(one_skeleton(mixer), HONEST_WIDE[mixer][1].split())


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [*HONEST, "running"])
def test_no_honest_mixer_fails_the_wider_checks(mixer, planted):
    assert not failed(one_skeleton(mixer), ["inputs", "batches", "modes", "decode", "carried",
                                            "derivative", "saved", "aside", "flops"])


def test_a_mixer_that_wants_other_sizes_is_told_which_were_not_asked(planted):
    [row] = fewer_sizes(one_skeleton("even_heads"))
    assert row.passed and "not asked" in row.figures and "choose an even number" in row.figures


# -- reports ---------------------------------------------------------------------------------------

def quoted(place):
    """The line of code that a place names."""
    file, line = place.removesuffix(", in mix").split(", line ")
    return open(file).read().splitlines()[int(line) - 1].strip()


@pytest.mark.parametrize("mixer, check, smallest, code", [
    ("whole_mean", "suffix", "2 tokens", "return torch.maximum(x, x.mean(1, keepdim=True)), state"),
    ("off_by_one", "suffix", "2 tokens", "return (x @ x.mT / 8).masked_fill("),
    ("batch_std", "rows", "2 tokens", "return x / x.std((0, 1))"),
    ("border_only", "suffix", "65 tokens", "after = torch.cat("),
    ("chunks_80", "lengths", "81 tokens: output 79", "after = torch.cat("),
    ("twelve_rows", "batches", "33 rows of 12 tokens: output 0", "return (x + x.roll(1, 0)"),
])
def test_a_fault_is_told_with_its_place_and_the_smallest_example(
        mixer, check, smallest, code, planted):
    row = failed(one_skeleton(mixer), [check])[check]
    assert row.smallest.startswith(smallest), row
    assert quoted(row.place).startswith(code), row


def test_the_smallest_example_of_decoding_says_how_it_is_fed(planted):
    row = failed(one_skeleton("ring"), ["decode"])["decode"]
    assert row.smallest == "192 tokens, row 0: output 191; fed as 192 x 1"


def test_where_gradients_alone_end_with_a_piece_the_state_is_named(planted):
    row = failed(one_skeleton("detached_state"), ["split"])["split"]
    assert row.figures.endswith("no gradient goes through what the state holds in torch.float64")


def test_a_fault_is_printed_with_what_to_look_at(here, monkeypatch, capsys):
    monkeypatch.setattr(audit, "QUICK", (audit.forward, FIRST["suffix"]))
    shutil.copy(ROOT / "tests" / "planted.py", "mine.py")
    monkeypatch.setattr(
        sys, "argv", ["audit", "--mixer_file=mine.py", "--mixer=whole_mean", "--quick"])
    with pytest.raises(SystemExit) as exit:
        audit.main()
    lines = capsys.readouterr().out.splitlines()
    [at] = [i for i, line in enumerate(lines) if line.startswith("suffix ")]
    assert exit.value.code == 1
    assert lines[at + 1].split()[0] == "place" and "mine.py, line " in lines[at + 1]
    assert lines[at + 2].split()[:2] == ["smallest", "2"]
    assert lines[at + 3].split()[0] == "advice" and "Look at: " in lines[at + 3]
    report = json.loads((here / "mine.whole_mean.audit.json").read_text())
    [row] = [row for row in report["rows"] if row["check"] == "suffix"]
    assert report["quick"] is True
    assert "mine.py, line " in row["place"] and row["smallest"] and row["advice"]


def test_the_quick_questions_come_first():
    assert audit.CHECKS[:len(audit.QUICK)] == audit.QUICK


@pytest.mark.slow
def test_a_run_passes_the_whole_audit(home, trained):
    done = run(home, "-m", "tools.audit", f"--out_dir={trained}", timeout=900)
    assert done.returncode == 0 and done.stderr == "", done
    checks = {line.split()[0] for line in done.stdout.splitlines() if line}
    assert checks >= CHECK_OF.keys() - {"causality"}


# -- train.py --------------------------------------------------------------------------------------

class After5Steps(Honest):
    """Leaks once it has been trained a little."""
    steps = 0

    def apply_statistics(self):
        self.steps += 1

    def mix(self, x, state):
        return (x + x.mean(1, keepdim=True) if self.steps >= 5 else x), state


def test_a_leak_that_opens_in_training_is_found_at_the_last_evaluation(train, planted, capsys):
    MIXERS["after_5_steps"] = After5Steps
    with pytest.raises(SystemExit) as exit:
        train.call([*TINY, "--mixer=after_5_steps", "--max_iters=8", "--out_dir=run"])
    assert exit.value.code == 2
    assert "an output depends on a later token" in capsys.readouterr().err
    assert all(row["val_loss"] is None for row in metrics("run"))
    newest = json.loads(open("run/checkpoints/newest.json").read())
    assert "00000008" in json.dumps(newest)  # its weights are kept
    out = train(*TINY, "--mixer=after_5_steps", "--max_iters=8", "--out_dir=other", "--allow_leak")
    assert "val loss" in out


def test_splits_cover_single_tokens_and_pieces(planted):
    """`running` is whole in any pieces, and its state is what goes on."""
    assert not failed(one_skeleton("running"), ["carried", "decode"])
    [row] = split(one_skeleton("running"), SPLITS[:-1])
    assert row.passed
