"""What each mixer says it costs, against the real state and PyTorch's own counter."""
import copy

import pytest
import torch
from test_mixers import every_mixer, every_skeleton, make, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixers import MIXERS
from mixers.parts.convolution import ShortConvolution
from mixers.parts.products import onednn_is_exact
from training.device import ready_to_decode

LENGTHS = (1, 7, 8, 63, 64, 100, 128)


def largest_states(model, dtype, autocast):
    """Bytes of the largest state up to each of LENGTHS tokens, fed one by one."""
    largest, state, found = 0, None, {}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for n in range(1, max(LENGTHS) + 1):
            _, state = model.step(torch.zeros(1, 1, dtype=torch.int64), state)
            largest = max(largest, sum(t.nbytes for t in tensors(state)))
            found[n] = largest
    return {n: found[n] for n in LENGTHS}


@every_mixer
@every_skeleton
@pytest.mark.parametrize("way", ["float32", "cast", "autocast", "packed"])
def test_state_bytes_are_those_of_the_largest_state(mixer, skeleton, way):
    """In float32; in a model that is cast; as training runs it; and as sample.py does."""
    dtype = torch.float32 if way == "float32" else torch.bfloat16
    model = make(mixer, skeleton).to(dtype if way == "cast" else torch.float32)
    if way == "packed":
        model = ready_to_decode(copy.deepcopy(model), dtype)
    real = largest_states(model, dtype, autocast=way in ("autocast", "packed"))
    assert {T: model.state_bytes(T, dtype) for T in LENGTHS} == real


@every_mixer
@pytest.mark.parametrize("autocast", [False, True])
def test_a_state_has_the_same_size_however_it_came_about(mixer, autocast):
    """In training, with gradients and many tokens at once, as token by token."""
    model, idx = make(mixer).float().train(), torch.randint(31, (1, 70))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, whole = model.step(idx)
        _, state = model.step(idx[:, :69])
        _, state = model.step(idx[:, 69:], state)
    assert [t.nbytes for t in tensors(whole)] == [t.nbytes for t in tensors(state)]


@pytest.mark.parametrize("mixer, slots", [("lln_diag", 0), ("linformer", 4), ("linformer", 100)])
def test_state_bytes_never_fall(mixer, slots):
    options = dict(linformer_slots=slots) if slots else {}
    model = make(mixer, **options)
    sizes = [model.state_bytes(T, torch.float32) for T in range(1, 300)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("op", ["max", "min", "max_context", "min_context"])
def test_a_reductions_state_is_rounded_where_products_are(op):
    """That changes no output: the maximum of rounded values is the rounded one."""
    reduction, x = make(f"causal_{op}").float().blocks[0].mixer, torch.randn(2, 40, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        whole, _ = reduction(x)
        first, state = reduction(x[:, :17])
        second, _ = reduction(x[:, 17:], state)
    assert state[0].dtype == torch.bfloat16
    tolerance = 1e-2 if "context" in op else 0  # the running sum is not the same to the bit
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=tolerance, atol=0)


def counted(model, T):
    """FLOPs per token of a forward pass by PyTorch's counter, which sees nothing of fused
    attention: hence the plain one."""
    onednn_is_exact()  # tried once, by products that are not the model's
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.randint(31, (1, T)))
    return counter.get_total_flops() / T


def masked_half(mixer, T, D=8, H=4, L=64):
    """FLOPs per token and layer that the counter has and our formulas leave out: products that a
    causal mask throws away."""
    def pairs(n):
        """Of n columns, those not visible, on average over rows."""
        return n - (n + 1) / 2

    if mixer in ("softmax", "ssa", "toptheta"):
        return 2 * 2 * H * D * pairs(T)
    if mixer in ("lln", "linear"):
        return 2 * H * 2 * D * pairs(64)
    if mixer == "lln_diag":
        return masked_half("lln", T) + 2 * 2 * H * D * pairs(D)
    if mixer == "performer":
        return 2 * H * (16 + D) * pairs(64)
    if mixer == "linformer":  # and all slots where only those of completed segments are visible
        slots = T // L * 4
        seen = sum(4 * (t // L) for t in range(T)) / T
        return 2 * 2 * H * D * (pairs(L) + slots - seen)
    if mixer == "swa":  # blocks of W queries see 2 W - 1 keys; W is a quarter of block_size
        W = 64
        return 2 * 2 * H * D * (2 * W - 1 - sum(min(t + 1, W) for t in range(T)) / T)
    return masked_half_of_recurrence(mixer, H, D)


def masked_half_of_recurrence(mixer, H, D, c=32):
    """The same for the mixers on mixers/parts/recurrence.py, in chunks of c tokens. Of a system's
    inverse the counter sees the two products that join its blocks of 16."""
    half = D // 2  # keys of the mixers whose values are twice as wide
    if mixer in ("retnet", "mamba2", "gla", "regla"):  # mamba2's C / 2 keys are for all heads
        return H * (c - 1) * (half + D)
    if mixer in ("deltanet", "gated_deltanet", "kda"):
        keys = half if mixer == "gated_deltanet" else D
        inverse = 2 * 2 * 16**3 / c - c * c / 3
        # drawn at random, kda's gates forget too fast for two factors: blocks of 8, and below them
        halves = 2 * (2 * 8 + 8 + 16) * D if mixer == "kda" else 0
        return H * (2 * (c - 1) * (keys + D) + (c + 1) * keys + inverse + halves)
    return 0


@every_mixer
@every_skeleton
def test_flops_are_those_counted(mixer, skeleton):
    T = 256
    model = make(mixer, skeleton, block_size=T)
    total = counted(model, T)
    assert total > 0
    own = MIXERS[mixer] and model.blocks[0].mixer
    if own and not hasattr(own, "flops_per_token"):
        pytest.skip("this mixer does not say")
    # our convention leaves out what a mask throws away; the counter has it. 1 % for sums written
    # as products
    expected = model.flops_per_token(T) + 2 * masked_half(mixer, T)
    # nor does it see the taps of short convolutions, which are no products of matrices
    expected -= sum(m.flops_per_token() for m in model.modules() if isinstance(m, ShortConvolution))
    assert total == pytest.approx(expected, rel=0.01)


class Quiet(torch.nn.Module):
    def forward(self, x, state=None):
        return x, state


def test_a_mixer_that_does_not_say_makes_the_model_not_say(monkeypatch):
    monkeypatch.setitem(MIXERS, "quiet", lambda config, layer: Quiet())
    model = make("quiet")
    assert model.flops_per_token(8) is None
    assert model.state_bytes(8, torch.float32) is None
