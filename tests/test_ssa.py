"""Selective self-attention: terms and switches, size, and its start from a softmax model."""
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
@pytest.mark.parametrize("position", ["authors", "paper"])
def test_ssa_is_softmax_on_scaled_queries_keys_and_values(share, per_head, position):
    model = make("ssa", ssa_share=share, ssa_per_head=per_head, ssa_position=position, **ON)
    mixer = model.blocks[0].mixer
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    vectors = dict(zip("qkv", mixer.c_attn(x)))
    for name, tau in mixer.tau.items():
        if position == "authors":
            c = (-tau.b.exp()).exp()
        else:
            c = tau.a.sigmoid()
        u = vectors[name][0].clone()  # (H, T, D)
        for t in range(20):
            for h in range(4):
                row = h if per_head else 0
                if not share:
                    features = tau.hidden(x[0, t])
                elif per_head:
                    features = u[h, t]
                else:
                    features = vectors[name][0, :, t].flatten()
                f = torch.nn.functional.gelu(features) @ tau.w.view(tau.outputs, -1)[row]
                u[h, t] *= 1 + f.tanh() + c[row] * math.log(t + 1)
        vectors[name] = u[None]
    q, k, v = (vectors[name] for name in "qkv")
    later = torch.ones(20, 20, dtype=torch.bool).triu(1)
    y = (q @ k.mT / math.sqrt(8)).masked_fill(later, -math.inf).softmax(-1) @ v
    expected = mixer.c_proj(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("skeleton", ["gpt2", "llama"])
def test_with_every_switch_off_it_is_softmax(skeleton):
    softmax, ssa = make("softmax", skeleton), make("ssa", skeleton, **OFF)
    ssa.load_state_dict(softmax.state_dict())
    assert torch.equal(ssa(tokens())[0], softmax(tokens())[0])


def test_sharing_adds_under_half_a_per_cent():
    def count(**options):
        model = GPT(GPTConfig(vocab_size=65, bias=False, **options))
        return sum(p.numel() for p in model.parameters())

    plain, shared = count(mixer="softmax"), count(mixer="ssa")
    own = count(mixer="ssa", ssa_share=False)
    new = 4 * (128 + 128 + 1)  # layers x (w_q, w_v, b)
    assert shared - plain == new and new / plain < 0.005
    assert own - plain == 4 * (2 * (32 * 128 + 32) + 1)
    assert count(mixer="ssa", ssa_per_head=True, **ON) / plain - 1 < 0.005


@pytest.mark.parametrize("position", ["authors", "paper"])
def test_start_values(position):
    config = GPTConfig(vocab_size=31, mixer="ssa", ssa_position=position)
    mixer = GPT(config).blocks[0].mixer
    x, u = torch.randn(1, 5, 128), torch.randn(1, 4, 5, 32)
    tau = mixer.tau["q"](x, u, 0)
    start = math.exp(-math.exp(1.5))  # 0.0113
    torch.testing.assert_close(tau[0, 0, :, 0], 1 + start * torch.arange(1, 6).log())
    assert (mixer.tau["v"](x, u, 0) == 1).all()
    assert "k" not in mixer.tau


def test_the_authors_form_moves_faster_from_the_same_start():
    def gradient(position, name):
        config = GPTConfig(vocab_size=31, mixer="ssa", ssa_position=position)
        tau = GPT(config).blocks[0].mixer.tau["q"]
        tau.c().sum().backward()
        return getattr(tau, name).grad.abs().item()
    assert gradient("authors", "b") / gradient("paper", "a") == pytest.approx(4.5, rel=0.02)


def test_a_checkpoint_of_another_position_term_is_refused_by_name():
    """Also one from before there were two: it has an `a` too."""
    old = make("ssa", ssa_position="paper")
    named = r"\+blocks.0.mixer.tau.q.a.*-blocks.0.mixer.tau.q.b"
    with pytest.raises(ValueError, match=named):
        checkpoint.load_model(make("ssa"), checkpoint.model_tensors(old), "test")
    with pytest.raises(ValueError, match=named):
        checkpoint.init_model(make("ssa"), checkpoint.model_tensors(old), "test")


NEUTRAL = [
    {}, ON, dict(ssa_share=False, ssa_per_head=True), dict(ssa_position="paper"),
    dict(ssa_position="paper", ssa_per_head=True, **ON),
]


@pytest.mark.parametrize("options", NEUTRAL)
def test_weights_of_a_softmax_model_start_unchanged(options):
    softmax = make("softmax").float()
    torch.manual_seed(3)
    sizes = dict(vocab_size=31, block_size=192, n_layer=2, n_head=4, n_embd=32)
    ssa = GPT(GPTConfig(**sizes, mixer="ssa", **options)).eval()
    plain = GPT(ssa.config)
    checkpoint.init_model(ssa, checkpoint.model_tensors(softmax), "test")
    assert torch.equal(ssa(tokens())[0], softmax(tokens())[0])  # c is 0, not nearly
    ssa.train().loss(tokens(), tokens().roll(-1, 1)).backward()
    learned = (".a", ".b", ".w")
    grads = {name: p.grad for name, p in ssa.named_parameters() if name.endswith(learned)}
    assert grads and all(g.abs().max() > 0 for g in grads.values())
    # c's gradient is the one it has without the offset
    for tuned, new in zip(ssa.blocks[0].mixer.tau.values(), plain.blocks[0].mixer.tau.values()):
        if tuned.position:
            name = "b" if tuned.form == "authors" else "a"
            a, b = (torch.autograd.grad(t.c().sum(), getattr(t, name))[0] for t in (tuned, new))
            assert torch.equal(a, b)
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
