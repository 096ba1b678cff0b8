"""Decoding of long sequences: mixers whose state does not grow take the same time and memory per
token for ever."""
import functools
import statistics
import time

import pytest
import torch

from mixers import MIXERS
from model import GPT, GPTConfig

LONG = 65_536


def make(mixer, n_layer=2):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=65, block_size=64, n_layer=n_layer, n_head=2, n_embd=64,
                       mixer=mixer, pos="none")
    return GPT(config).eval()


def does_not_grow(mixer):
    """By the mixer's own word, which tests/test_costs.py holds against its real state."""
    model = make(mixer)
    small, large = model.state_bytes(8192, torch.float32), model.state_bytes(LONG, torch.float32)
    return small is not None and large <= small


CONSTANT = sorted(name for name in MIXERS if does_not_grow(name))


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_those_that_should_be_constant_are():
    constant = {"pelican", "linear", "lln", "lln_diag", "performer", "causal_max",
                "causal_mean_context"}
    assert constant <= set(CONSTANT)
    assert not {"softmax", "ssa", "linformer"} & set(CONSTANT)


@torch.no_grad()
def state_after(model, n):
    """The state after n tokens, read in pieces."""
    state, g = None, torch.Generator().manual_seed(0)
    for start in range(0, n, 1000):
        piece = torch.randint(65, (1, min(1000, n - start)), generator=g)
        _, state = model.step(piece, state)
    return state


@torch.no_grad()
def block_ms(model, state, n=50):
    """Milliseconds per token of n tokens on top of a state."""
    token, start = torch.zeros(1, 1, dtype=torch.int64), time.perf_counter()
    for _ in range(n):
        _, state = model.step(token, state)
    return 1e3 * (time.perf_counter() - start) / n


def growth(model, blocks=24):
    """Time per token at 65,000 tokens over that at 256, in turn, since a machine's speed drifts;
    and the two medians in ms."""
    early, late = state_after(model, 256), state_after(model, 65_000)
    pairs = [(block_ms(model, early), block_ms(model, late)) for _ in range(blocks)][2:]
    ratio = statistics.median(b / a for a, b in pairs)
    return ratio, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


@functools.cache
def softmax_growth():
    return growth(make("softmax"), blocks=8)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", CONSTANT)
def test_time_per_token_is_the_same_at_65_000_as_at_256(mixer):
    for _ in range(5):  # others may use the machine, too
        ratio, early, late = growth(make(mixer))
        if ratio < 1.15:
            break
    softmax, softmax_early, softmax_late = softmax_growth()
    print(f"{mixer}: {early:.3f} ms at 256, {late:.3f} ms at 65,000, ratio {ratio:.3f}; "
          f"softmax: {softmax_early:.3f} ms, {softmax_late:.3f} ms, ratio {softmax:.2f}")
    assert ratio < 1.15 and softmax > 2


@pytest.mark.slow
@pytest.mark.parametrize("mixer", CONSTANT)
def test_65_536_tokens_in_flat_memory(mixer):
    model, seen = make(mixer, n_layer=1), []
    first, g = torch.zeros(1, 1, dtype=torch.int64), torch.Generator().manual_seed(0)
    for i, _ in enumerate(model.stream(first, LONG, generator=g)):
        if i + 1 in (4096, LONG):
            seen.append(resident_bytes())
    early, late = seen
    print(f"{mixer}: {early / 2**20:.1f} MiB resident after 4,096 tokens, "
          f"{late / 2**20:.1f} MiB after {LONG:,}")
    # keys and values of 64 channels; what other tests have left may move the heap by some MiB
    of_softmax = (LONG - 4096) * 2 * 64 * 4
    assert late - early < of_softmax / 4
