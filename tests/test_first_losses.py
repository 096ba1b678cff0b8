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
from mixers import MIXERS, mixers_with
from mixers.parts.convolution import ShortConvolution
from model import GPT, GPTConfig
from training.optimizer import make_optimizer

RECORD = Path(__file__).with_name("first_losses.json")
RECORDED = json.loads(RECORD.read_text())
TOLERANCE = 2e-4  # relative: processors and versions of PyTorch round sums differently


def small_model(case):
    """case: a mixer, or a mixer and the taps of its short convolution, "softmax conv 4"."""
    mixer, *conv = case.split(" conv ")
    torch.manual_seed(0)
    sizes = dict(vocab_size=11, block_size=150, n_layer=2, n_head=2, n_embd=32)
    options = dict(conv=int(conv[0])) if conv else {}
    return GPT(GPTConfig(**sizes, mixer=mixer, init_std=0.02, **options))


def cases():
    """Every mixer, and each that takes the short convolution with it or without, as it is not by
    itself."""
    found = list(MIXERS)
    for mixer in mixers_with("conv"):
        has_one = any(isinstance(m, ShortConvolution) for m in small_model(mixer).modules())
        found.append(f"{mixer} conv {0 if has_one else 4}")
    return found


def first_losses(case):
    """Six steps of a small model in float32, on made-up text of 150 tokens: more than two chunks,
    and no multiple of them."""
    model = small_model(case)
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


@pytest.mark.parametrize("case", cases())
def test_first_losses_are_as_recorded(case):
    assert case in RECORDED, "none are recorded: python -m tests.test_first_losses"
    assert first_losses(case) == pytest.approx(RECORDED[case], rel=TOLERANCE)


def test_every_record_is_of_a_mixer():
    assert set(RECORDED) <= set(cases())


if __name__ == "__main__":
    losses = {case: first_losses(case) for case in cases()}
    RECORD.write_text(json.dumps(losses, indent=1) + "\n")
    print(f"wrote {RECORD}", file=sys.stderr)
