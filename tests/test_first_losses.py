"""The first losses of every mixer, as recorded: a change that is meant to change no numbers
changes none, and a new mixer is recorded.

After a change that is meant to: python -m tests.test_first_losses   writes them anew; the commit
says why.
"""
import json
import sys
from pathlib import Path

import pytest
import torch

from config import Options
from mixers import MIXERS
from model import GPT, GPTConfig
from training.optimizer import make_optimizer

RECORD = Path(__file__).with_name("first_losses.json")
RECORDED = json.loads(RECORD.read_text())
TOLERANCE = 2e-4  # relative: processors and versions of PyTorch round sums differently


def first_losses(mixer):
    """Six steps of a small model in float32, on made-up text of 150 tokens: more than two chunks,
    and no multiple of them."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=11, block_size=150, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**sizes, mixer=mixer, init_std=0.02))
    optimizer = make_optimizer(model, Options(learning_rate=1e-2), torch.device("cpu"))
    text = torch.randint(11, (3, 151)).cumsum(1) % 11
    losses = []
    for _ in range(6):
        loss = model.loss(text[:, :-1], text[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.apply_statistics()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("mixer", MIXERS)
def test_first_losses_are_as_recorded(mixer):
    assert mixer in RECORDED, "none are recorded: python -m tests.test_first_losses"
    assert first_losses(mixer) == pytest.approx(RECORDED[mixer], rel=TOLERANCE)


def test_every_record_is_of_a_mixer():
    assert set(RECORDED) <= set(MIXERS)


if __name__ == "__main__":
    losses = {mixer: first_losses(mixer) for mixer in MIXERS}
    RECORD.write_text(json.dumps(losses, indent=1) + "\n")
    print(f"wrote {RECORD}", file=sys.stderr)
