"""Does an output see what it must not: a later token, another sequence of the batch, an earlier call, the length?

    found = find_leak(model, dtype)     # None, or what leaks where, in words; train.py asks before it reports a loss
    sizes = leaks(module, x, cuts)      # every kind with its figure; tools/audit.py asks at many lengths

Everything is measured on the CPU, on a copy: of the model itself nothing changes, and neither do torch's random numbers. Mostly in
float64, where rounding hides nothing, but also in the precision of training, for which a mixer may have other code. B batch, T time,
C channels.
"""
import copy
import math

import torch
import torch.nn as nn

from mixers import layer_mixers

HUGE = 1e4  # factor on the later tokens: enough for a maximum taken over them to push earlier rows to 0/0
# kind -> what happens, and the most that it may move an output, as a share of the largest output (of the gradient: of the
# largest gradient). Rounding in float64 is 1e-16; products of HUGE numbers, and sums of other lengths, round to more.
KINDS = {
    "repeat": ("the same call gives another output after other calls", 1e-9),
    "rows": ("an output depends on another sequence of the batch", 1e-9),
    "suffix": ("an output depends on a later token", 1e-9),
    "gradient": ("an output's gradient reaches a later token", 1e-9),
    "length": ("an output depends on how long the sequence is", 1e-6),
    "huge": (f"a later token of {HUGE:,.0f} times the usual size changes an earlier output", 1e-5),
}


def limit(kind, precision=torch.float64):
    """What a size of that kind may be in a precision: also 8 roundings, as a scale that cancels may come from later tokens."""
    return max(KINDS[kind][1], 8 * torch.finfo(precision).eps)


def leaking(sizes, precision=torch.float64):
    """The kinds of `sizes` (kind -> size) that are over their limit; NaN is."""
    return [kind for kind in sizes if not sizes[kind] <= limit(kind, precision)]


def bare_copy(model, noise=0.1):
    """A float64 copy of a GPT on the CPU that reads hidden states (B, T, C) in place of tokens and ends before the head.

    noise: the standard deviation of what is added to every parameter: one that starts at zero would hide what it scales. Statistics
    are then collected and applied once, for what they change may leak too. noise=0 copies the model as it is."""
    outside = {id(model.embed): nn.Identity(), id(model.head): nn.Identity()}  # the large tables see one token at a time
    bare = copy.deepcopy(model, outside).cpu().double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in bare.parameters():
        p += noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    if noise:
        call(bare.train(), torch.randn(2, min(64, bare.config.block_size), bare.config.n_embd, generator=generator, dtype=torch.float64))
        bare.apply_statistics()
    return bare.train(model.training)


def parts(model):
    """name -> module for each mixer of a GPT, the first layer that has it, and for the FFN."""
    names = layer_mixers(model.config.mixer, model.config.n_layer)
    mixers = {f"mixer {name}": block.mixer for name, block in reversed(list(zip(names, model.blocks))) if block.mixer is not None}
    return mixers | {f"mlp_activation {model.config.mlp_activation}": model.blocks[0].mlp}


def call(module, x, autocast=False):
    """The outputs (B, T, .) of a mixer or model, (y, anything) = module(x); dropout, if there is any, always drops the same."""
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.default_generator.manual_seed(0)
        return module(x)[0]


def difference(a, b):
    """|a - b| over the largest |b|, the largest over the last axis. Infinite where only one is a number; two NaN are alike."""
    alike = (a == b) | a.isnan() & b.isnan()
    scale = b.abs().nan_to_num(0, 0, 0).max().clamp(min=1e-300)
    return ((a - b).abs() / scale).masked_fill(alike, 0).nan_to_num(nan=math.inf).amax(-1)


def leaks(module, x, cuts, lengths=True, huge=True, autocast=False):
    """The size of each kind of leak: kind -> size, to be held against KINDS. x (1 + len(cuts), T, C).

    Row i + 1 changes from token cuts[i] on, row 0 nowhere; so two calls tell what all rows, before their cuts, depend on.
    lengths: also whether beginnings of row 0 alone are those of the whole; not where dropout would differ.
    huge: also with HUGE changes; of little use behind a norm. autocast: of the forward pass to bfloat16, as in training."""
    B, T, _ = x.shape
    output = lambda x: call(module, x, autocast)
    later = torch.arange(T) >= torch.tensor([T, *cuts])[:, None]  # (B, T)
    first = torch.arange(B)[:, None].expand(B, T) == 0
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    x = x.requires_grad_()
    y = output(x)
    sizes = {}
    if y.requires_grad:
        earlier = y[~later & ~first]
        [gradient] = torch.autograd.grad((earlier * torch.randn(earlier.shape, generator=generator, dtype=y.dtype)).sum(), x)
        gradient = gradient.abs().amax(-1)
        sizes["gradient"] = (gradient[later | first].max() / gradient.max().clamp(min=1e-300)).nan_to_num(nan=math.inf).item()
    with torch.no_grad():
        x, y = x.detach(), y.detach()
        moved = lambda after, where: difference(after, y[:len(after), :after.size(1)])[where].max().item()
        changed = output(torch.where(later[..., None], other, x))
        sizes["rows"], sizes["suffix"] = moved(changed, first), moved(changed, ~later & ~first)
        # row 0 was the same in both calls
        sizes["repeat"] = moved(output(x), slice(None)) if leaking(sizes) else sizes["rows"]
        if huge:
            sizes["huge"] = moved(output(torch.where(later[..., None], HUGE * other, x)), ~later)
        if lengths:
            sizes["length"] = max(moved(output(x[:1, :t]), slice(None)) for t in cuts)
    return sizes


def find_leak(model, dtype=torch.float32):
    """What leaks in a GPT, "mixer lln: an output depends on a later token", or None. dtype: of its heavy operations.

    In float64 a sequence of a chunk of 64 and a bit, if block_size lets it; in training mode with noise on the weights, in
    evaluation mode with the weights as they are. Then, of the parts, one of block_size tokens in the precision of the run."""
    config = model.config
    T = min(config.block_size, 71)
    borders = {config.n_embd // config.n_head, 64, T // 2, T - 1}
    found = {}  # kind -> where

    def look(modules, T, borders, precision, **which):
        cuts = sorted(t for t in borders if 0 < t < T) or [T]
        x = torch.randn(1 + len(cuts), T, config.n_embd, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for where, module in modules:
            sizes = leaks(module, x.to(torch.promote_types(precision, torch.float32)), cuts, autocast=precision == torch.bfloat16, **which)
            found.update({kind: where for kind in leaking(sizes, precision)})

    for training in (True, False):
        bare = bare_copy(model, noise=0.1 if training else 0).train(training)
        look([("the model", bare)], T, borders, torch.float64, lengths=not training, huge=False)
        look(parts(bare).items(), T, borders, torch.float64, lengths=not training)  # a part is named rather than the model around it
        look(parts(bare.float()).items(), config.block_size, {config.block_size // 2, config.block_size - 1}, dtype, lengths=False, huge=False)
    return next((f"{found[kind]}: {what}" for kind, (what, _) in KINDS.items() if kind in found), None)
