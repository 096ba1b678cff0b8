"""Options that some mixers take, or all: the short convolution before every mixer with queries,
keys and values, the temperature of softmax attention, blocks without norms."""
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY
from test_costs import counted, largest_states, masked_half
from test_mixers import make, tokens
from test_second_wave import convolved

from mixers import MIXERS, mixers_with
from mixers.lln_diag import block_attention
from mixers.parts.convolution import ShortConvolution
from mixers.parts.heads import rotate
from model import GPTConfig
from tools.inspect_attention import attention_matrix
from training.device import ready_to_decode
from training.optimizer import hidden_matrices

WITH_CONV = sorted(mixers_with("conv"))
OF_SOFTMAX = sorted(mixers_with("attn_temperature"))
every_conv = pytest.mark.parametrize("conv", [0, 4])
every_mixer = pytest.mark.parametrize("mixer", WITH_CONV)
LLAMA = dict(arch="llama", n_kv_head=2)


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, ShortConvolution)]


# The short convolution ---------------------------------------------------------------------------

def test_every_mixer_with_queries_keys_and_values_takes_it():
    without = {"pelican"} | {name for name in MIXERS if name.startswith("causal_")}
    assert set(WITH_CONV) == set(MIXERS) - without
    assert {"softmax", "lln", "gla", "kda"} <= set(WITH_CONV)


@pytest.mark.parametrize("conv", [0, 4])
def test_it_is_refused_where_it_would_do_nothing(conv):
    for mixer in ("pelican", "causal_max", "pelican,causal_mean"):
        with pytest.raises(ValueError, match="conv has no effect: no layer .* is softmax, .* or "):
            GPTConfig(vocab_size=3, mixer=mixer, conv=conv)
    assert GPTConfig(vocab_size=3, mixer="pelican,lln", conv=conv).conv == conv
    with pytest.raises(ValueError, match="conv"):
        GPTConfig(vocab_size=3, conv=-1)
    with pytest.raises(ValueError, match="conv"):
        GPTConfig(vocab_size=3, conv=65)


@every_mixer
def test_taps_are_those_asked_for_and_not_decayed(mixer):
    own = {m.taps for m in convolutions(make(mixer))}
    assert own in (set(), {4})
    for conv in (0, 1, 3):
        model = make(mixer, conv=conv)
        assert [m.taps for m in convolutions(model)] == [conv] * (2 if conv else 0)
        plain = sum(p.numel() for p in make(mixer, conv=0).parameters())
        taps = sum(p.numel() for m in convolutions(model) for p in m.parameters())
        assert sum(p.numel() for p in model.parameters()) == plain + taps
        for p in (p for m in convolutions(model) for p in m.parameters()):
            assert p.dim() == 1  # weight decay is on matrices only
            assert all(p is not matrix for matrix in hidden_matrices(model))  # and so is Muon


def test_softmax_behind_it_is_attention_on_convolved_projections():
    mixer = make("softmax", conv=3, pos="none").blocks[0].mixer
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    z = convolved(mixer.c_attn.conv, mixer.c_attn.proj(x))
    q, k, v = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in z.chunk(3, 2))
    later = torch.ones(50, 50, dtype=torch.bool).triu(1)
    weights = (q @ k.mT / 8 ** 0.5).masked_fill(later, -torch.inf).softmax(-1)
    expected = mixer.c_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-12)
    P = attention_matrix(mixer, x[:1])[0]  # what inspect_attention shows is behind it too
    torch.testing.assert_close(P, weights[0], rtol=0, atol=1e-12)


@every_mixer
def test_queries_keys_and_values_come_through_it(mixer):
    """With a convolution that passes SiLU(z_t) alone, a mixer whose own has SiLU is what it is
    without; and one that passes z_{t-1} instead is another."""
    options = dict(pos="none", n_layer=1)
    one, none = make(mixer, conv=2, **options), make(mixer, conv=0, **options)
    own = convolutions(make(mixer, **options))
    none.load_state_dict({name: t for name, t in one.state_dict().items() if "conv" not in name})
    [conv] = convolutions(one)
    taps = conv.weight.data.view(2, -1)
    if conv.bias is not None:
        conv.bias.data.zero_()
    taps[0], taps[1] = 0, 1
    same = one(tokens(n=20))[0]
    assert torch.allclose(same, none(tokens(n=20))[0], rtol=0, atol=1e-12) == bool(own)
    taps[0], taps[1] = 1, 0
    assert not torch.allclose(same, one(tokens(n=20))[0])


@every_mixer
@every_conv
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_any_split_gives_the_whole_and_nothing_sees_later_tokens(mixer, conv, options):
    model, idx = make(mixer, conv=conv, **options), tokens(n=80)
    whole, loss = model(idx, idx.roll(-1, 1))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    state, parts = None, []
    for part in idx.split([1, 2, 61, 1, 15], dim=1):  # calls shorter than the taps, too
        logits, state = model.step(part, state)
        parts.append(logits)
    stepped = torch.cat(parts, dim=1)
    torch.testing.assert_close(stepped, whole, rtol=0, atol=1e-11)
    loss = F.cross_entropy(stepped.flatten(0, 1), idx.roll(-1, 1).flatten())
    for g, e in zip(torch.autograd.grad(loss, list(model.parameters())), expected):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-10)
    for t in (2, 43, 64):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 31
        after = model(changed)[0]
        torch.testing.assert_close(after[:, :t], whole[:, :t], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, t], whole[:, t])


@every_mixer
@every_conv
@pytest.mark.parametrize("way", ["float32", "autocast", "packed"])
def test_state_bytes_are_those_of_the_largest_state(mixer, conv, way, monkeypatch):
    monkeypatch.setattr("test_costs.LENGTHS", (1, 2, 7, 63, 65))
    dtype = torch.float32 if way == "float32" else torch.bfloat16
    model = make(mixer, n_layer=1, conv=conv).float()
    if way == "packed":
        model = ready_to_decode(model, dtype)
    real = largest_states(model, dtype, autocast=way != "float32")
    assert {T: model.state_bytes(T, dtype) for T in real} == real
    plain = make(mixer, n_layer=1, conv=0).state_bytes(64, dtype)
    channels = sum(m.channels for m in convolutions(model))
    assert model.state_bytes(64, dtype) - plain == 3 * channels * dtype.itemsize


@every_mixer
@every_conv
def test_flops_are_those_counted(mixer, conv):
    T = 128
    model = make(mixer, n_layer=1, block_size=256, conv=conv)
    taps = sum(m.flops_per_token() for m in convolutions(model))
    assert taps == sum(2 * conv * m.channels for m in convolutions(model))
    # the counter sees no taps, and what a mask throws away
    expected = model.flops_per_token(T) - taps + masked_half(mixer, T)
    assert counted(model, T) == pytest.approx(expected, rel=0.01)


def test_hybrids_have_it_in_all_layers_that_can():
    model, idx = make("kda,pelican,softmax", conv=2, n_layer=3), tokens(n=40)
    assert [m.taps for m in convolutions(model)] == [2, 2]
    whole, state = model(idx)[0], None
    for i in range(40):
        logits, state = model.step(idx[:, i:i + 1], state)
        torch.testing.assert_close(logits[:, 0], whole[:, i], rtol=0, atol=1e-11)


# attn_temperature --------------------------------------------------------------------------------

def test_the_softmax_family_takes_a_temperature_and_no_other_mixer():
    assert set(OF_SOFTMAX) == {"softmax", "swa", "ssa", "linformer", "lln_diag", "toptheta"}
    for mixer in sorted(set(MIXERS) - set(OF_SOFTMAX)):
        with pytest.raises(ValueError, match="attn_temperature has no effect: no layer of mixer"):
            GPTConfig(vocab_size=3, mixer=mixer, attn_temperature=0.7)
    with pytest.raises(ValueError, match="attn_temperature"):
        GPTConfig(vocab_size=3, attn_temperature=0.0)


@pytest.mark.parametrize("mixer", ["softmax", "swa", "linformer", "ssa", "toptheta"])
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_a_temperature_divides_the_queries(mixer, options):
    """tau = 0.5 is the query projection twice as large. SSA's token term, which reads the
    projection, is off; its own test is the next one."""
    if mixer == "ssa":
        options = options | dict(ssa_query_token=False)
    cool = make(mixer, attn_temperature=0.5, **options)
    plain, idx = make(mixer, **options), tokens()
    assert not torch.allclose(cool(idx)[0], plain(idx)[0])
    for block in plain.blocks:
        for p in block.mixer.c_attn.proj.parameters():
            p.data[:32] *= 2
    expected, state = plain(idx)[0], None
    torch.testing.assert_close(cool(idx)[0], expected, rtol=0, atol=1e-11)
    for part, logits in zip(idx.split([70, 1, 59], 1), expected.split([70, 1, 59], 1)):
        y, state = cool.step(part, state)
        torch.testing.assert_close(y, logits, rtol=0, atol=1e-11)


def test_ssas_own_temperature_does_not_see_it():
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    seen = []
    for temperature in (1.0, 0.5):
        mixer = make("ssa", attn_temperature=temperature).blocks[0].mixer
        mixer.tau["q"].register_forward_hook(lambda module, args, tau: seen.append(tau))
        mixer(x)
    assert torch.equal(*seen)


def test_lln_diag_divides_the_queries_of_its_softmax_alone():
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    cool = make("lln_diag", attn_temperature=0.5).blocks[0].mixer
    plain = make("lln_diag").blocks[0].mixer
    q, k, v, _ = plain.c_attn(x)
    change = block_attention(2 * q, k, v, 0) - block_attention(q, k, v, 0)
    expected = F.linear(0.5 * change.transpose(1, 2).flatten(2), plain.c_proj.weight)
    torch.testing.assert_close(cool(x)[0] - plain(x)[0], expected, rtol=0, atol=1e-12)


def evaluated(text):
    [loss] = re.findall("val loss ([0-9.]+)", text)
    return float(loss)


def test_a_run_is_evaluated_at_another_temperature_and_trained_at_none(train, trained, run_folder):
    plain = train("--eval_only", f"--out_dir={run_folder}")
    cool = train("--eval_only", f"--out_dir={run_folder}", "--attn_temperature=0.01")
    assert evaluated(plain) != evaluated(cool)
    assert "attn_temperature 1.0 -> 0.01" in cool
    config = json.loads(Path(run_folder, "config.json").read_text())
    assert config["attn_temperature"] == 1.0
    line = train.refuses("--resume", "--max_iters=30", f"--out_dir={run_folder}",
                         "--attn_temperature=0.5", unchanged=Path(run_folder, "checkpoints"))
    assert "attn_temperature 1.0 -> 0.5" in line
    line = train.refuses("--eval_only", f"--out_dir={run_folder}", "--conv=4")
    assert "conv None -> 4" in line
    line = train.refuses("--eval_only", f"--out_dir={run_folder}", "--mixer=lln",
                         "--attn_temperature=0.5")
    assert "attn_temperature has no effect" in line


# rotate_features ---------------------------------------------------------------------------------

@pytest.mark.parametrize("mixer", sorted(mixers_with("rotate_features")))
def test_rotated_features_are_the_mixer_on_rotated_queries_and_keys(mixer):
    """Against a c_attn that rotates what it returns, on a whole sequence; then in pieces."""
    rotated = make(mixer, rotate_features=True, **LLAMA)
    plain, idx = make(mixer, **LLAMA | dict(pos="none")), tokens()
    for block in plain.blocks:
        def hook(module, args, out):
            q, k, v, state = out
            return rotate(q, 0, 10000.0), rotate(k, 0, 10000.0), v, state
        block.mixer.c_attn.register_forward_hook(hook)
    whole, state = rotated(idx)[0], None
    torch.testing.assert_close(whole, plain(idx)[0], rtol=0, atol=1e-11)
    assert not torch.allclose(whole, make(mixer, **LLAMA)(idx)[0])
    sizes = [70, 1, 59]
    for part, logits in zip(idx.split(sizes, 1), whole.split(sizes, 1)):
        y, state = rotated.step(part, state)
        torch.testing.assert_close(y, logits, rtol=0, atol=1e-11)


def test_rotated_features_are_for_those_that_rotate_nothing_themselves():
    assert mixers_with("rotate_features") == ["lln", "lln_diag", "linear"]
    with pytest.raises(ValueError, match="rotate_features has no effect"):
        GPTConfig(vocab_size=3, mixer="swa", pos="rope", rotate_features=True)
    with pytest.raises(ValueError, match="rotate_features needs pos 'rope', not 'learned'"):
        GPTConfig(vocab_size=3, mixer="lln", rotate_features=True)


# Norms and activations ---------------------------------------------------------------------------

@pytest.mark.parametrize("arch, own", [("gpt2", nn.LayerNorm), ("llama", nn.RMSNorm)])
def test_norms_follow_the_architecture_or_the_option(arch, own):
    kinds = {None: own, "layer": nn.LayerNorm, "rms": nn.RMSNorm, "none": nn.Identity}
    for norm, kind in kinds.items():
        model = make("softmax,pelican", arch=arch, norm=norm)
        found = [type(m) for block in model.blocks for m in (block.norm1, block.norm2)]
        assert found == [kind, kind, type(None), kind]
        assert type(model.norm) is (own if norm == "none" else kind)
        assert model.config.norm == {nn.LayerNorm: "layer", nn.RMSNorm: "rms",
                                     nn.Identity: "none"}[kind]
        assert model.norm.eps == (1e-6 if arch == "llama" else 1e-5)


@pytest.mark.parametrize("activation, slope", [("relu", 0.0), ("leaky_relu", 0.1)])
def test_a_block_without_norms_and_with_relu_is_the_papers(activation, slope):
    model = make("softmax", norm="none", mlp_activation=activation)
    block = model.blocks[0]
    h = torch.randn(2, 9, 32, dtype=torch.float64)
    middle = h + block.mixer(h)[0]
    z = block.mlp.c_fc(middle)
    expected = middle + block.mlp.c_proj(torch.where(z > 0, z, slope * z))
    torch.testing.assert_close(block(h)[0], expected, rtol=0, atol=1e-12)
    gated = make("softmax", arch="llama", mlp_activation=activation).blocks[0].mlp
    gate, up = gated.c_fc(h).chunk(2, -1)
    expected = gated.c_proj(torch.where(gate > 0, gate, slope * gate) * up)
    torch.testing.assert_close(gated(h)[0], expected, rtol=0, atol=1e-12)
    model.loss(tokens(), tokens().roll(-1, 1)).backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_a_model_without_norms_trains_and_samples(train, sample):
    train(*TINY, "--norm=none", "--mlp_activation=relu", "--conv=3", "--max_iters=2",
          "--out_dir=run")
    config = json.loads(Path("run/config.json").read_text())
    assert (config["norm"], config["mlp_activation"], config["conv"]) == ("none", "relu", 3)
    sample("--out_dir=run", "--num_samples=1", "--max_new_tokens=5")
    assert "norm none -> layer" in train.refuses(*TINY, "--resume", "--norm=layer",
                                                 "--max_iters=3", "--out_dir=run")
