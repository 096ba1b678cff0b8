"""The loss over a large vocabulary never holds all of its logits at once."""
import copy
import subprocess
import sys

import pytest
import torch

from base import loss as loss_module
from model import GPT, GPTConfig

PEAK = """
import sys, torch
from base import loss
from model import GPT, GPTConfig
from training.device import peak_memory
if sys.argv[1] == "plain":
    loss.ALL_AT_ONCE = 2**40
torch.manual_seed(0)
gpt = GPT(GPTConfig(vocab_size=50304, block_size=128, n_layer=1, n_head=2, n_embd=32, arch="llama"))
x = torch.randint(50304, (32, 128))
cpu = torch.device("cpu")
before = peak_memory(cpu)
gpt.loss(x, x).backward()
print(peak_memory(cpu) - before)
"""


def in_pieces(at_once, monkeypatch):
    """Pieces of `at_once` logits from now on; None: all at once."""
    monkeypatch.setattr(loss_module, "ALL_AT_ONCE", 0 if at_once else 2**40)
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once or 1)


def loss_and_gradients(at_once, monkeypatch, tie_head, compiled=False):
    in_pieces(at_once, monkeypatch)
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=101, block_size=16, n_layer=1, n_head=2, n_embd=16,
                       tie_head=tie_head)
    model = GPT(config).double()
    idx, targets = torch.randint(101, (5, 16)), torch.randint(101, (5, 16))
    targets[:, ::3] = -1
    targets[1] = -1  # one piece without a target
    loss = (torch.compile(model.loss) if compiled else model.loss)(idx, targets)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


CASES = [
    (1, True, False), (7, True, False), (7, False, False), (16, False, False),
    pytest.param(16, True, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("rows, tie_head, compiled", CASES)
def test_loss_and_gradients_in_pieces_are_those_of_the_whole(rows, tie_head, compiled, monkeypatch):
    whole, gradients = loss_and_gradients(None, monkeypatch, tie_head)
    pieces, gradients_of_pieces = loss_and_gradients(rows * 101, monkeypatch, tie_head, compiled)
    assert pieces == pytest.approx(whole, rel=1e-12)
    for a, b in zip(gradients, gradients_of_pieces):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_in_bfloat16_it_is_as_near_to_float64_as_autograd_is(frozen, monkeypatch):
    torch.manual_seed(0)
    h, targets = torch.randn(2, 30, 24), torch.randint(501, (2, 30))
    head = torch.nn.Linear(24, 501, bias=False).requires_grad_(not frozen)
    targets[:, ::7] = -1

    def gradients(at_once, dtype, autocast):
        in_pieces(at_once, monkeypatch)
        x, layer = h.detach().to(dtype).requires_grad_(), copy.deepcopy(head).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_module.head_loss(x, layer, targets)
        (2 * loss).backward()
        assert x.grad.dtype == dtype
        return [loss.item(), x.grad] + ([] if frozen else [layer.weight.grad])

    exact = gradients(None, torch.float64, False)
    whole = gradients(None, torch.float32, True)
    pieces = gradients(8 * 501, torch.float32, True)
    assert pieces[0] == pytest.approx(exact[0], rel=1e-3)
    for a, b, c in zip(pieces[1:], whole[1:], exact[1:]):
        ours, theirs = (a - c).norm() / c.norm(), (b - c).norm() / c.norm()
        assert ours < 1.2 * theirs < 0.02


def test_float64_is_not_rounded_by_autocast(monkeypatch):
    h = torch.randn(1, 9, 8, dtype=torch.float64)
    head = torch.nn.Linear(8, 101, bias=False).double()
    losses = []
    for at_once in (None, 101):
        in_pieces(at_once, monkeypatch)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss_module.head_loss(h, head, torch.zeros(1, 9, dtype=int)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_a_gradient_of_the_gradient_is_refused(monkeypatch):
    in_pieces(101, monkeypatch)
    h = torch.randn(1, 9, 8, requires_grad=True)
    head = torch.nn.Linear(8, 101, bias=False)
    loss = loss_module.head_loss(h, head, torch.zeros(1, 9, dtype=int))
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_without_gradients_none_are_formed(monkeypatch):
    in_pieces(101, monkeypatch)
    products = []
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda *args: products.append(1))
    with torch.no_grad():
        head = torch.nn.Linear(8, 101, bias=False)
        loss_module.head_loss(torch.randn(1, 5, 8), head, torch.zeros(1, 5, dtype=int))
    assert not products


@pytest.mark.slow
def test_memory_of_a_step_is_less_than_half():
    def peak(how):
        command = [sys.executable, "-c", PEAK, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    plain, pieces = peak("plain"), peak("pieces")
    assert pieces < plain / 2
