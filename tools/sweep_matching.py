"""Models of equal size whatever the mixer: the widths at which parameters, or FLOPs per token, agree."""

import torch

from base.errors import BadInput
from mixers import has_effect
from model import GPT, model_config

TOLERANCE = 0.02  # relative
MOST = 64         # times as wide as the recipe, at most


def size(config, what):
    """Parameters ("params"), or forward FLOPs per token of block_size ("flops"; None if the mixer has no formula)."""
    with torch.random.fork_rng():
        try:
            with torch.device("meta"):  # shapes without numbers: no time, no memory
                model = GPT(config)
        except (RuntimeError, NotImplementedError):  # a mixer that computes with what it draws
            model = GPT(config)
    return sum(p.numel() for p in model.parameters()) if what == "params" else model.flops_per_token(config.block_size)


def matched(options, mixer, baseline, what, vocab_size):
    """({option: (value, changed value)}, the size they give the model with `mixer`, the baseline's size): n_embd goes to the step just
    below or at the target, then ffn_hidden makes up the rest. options: a dict of train.py's. BadInput if the sizes cannot be
    brought within TOLERANCE."""
    def config_of(mixer, **changed):
        own = {name: value for name, value in options.items() if has_effect(name, mixer, options["n_layer"])}
        return model_config({**own, "mixer": mixer, **changed, "vocab_size": vocab_size}, "options")

    config, target = config_of(mixer), size(config_of(baseline), what)
    reached = lambda **changed: size(config_of(mixer, **changed), what)
    if target is None or reached() is None:
        raise BadInput(f"--match=flops: {mixer if target else baseline} has no FLOP formula; use --match=params")
    near = lambda value: abs(value / target - 1) <= TOLERANCE
    if near(reached()):
        return {}, reached(), target
    step = config.n_head * (2 if config.pos == "rope" else 1)
    width = largest(1, MOST * config.n_embd // step, lambda n: reached(n_embd=n * step) <= target) * step
    changed = {"n_embd": width} if width != config.n_embd else {}
    if not near(reached(**changed)):
        hidden = largest(1, MOST * width, lambda n: reached(**changed, ffn_hidden=n) <= target)
        changed["ffn_hidden"] = min((hidden, hidden + 1), key=lambda n: abs(reached(**changed, ffn_hidden=n) - target))
    if not near(reached(**changed)):
        raise BadInput(f"--match={what}: {mixer} cannot be brought to {baseline}'s {target:,.0f}, nearest {reached(**changed):,.0f}; leave it out")
    return {name: (getattr(config, name), value) for name, value in changed.items()}, reached(**changed), target


def largest(low, high, fits):
    """The largest n from low to high with fits(n), a condition that holds up to some n; low if it never holds."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
