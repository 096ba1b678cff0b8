"""Where to compute: what cannot be used is refused in one line; without torch's private functions
training and decoding go on."""
import types

import pytest
import torch
from conftest import TINY, one_line, run

from model import GPT, GPTConfig
from training.device import PackedLinear, choose_dtype, ready_to_decode

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["hpu", "mkldnn", "meta", "xla", "privateuseone", "opencl",
                                    "vulkan", "nope", "", "cpu:x", "cuda:-1", "cuda:99999", "\x1b"])
@pytest.mark.filterwarnings("error")
def test_a_device_that_is_none_is_refused_in_one_line(device, train, sample, trained):
    line = train.refuses(*TINY, f"--device={device}")
    assert "--device=" in line and "cpu" in line and "\x1b" not in line
    assert "--device=" in sample.refuses(f"--out_dir={trained}", f"--device={device}")


def test_nothing_else_is_printed(home, trained):
    """Torch warns of some names on standard error, and in a process of its own it shows."""
    line = one_line(run(home, "sample.py", f"--out_dir={trained}", "--device=mkldnn"))
    assert line.startswith("sample.py: --device=mkldnn is not one of")


@pytest.fixture
def without_private_functions(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())


def test_training_and_sampling_go_on_without_them(without_private_functions, train, sample):
    train(*TINY, "--n_embd=128", "--max_iters=2", "--out_dir=run")
    assert choose_dtype("auto", CPU, 128) == torch.float32
    for dtype in ("auto", "bfloat16"):
        sample("--out_dir=run", "--max_new_tokens=5", f"--dtype={dtype}")


def changed_signature(*arguments):
    raise TypeError("another number of arguments")


@pytest.mark.parametrize("operations", [{}, {"_reorder_linear_weight": changed_signature}])
def test_decoding_without_them_is_the_same(operations, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, n_layer=1, n_embd=32)).eval()
    idx = torch.randint(31, (1, 9))
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**operations))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(idx)[0]
        ready_to_decode(model, torch.bfloat16)
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
        assert model.blocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
        torch.testing.assert_close(model(idx)[0], expected, atol=0.02, rtol=0.02)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build has no oneDNN")
def test_the_trial_draws_no_random_numbers():
    model = GPT(GPTConfig(vocab_size=31, n_layer=1, n_embd=32)).eval()
    before = torch.get_rng_state()
    ready_to_decode(model, torch.bfloat16)
    assert isinstance(model.head, PackedLinear)
    assert torch.equal(torch.get_rng_state(), before)
