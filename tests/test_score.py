"""The scores of runs: what was held out chooses, the whole validation split reports, in blocks."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

from base.errors import BadInput
from data import load_dataset
from tools import score as scoring
from training import checkpoint


def losses_by_window(folder, data):
    """The losses in nats of every window, by a forward pass for each."""
    model = checkpoint.build_model(checkpoint.load(folder))
    losses = []
    with torch.no_grad():
        for x, y in data.val_batches(16, 1):
            losses.append(F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), reduction="none"))
    return losses


def test_the_whole_validation_split_reports(trained, here, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK_BYTES", 400)
    data = load_dataset("letters", 16)
    losses = losses_by_window(trained, data)
    of = scoring.score(trained, torch.device("cpu"))
    assert of["select"] is None
    assert of["report"]["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    bits = of["report"]["loss"] / math.log(2)
    assert of["report"]["bpb"] == pytest.approx(bits / data.bytes_per_token)
    full = [loss for loss in losses if len(loss) == 16]
    by_position = torch.stack(full).mean(0)
    assert np.abs(np.array(of["by_position"])[-1] - by_position[-1].item()) < 1e-5
    # 400 bytes are 25 windows of 16 characters; the blocks differ by one window at most
    blocks = round(len(full) / 25)
    assert len(of["by_block"]) == blocks > 1
    first = math.ceil(len(full) / blocks)
    assert of["by_block"][0] == pytest.approx(torch.cat(full[:first]).mean().item(), abs=1e-5)
    last = len(full) // blocks
    assert of["by_block"][-1] == pytest.approx(torch.cat(full[-last:]).mean().item(), abs=1e-5)


def test_windows_longer_than_those_trained_on(train, here):
    """Four times as long, each quarter of their positions apart; learned positions end before."""
    train(*TINY, "--max_iters=1", "--pos=rope", f"--out_dir={here}/run")
    of = scoring.score(here / "run", torch.device("cpu"))
    data = load_dataset("letters", 16)
    losses = []
    model = checkpoint.build_model(checkpoint.load(here / "run"))
    with torch.no_grad():
        for start in range(0, len(data.val) - 64, 64):
            tokens = torch.tensor(data.val[start:start + 65].astype(int))
            losses.append(F.cross_entropy(model(tokens[None, :-1])[0][0], tokens[1:],
                                          reduction="none"))
    by_quarter = torch.stack(losses).view(-1, 4, 16).mean((0, 2))
    assert of["beyond"] == pytest.approx(by_quarter.tolist(), abs=1e-5)
    train(*TINY, "--max_iters=1", "--pos=learned", f"--out_dir={here}/other")
    assert scoring.score(here / "other", torch.device("cpu"))["beyond"] is None


def test_what_is_held_out_of_training_chooses(train, here):
    """Neither it nor the validation split is trained on: the batches are those of the rest."""
    train(*TINY, "--max_iters=1", "--holdout=0.25", f"--out_dir={here}/run")
    whole, data = load_dataset("letters", 16), load_dataset("letters", 16, holdout=0.25)
    n = round(0.25 * len(whole.train))
    assert (data.val == whole.train[-n:]).all() and (data.train == whole.train[:-n]).all()
    of = scoring.score(here / "run", torch.device("cpu"))
    mean = torch.cat(losses_by_window(here / "run", data)).mean().item()
    assert of["select"]["loss"] == pytest.approx(mean, abs=1e-5)
    assert of["report"] is of["by_block"] is of["by_position"] is None


@pytest.mark.parametrize("share", ["0.00001", "0.99999"])
def test_a_share_that_leaves_no_window_is_refused(train, share):
    assert f"holdout={float(share)}" in train.refuses(*TINY, f"--holdout={share}")


def test_a_recall_task_has_a_split_to_choose_by(train):
    words = [word for word in TINY if not word.startswith("--dataset")]
    assert "val split" in train.refuses(*words, "--dataset=recall", "--holdout=0.1")


@pytest.mark.parametrize("windows, T, bytes_per_token, blocks", [
    (1742, 64, 1.0, 56), (1, 64, 1.0, 1), (10, 1024, 4.0, 10), (31, 64, 1.0, 1)])
def test_blocks_have_about_2000_bytes(windows, T, bytes_per_token, blocks):
    losses = list(np.random.default_rng(1).normal(size=windows))
    found = scoring.block_losses(losses, T, bytes_per_token)
    assert len(found) == blocks
    sizes = [windows // blocks + (i < windows % blocks) for i in range(blocks)]
    starts = np.cumsum([0, *sizes])
    means = [np.mean(losses[start:start + size]) for start, size in zip(starts, sizes)]
    assert found == pytest.approx(means)


def test_a_damaged_block_is_no_score(run_folder, here):
    scores = scoring.scores_of(run_folder, torch.device("cpu"))
    assert scoring.read_scores(run_folder) == scores
    for wrong in ([], "x", [None], [1e31], {}):
        scoring.write_json(run_folder / "scores.json", scores | {"by_block": wrong})
        assert scoring.read_scores(run_folder) is None
    with pytest.raises(BadInput, match="no checkpoint"):
        scoring.score(here, torch.device("cpu"))
