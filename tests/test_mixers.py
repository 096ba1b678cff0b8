"""What every registered mixer must hold, alone and in a model: a new one is tested by being
registered."""
import pytest
import torch

from mixers import MIXERS, layer_mixers
from model import GPT, GPTConfig
from tools.audit_state import tensors

T = 130  # no multiple of anything a mixer cuts time into, and longer than each
SKELETONS = {
    "gpt2": dict(),
    "llama": dict(arch="llama", n_kv_head=2),
    "reduction-ffn": dict(mlp_activation="causal_max_context", pos="none", bias=True),
}


def make(mixer, skeleton="gpt2", **options):
    """A small float64 model whose parameters are all drawn anew, so that nothing is zero or one by
    its initialisation."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, block_size=192, n_layer=2, n_head=4, n_embd=32)
    config = GPTConfig(**sizes | dict(mixer=mixer) | SKELETONS[skeleton] | options)
    model = GPT(config).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def tokens(rows=2, n=T):
    return torch.randint(31, (rows, n), generator=torch.Generator().manual_seed(1))


every_mixer = pytest.mark.parametrize("mixer", sorted(MIXERS))
every_skeleton = pytest.mark.parametrize("skeleton", SKELETONS)
SPLITS = [[64, 66], [7, 1, 1, 9, 1, 90, 21], [104] + [1] * 26]


@every_mixer
@every_skeleton
@pytest.mark.parametrize("training", [False, True])
def test_no_logit_sees_a_later_token(mixer, skeleton, training):
    model, idx = make(mixer, skeleton).train(training), tokens()
    before, _ = model(idx)
    for t in (1, 2, 7, 8, 9, 43, 44, 45, 63, 64, 65, 88, 127, 128, T - 1):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1 + t) % 31
        after, _ = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, t], before[:, t])


@every_mixer
@every_skeleton
def test_no_gradient_from_a_later_token(mixer, skeleton):
    model, idx = make(mixer, skeleton), tokens(rows=1)
    h = {}
    def keep(module, args, out):
        out.retain_grad()
        h["x"] = out

    model.drop.register_forward_hook(keep)
    logits = model(idx)[0]
    for t in (0, 7, 8, 43, 44, 63, 64, T - 2):
        h["x"].grad = None
        logits[0, t].sum().backward(retain_graph=True)
        assert h["x"].grad[0, t + 1:].abs().max() == 0
        assert h["x"].grad[0, t].abs().max() > 0


@every_mixer
def test_rows_do_not_see_each_other(mixer):
    model, idx = make(mixer).train(), tokens(rows=3)
    whole = model(idx)[0]
    changed = torch.cat([idx[:1], (idx[1:] + 5) % 31])
    torch.testing.assert_close(model(changed)[0][0], whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(idx[:1])[0][0], whole[0], rtol=0, atol=1e-12)


@every_mixer
@every_skeleton
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "+".join(map(str, split[:8])))
def test_any_split_gives_the_whole_forward_and_backward(mixer, skeleton, split):
    model, idx = make(mixer, skeleton), tokens()
    targets = idx.roll(-1, 1)
    whole, loss = model(idx, targets)
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    state, parts = None, []
    for part in idx.split(split, dim=1):
        logits, state = model.step(part, state)
        parts.append(logits)
    stepped = torch.cat(parts, dim=1)
    torch.testing.assert_close(stepped, whole, rtol=0, atol=1e-11)
    loss = torch.nn.functional.cross_entropy(stepped.flatten(0, 1), targets.flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for (name, _), g, e in zip(model.named_parameters(), grads, expected):
        assert (g is None) == (e is None), name
        if g is not None:
            assert (g - e).abs().max() <= 1e-10, name


@every_mixer
@pytest.mark.parametrize("gradients", [False, True])
def test_a_state_never_changes(mixer, gradients):
    model, idx = make(mixer), tokens()
    with torch.set_grad_enabled(gradients):
        _, early = model.step(idx[:, :10])
        kept = [t.clone() for t in tensors(early)]
        first, middle = model.step(idx[:, 10:12], early)
        for other in (idx[:, 20:23], idx[:, 30:31]):  # other continuations, also of a later state
            model.step(other, early)
            model.step(other, middle)
        again, _ = model.step(idx[:, 10:12], early)
    assert torch.equal(again, first)
    assert all(torch.equal(a, b) for a, b in zip(tensors(early), kept))


@every_mixer
def test_shapes_and_single_tokens(mixer):
    model = make(mixer)
    for rows, n in ((1, 1), (3, 1), (1, 2), (2, 64)):
        logits, state = model.step(tokens(rows, n))
        assert logits.shape == (rows, n, 31) and state.n == n
    if MIXERS[mixer]:
        x = torch.randn(2, 5, 32, dtype=torch.float64)
        assert model.blocks[0].mixer(x)[0].shape == x.shape


@every_mixer
@every_skeleton
def test_every_parameter_learns(mixer, skeleton):
    model = make(mixer, skeleton)
    model.loss(tokens(), tokens().roll(-1, 1)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, f"{name} gets no gradient"


@every_mixer
def test_parameter_groups_add_up(mixer):
    model = make(mixer, tie_head=False)
    groups = model.parameter_groups()
    assert sum(groups.values()) == sum(p.numel() for p in model.parameters())
    mixer_only = sum(p.numel() for mixer in model.mixers() for p in mixer.parameters())
    assert groups["mixer"] == mixer_only and groups["head"] == 31 * 32
    assert groups["embedding"] == 31 * 32 + 192 * 32


def test_parameter_counts_at_the_laptop_size():
    def count(mixer):
        model = GPT(GPTConfig(vocab_size=65, mixer=mixer, bias=False))
        return sum(p.numel() for p in model.parameters())
    C, F, V, N, L = 128, 512, 65, 64, 4
    embedding = V * C + N * C + C  # and the last norm
    ffn = L * (2 * C * F + C)  # with the norm before
    assert count("softmax") == embedding + ffn + L * (4 * C * C + C)
    assert count("causal_max") == count("causal_mean_context") == embedding + ffn + L * (C * C + C)
    assert count("pelican") == embedding + ffn


@every_mixer
def test_bfloat16_under_autocast_stays_close_to_float64(mixer):
    model, idx = make(mixer), tokens()
    exact = model(idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.float()(idx)[0].double()
    # bfloat16 keeps 8 bits: a few per cent after two layers
    assert (rough - exact).abs().max() < 0.15 * exact.abs().max()


def test_patterns_over_layers():
    expected = ["softmax", "pelican", "softmax", "pelican", "softmax"]
    assert layer_mixers("softmax,pelican", 5) == expected
    assert layer_mixers("softmax+pelican", 2) == layer_mixers("softmax, pelican", 2)
    model = make("softmax,pelican,causal_max", n_layer=3)
    kinds = [type(b.mixer).__name__ for b in model.blocks]
    assert kinds == ["Softmax", "NoneType", "CausalReduction"]
    assert model.config.head_temperature == 1.0
    with pytest.raises(ValueError, match="'foo'; have .*causal_max.*softmax"):
        layer_mixers("softmax,foo", 2)


def slow_reduction(x, op, context):
    """The equations of the paper, one position after the other. x (T, C)."""
    out = []
    for t in range(len(x)):
        seen = [x[t], x[max(t - 1, 0)]] + ([x[:t + 1].mean(0)] if context else [])
        stacked = torch.stack(seen)
        out.append({"max": stacked.amax(0), "min": stacked.amin(0), "mean": stacked.mean(0)}[op])
    return torch.stack(out)


@pytest.mark.parametrize("op", ["max", "min", "mean"])
@pytest.mark.parametrize("context", [False, True])
def test_causal_reduction_is_the_papers(op, context):
    mixer = make(f"causal_{op}" + ("_context" if context else "")).blocks[0].mixer
    x = torch.randn(2, T, 32, dtype=torch.float64)
    expected = mixer.c_proj(torch.stack([slow_reduction(row, op, context) for row in x]))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-12)


def test_the_papers_whole_sequence_mean_would_be_caught():
    """The leak in the reference code, planted into our mixer, fails the causality test above."""
    class Leaky(torch.nn.Module):
        def forward(self, x, state=None):
            return torch.maximum(x, x.mean(1, keepdim=True)), state

    MIXERS["leaky"] = lambda config, layer: Leaky()
    try:
        with pytest.raises(AssertionError):
            test_no_logit_sees_a_later_token("leaky", "gpt2", False)
        with pytest.raises(AssertionError):
            test_no_gradient_from_a_later_token("leaky", "gpt2")
    finally:
        del MIXERS["leaky"]


def slow_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v row by row. q, k, v (T, D)."""
    out = []
    for t in range(len(q)):
        weights = (q[t] @ k[:t + 1].T / q.size(1) ** 0.5).softmax(0)
        out.append(weights @ v[:t + 1])
    return torch.stack(out)


def test_softmax_is_plain_attention():
    mixer = make("softmax").blocks[0].mixer
    x = torch.randn(1, T, 32, dtype=torch.float64)
    q, k, v, _ = mixer.c_attn(x)
    heads = torch.stack([slow_attention(q[0, h], k[0, h], v[0, h]) for h in range(4)])  # (H, T, D)
    expected = mixer.c_proj(heads.transpose(0, 1).flatten(1))
    torch.testing.assert_close(mixer(x)[0][0], expected, rtol=0, atol=1e-12)
