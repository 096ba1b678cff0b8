"""Models of equal size whatever the mixer: the widths at which parameters, or FLOPs per token,
agree."""
from dataclasses import dataclass

import torch

from base.errors import BadInput
from mixers import has_effect
from model import GPT, model_config

TOLERANCE = 0.02  # relative
MOST = 64         # times as wide as the recipe, at most


@dataclass
class Change:
    name: str  # of an option
    before: int
    value: int


@dataclass
class Match:
    changes: list   # of Change
    reached: float  # parameters, or FLOPs per token
    target: float   # the baseline's


def size(config, what):
    """Parameters ("params"), or forward FLOPs per token of block_size ("flops"; None if the mixer
    has no formula)."""
    with torch.random.fork_rng():
        try:
            with torch.device("meta"):  # shapes without numbers: no time, no memory
                model = GPT(config)
        except (RuntimeError, NotImplementedError):  # a mixer that computes with what it draws
            model = GPT(config)
    if what == "params":
        return sum(p.numel() for p in model.parameters())
    return model.flops_per_token(config.block_size)


def matched(options, mixer, baseline, what, vocab_size):
    """The Match of a model with `mixer` to one with `baseline`: n_embd goes to the step just
    below or at the target, then ffn_hidden makes up the rest. options: a dict of train.py's;
    what: "params" or "flops". BadInput if the sizes cannot be brought within TOLERANCE."""
    def config_of(name, **changed):
        own = {}
        for key, value in options.items():
            if has_effect(key, name, options["n_layer"]):
                own[key] = value
        return model_config({**own, "mixer": name, **changed, "vocab_size": vocab_size}, "options")

    def size_with(**changed):
        return size(config_of(mixer, **changed), what)

    def distance(reached):
        return abs(reached / target - 1)

    config = config_of(mixer)
    target = size(config_of(baseline), what)
    if target is None or size_with() is None:
        without = baseline if target is None else mixer
        raise BadInput(f"--match=flops: {without} has no FLOP formula; use --match=params")
    if distance(size_with()) <= TOLERANCE:
        return Match([], size_with(), target)

    step = config.n_head * (2 if config.pos == "rope" else 1)
    steps = largest(1, MOST * config.n_embd // step, lambda n: size_with(n_embd=n * step) <= target)
    width = steps * step
    changed = {}
    if width != config.n_embd:
        changed["n_embd"] = width
    if distance(size_with(**changed)) > TOLERANCE:
        hidden = largest(1, MOST * width, lambda n: size_with(**changed, ffn_hidden=n) <= target)
        below, above = (distance(size_with(**changed, ffn_hidden=n)) for n in (hidden, hidden + 1))
        changed["ffn_hidden"] = hidden if below <= above else hidden + 1

    reached = size_with(**changed)
    if distance(reached) > TOLERANCE:
        raise BadInput(f"--match={what}: {mixer} cannot be brought to {baseline}'s {target:,.0f}, "
                       f"nearest {reached:,.0f}; leave it out")
    changes = [Change(name, getattr(config, name), value) for name, value in changed.items()]
    return Match(changes, reached, target)


def largest(low, high, fits):
    """The largest n from low to high with fits(n), a condition that holds up to some n; low if it
    never holds."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
