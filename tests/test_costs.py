"""What each mixer says it costs, against the real state and PyTorch's own counter."""
import pytest
import torch
from test_mixers import SKELETONS, every_mixer, make, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixers import MIXERS
from mixers.parts.convolution import ShortConvolution

every_skeleton = pytest.mark.parametrize("skeleton", SKELETONS)


@every_mixer
@every_skeleton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_the_states(mixer, skeleton, dtype):
    model = make(mixer, skeleton).to(dtype)
    for T in (1, 8, 63, 64, 100, 128):
        _, state = model.step(torch.randint(31, (1, T)))
        assert sum(t.nbytes for t in tensors(state)) == model.state_bytes(T, dtype), T


def counted(model, T):
    """FLOPs per token of a forward pass by PyTorch's counter, which sees nothing of fused attention: hence the plain one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.randint(31, (1, T)))
    return counter.get_total_flops() / T


def masked_half(mixer, T, D=8, H=4, L=64):
    """FLOPs per token and layer that the counter has and our formulas leave out: products that a causal mask throws away."""
    pairs = lambda n: (n - (n + 1) / 2)  # of n columns, those not visible, on average over rows
    if mixer in ("softmax", "ssa"):
        return 2 * 2 * H * D * pairs(T)
    if mixer in ("lln", "linear", "lln_diag"):
        return 2 * H * (2 * D + 1) * pairs(64) + (2 * 2 * H * D * pairs(D) if mixer == "lln_diag" else 0)
    if mixer == "performer":
        return 2 * H * (16 + D + 1) * pairs(64)
    if mixer == "linformer":  # and all slots where only those of completed segments are visible
        slots = T // L * 4
        seen = sum(4 * (t // L) for t in range(T)) / T
        return 2 * 2 * H * D * (pairs(L) + slots - seen)
    if mixer == "swa":  # blocks of W queries see 2 W - 1 keys, in a window W of a quarter of block_size
        W = 64
        return 2 * 2 * H * D * (2 * W - 1 - sum(min(t + 1, W) for t in range(T)) / T)
    return masked_half_of_recurrence(mixer, H, D)


def masked_half_of_recurrence(mixer, H, D, c=64):
    """The same for the mixers on mixers/parts/recurrence.py, whose triangular solve no counter sees.

    With a decay for each channel the visible half alone is formed, but for blocks on the diagonal."""
    half = D // 2  # keys of the mixers whose values are twice as wide
    if mixer in ("retnet", "mamba2"):
        shared = D * H // 2 if mixer == "mamba2" else H * half  # keys of C / 2 channels for all heads
        return (c - 1) * (shared + H * D)
    if mixer == "gla":
        return H * (-2 * half + (c - 1) * D)
    if mixer == "deltanet":
        return H * (c - 1) * D
    if mixer == "gated_deltanet":
        return H * (c - 1) * half
    if mixer == "kda":
        return H * (2 * (16 + 56) * D + 2 * c * D - (c + 1) * 3 * D - (c - 1) * 2 * D)
    return 0


@every_mixer
@every_skeleton
def test_flops_are_those_counted(mixer, skeleton):
    model, T = make(mixer, skeleton, block_size=256), 256
    total = counted(model, T)
    assert total > 0
    own = MIXERS[mixer] and model.blocks[0].mixer
    if own and not hasattr(own, "flops_per_token"):
        pytest.skip("this mixer does not say")
    # our convention leaves out what a mask throws away; the counter has it. 1 % for sums written as products
    expected = model.flops_per_token(T) + 2 * masked_half(mixer, T)
    # nor does it see the taps of short convolutions, which are no products of matrices
    expected -= sum(m.flops_per_token() for m in model.modules() if isinstance(m, ShortConvolution))
    assert total == pytest.approx(expected, rel=0.01)


def test_a_mixer_that_does_not_say_makes_the_model_not_say():
    class Quiet(torch.nn.Module):
        def forward(self, x, state=None):
            return x, state

    MIXERS["quiet"] = lambda config, layer: Quiet()
    try:
        model = make("quiet")
        assert model.flops_per_token(8) is None and model.state_bytes(8, torch.float32) is None
    finally:
        del MIXERS["quiet"]
