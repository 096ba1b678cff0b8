"""ReGLA against its paper's form, in which a maximum over all positions scales every row."""
import math

import pytest
import torch
import torch.nn.functional as F
from planted import PLANTED
from test_second_wave import C, H, build, heads

from mixers import MIXERS
from mixers.regla import ReGLA, ScaleFreeNorm
from model import GPT, GPTConfig
from training.leaks import find_leak


def decays(mixer, x):
    """F (B, H, T, D) as the paper prints it, but f (2 - f) for 1 - (1 - f)^2, which cancels."""
    def gate(g):
        return heads(g.up(g.down(x)) + g.bias, H).sigmoid()

    f, r = gate(mixer.forget), gate(mixer.refine)
    return (1 - r) * f**2 + r * f * (2 - f)


def published_rows(q, k, v, decay):
    """S^T phi(q) (B, H, T, E), token after token; phi(k) relative to the largest key of all."""
    phi_q = (q - q.amax(3, keepdim=True)).exp()
    phi_k = (k - k.amax((2, 3), keepdim=True)).exp()
    S, ys = 0, []
    for t in range(q.size(2)):
        S = decay[:, :, t, :, None] * S + phi_k[:, :, t, :, None] * v[:, :, t, None]
        ys.append((S.mT @ phi_q[:, :, t, :, None])[..., 0])
    return torch.stack(ys, 2)


def projected(mixer, x):
    q, k, v = mixer.c_attn.proj(x).split([C // 2, C // 2, C], 2)
    return heads(q, H), heads(k, H), heads(v, H)


def normed(y, eps):
    return y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()


@pytest.mark.parametrize("size", [1, 10])  # of the inputs: keys of up to 3, or up to 30
def test_regla_is_the_papers_form_without_eps(size):
    """... in every row: what the published maximum does to one is a scale."""
    mixer, x = build("regla")
    x = size * x
    q, k, v = projected(mixer, x)
    rows = published_rows(q, k, v, decays(mixer, x))
    own, _ = mixer.attend(q, k, v, mixer.log_decay(x), None)
    torch.testing.assert_close(normed(own, 0), normed(rows, 0), rtol=1e-9, atol=1e-9)
    y = (normed(rows, 0) * mixer.norm.weight).transpose(1, 2).flatten(2)
    expected = mixer.c_proj(y * F.silu(mixer.gate(x)))
    # our eps of 1e-5 beside a mean square of 1 / E = 1 / 8 at least
    assert (mixer(x)[0] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_published_maximum_changes_earlier_rows():
    """By the norm's eps alone, and by a lot: a last key 30 nats larger."""
    mixer, x = build("regla")
    q, k, v = projected(mixer, x)
    later = k.clone()
    later[:, :, -1] += 30
    log_F = mixer.log_decay(x)
    published, ours = [], []
    for keys in (k, later):
        published.append(normed(published_rows(q, keys, v, decays(mixer, x)), 1e-6)[:, :, :-1])
        ours.append(mixer.norm(mixer.attend(q, keys, v, log_F, None)[0])[:, :, :-1])
    assert (published[0] - published[1]).abs().max() > 1
    assert torch.equal(ours[0], ours[1])


def test_the_published_maximum_is_refused_by_training(monkeypatch):
    monkeypatch.setitem(MIXERS, "published", PLANTED["published_maximum"][0])
    for mixer, leaks in (("published", True), ("regla", False)):
        torch.manual_seed(0)
        sizes = dict(vocab_size=31, block_size=64, n_layer=2, n_head=4, n_embd=32)
        found = find_leak(GPT(GPTConfig(**sizes, mixer=mixer)), torch.float32)
        assert bool(found) == leaks, found


def test_log_decay_is_accurate_where_the_formula_is_not():
    """Over logits of +-40, also where f rounds to 0 or 1 in float32."""
    f, r = torch.meshgrid(*[torch.linspace(-40, 40, 81, dtype=torch.float64)] * 2, indexing="ij")
    mixer = ReGLA.__new__(ReGLA)
    torch.nn.Module.__init__(mixer)
    mixer.c_attn = torch.nn.Module()
    mixer.c_attn.heads = 1, 1
    exact = torch.special.expit  # 1 - expit(x) is expit(-x), to all digits
    log_F = torch.log(exact(f)) + torch.log(exact(f) + 2 * exact(r) * exact(-f))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        mixer.forget, mixer.refine = lambda x: f[None].to(dtype), lambda x: r[None].to(dtype)
        found = mixer.log_decay(None)[0, 0].double()
        assert (found <= 0).all()
        # what rounds away beside 1 is below the last digit of F
        torch.testing.assert_close(found, log_F.clamp(max=0), rtol=tolerance, atol=tolerance / 10)


def test_a_huge_key_that_is_forgotten_leaves_the_others():
    """A first key 150 nats larger than all others, which float32 cannot hold beside them, and gates
    that have forgotten it after 40 tokens."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 80, n, dtype=torch.float64) for n in (4, 4, 6))
    k[:, :, 0] += 150
    log_F = torch.full_like(k, -5.0)
    mixer = build("regla")[0]
    exact = normed(published_rows(q, k, v, log_F.exp()), 0)
    found = []
    for dtype in (torch.float64, torch.float32):
        y, _ = mixer.attend(*(t.to(dtype) for t in (q, k, v, log_F)), None)
        found.append(normed(y.double(), 0))
    torch.testing.assert_close(found[0], exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", [0.02, 5.0, 30.0])
def test_float32_holds_over_long_texts(rate):
    """The references come from sums of all decays, to -90,000 here; what that rounds cancels."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 3000, n, dtype=torch.float64) for n in (4, 4, 6))
    log_F = -2 * rate * torch.rand_like(k)
    attend = build("regla")[0].attend
    exact, _ = attend(q, k, v, log_F, None)
    found, _ = attend(*(t.float() for t in (q, k, v, log_F)), None)
    assert (normed(found.double(), 0) - normed(exact, 0)).abs().max() < 1e-5


def test_gradients_are_those_of_the_function():
    """The references m carry none; finite differences do not know that."""
    mixer, norm = build("regla")[0], ScaleFreeNorm(2).double()
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 1, 6, n, dtype=torch.float64) for n in (3, 3, 2))
    inputs = [t.requires_grad_() for t in (q, k, v, -torch.rand(1, 1, 6, 3, dtype=torch.float64))]

    def two_calls(q, k, v, log_F):
        first, state = mixer.attend(*(t[:, :, :2] for t in (q, k, v, log_F)), None)
        second, _ = mixer.attend(*(t[:, :, 2:] for t in (q, k, v, log_F)), state)
        return norm(torch.cat([first, second], 2))

    assert torch.autograd.gradcheck(two_calls, inputs)
    assert torch.autograd.gradcheck(lambda *args: norm(mixer.attend(*args, None)[0]), inputs)


def test_the_start_of_the_gates():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=11, n_layer=1, n_embd=128, n_head=4, init_std=0.02,
                       mixer="regla")
    mixer = GPT(config).blocks[0].mixer
    g = mixer.log_decay(torch.randn(2, 50, 128))
    assert (math.log(0.5) / g).median().item() == pytest.approx(38, rel=0.05)
