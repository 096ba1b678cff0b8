"""What a CPU does in its own way to be fast, against the plain way."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from mixers import MIXERS
from mixers.parts.cpu_attention import BLOCK, BlockedAttention
from model import GPT, Dropout, GPTConfig
from training.device import CPU_TOKENS_AT_ONCE, PackedLinear, ready_to_decode, rows_per_pass

needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build has no oneDNN")


def relative(rough, exact):
    return ((rough.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("T", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_attention_in_blocks_is_attention_forward_and_backward(T):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, T, 16).bfloat16().requires_grad_() for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    dy = torch.randn(2, 3, T, 16).bfloat16()
    y, expected = BlockedAttention.apply(*inputs), F.scaled_dot_product_attention(*exact, is_causal=True)
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 0.01
    rough, plain = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, exact, dy.double())
    scale = max(g.norm() for g in plain)  # at T = 1 two of the gradients are zero
    assert all((a.double() - b).norm() / scale < 0.01 for a, b in zip(rough, plain))


def test_attention_in_blocks_sees_nothing_later():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 16).bfloat16().requires_grad_() for _ in range(3))
    for t in (2, BLOCK - 1, BLOCK, 290):  # a first token alone has no weights to learn
        y = BlockedAttention.apply(q, k, v)
        for gradient in torch.autograd.grad(y[:, :, :t].float().square().sum(), (q, k, v)):
            assert gradient[:, :, t:].abs().max() == 0 and gradient[:, :, :t].abs().max() > 0
        later = torch.arange(300)[:, None] >= t
        changed = BlockedAttention.apply(q, k.masked_fill(later, 50.0), v.masked_fill(later, -50.0))
        assert torch.equal(changed[:, :, :t], y[:, :, :t])


@pytest.mark.parametrize("shape", [(5,), (3, 1001), (2, 7, 128)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p, shape):
    torch.manual_seed(0)
    drop, x = Dropout(p), torch.ones(200, *shape, requires_grad=True)
    y = drop(x)
    kept = y != 0
    n = x.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)), rtol=1e-3)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # what is dropped forward is dropped backward
    assert not torch.equal(drop(x) != 0, kept) or n < 20
    torch.manual_seed(0)
    assert torch.equal(drop(x), y)
    assert torch.equal(drop.eval()(x), x) and torch.equal(Dropout(0.0)(x), x)


def test_dropout_close_to_everything_stays_finite():
    assert Dropout(1 - 1e-9)(torch.ones(1000)).isfinite().all()


@needs_mkldnn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_a_packed_layer_is_the_layer_in_bfloat16(rows, bias):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(48, 80, bias=bias), torch.randn(rows, 3, 48)
    y = PackedLinear(linear)(x)
    assert y.dtype == torch.bfloat16 and relative(y, linear.double()(x.double()).detach()) < 0.01


@needs_mkldnn
@pytest.mark.parametrize("options", [*(dict(mixer=mixer) for mixer in sorted(MIXERS)), dict(arch="llama", n_kv_head=2),
                                     dict(embed_rank=4, tie_head=False), dict(mlp_activation="causal_max_context")])
def test_decoding_with_packed_weights_is_autocast(options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(vocab_size=31, block_size=32, n_layer=2, n_head=4, n_embd=32) | options)).eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    idx = torch.randint(31, (2, 20))
    packed = ready_to_decode(copy.deepcopy(model), torch.bfloat16)
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, state, logits = model(idx)[0], None, []
        for piece in idx.split([9, 1, 1, 6, 1, 1, 1], dim=1):
            new, state = packed.step(piece, state)
            logits.append(new)
    assert relative(torch.cat(logits, dim=1), expected.double()) < 0.02
    assert packed.state_bytes(20, torch.bfloat16) == model.state_bytes(20, torch.bfloat16) and packed.flops_per_token(20) == model.flops_per_token(20)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_nothing_is_packed_in_float32():
    model = GPT(GPTConfig(vocab_size=31, n_layer=1, n_embd=16))
    assert ready_to_decode(model, torch.float32) is model and not any(isinstance(m, PackedLinear) for m in model.modules())


@pytest.mark.parametrize("batch_size, block_size, processes", [(12, 64, 1), (64, 256, 1), (64, 256, 4), (61, 256, 1), (6, 1000, 2), (2, 9000, 1)])
def test_a_pass_divides_the_batch_and_fits_the_cache(batch_size, block_size, processes):
    rows = rows_per_pass(batch_size, block_size, torch.device("cpu"), processes)
    own = rows // processes
    assert rows % processes == 0 and batch_size % rows == 0
    assert own == 1 or own * block_size <= CPU_TOKENS_AT_ONCE
    larger = [n for n in range(own + 1, batch_size // processes + 1) if batch_size // processes % n == 0]
    assert all(n * block_size > CPU_TOKENS_AT_ONCE for n in larger)
    assert rows_per_pass(batch_size, block_size, torch.device("cuda"), processes) == batch_size
