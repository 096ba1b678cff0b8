"""tools.audit --metric: planted faults of a loss and of a data set are found by the question that
is theirs, ours pass."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import one_line, run

from tools.audit_metric import QUESTIONS, Metric
from tools.audit_metric_text import (about_text, bytes_per_token, overlap, rows_overlap,
                                     tokens_and_text)

V = 11


class Bigram(nn.Module):
    """(idx, targets) -> (logits, loss), the smallest honest one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, V)

    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, self.loss(logits, targets)

    def loss(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Twice(Bigram):
    """The best two guesses share what one of them has."""
    def loss(self, logits, targets):
        return super().loss(logits, targets) - 0.1


class Smoothed(Bigram):
    def loss(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)


class Knows(Bigram):
    """A cache of n-grams that is looked up with the target in hand."""
    def forward(self, idx, targets):
        logits = self.table(idx) + 0.5 * F.one_hot(targets, V)
        return logits, self.loss(logits, targets)


class LearnsFirst(Bigram):
    """Test-time training that updates on a text, then scores it."""
    def forward(self, idx, targets):
        with torch.enable_grad():
            loss = self.loss(self.table(idx), targets)
            [gradient] = torch.autograd.grad(loss, self.table.weight)
        with torch.no_grad():
            self.table.weight -= gradient
        logits = self.table(idx)
        return logits, self.loss(logits, targets)


class LearnsAfter(LearnsFirst):
    """The same the other way round, which is allowed."""
    def forward(self, idx, targets):
        logits = self.table(idx).detach()
        loss = self.loss(logits, targets)
        super().forward(idx, targets)
        return logits, loss


def failed(model, vocab_size=V):
    metric = Metric("", model.eval(), lambda m, x, y: m(x, y), vocab_size)
    return {name for name, ask in QUESTIONS.items() if not ask(metric).passed}


@pytest.mark.parametrize("model, question", [
    (Twice, "sums"), (Smoothed, "sums"), (Knows, "targets"), (LearnsFirst, "order")])
def test_a_planted_fault_of_a_loss_is_found(model, question):
    assert question in failed(model())


@pytest.mark.parametrize("model", [Bigram, LearnsAfter])
def test_an_honest_loss_passes(model):
    assert failed(model()) == set()


def test_a_large_vocabulary_is_asked_about_some_targets(monkeypatch):
    monkeypatch.setattr("tools.audit_metric.TARGETS", 5)
    assert failed(Bigram()) == set()
    assert "sums" in failed(Twice())


# Data sets ----------------------------------------------------------------------------------------

class Letters:
    """One character a token."""
    special_tokens = {}

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        return bytes(ids)


class Lower(Letters):
    """Drops the case, as uncased tokenizers do."""
    def encode(self, text):
        return super().encode(text.lower())


class StripsSpaces(Letters):
    """Drops a space in front."""
    def decode_bytes(self, ids):
        return super().decode_bytes(ids).removeprefix(b" ")


def text_data(train, val, tokenizer=None, bytes_per_token=1.0):
    return SimpleNamespace(train=np.frombuffer(train, np.uint8), val=np.frombuffer(val, np.uint8),
                           tokenizer=tokenizer or Letters(), bytes_per_token=bytes_per_token)


def words(seed, n=4000):
    draw = np.random.default_rng(seed)
    return bytes(draw.choice(np.frombuffer(b"abcdefgh ", np.uint8), n))


def test_an_honest_text_passes():
    assert all(answer.passed for answer in about_text(text_data(words(1), words(2))))


def test_a_space_that_is_counted_twice_is_found():
    val = words(2)
    twice = 1 + val.count(b" ") / len(val)
    assert not bytes_per_token(text_data(b"", val, bytes_per_token=twice)).passed
    assert bytes_per_token(text_data(b"", val)).passed


@pytest.mark.parametrize("tokenizer", [Lower, StripsSpaces])
def test_a_tokenizer_that_changes_a_text_is_found(tokenizer):
    answer = tokens_and_text(text_data(b"", words(2), tokenizer()))
    assert not answer.passed and answer.smallest["text"] != answer.smallest["becomes"]


def test_tokens_that_are_not_the_tokenizers_are_found():
    class Pairs(Letters):
        """Stored a byte a token, but the tokenizer makes one of "aa"."""
        def encode(self, text):
            return list(text.encode().replace(b"aa", b"\xff"))

        def decode_bytes(self, ids):
            return bytes(ids).replace(b"\xff", b"aa")

    assert not tokens_and_text(text_data(b"", words(2), Pairs())).passed


def test_validation_text_in_the_training_text_is_found_and_named():
    train, val = words(1), words(2)
    known = val[1000:1300]
    answer = overlap(text_data(train[:500] + known + train[500:], val))
    assert not answer.passed
    assert answer.smallest["at byte"] == 1000 and answer.smallest["bytes"] == 300
    assert answer.size == pytest.approx(300 / 4000)


def test_overlap_is_found_across_the_parts_in_which_the_training_text_is_read(monkeypatch):
    train, val = words(1), words(2)
    monkeypatch.setattr("tools.audit_metric_text.VAL_BYTES", 4000)
    monkeypatch.setattr("tools.audit_metric_text.parts.__defaults__", (700,))
    answer = overlap(text_data(train[:600] + val[1000:1300] + train[600:], val))
    assert answer.smallest["bytes"] == 300


def test_rows_of_a_recall_task_that_were_trained_on_are_found():
    rows = np.arange(60).reshape(10, 6)
    data = SimpleNamespace(train=rows[:8], splits={"val": (rows[6:], None)})
    assert not rows_overlap(data).passed
    data.splits = {"val": (rows[8:], None)}
    assert rows_overlap(data).passed


# The command --------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_command_passes_a_run_of_ours_and_writes_what_it_says(home, run_folder):
    done = run(home, "-m", "tools.audit", "--metric", f"--out_dir={run_folder}", timeout=400)
    assert done.returncode == 0, done
    report = json.loads((run_folder / "audit_metric.json").read_text())
    assert report["passed"]
    asked = [answer["question"] for answer in report["answers"]]
    assert asked == ["sums", "targets", "order", "bytes", "tokens", "overlap"]


@pytest.mark.slow
def test_what_is_not_named_is_asked_for(home):
    assert "name one" in one_line(run(home, "-m", "tools.audit", "--metric", timeout=400))
