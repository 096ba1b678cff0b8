"""tools.context: the loss of the same tokens behind less and more of the text."""
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

from base.errors import BadInput
from data import load_dataset
from tools import compare, context, records

FEW = ["--contexts=8,24,64", "--targets=256"]


def said(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["context", *map(str, words), "--device=cpu"])
    capsys.readouterr()
    context.main.__wrapped__()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    return [[cell.strip() for cell in row] for row in rows if row != [""] and "---" not in row[0]]


def by_token(model, text, C, ends):
    """The losses of the tokens of each stretch, a call of the model for each."""
    size = context.counted(C)
    losses = []
    with torch.no_grad():
        for end in ends:
            for t in range(end - context.STRETCH, end):
                stop = end - (end - 1 - t) // size * size
                logits, _ = model(text[None, stop - C - 1:t])
                losses.append(F.cross_entropy(logits[0, -1], text[t]).item())
    return np.array(losses).reshape(len(ends), -1).mean(1)


@pytest.mark.parametrize("mixer, pos", [("softmax", "rope"), ("gla", "none"), ("swa", "learned")])
def test_losses_are_those_of_single_tokens(train, here, mixer, pos):
    train(*TINY, "--max_iters=2", f"--mixer={mixer}", f"--pos={pos}", f"--out_dir={here}/run")
    scored = context.load_scored(here / "run", torch.device("cpu"))
    text = torch.from_numpy(scored.data.val.astype(np.int64))
    ends = context.stretch_ends(len(text), [8, 24, 64], 128)
    assert len(ends) == 2 and ends[-1] == len(text)
    for C in (8, 24, 64):
        found = context.losses_behind(scored, C, ends)
        if pos == "learned" and C > 16:
            assert found is None
        else:
            assert found == pytest.approx(by_token(scored.model, text, C, ends), abs=1e-5)


def test_a_second_reading_is_of_the_same_tokens(train, here):
    """As a call of the model for each token has it, and only the first tokens' order told it."""
    train(*TINY, "--max_iters=2", "--pos=rope", f"--out_dir={here}/run")
    scored = context.load_scored(here / "run", torch.device("cpu"))
    text = torch.from_numpy(scored.data.val.astype(np.int64))
    ends = context.stretch_ends(len(text), [8, 16], 128)
    assert ends[0] == context.AGAIN + context.STRETCH
    found = context.losses_of_readings(scored, ends)
    for of_stretches, times in zip(found, (1, 2)):
        for end, loss in zip(ends, of_stretches):
            read = text[end - context.AGAIN:end].repeat(times)
            losses = []
            for t in range(len(read) - context.STRETCH, len(read)):
                logits, _ = scored.model(read[None, :t])
                losses.append(F.cross_entropy(logits[0, -1], read[t]).item())
            assert loss == pytest.approx(np.mean(losses), abs=1e-5)
    scored.options.pos = "learned"  # of 16 tokens
    assert context.losses_of_readings(scored, ends) is None


@pytest.mark.parametrize("C, size", [(8, 2), (24, 4), (64, 16), (256, 64), (4096, 64)])
def test_a_window_counts_its_last_quarter_at_most(C, size):
    assert context.counted(C) == size and context.STRETCH % size == 0


def test_the_tables_and_the_file(train, here, capsys, monkeypatch):
    """Of two arms of two seeds; and the same from the records alone, with the file beside them."""
    runs, kept = here / "runs", here / "kept"
    for mixer, pos in (("softmax", "rope"), ("causal_max", "learned")):
        for seed in (1, 2):
            train(*TINY, "--max_iters=2", f"--mixer={mixer}", f"--seed={seed}", f"--pos={pos}",
                  f"--out_dir={runs}/{mixer}-seed{seed}")
    rows = said(capsys, monkeypatch, runs, *FEW)
    assert [row[0] for row in rows] == [
        "bits per byte behind", "causal_max", "softmax", "minus the same behind 8", "causal_max",
        "softmax", "minus softmax behind", "causal_max", "128 tokens read twice", "softmax"]
    file = json.loads((runs / "context.json").read_text())
    bits = 1 / np.log(2) / file["bytes_per_token"]
    losses = {name: run["losses"] for name, run in file["runs"].items()}
    softmax = np.array([losses[f"softmax-seed{seed}"] for seed in (1, 2)])  # (seeds, C, blocks)
    of_each = softmax.mean((0, 2)) * bits
    assert rows[2][1:] == [f"{loss:.4f}" for loss in of_each]
    assert rows[5][1].startswith(f"{of_each[1] - of_each[0]:+.4f} [")
    other = np.mean([losses[f"causal_max-seed{seed}"][0] for seed in (1, 2)]) * bits
    assert rows[1][1:] == [f"{other:.4f}", "n/a", "n/a"]
    assert rows[7][1].startswith(f"{other - of_each[0]:+.4f} [") and rows[7][2] == "n/a"
    once, again = np.array([file["runs"][f"softmax-seed{seed}"]["readings"]
                            for seed in (1, 2)]).mean((0, 2)) * bits
    assert rows[9][1:3] == [f"{once:.4f}", f"{again:.4f}"]
    assert rows[9][3].startswith(f"{again - once:+.4f} [")
    assert file["runs"]["causal_max-seed1"]["readings"] is None  # its positions are learned
    records.write_records(kept, compare.records_to_compare([runs], torch.device("cpu")))
    with pytest.raises(BadInput, match="no checkpoint and no figures"):
        said(capsys, monkeypatch, kept)
    (kept / "context.json").write_bytes((runs / "context.json").read_bytes())
    monkeypatch.setattr(context, "measure", None)
    assert said(capsys, monkeypatch, kept) == rows


def test_other_weights_are_measured_anew(run_folder, train, capsys, monkeypatch):
    said(capsys, monkeypatch, run_folder, "--contexts=8,16", "--targets=256")
    before = json.loads((run_folder / "context.json").read_text())["runs"]
    train("--resume", f"--out_dir={run_folder}", "--max_iters=21")
    said(capsys, monkeypatch, run_folder)  # as the file says
    after = json.loads((run_folder / "context.json").read_text())["runs"]
    [name] = before
    assert after.keys() == before.keys() and after[name]["losses"] != before[name]["losses"]
    scored = context.load_scored(run_folder, torch.device("cpu"))
    assert after[name]["weights"] == scored.weights != before[name]["weights"]


def test_authors_are_the_blocks(here):
    data = load_dataset("letters", 16)
    data.meta["val_documents"] = [{"author": "A", "tokens": 700, "title": "x"},
                                  {"author": "B", "tokens": len(data.val) - 700, "title": "y"}]
    found = context.by_block(np.array([1.0, 2.0, 6.0]), np.array([600, 731, 900]), data)
    assert found == [1.5, 6.0]
    del data.meta["val_documents"]
    assert context.by_block(np.array([1.0, 2.0, 6.0]), np.array([600, 731, 900]), data) == [1, 2, 6]


def test_bad_input_is_refused_in_a_line(run_folder, here, refusal):
    assert "name one folder" in refusal(context)
    for wrong in ("8", "64,8", "4,8", "8,8", "8,x", "-8,16"):
        assert "--contexts=" in refusal(context, run_folder, f"--contexts={wrong}")
    many = ["--contexts=8,64", "--targets=1000000"]
    assert "too few for windows" in refusal(context, run_folder, *many)
    file = run_folder / "context.json"
    assert not file.exists()
    sound = {"contexts": [8, 24], "targets": 128, "bytes_per_token": 1.0, "runs": {}}
    file.write_text(json.dumps(sound))
    assert "other contexts" in refusal(context, run_folder, "--contexts=8,16")
    assert "other targets" in refusal(context, run_folder, "--targets=256")
    for wrong in ({"contexts": [8]},
                  {"runs": {"a": {"weights": None, "losses": [[1.0]], "readings": None}}},
                  {"runs": {"a": {"weights": None, "losses": [[1.0], [1.0]]}}},
                  {"runs": {"a": {"weights": None, "losses": [[1.0], [1.0, 2.0]],
                                  "readings": None}}},
                  {"runs": {"a": {"weights": None, "losses": [[1.0], [1.0]],
                                  "readings": [[1.0, 2.0], [1.0, 2.0]]}}},
                  {"targets": 63}, {"bytes_per_token": 0}, {"runs": []}):
        file.write_text(json.dumps(sound | wrong))
        assert "is damaged" in refusal(context, run_folder)


def test_a_recall_task_has_no_windows(train, here, refusal):
    words = [word for word in TINY if not word.startswith("--dataset")]
    train(*words, "--dataset=recall", "--max_iters=1", "--seed=1", "--pos=rope",
          f"--out_dir={here}/run")
    assert "recall task" in refusal(context, here / "run", *FEW)
