"""tools/inspect_attention.py: measures on matrices whose values are known, matrices against their
formulas, the whole command."""
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, run
from safetensors.numpy import load_file
from scipy import stats
from test_mixers import make, tokens
from test_second_wave import scan

from data.tokenizer import CharTokenizer
from mixers import MIXERS
from mixers.linear import log_elu_plus_one
from mixers.parts.heads import QKV, repeat_heads, rotate
from mixers.performer import log_features
from model import GPT, GPTConfig
from tools import inspect_attention
from tools import inspect_measures as measures
from tools import inspect_plots as attention_pictures
from tools.inspect_attention import (NoMatrix, attention_matrix, gates, influence, inspect,
                                     is_stochastic, log_decay, model_influence, reach)
from training import checkpoint

every_mixer = pytest.mark.parametrize("mixer", sorted(MIXERS))
WITH_MATRIX = {"softmax", "ssa", "lln", "lln_diag", "linear", "performer", "swa", "toptheta"}
SIGNED = {"gla", "retnet", "mamba2", "deltanet", "gated_deltanet", "kda", "regla"}
# others may go either way
WITHOUT_MATRIX = {"pelican", *(name for name in MIXERS if name.startswith("causal_"))}
NAME = "tools.inspect_attention"


# Measures -----------------------------------------------------------------------------------------

T = 9
UNIFORM, IDENTITY = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None], np.eye(T)
PREVIOUS = np.eye(T, k=-1) + np.eye(T) * (np.arange(T) == 0)
FIRST = np.zeros((T, T)) + (np.arange(T) == 0)


def random_matrix(T, seed=0):
    return np.exp(np.random.default_rng(seed).normal(size=(T, T))) * np.tri(T)


def rank_of_previous(T):
    """Column 0 twice, every other but the last once: one singular value sqrt(2), T - 2 of 1."""
    total = T - 2 + 2**0.5
    return math.exp(math.log(total) - 2**0.5 / total * math.log(2) / 2)


KNOWN = {
    "uniform": (UNIFORM, dict(
        entropy=math.log2(math.factorial(T)) / T,
        spectral_gap=1 / 2,
        weight_on_first=sum(1 / n for n in range(2, T + 1)) / (T - 1),
        mean_distance=(T - 1) / 4,  # row t lies t / 2 back
    )),
    "identity": (IDENTITY, dict(
        entropy=0,
        effective_rank=T,
        spectral_gap=0,
        weight_on_first=0,
        mean_distance=0,
    )),
    "previous": (PREVIOUS, dict(
        entropy=0,
        effective_rank=rank_of_previous(T),
        spectral_gap=1,
        weight_on_first=1 / (T - 1),
        mean_distance=(T - 1) / T,
    )),
    "first": (FIRST, dict(
        entropy=0,
        effective_rank=1,
        spectral_gap=1,
        weight_on_first=1,
        mean_distance=(T - 1) / 2,
    )),
    "half": (0.5 * IDENTITY + 0.5 * FIRST, dict(
        entropy=(T - 1) / T,
        spectral_gap=0.5,
        weight_on_first=0.5,
    )),
}


@pytest.mark.parametrize("P, expected", KNOWN.values(), ids=KNOWN)
def test_measures_of_known_matrices(P, expected):
    for name, value in expected.items():
        assert getattr(measures, name)(P) == pytest.approx(value, abs=1e-12), name


def test_weight_by_distance():
    assert measures.weight_by_distance(IDENTITY) == pytest.approx([1] + [0] * (T - 1))
    assert measures.weight_by_distance(PREVIOUS) == pytest.approx([1 / T, 1] + [0] * (T - 2))
    even = [sum(1 / (t + 1) for t in range(d, T)) / (T - d) for d in range(T)]
    assert measures.weight_by_distance(UNIFORM) == pytest.approx(even)
    assert np.array_equal(measures.uniform(T), UNIFORM)


def test_effective_rank_of_two_by_two():
    # [[1, 0], [1/2, 1/2]]: the singular values have the product 1/2 and the squares' sum 3/2
    total = math.sqrt(1.5 + 2 * 0.5)
    a = 0.5 + math.sqrt(0.25 - 0.5 / total**2)  # as shares of their sum
    b = 1 - a
    rank = math.exp(-a * math.log(a) - b * math.log(b))
    assert measures.effective_rank(measures.uniform(2)) == pytest.approx(rank)


def test_spectral_gap_is_that_of_the_eigenvalues():
    P = random_matrix(12)
    P /= P.sum(1, keepdims=True)
    eigenvalues = np.sort(np.abs(np.linalg.eigvals(P)))
    assert eigenvalues[-1] == pytest.approx(1)
    assert measures.spectral_gap(P) == pytest.approx(1 - eigenvalues[-2])


def test_log_weights_are_relative_to_even_attention():
    assert measures.log_weights(UNIFORM) == pytest.approx(np.zeros(T * (T + 1) // 2 - 1))
    assert measures.log_weights(PREVIOUS) == pytest.approx(np.log(np.arange(2, T + 1)))
    zero = pytest.approx(0)
    constant = dict(mean=zero, variance=zero, skewness=None, kurtosis=None, ks=None)
    assert measures.normality(measures.log_weights(UNIFORM)) == constant


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_log_normal_weights_are_found_so(sigma):
    z = np.random.default_rng(1).normal(size=(600, 600)) * sigma
    P = np.exp(z) * np.tri(600)
    fit = measures.normality(measures.log_weights(P / P.sum(1, keepdims=True)))
    # a weight over the mean one: ln w - ln E w = z - sigma^2 / 2
    assert fit["mean"] == pytest.approx(-sigma**2 / 2, rel=0.05)
    assert fit["variance"] == pytest.approx(sigma**2, rel=0.05)
    assert fit["ks"] < 0.01 and abs(fit["skewness"]) < 0.1 and abs(fit["kurtosis"]) < 0.1


def test_normality_of_known_samples():
    quantiles = (np.arange(2000) + 0.5) / 2000
    normal = measures.normality(3 + 2 * stats.norm.ppf(quantiles))
    assert normal["mean"] == pytest.approx(3)
    assert normal["variance"] == pytest.approx(4, rel=0.01)
    assert normal["ks"] < 0.001
    two = measures.normality(np.array([-1.0, 1.0] * 500))
    assert two["ks"] == pytest.approx(stats.norm.cdf(1) - 0.5)
    assert two["kurtosis"] == pytest.approx(-2)
    assert two["skewness"] == pytest.approx(0)
    exponential = measures.normality(-np.log(quantiles))
    assert exponential["skewness"] == pytest.approx(2, rel=0.05)
    assert exponential["ks"] == pytest.approx(stats.norm.cdf(-1), abs=0.003)  # at 0


def test_temperatures():
    q, k = np.array([[2.0, -2.0]] * 4), np.array([[0.5, -0.5]] * 4)
    assert measures.temperature_softmax(q, k) == pytest.approx(1)
    assert measures.temperature_lln(q, k, alpha=1.5, beta=8.0) == pytest.approx(1 / 5)
    draw = np.random.default_rng(0)
    q, k = draw.normal(size=(2000, 64)) * 1.5, draw.normal(size=(2000, 64)) * 0.8
    scores = (q * k).sum(1) / 8
    assert measures.temperature_softmax(q, k) == pytest.approx(1 / scores.std(), rel=0.05)


def test_measures_of_a_matrix_with_signs():
    P = np.array([[2.0, 0, 0], [-3, 1, 0], [0, 0, 0]])  # a row of zeros weighs nothing
    assert measures.describe_signed(P) == dict(
        negative=pytest.approx(0.75 / 3),
        row_sum=pytest.approx((2 - 2 + 0) / 3),
        row_size=pytest.approx((2 + 4 + 0) / 3),
        effective_rank=pytest.approx(measures.effective_rank(P)),
        weight_on_self=pytest.approx((1 + 0.25 + 0) / 3),
        weight_on_previous=pytest.approx((0.75 + 0) / 2),
        weight_on_first=pytest.approx((0.75 + 0) / 2),
        mean_distance=pytest.approx(0.75 / 3),
        weight_by_distance=pytest.approx([1.25 / 3, 0.375, 0]),
    )
    assert measures.describe_signed(0 * P)["effective_rank"] == 0


def test_half_lives_and_saturation_of_known_values():
    g = np.log([[[0.5, 0.25, 1.0], [0.5, 1.0, 1.0]]])  # (1 head, 2 tokens, 3 channels)
    assert measures.half_lives(g) == pytest.approx(np.array([[1, 1, measures.LONGEST]]))
    assert measures.half_lives(np.full((1, 2, 1), -np.inf)) == 0
    row = measures.saturation(np.array([0.001, 0.5, 0.5, 0.995]))
    assert row["mean"] == pytest.approx(0.499)
    assert (row["below"], row["above"]) == (0.25, 0.25)
    assert row["histogram"] == [0.25, *[0] * 9, 0.5, *[0] * 8, 0.25]


# Matrices -----------------------------------------------------------------------------------------

def softmax_rows(scores):
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1)


def diagonal_blocks(scores, size):
    t = torch.arange(scores.size(-1)) // size
    return scores.masked_fill(t[:, None] != t, -math.inf)


def formula(name, mixer, x):
    """P and v (H, T, .) from the mechanism's equation, in float64."""
    H = mixer.c_attn.sizes[0]
    q, k, v = (repeat_heads(t, H)[0] for t in list(mixer.c_attn(x))[:3])
    D = q.size(-1)
    raw_q, raw_k = q, k
    if name == "ssa":
        vectors = dict(q=q, k=k, v=v)
        for which, tau in mixer.tau.items():
            group = list(mixer.c_attn(x))["qkv".index(which)]
            scale = tau(x, group, 0)
            scale = repeat_heads(scale, H) if scale.size(1) > 1 else scale
            vectors[which] = vectors[which] * scale[0]
        q, k, v = vectors.values()
    if getattr(mixer, "rope_base", None):
        q, k = rotate(q[None], 0, mixer.rope_base)[0], rotate(k[None], 0, mixer.rope_base)[0]
    scores = q @ k.mT / D**0.5
    if name in ("softmax", "ssa", "linformer", "toptheta"):  # one without thresholds yet
        return softmax_rows(scores), v
    if name == "swa":
        t = torch.arange(scores.size(-1))
        seen = t[:, None] - t < mixer.window
        return softmax_rows(scores.masked_fill(~seen, -math.inf)), v
    if name == "linear":
        a, b = log_elu_plus_one(raw_q), log_elu_plus_one(raw_k)
    elif name == "performer":
        a, b = log_features(q, mixer.features.omega), log_features(k, mixer.features.omega)
    else:
        alpha, beta = (t.double()[:, None, None] for t in mixer.alpha_beta())
        a, b = alpha * raw_q, beta * raw_k
    P = softmax_rows(torch.logsumexp(a[:, :, None] + b[:, None], dim=-1))
    if name == "lln_diag":
        P = 0.5 * P + 0.5 * softmax_rows(diagonal_blocks(scores, D))
    return P, v


ALL_TERMS = dict(ssa_key_token=True, ssa_key_position=True, ssa_value_position=True)


CASES = [(name, {}) for name in sorted(WITH_MATRIX)] + [
    ("linformer", {}),
    ("ssa", ALL_TERMS),
    ("ssa", ALL_TERMS | dict(ssa_per_head=True)),
]


@pytest.mark.parametrize("skeleton", ["gpt2", "llama"])
@pytest.mark.parametrize("name, options", CASES)
@pytest.mark.parametrize("T", [2, 61])
def test_matrix_is_the_formulas(name, options, skeleton, T):
    mixer = make(name, skeleton, **options).blocks[0].mixer
    if name.startswith("lln"):
        mixer.q_moments.square += torch.arange(4)
        mixer.k_moments.mean += 0.3
    x = torch.randn(1, T, 32, dtype=torch.float64)
    P, heads = attention_matrix(mixer, x)
    expected, v = formula(name, mixer, x)
    torch.testing.assert_close(P, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(P.sum(-1), torch.ones(4, T, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (P.triu(1) == 0).all() and (P >= 0).all()
    y = (P @ v).transpose(0, 1).flatten(1)
    torch.testing.assert_close(heads["y"][0], y, rtol=0, atol=1e-11)
    torch.testing.assert_close(mixer(x)[0][0], mixer.c_proj(y), rtol=0, atol=1e-11)
    torch.testing.assert_close(repeat_heads(heads["v"], 4)[0], v, rtol=0, atol=1e-12)


def decayed_formula(name, mixer, x):
    """P (H, T, T) of a mixer that decays and erases: its recurrence with the identity for
    values."""
    heads = {key: value for key, value in inspect_attention.run_heads(mixer, x).items()}
    q, k = heads["q"], heads["k"]
    H, T, D = heads["v"].size(1), x.size(1), q.size(3)
    eye = torch.eye(T, dtype=x.dtype).expand(1, H, T, T)
    beta, alpha, written = None, torch.ones(1, H, T, 1, dtype=x.dtype), eye
    if hasattr(mixer, "beta"):
        beta = mixer.beta(x).sigmoid().mT[..., None]
    if name in ("gla", "kda", "regla"):
        alpha = mixer.log_decay(x).exp()
    if name == "gated_deltanet":
        alpha = mixer.decay(mixer.decay_proj(x))[0].exp().mT[..., None]
    if name == "retnet":
        q, k = rotate(q, 0, 10000.0), rotate(k, 0, 10000.0)
        alpha = mixer.decays.log_gamma.exp()[:, None, None].expand(1, H, T, 1)
    if name == "regla":  # but for the scale of rows
        return scan((q - q.amax()).exp(), (k - k.amax()).exp(), eye, alpha, None)[0]
    if name == "mamba2":
        g, dt = mixer.decay(mixer.dt_proj(x))
        alpha, written = g.exp().mT[..., None], dt.mT[..., None] * eye
        q, k = q.expand(-1, H, -1, -1), k.expand(-1, H, -1, -1)
        return (scan(q, k, written, alpha, None) + mixer.skip[:, None, None] * eye)[0]
    return scan(q / D**0.5, k, written, alpha, beta)[0]


@pytest.mark.parametrize("name", sorted(SIGNED))
@pytest.mark.parametrize("T", [2, 41])
def test_signed_matrix_is_the_recurrences(name, T):
    mixer, x = make(name).blocks[0].mixer, torch.randn(1, T, 32, dtype=torch.float64)
    P, heads = attention_matrix(mixer, x)
    expected = decayed_formula(name, mixer, x)
    if name == "regla":
        P, expected = P / P.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True)
    tolerance = 1e-6 if name == "retnet" else 1e-11  # its table of decays is in float32
    assert (P - expected).abs().max() < tolerance * expected.abs().max()
    assert (P.triu(1) == 0).all()
    if name != "regla":
        assert not is_stochastic(P)
        y = (P @ heads["v"][0]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(heads["y"][0], y, rtol=0, atol=1e-10)


def test_a_convex_combination_of_two_heads_is_no_matrix():
    """Of one for each channel, as lln_diag has them."""
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    for mode in ("sum", "convex"):
        with pytest.raises(NoMatrix, match="no matrix times the values"):
            attention_matrix(make("lln_diag", lln_diag_mode=mode).blocks[0].mixer, x)
    with pytest.raises(NoMatrix, match="no queries, keys and values"):
        attention_matrix(make("causal_mean").blocks[0].mixer, x)


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mamba2", "kda", "regla"])
def test_decays_and_gates_are_the_mixers_own(name):
    mixer, x = make(name).blocks[0].mixer, torch.randn(1, 20, 32, dtype=torch.float64)
    g, found = log_decay(mixer, x), gates(mixer, x)
    if hasattr(mixer, "decay"):
        u = (mixer.dt_proj if name == "mamba2" else mixer.decay_proj)(x)
        steps = torch.nn.functional.softplus(u + mixer.decay.dt_bias)
        torch.testing.assert_close(g, (-mixer.decay.A_log.exp() * steps)[0].T[..., None])
    else:
        assert g.shape == (4, 20, 8 if name == "kda" else 4)
        assert torch.equal(g, mixer.log_decay(x)[0])
    expected = {
        "gla": {"forget": lambda: mixer.decay_up(mixer.decay_down(x))},
        "gated_deltanet": {"write": lambda: mixer.beta(x)},
        "mamba2": {},
        "kda": {"write": lambda: mixer.beta(x),
                "output": lambda: mixer.gate_up(mixer.gate_down(x))},
        "regla": {"forget": lambda: mixer.forget(x), "refine": lambda: mixer.refine(x)},
    }[name]
    assert found.keys() == expected.keys()
    for gate, logits in expected.items():
        assert torch.equal(found[gate], torch.sigmoid(logits()))


def test_saturated_gates_and_long_memory_are_seen():
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    for start, where in ((8.0, "above"), (-8.0, "below")):
        row = measures.saturation(inspect_attention.array(
            gates(fresh("regla", regla_start=start), x)["forget"]))
        assert row[where] == 1
    g = inspect_attention.array(log_decay(fresh("gla"), x))  # sigmoid(0)^(1/16)
    assert measures.half_lives(g) == pytest.approx(16, rel=0.01)
    assert log_decay(fresh("deltanet"), x) is None and gates(fresh("softmax"), x) == {}


def fresh(mixer, **options):
    """A mixer as it starts."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=31, n_layer=1, n_head=4, n_embd=32, init_std=0.02, mixer=mixer,
                       **options)
    return GPT(config).double().blocks[0].mixer


class Crafted(torch.nn.Module):
    """A user's mixer with queries, keys and values, and heads of its own making."""

    def __init__(self, config, layer):
        super().__init__()
        self.c_attn, self.c_proj = QKV(config), torch.nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, state=None):
        q, k, v = self.c_attn(x)
        return self.c_proj(self.mix(q, k, v).transpose(1, 2).flatten(2)), None


def identity(q, k, v):
    return v


def twice(q, k, v):
    return 2 * v


def negative(q, k, v):
    return 3 * v - 2 * torch.cat([v[:, :, :1], v[:, :, :-1]], 2)


def nonlinear(q, k, v):
    return v.abs()


@pytest.mark.parametrize("mix, diagonal, below", [(identity, 1, 0), (twice, 2, 0),
                                                  (negative, 3, -2)])
def test_matrix_of_a_users_mixer(mix, diagonal, below, monkeypatch):
    mixer = crafted(mix, monkeypatch)
    P, _ = attention_matrix(mixer, torch.randn(1, 20, 32, dtype=torch.float64))
    expected = diagonal * torch.eye(20) + below * torch.eye(20).roll(1, 0).tril()
    expected[0, 0] += below  # the first token is the one before itself
    assert torch.equal(P, expected.double().expand(4, -1, -1))
    assert is_stochastic(P) == (mix is identity)


def test_heads_that_are_no_matrix_times_the_values(monkeypatch):
    with pytest.raises(NoMatrix, match="no matrix times the values"):
        attention_matrix(crafted(nonlinear, monkeypatch),
                         torch.randn(1, 20, 32, dtype=torch.float64))


def crafted(mix, monkeypatch):
    monkeypatch.setitem(MIXERS, "crafted", type("Mine", (Crafted,), {"mix": staticmethod(mix)}))
    return make("crafted").blocks[0].mixer


# Influence ----------------------------------------------------------------------------------------

def exact_influence(f, x):
    J = torch.autograd.functional.jacobian(lambda x: f(x)[0], x)[:, :, 0]  # (T, E, T, C)
    return J.square().sum((1, 3)).sqrt()


@every_mixer
def test_influence_is_the_jacobians_norm(mixer):
    model, idx = make(mixer), tokens(rows=1, n=7)
    e = (model.embed(idx) + model.pos_embed.weight[:7]).detach()

    def hidden(x):  # by hand: what GPT.hidden does behind the embeddings
        for block in model.blocks:
            x, _ = block(x)
        return model.norm(x) / model.config.head_temperature
    exact = exact_influence(hidden, e)
    torch.testing.assert_close(influence(hidden, e, probes=32), exact, rtol=1e-9, atol=1e-12)
    estimate = model_influence(model, idx)  # from 16 of 32 directions
    assert torch.equal(estimate > 0, exact > 0)
    assert ((estimate - exact).abs() <= 0.5 * exact).all()


def test_the_estimate_of_influence_is_unbiased():
    mixer = make("softmax", n_layer=1).blocks[0].mixer
    x = torch.randn(1, 5, 32, dtype=torch.float64)

    def f(x):
        return mixer(x)[0]

    squares = torch.stack([influence(f, x, probes=4, seed=seed).square() for seed in range(150)])
    error = (squares.mean(0) - exact_influence(f, x).square()).abs()
    assert (error <= 4 * squares.std(0) / 150**0.5 + 1e-12).all()
    assert (squares.std(0) < 0.6 * squares.mean(0) + 1e-12).all()


@every_mixer
def test_inspect_knows_every_mixer(mixer):
    T, T_influence = (70, 64) if mixer in ("linear", "linformer") else (34, 34)
    model, idx = make(mixer).float(), tokens(rows=1, n=T)
    layers, matrices = inspect(model, idx)
    text = inspect_attention.summary(dict(layers=layers, model=reach(matrices["influence.model"])))
    json.dumps([layers], allow_nan=False)
    J = matrices["influence.model"]
    assert J.shape == (T_influence, T_influence)
    assert (np.triu(J, 1) == 0).all() and (np.diag(J) > 0).all()
    for i, layer in enumerate(layers):
        assert (layer["layer"], layer["mixer"]) == (i, mixer)
        assert layer["signed"] or mixer not in SIGNED
        if mixer not in WITHOUT_MATRIX:
            P = matrices[f"attention.{i}"]
            assert P.shape == (4, T, T) and (np.triu(P, 1) == 0).all()
            assert layer["signed"] or abs(P.sum(-1) - 1).max() < 1e-5
            assert not layer["signed"] or mixer not in WITH_MATRIX
            assert [head["head"] for head in layer["heads"]] == [0, 1, 2, 3]
            assert layer["no_matrix"] is None
            assert ("temperature_lln" in layer["heads"][0]) == mixer.startswith("lln")
            assert set(layer["ssa_temperature"]) == ({"q", "v"} if mixer == "ssa" else set())
        else:
            assert layer["heads"] == [] and layer["no_matrix"] in text
            assert f"attention.{i}" not in matrices
        if mixer == "pelican":
            assert layer["influence"] is None and np.count_nonzero(J) == T  # the diagonal alone
        else:
            assert np.triu(matrices[f"influence.{i}"], 1).max() == 0
            assert 0 < layer["influence"]["on_self"] < 1
        if mixer in ("causal_max", "causal_min", "causal_mean"):
            assert np.tril(matrices[f"influence.{i}"], -2).max() == 0 and np.tril(J, -3).max() == 0


def test_reach():
    J = np.array([[2.0, 0, 0], [3, 1, 0], [0, 0, 0]])  # a row of zeros stays one
    assert reach(J) == dict(
        on_self=pytest.approx((1 + 0.25 + 0) / 3),
        on_previous=pytest.approx((0.75 + 0) / 2),
        mean_distance=pytest.approx(0.75 / 3),
        by_distance=pytest.approx([1.25 / 3, 0.375, 0]),
    )


def test_measured_values_are_those_of_the_matrices():
    model, idx = make("lln").float(), tokens(rows=1, n=20)
    layers, matrices = inspect(model, idx)
    head, P = layers[1]["heads"][2], matrices["attention.1"][2]
    rows = [-sum(p * math.log2(p) for p in row if p > 0) for row in P]
    assert head["entropy_bits"] == pytest.approx(sum(rows) / 20)
    assert head["weight_on_self"] == pytest.approx(np.diag(P).mean())
    assert head["weight_on_previous"] == pytest.approx(np.diag(P, -1).mean())
    mixer = model.blocks[1].mixer
    q, k, *_ = mixer.c_attn(inspect_attention.mixer_inputs(model, idx)[1])
    alpha, beta = mixer.alpha_beta()
    sigma_q, sigma_k = q[0, 2].std(correction=0).item(), k[0, 2].std(correction=0).item()
    assert head["temperature_softmax"] == pytest.approx(1 / (sigma_q * sigma_k), rel=1e-4)
    variance = (alpha[2] * sigma_q)**2 + (beta[2] * sigma_k)**2
    assert head["temperature_lln"] == pytest.approx(variance.item()**-0.5, rel=1e-4)


# The command --------------------------------------------------------------------------------------

ALPHABET = "".join(map(chr, range(97, 123))) + " \n$_?"  # 31 symbols


def draw_nothing(folder, report, matrices):
    return []


def save_run(folder, model, **config):
    trainer = dict(iter=5, val_loss=None, best_val_loss=None, tokens=0, seconds=0.0, wandb_id=None)
    config = {name: getattr(model.config, name) for name in vars(model.config)} | config
    tokenizer = CharTokenizer(ALPHABET).to_json()
    checkpoint.save(folder, checkpoint.model_tensors(model), {}, trainer, config, tokenizer, 1)
    return folder


@pytest.fixture
def command(here, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [NAME, *map(str, arguments)])
        capsys.readouterr()
        inspect_attention.main()
        return capsys.readouterr().out
    return call


@pytest.fixture
def drawn(monkeypatch):
    """{file name: the Figure that would be saved}"""
    found = {}

    def keep(path, figure):
        found[path.name] = figure
        return path

    monkeypatch.setattr(attention_pictures, "save", keep)
    return found


def test_report_and_pictures_of_a_mixed_model(command, here, drawn):
    pattern = "ssa,pelican,linformer,causal_max"
    model = make(pattern, n_layer=4, n_head=2, linformer_segment=8).float()
    folder = save_run(here / "mixed", model)
    out = command(f"--out_dir={folder}", "--start=the quick $brown\nfox jumps")
    report = json.loads((folder / "inspect" / "attention.json").read_text())
    assert report["text"] == "the quick $brown\nfox jumps" == "".join(report["tokens"])
    assert [len(layer["heads"]) for layer in report["layers"]] == [2, 0, 2, 0]
    assert [layer["signed"] for layer in report["layers"]] == [False, False, True, False]
    assert len(report["layers"][0]["ssa_temperature"]["q"][0]) == 26
    matrices = load_file(folder / "inspect" / "attention.safetensors")
    assert set(matrices) == {
        "attention.0", "attention.2", "influence.0", "influence.2", "influence.3",
        "influence.model"}
    distance = measures.mean_distance(matrices["attention.0"][1])
    reported = report["layers"][0]["heads"][1]["mean_distance"]
    assert reported == pytest.approx(distance, rel=1e-5)
    assert set(drawn) == {"attention_maps.png", "log_weights.png", "entropy.png", "distance.png",
                          "influence.png", "ssa_temperature.png", "signed_maps.png"}
    assert all(name in out for name in drawn)
    titles = [ax.get_title() for ax in drawn["influence.png"].axes]
    assert titles[:4] == [
        "ssa, layer 0", "linformer, layer 2", "causal_max, layer 3", "the whole model"]
    image = drawn["attention_maps.png"].axes[1].images[0].get_array()
    shown = np.maximum(matrices["attention.0"][1], 1e-3)
    assert np.allclose(image[np.tril_indices(26)], shown[np.tril_indices(26)])
    assert image.mask[np.triu_indices(26, 1)].all()
    ticks = [label.get_text() for label in drawn["ssa_temperature.png"].axes[-1].get_xticklabels()]
    assert len(ticks) == 26 and ticks[3] == "␣" and ticks[16] == "↵" and ticks[10] == r"\$"
    for figure in drawn.values():
        assert figure.get_suptitle().startswith(f"{pattern} on ")
        check_labels(figure)


def check_labels(figure):
    """All can be drawn, the title is within the frame, and no tick is a power of ten."""
    figure.canvas.draw()
    title = figure._suptitle.get_window_extent()
    assert figure.bbox.x0 <= title.x0 and title.x1 <= figure.bbox.x1
    for ax in figure.axes:
        for label in (*ax.get_xticklabels(which="both"), *ax.get_yticklabels(which="both")):
            assert "mathdefault" not in label.get_text(), (ax.get_title(), label)


def labels(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_pictures_of_decays_and_gates(command, here, drawn):
    model = make("gla,deltanet,causal_max", n_layer=3, n_head=2).float()
    folder = save_run(here / "r", model)
    out = command(f"--out_dir={folder}", "--start=ab c\n$")
    report = json.loads((folder / "inspect" / "attention.json").read_text())
    assert set(drawn) == {"signed_maps.png", "distance.png", "influence.png", "half_lives.png",
                          "gates.png"}
    gla, deltanet, reduction = report["layers"]
    assert np.shape(gla["half_lives"]) == (2, 8) and list(gla["gates"]) == ["forget"]
    assert deltanet["half_lives"] is None and list(deltanet["gates"]) == ["write"]
    assert reduction["half_lives"] is None and reduction["gates"] == {}
    assert "half-lives, layer 0, gla: 5 % of the channels up to " in out
    assert "write gates, layer 1, deltanet: " in out and "half-lives, layer 1" not in out
    P = load_file(folder / "inspect" / "attention.safetensors")["attention.1"][1]
    shown = drawn["signed_maps.png"].axes[3].images[0].get_array()
    share = P / abs(P).sum(1, keepdims=True)
    assert np.allclose(shown[np.tril_indices(6)], share[np.tril_indices(6)], rtol=1e-4)
    assert shown.mask[np.triu_indices(6, 1)].all()
    for name in ("signed_maps.png", "influence.png"):
        assert labels(drawn[name].axes[0]) == ["a", "b", "␣", "c", "↵", r"\$"]
    titles = [ax.get_title() for ax in drawn["gates.png"].axes]
    assert titles == ["gla, layer 0, forget", "", "", "deltanet, layer 1, write"]
    for figure in drawn.values():
        check_labels(figure)


@pytest.mark.parametrize("T, H, written", [(9, 4, True), (44, 2, True), (44, 4, True),
                                           (44, 8, False), (60, 1, False)])
def test_tokens_stand_at_the_axes_where_there_is_room(T, H, written):
    layer = dict(layer=0, mixer="softmax", heads=[{}] * H)
    P = np.tile(np.tril(np.ones((T, T))), (H, 1, 1))
    figure = attention_pictures.attention_maps([layer], {"attention.0": P}, ["x"] * T)
    assert (labels(figure.axes[0]) == ["x"] * T) == written
    assert figure.get_size_inches()[0] < 18


@pytest.mark.parametrize("arguments, config, message", [
    ("--out_dir=none", {}, "no checkpoint in none; train one with: "),
    ("", {}, "which run[?] name its folder: "),
    ("--out_dir=r --start=", {}, "--start is empty; "),
    ("--out_dir=r --start=FILE:gone.txt", {}, "--start=FILE:gone.txt: .*No such file"),
    ("--out_dir=r --start=a", {}, "the text is a single token"),
    ("--out_dir=r --start=ABC", {}, "characters not in the alphabet of this model: 'A', 'B', 'C'"),
    (f"--out_dir=r --start={'a' * 193}", {},
     "--start is 193 tokens, and the model's block_size 192; .*--length=192"),
    ("--out_dir=r --start=abc --length=193", {},
     "--length=193: the model has learned positions for 192 tokens only"),
    ("--out_dir=r --length=1", {}, "--length=1: input should be greater than or equal to 2"),
    ("--out_dir=r", {"dataset": "gone"},
     "data/gone, which the run was trained on, is not here; give a text with --start"),
    ("--out_dir=r", {"dataset": "x" * 300}, "which the run was trained on, is not here"),
    ("--out_dir=r", {"dataset": "digits"},
     "was trained on other symbols than those of data set digits"),
    ("--out_dir=r --heads=2", {}, "no option --heads; "),
    ("--out_dir=r --checkpoint=00000007", {}, "is missing: .*whole: 00000005"),
    ("--out_dir=r --mixer_file=gone.py", {}, "mixer_file gone.py does not exist")])
def test_bad_input_is_one_line(arguments, config, message, command, here, capsys):
    save_run(here / "r", make("pelican", n_layer=1).float(), **config)
    with pytest.raises(SystemExit) as exit:
        command(*arguments.split())
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1 and line.startswith(f"{NAME}: ")
    assert re.search(message, line), line
    assert not (here / "r" / "inspect").exists()


def test_without_learned_positions_a_text_may_be_longer(command, here, monkeypatch):
    monkeypatch.setattr(attention_pictures, "draw", draw_nothing)
    folder = save_run(here / "r", make("linear", "llama", n_layer=1, block_size=16).float())
    (here / "text.txt").write_text("a long text " * 20)
    command(f"--out_dir={folder}", "--start=FILE:text.txt", "--length=100")
    assert len(json.loads((folder / "inspect" / "attention.json").read_text())["tokens"]) == 100


MINE = '''
import torch
from mixers import MIXERS

class Previous(torch.nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_proj = torch.nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, state=None):
        before = torch.zeros_like(x[:, :1]) if state is None else state
        return self.c_proj(torch.cat([before, x[:, :-1]], dim=1)), x[:, -1:]

MIXERS["previous"] = Previous
'''


def test_from_training_to_pictures(home, train, here):
    (here / "mine.py").write_text(MINE)
    train(*TINY, "--mixer=softmax,previous", "--n_layer=2", "--mixer_file=mine.py",
          "--max_iters=2", "--out_dir=run")
    done = run(home, "-m", NAME, f"--out_dir={here / 'run'}", f"--mixer_file={here / 'mine.py'}")
    assert done.returncode == 0 and done.stderr == "", done
    assert "no attention matrix: it has no queries, keys and values" in done.stdout
    folder = here / "run" / "inspect"
    report = json.loads((folder / "attention.json").read_text())
    tokenizer = checkpoint.load(here / "run").tokenizer
    validation = np.fromfile(home / "data" / "letters" / "val.bin", "<u2")
    assert report["text"] == tokenizer.decode(validation[:16].tolist())
    matrices = load_file(folder / "attention.safetensors")
    assert matrices["attention.0"].shape == (2, 16, 16)
    J = matrices["influence.1"]  # of the user's mixer: the token before, and nothing else
    assert np.count_nonzero(J) == 15 and (np.diag(J, -1) > 0).all()
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["attention_maps.png", "distance.png", "entropy.png", "influence.png",
                        "log_weights.png"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_recall_run_is_read_in_a_row_of_its_task(home, train, command, here, monkeypatch):
    monkeypatch.setattr(attention_pictures, "draw", draw_nothing)
    recall = [argument for argument in TINY if not argument.startswith("--dataset")]
    train(*recall, "--dataset=recall", "--mixer=softmax", "--max_iters=2", "--out_dir=run")
    command("--out_dir=run")
    report = json.loads((here / "run" / "inspect" / "attention.json").read_text())
    cell = json.loads((home / "data" / "recall" / "meta.json").read_text())["cells"]["val"][0]
    validation = np.fromfile(home / "data" / "recall" / "val.bin", "<u2")
    assert report["text"].split() == [str(token) for token in validation[:cell["length"]]]


def test_a_link_in_the_run_is_not_written_through(command, here, capsys):
    save_run(here / "r", make("pelican", n_layer=1).float())
    (here / "elsewhere").mkdir()
    (here / "r" / "inspect").symlink_to(here / "elsewhere")
    with pytest.raises(SystemExit) as exit:
        command("--out_dir=r", "--start=abc")
    assert exit.value.code == 2 and "r/inspect is a link" in capsys.readouterr().err
    assert list((here / "elsewhere").iterdir()) == []


def test_weights_that_are_not_finite_are_refused(command, here, capsys):
    model = make("softmax", n_layer=1).float()
    model.norm.weight.data[0] = math.nan
    save_run(here / "r", model)
    with pytest.raises(SystemExit) as exit:
        command("--out_dir=r", "--start=abc")
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1 and "not finite" in line
    assert not (here / "r" / "inspect").exists()


def test_a_mixer_that_does_nothing_yet_is_drawn_without_a_warning(recwarn):
    model = make("softmax", n_layer=1).float()
    model.blocks[0].mixer.c_proj.weight.data.zero_()
    layers, matrices = inspect(model, tokens(rows=1, n=9))
    assert not matrices["influence.0"].any()
    report = dict(layers=layers, tokens=["a"] * 9)
    attention_pictures.influence_maps(report, matrices).canvas.draw()
    assert [str(warning.message) for warning in recwarn] == []
