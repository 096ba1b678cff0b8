"""The first losses of every mixer, as recorded: a change that is meant to change no numbers changes none.

After a change that is meant to: python -m tests.test_first_losses   writes them anew; the commit says why.
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


def first_losses(mixer):
    """Six steps of a small model on 150 tokens (more than two chunks, no multiple of them) of made-up text, in float32."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=150, n_layer=2, n_head=2, n_embd=32, mixer=mixer))
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
    recorded = json.loads(RECORD.read_text())
    if mixer not in recorded:
        pytest.skip(f"no losses of {mixer} are recorded yet: python -m tests.test_first_losses")
    assert first_losses(mixer) == pytest.approx(recorded[mixer], rel=2e-4)


if __name__ == "__main__":
    RECORD.write_text(json.dumps({mixer: first_losses(mixer) for mixer in MIXERS}, indent=1) + "\n")
    print(f"wrote {RECORD}", file=sys.stderr)
