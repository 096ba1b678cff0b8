"""The engine with decays and erasing, against the recurrence written out token by token."""
import math

import pytest
import torch
import torch.nn.functional as F

from mixers.parts import decays, products
from mixers.parts import recurrence as engine
from mixers.parts.chunkwise import linear_attention
from mixers.parts.recurrence import recurrence

B, H, D, E = 2, 3, 8, 5


def loop(q, k, v, g=None, e=None, w=None, state=None):
    """The oracle: the four lines of the module's docstring, one token after the other."""
    S = v.new_zeros(*v.shape[:2], k.size(-1), v.size(-1)) if state is None else state
    w = k if w is None else w
    ys = []
    for t in range(v.size(2)):
        if g is not None:
            S = g[:, :, t, :, None].exp() * S
        S_new = S + k[:, :, t, :, None] * v[:, :, t, None, :]
        if e is not None:
            read = (S * e[:, :, t, :, None]).sum(2)
            S_new = S_new + w[:, :, t, :, None] * read[:, :, None, :]
        S = S_new
        ys.append((S * q[:, :, t, :, None]).sum(2))
    return torch.stack(ys, 2), S


def unit(x):
    return F.normalize(x, dim=-1)


def inputs(kind, T, dtype=torch.float64, heads=H, seed=0):
    """recurrence's arguments (dict) as the mechanism `kind` of its table gives them."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=make, dtype=torch.float64)

    q, k, v = normal(B, heads, T, D), normal(B, heads, T, D), normal(B, heads, T, E)
    scalar, vector = -uniform(B, heads, T, 1), -uniform(B, heads, T, D)
    beta, key = uniform(B, heads, T, 1), unit(k)
    values = {
        "plain": dict(q=q, k=k, v=v),
        "retnet": dict(q=q, k=k, v=v, g=scalar * 0 - 0.03),
        "mamba2": dict(q=q[:, :1], k=k[:, :1], v=v, g=scalar),
        "gla": dict(q=q, k=k, v=v, g=vector),
        "deltanet": dict(q=q, k=key, v=beta * v, e=-beta * key),
        "gated_deltanet": dict(q=q, k=key, v=beta * v, g=scalar, e=-beta * key),
        "kda": dict(q=q, k=key, v=beta * v, g=vector, e=-beta * key),
        "rwkv7": dict(q=q, k=k, v=v, g=0.6 * vector, e=-key * (-0.6 * vector).exp(), w=key * beta),
    }[kind]
    values["state"] = normal(B, heads, D, E)
    return {name: x.to(dtype) for name, x in values.items()}


KINDS = ("plain", "retnet", "mamba2", "gla", "deltanet", "gated_deltanet", "kda", "rwkv7")


def worst(a, b):
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def pieces(arguments, start, end):
    return {name: x[:, :, start:end] for name, x in arguments.items() if name != "state"}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("T", [1, 2, 37, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_recurrence(kind, T, dtype, tolerance):
    arguments = inputs(kind, T, dtype)
    y, S = recurrence(**arguments)
    expected_y, expected_S = loop(**{name: x.double() for name, x in arguments.items()})
    assert y.dtype == S.dtype == dtype
    assert worst(y, expected_y) < tolerance and worst(S, expected_S) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_is_the_whole(kind):
    arguments = inputs(kind, 150)
    y, S = recurrence(**arguments)
    for sizes in ((1, 63, 6, 80), [1] * 150):
        state, ys, start = arguments["state"], [], 0
        for size in sizes:
            out, state = recurrence(**pieces(arguments, start, start + size), state=state)
            ys.append(out)
            start += size
        assert worst(torch.cat(ys, 2), y) < 1e-12 and worst(state, S) < 1e-12


@pytest.mark.parametrize("T", [1, 70])
def test_an_older_state_stays_as_it_was(T):
    arguments = inputs("kda", T)
    before = arguments["state"].clone()
    recurrence(**arguments)
    assert torch.equal(arguments["state"], before)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("T", [1, 37])
def test_autocast_rounds_nothing(T, private, monkeypatch):
    """Nor without the private function that switches it off."""
    if not private:
        monkeypatch.setattr(products, "NO_AUTOCAST", None)
    arguments = inputs("kda", T, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, S = recurrence(**arguments)
    expected_y, expected_S = recurrence(**arguments)
    assert torch.equal(y, expected_y) and torch.equal(S, expected_S)


@pytest.fixture
def elsewhere(monkeypatch):
    """Decays as on devices whose numbers cannot be looked at without waiting: in halves, all."""
    monkeypatch.setattr(decays, "can_look", lambda x: False)


@pytest.mark.parametrize("floor", [None, -10.0, -5.0, -1.1])
@pytest.mark.parametrize("kind", ["gla", "kda", "rwkv7"])
def test_a_floor_changes_no_number(elsewhere, kind, floor):
    arguments = inputs(kind, 150)
    y, S = recurrence(**arguments, floor=floor)
    expected_y, expected_S = loop(**arguments)
    assert worst(y, expected_y) < 1e-11 and worst(S, expected_S) < 1e-12


def test_a_floor_is_exact_where_decays_sit_on_it(elsewhere):
    arguments = inputs("gla", 150, torch.float32)
    arguments["g"] = torch.full_like(arguments["g"], -10.0)
    expected, _ = loop(**{name: x.double() for name, x in arguments.items()})
    assert worst(recurrence(**arguments, floor=-10.0)[0], expected) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_recurrence(kind):
    T = 100
    arguments = {name: x.requires_grad_() for name, x in inputs(kind, T).items()}
    names = list(arguments)
    of_y = torch.randn(B, H, T, E, dtype=torch.float64)
    of_S = torch.randn(B, H, D, E, dtype=torch.float64)

    def gradients(compute):
        y, S = compute(**arguments)
        total = (y * of_y).sum() + (S * of_S).sum()
        return torch.autograd.grad(total, [arguments[name] for name in names])

    for name, ours, expected in zip(names, gradients(recurrence), gradients(loop)):
        assert worst(ours, expected) < 1e-11, name


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", 4)
    monkeypatch.setattr(decays, "MOST_EXPONENT", 3)
    arguments = {name: x[:1, :1].detach().requires_grad_() for name, x in inputs(kind, 9).items()}
    names = list(arguments)
    floor = -1.0 if kind == "gla" else None

    def compute(*values):
        return recurrence(**dict(zip(names, values)), floor=floor)

    assert torch.autograd.gradcheck(compute, tuple(arguments.values()))


def mixed_decays(kind, T, channels, dtype):
    """Decays of 0, a little, 1,000 nats and all of it: a chunk may have none, some or many of the
    large ones."""
    arguments = inputs(kind, T, dtype)
    choices = torch.tensor([0.0, -1e-3, -1000.0, -math.inf], dtype=dtype)
    chosen = torch.randint(4, (B, H, T, channels), generator=torch.Generator().manual_seed(1))
    rare = torch.rand(B, H, T, channels, generator=torch.Generator().manual_seed(2)) < 0.98
    arguments["g"] = choices[torch.where(rare, chosen % 2, chosen)]
    return {name: x.requires_grad_() for name, x in arguments.items()}


@pytest.mark.parametrize("channels", [1, D])
@pytest.mark.parametrize("kind", ["gla", "kda", "rwkv7"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_decays_of_any_size(kind, channels, dtype, tolerance):
    """Outputs and gradients are numbers, and those of the recurrence."""
    arguments = mixed_decays(kind, 150, channels, dtype)
    names = list(arguments)
    y, S = recurrence(**arguments)
    exact = {name: x.detach().double().requires_grad_() for name, x in arguments.items()}
    expected_y, expected_S = loop(**exact)
    assert worst(y, expected_y) < tolerance and worst(S, expected_S) < tolerance
    found = torch.autograd.grad(y.sum() + S.sum(), [arguments[name] for name in names])
    expected = torch.autograd.grad(expected_y.sum() + expected_S.sum(),
                                   [exact[name] for name in names])
    for name, a, b in zip(names, found, expected):
        assert a.isfinite().all() and worst(a, b) < 10 * tolerance, name


@pytest.mark.parametrize("kind", ["gla", "kda", "rwkv7"])
def test_decays_elsewhere_are_the_same(elsewhere, kind):
    test_decays_of_any_size(kind, D, torch.float64, 1e-10)
    test_gradients_are_those_of_the_recurrence(kind)


def test_a_row_is_not_rounded_by_a_decay_behind_it():
    """One token forgets all, in the middle of a chunk: the rows before it stay to a bit."""
    arguments = inputs("kda", 64, torch.float32)
    arguments["g"] = 0.1 * arguments["g"]
    later = dict(arguments, g=arguments["g"].clone())
    later["g"][:, :, 40, 3] = -math.inf
    before, after = recurrence(**arguments)[0], recurrence(**later)[0]
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert not torch.allclose(before[:, :, 40:], after[:, :, 40:])


@pytest.mark.parametrize("key", ["repeated", "alike"])
def test_repeated_keys_lose_no_digits(key):
    """beta 1 and one key over and over: Neumann doubling would be wrong by 1e9 here."""
    arguments = inputs("deltanet", 256, torch.float32)
    direction = unit(torch.randn(1, 1, 1, D, generator=torch.Generator().manual_seed(3)))
    spread = 0.0 if key == "repeated" else 0.2
    keys = unit(direction + spread * arguments["k"])
    arguments |= dict(k=keys, e=-keys)
    expected, _ = loop(**{name: x.double() for name, x in arguments.items()})
    assert worst(recurrence(**arguments)[0], expected) < 5e-6


@pytest.mark.parametrize("kind", ["mamba2", "gla", "gated_deltanet", "kda", "rwkv7"])
def test_the_past_does_not_see_the_future(kind):
    """Later queries and values grow 1e4-fold, later decays 9-fold: earlier rows stay to a bit."""
    arguments = inputs(kind, 150, torch.float32)
    later = {name: x.clone() for name, x in arguments.items()}
    for name, factor in (("q", 1e4), ("v", 1e4), ("g", 9.0)):
        later[name][:, :, 100:] *= factor
    if kind == "rwkv7":
        later["g"] = arguments["g"]  # its e depends on g
    assert torch.equal(recurrence(**arguments)[0][:, :, :100], recurrence(**later)[0][:, :, :100])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_lln_is_a_recurrence_whose_decay_is_its_running_maximum(dtype, tolerance):
    """linear_attention by decays of m_{t-1} - m_t and a column of ones: two engines agree."""
    T, make = 150, torch.Generator().manual_seed(4)
    a, b = (2 * torch.randn(B, H, T, D, generator=make, dtype=torch.float64) for _ in range(2))
    b[:, :, 70] += 50  # a key that dwarfs all before it
    v = torch.randn(B, H, T, E, generator=make, dtype=torch.float64)
    expected, state = linear_attention(a, b, v)
    a, b, v = a.to(dtype), b.to(dtype), v.to(dtype)
    m = b.cummax(2).values
    g = torch.cat([torch.full_like(m[:, :, :1], -math.inf), m[:, :, :-1] - m[:, :, 1:]], 2)
    q = (a + m - (a + m).amax(3, keepdim=True)).exp()
    y, S = recurrence(q, (b - m).exp(), torch.cat([v, torch.ones_like(v[..., :1])], 3), g=g)
    assert worst(y[..., :-1] / y[..., -1:], expected) < tolerance
    assert worst(S[..., :-1], state.S) < tolerance and worst(S[..., -1], state.z) < tolerance


def test_one_mechanism_becomes_another():
    arguments = inputs("kda", 100)
    scalar = arguments["g"][..., :1]
    no_g, no_e = arguments | dict(g=None), arguments | dict(e=None)
    repeated = arguments | dict(g=scalar.expand_as(arguments["g"]))
    for one, other in ((arguments | dict(g=torch.zeros_like(scalar)), no_g),
                       (arguments | dict(e=torch.zeros_like(arguments["e"])), no_e),
                       (repeated, arguments | dict(g=scalar)),
                       (arguments | dict(w=arguments["k"]), arguments)):
        assert worst(recurrence(**one)[0], recurrence(**other)[0]) < 1e-12


def test_nothing_written_leaves_the_decayed_state():
    arguments = inputs("gated_deltanet", 100)
    empty = arguments | dict(v=torch.zeros_like(arguments["v"]), e=torch.zeros_like(arguments["e"]))
    _, S = recurrence(**empty)
    assert worst(S, arguments["state"] * arguments["g"].sum(2)[..., None].exp()) < 1e-12


def test_orthonormal_keys_are_a_dictionary():
    """beta 1: what was written under a key is read under it, and writing again replaces it."""
    keys = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    keys = torch.cat([keys, keys])[None, None]  # each key twice
    v = torch.randn(1, 1, 2 * D, E, dtype=torch.float64)
    y, S = recurrence(keys, keys, v, e=-keys)
    assert worst(y, v) < 1e-12
    assert worst(keys[:, :, :D] @ S, v[:, :, D:]) < 1e-12


def test_states_are_wide_and_outputs_are_as_the_values():
    arguments = {name: x.to(torch.bfloat16) for name, x in inputs("kda", 70).items()}
    y, S = recurrence(**arguments)
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
