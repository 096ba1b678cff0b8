"""Selective self-attention: its terms and switches, its size, and its start from a softmax model."""
import math

import pytest
import torch
from test_mixers import make, tokens

from model import GPT, GPTConfig
from training import checkpoint

OFF = dict(ssa_query_token=False, ssa_query_position=False, ssa_value_token=False)
ON = dict(ssa_key_token=True, ssa_key_position=True, ssa_value_position=True)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
def test_ssa_is_softmax_on_scaled_queries_keys_and_values(share, per_head):
    model = make("ssa", ssa_share=share, ssa_per_head=per_head, **ON)
    mixer, x = model.blocks[0].mixer, torch.randn(1, 20, 32, dtype=torch.float64)
    vectors = dict(zip("qkv", mixer.c_attn(x)))
    for name, tau in mixer.tau.items():
        u = vectors[name][0].clone()  # (H, T, D)
        for t in range(20):
            for h in range(4):
                row = h if per_head else 0
                features = (u[h, t] if per_head else vectors[name][0, :, t].flatten()) if share else tau.hidden(x[0, t])
                f = torch.nn.functional.gelu(features) @ tau.w.view(tau.outputs, -1)[row]
                u[h, t] *= 1 + f.tanh() + tau.a[row].sigmoid() * math.log(t + 1)
        vectors[name] = u[None]
    q, k, v = (vectors[name] for name in "qkv")
    later = torch.ones(20, 20, dtype=torch.bool).triu(1)
    y = (q @ k.mT / math.sqrt(8)).masked_fill(later, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(mixer(x)[0], mixer.c_proj(y.transpose(1, 2).flatten(2)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("skeleton", ["gpt2", "llama"])
def test_with_every_switch_off_it_is_softmax(skeleton):
    softmax, ssa = make("softmax", skeleton), make("ssa", skeleton, **OFF)
    ssa.load_state_dict(softmax.state_dict())
    assert torch.equal(ssa(tokens())[0], softmax(tokens())[0])


def test_sharing_adds_under_half_a_per_cent():
    count = lambda **options: sum(p.numel() for p in GPT(GPTConfig(vocab_size=65, bias=False, **options)).parameters())
    plain, shared, own = count(mixer="softmax"), count(mixer="ssa"), count(mixer="ssa", ssa_share=False)
    new = 4 * (128 + 128 + 1)  # layers x (w_q, w_v, a)
    assert shared - plain == new and new / plain < 0.005
    assert own - plain == 4 * (2 * (32 * 128 + 32) + 1)
    assert count(mixer="ssa", ssa_per_head=True, **ON) / plain - 1 < 0.005


def test_start_values():
    mixer = GPT(GPTConfig(vocab_size=31, mixer="ssa")).blocks[0].mixer
    tau = mixer.tau["q"](torch.randn(1, 5, 128), torch.randn(1, 4, 5, 32), 0)
    torch.testing.assert_close(tau[0, 0, :, 0], 1 + 0.011 * torch.arange(1, 6).log())
    assert (mixer.tau["v"](torch.randn(1, 5, 128), torch.randn(1, 4, 5, 32), 0) == 1).all()
    assert "k" not in mixer.tau


@pytest.mark.parametrize("options", [{}, ON, dict(ssa_share=False, ssa_per_head=True)])
def test_weights_of_a_softmax_model_start_unchanged(options):
    softmax = make("softmax").float()
    torch.manual_seed(3)
    ssa = GPT(GPTConfig(vocab_size=31, block_size=192, n_layer=2, n_head=4, n_embd=32, mixer="ssa", **options)).eval()
    checkpoint.init_model(ssa, checkpoint.model_tensors(softmax), "test")
    assert (ssa(tokens())[0] - softmax(tokens())[0]).abs().max() < 1e-5
    ssa.train().loss(tokens(), tokens().roll(-1, 1)).backward()
    grads = {name: p.grad for name, p in ssa.named_parameters() if name.endswith((".a", ".w"))}
    assert grads and all(g.abs().max() > 0 for g in grads.values())
    # what was saved goes on as it was
    again = GPT(ssa.config).eval()
    checkpoint.init_model(again, checkpoint.model_tensors(ssa), "test")
    torch.testing.assert_close(again(tokens())[0], ssa.eval()(tokens())[0])


def test_other_models_do_not_fit():
    ssa = make("ssa")
    with pytest.raises(ValueError, match=r"\+blocks.0.mixer.q_moments.*-blocks.0.mixer.tau"):
        checkpoint.load_model(ssa, checkpoint.model_tensors(make("lln")), "test")
    with pytest.raises(ValueError, match=r"\+blocks.0.mixer.q_moments"):
        checkpoint.init_model(ssa, checkpoint.model_tensors(make("lln")), "test")
