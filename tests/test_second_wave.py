"""Mixers with decays, erasing and windows against their papers' formulas, written out."""
import math

import pytest
import torch
import torch.nn.functional as F

from mixers.parts.convolution import ShortConvolution
from mixers.parts.heads import rotate
from mixers.parts.recurrent_heads import MambaDecay
from model import GPT, GPTConfig

T, C, H = 100, 32, 4
WAVE = ("swa", "gla", "retnet", "mamba2", "deltanet", "gated_deltanet", "kda")


def build(mixer, **options):
    """The mixer of a one-layer float64 model, all of its parameters drawn anew; and x (2, T, C)."""
    torch.manual_seed(0)
    config = dict(vocab_size=11, block_size=128, n_layer=1, n_head=H, n_embd=C, mixer=mixer)
    mixer = GPT(GPTConfig(**config | options)).double().blocks[0].mixer
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return mixer, torch.randn(2, T, C, dtype=torch.float64)


def heads(x, n):
    return x.unflatten(2, (n, -1)).transpose(1, 2)


def head_norm(norm, y):
    return y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def scan(q, k, v, alpha, beta):
    """S = (I - beta k k^T) (alpha * S) + beta k v^T, y = S^T q, with matrices written out.

    q, k (B, H, T, D), v (B, H, T, E), alpha (B, H, T, 1 or D), beta (B, H, T, 1) or None: no
    erasing."""
    D = k.size(-1)
    S = v.new_zeros(*v.shape[:2], D, v.size(-1))
    ys = []
    for t in range(v.size(2)):
        S = alpha[:, :, t, :, None] * S
        key = k[:, :, t, :, None]
        if beta is None:
            S = S + key @ v[:, :, t, None]
        else:
            b = beta[:, :, t, :, None]
            S = (torch.eye(D, dtype=S.dtype) - b * key @ key.mT) @ S + b * key @ v[:, :, t, None]
        ys.append((S.mT @ q[:, :, t, :, None])[..., 0])
    return torch.stack(ys, 2)


def convolved(conv, z):
    """SiLU of PyTorch's own causal depthwise convolution."""
    weight = conv.weight.view(conv.taps, -1).T[:, None]
    padded = F.pad(z.mT, (conv.taps - 1, 0))
    return F.silu(F.conv1d(padded, weight, conv.bias, groups=z.size(2)).mT)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_short_convolution_is_pytorchs():
    conv = ShortConvolution(6, 4, bias=True).double()
    torch.nn.init.normal_(conv.bias)
    z = torch.randn(2, 9, 6, dtype=torch.float64)
    whole, _ = conv(z)
    same(whole, convolved(conv, z))
    state, pieces = None, []
    for piece in z.split([2, 1, 1, 5], 1):  # calls shorter than the taps, too
        u, state = conv(piece, state)
        pieces.append(u)
    same(torch.cat(pieces, 1), whole)
    assert conv.weight.abs().max() <= 0.5  # 1 / sqrt(taps)


def test_gla():
    mixer, x = build("gla", gla_divisor=4.0)
    q, k, v = mixer.c_attn.proj(x).split([C // 2, C // 2, C], 2)
    alpha = heads(mixer.decay_up(mixer.decay_down(x)).sigmoid() ** 0.25, H)
    y = scan(heads(q, H) / math.sqrt(4), heads(k, H), heads(v, H), alpha, None)
    y = head_norm(mixer.norm, y).transpose(1, 2).flatten(2)
    same(mixer(x)[0], mixer.c_proj(y * F.silu(mixer.gate(x))))


def test_retnet_is_the_papers_masked_matrix():
    mixer, x = build("retnet")
    q, k, v = mixer.c_attn.proj(x).split([C // 2, C // 2, C], 2)
    q, k, v = rotate(heads(q, H), 0, 10000.0), rotate(heads(k, H), 0, 10000.0), heads(v, H)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    t = torch.arange(T)
    distance = (t[:, None] - t).clamp(min=0)
    D = torch.where(t[:, None] >= t, gamma[:, None, None] ** distance, 0)
    y = (q @ k.mT / math.sqrt(4) * D) @ v
    y = head_norm(mixer.norm, y).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x)[0], mixer.c_proj(y * F.silu(mixer.gate(x))),
                               rtol=1e-6, atol=1e-6)  # its table of decays is in float32


@pytest.mark.parametrize("negative", [False, True])
def test_deltanet(negative):
    mixer, x = build("deltanet", deltanet_negative=negative)
    q, k, v = (heads(u, H) for u in convolved(mixer.c_attn.conv, mixer.c_attn.proj(x)).chunk(3, 2))
    beta = mixer.beta(x).sigmoid().mT[..., None] * (2 if negative else 1)
    one = torch.ones_like(beta)
    y = scan(unit(q) / math.sqrt(8), unit(k), v, one, beta)
    y = head_norm(mixer.norm, y)
    same(mixer(x)[0], mixer.c_proj(y.transpose(1, 2).flatten(2)))


def test_gated_deltanet():
    mixer, x = build("gated_deltanet")
    z = convolved(mixer.c_attn.conv, mixer.c_attn.proj(x))
    q, k, v = (heads(u, H) for u in z.split([C // 2, C // 2, C], 2))
    dt = F.softplus(mixer.decay_proj(x) + mixer.decay.dt_bias)
    alpha = (-mixer.decay.A_log.exp() * dt).exp().mT[..., None]
    y = scan(unit(q) / math.sqrt(4), unit(k), v, alpha, mixer.beta(x).sigmoid().mT[..., None])
    y = head_norm(mixer.norm, y).transpose(1, 2).flatten(2)
    same(mixer(x)[0], mixer.c_proj(y * F.silu(mixer.gate(x))))


@pytest.mark.parametrize("bounded", [True, False])
def test_kda(bounded):
    mixer, x = build("kda", kda_bounded=bounded)
    q, k, v = (heads(u, H) for u in convolved(mixer.c_attn.conv, mixer.c_attn.proj(x)).chunk(3, 2))
    f = heads(mixer.decay_up(mixer.decay_down(x)) + mixer.dt_bias, H)
    A = mixer.A_log.exp()[:, None, None]
    g = -5 * (A * f).sigmoid() if bounded else -A * F.softplus(f)
    y = scan(unit(q) / math.sqrt(8), unit(k), v, g.exp(), mixer.beta(x).sigmoid().mT[..., None])
    y = head_norm(mixer.norm, y).transpose(1, 2).flatten(2)
    same(mixer(x)[0], mixer.c_proj(y * mixer.gate_up(mixer.gate_down(x)).sigmoid()))


@pytest.mark.parametrize("expand", [1, 2])
def test_mamba2(expand):
    mixer, x = build("mamba2", mamba2_expand=expand, mamba2_state=6)
    inner, n = expand * C, expand * H
    z, xBC = mixer.proj(x).split([inner, inner + 12], 2)
    u, B, C_ = convolved(mixer.conv, xBC).split([inner, 6, 6], 2)
    dt = F.softplus(mixer.dt_proj(x) + mixer.decay.dt_bias)
    alpha = (-mixer.decay.A_log.exp() * dt).exp().mT[..., None]
    u, dt = heads(u, n), dt.mT[..., None]
    k, q = (s[:, None].expand(-1, n, -1, -1) for s in (B, C_))
    y = scan(q, k, dt * u, alpha, None) + mixer.skip[:, None, None] * u
    y = y.transpose(1, 2).flatten(2) * F.silu(z)
    same(mixer(x)[0], mixer.c_proj(head_norm(mixer.norm, y)))


@pytest.mark.parametrize("pos", ["none", "rope"])
@pytest.mark.parametrize("window, sinks", [(1, 0), (7, 0), (7, 3), (99, 0), (128, 2), (5, 200)])
def test_swa_is_masked_attention(window, sinks, pos):
    mixer, x = build("swa", swa_window=window, swa_sinks=sinks, pos=pos)
    q, k, v, _ = mixer.c_attn(x)
    if pos == "rope":
        q, k = rotate(q, 0, 10000.0), rotate(k, 0, 10000.0)
    t = torch.arange(T)
    distance = t[:, None] - t
    seen = (distance >= 0) & ((distance < window) | (t < sinks))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~seen, -math.inf)
    expected = mixer.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    same(mixer(x)[0], expected)
    state, pieces = None, []
    for piece in x.split([1, 2, 1, 40, 1, 55], 1):
        y, state = mixer(piece, state)
        pieces.append(y)
    same(torch.cat(pieces, 1), expected)


def test_swa_reaches_no_further_than_its_windows():
    """L layers of a window W: L (W - 1) tokens back, and a gradient of exactly 0 before that."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=64, n_layer=2, n_head=2, n_embd=16, mixer="swa",
                          swa_window=5, pos="none", bias=False)).double()
    x = torch.randn(1, 30, 16, dtype=torch.float64, requires_grad=True)
    h = x
    for block in model.blocks:
        h, _ = block(h)
    h[0, 20].sum().backward()
    moved = x.grad[0].abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == list(range(12, 21))


def test_half_lives_at_the_start():
    """5, 50 and 95 % of Mamba's decays at the step dt_bias gives: 0.9, 10 and 110 tokens."""
    torch.manual_seed(0)
    g, dt = MambaDecay(100_000, (1, 16))(torch.zeros(100_000))
    half_lives = torch.quantile(math.log(0.5) / g, torch.tensor([0.05, 0.5, 0.95]))
    assert half_lives.tolist() == pytest.approx([0.9, 10, 110], rel=0.15)
    assert 1e-3 * 0.99 <= dt.min() and dt.max() <= 0.1 * 1.01


@pytest.mark.parametrize("mixer", WAVE)
def test_parameters_are_about_those_of_softmax(mixer):
    """At 128 channels and 4 heads within 3 %, but for kda's low-rank maps, which 4 C D = C^2 more
    are."""
    def size(name):
        model = GPT(GPTConfig(vocab_size=11, n_layer=1, n_embd=128, n_head=4, mixer=name))
        return sum(p.numel() for p in model.blocks[0].mixer.parameters())

    ratio = size(mixer) / size("softmax")
    assert ratio == pytest.approx(1.25 if mixer == "kda" else 1, abs=0.06)
