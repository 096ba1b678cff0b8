"""Does an output see what it must not: a later token, another sequence, a call before, the length?

    found = find_leak(model, dtype)     # None, or what leaks where; train.py asks before it trains
    sizes = leaks(module, x, cuts)      # every kind with its figure; tools/audit.py asks for more

Everything is measured on the CPU, on a copy: of the model itself nothing changes, and neither do
torch's random numbers. Mostly in float64, where rounding hides nothing, but also in the precision
of training, for which a mixer may have other code. B batch, T time, C channels.
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from base.errors import BadInput
from mixers import layer_mixers
from training.chance import Chance, call, drawn
from training.contract import check_forward

HUGE = 1e4  # factor on later tokens: enough for a maximum over them to push earlier rows to 0/0
SHORT = 71  # tokens: a chunk of 64 and a bit

# kind -> what happens, and the most that it may move an output, as a share of the largest output
# (of the gradient: of the largest gradient). Rounding in float64 is 1e-16; products of HUGE
# numbers, and sums of other lengths, round to more.
KINDS = {
    "repeat": ("the same call gives another output after other calls", 1e-12),
    "rows": ("an output depends on another sequence of the batch", 1e-12),
    "suffix": ("an output depends on a later token", 1e-12),
    "gradient": ("an output's gradient reaches a later token", 1e-12),
    "length": ("an output depends on how long the sequence is", 1e-9),
    "huge": (f"a later token of {HUGE:,.0f} times the usual size changes an earlier output", 1e-5),
}


def limit(kind, precision=torch.float64):
    """What a size of that kind may be in a precision.

    In float32 also 256 roundings, 3e-5: a Fourier transform rounds every output by all inputs,
    later ones too. In bfloat16, where no transform is taken, 8: a scale that cancels may come from
    later tokens."""
    roundings = 8 if precision.itemsize == 2 else 256
    most = roundings * torch.finfo(precision).eps
    if kind == "huge":
        most *= HUGE
    return max(KINDS[kind][1], most)


def leaking(sizes, precision=torch.float64):
    """The kinds of `sizes` (kind -> size) that are over their limit; NaN is."""
    return [kind for kind in sizes if not sizes[kind] <= limit(kind, precision)]


# The model's copies and its parts -----------------------------------------------------------------

def cast(module, dtype):
    """`module` with all its floating-point tensors in another dtype. Complex ones stay complex,
    where Module.to would drop their imaginary part: complex128 beside float64, else complex64."""
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64

    def convert(tensor):
        if tensor.is_complex():
            return tensor.to(complex_dtype)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return module._apply(convert)


def bare_copy(model, noise=0.1):
    """A float64 copy of a GPT on the CPU that reads hidden states (B, T, C) in place of tokens and
    ends before the head.

    noise: the standard deviation of what is added to every parameter: one that starts at zero would
    hide what it scales. A negative one adds the same with the other sign. Statistics are then
    collected and applied once, for what they change may leak too. noise=0 copies the model as it
    is."""
    # the large tables see one token at a time
    outside = {id(model.embed): nn.Identity(), id(model.head): nn.Identity()}
    bare = cast(copy.deepcopy(model, outside).cpu(), torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in bare.parameters():
        p += noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    if noise:
        T = min(64, bare.config.block_size)
        x = torch.randn(2, T, bare.config.n_embd, generator=generator, dtype=torch.float64)
        call(bare.train(), x)
        bare.apply_statistics()
    return bare.train(model.training)


def parts(model):
    """name -> module for each mixer of a GPT, the first layer that has it, and for the FFN."""
    names = layer_mixers(model.config.mixer, model.config.n_layer)
    found = {}
    for name, block in zip(names, model.blocks):
        if block.mixer is not None:
            found.setdefault(f"mixer {name}", block.mixer)
    found[f"mlp_activation {model.config.mlp_activation}"] = model.blocks[0].mlp
    return found


# Questions ----------------------------------------------------------------------------------------

def difference(a, b, either=False):
    """|a - b| over the largest |b|, or with `either` of both, the largest over the last axis.
    Infinite where only one is a number; two NaN are alike."""
    alike = (a == b) | a.isnan() & b.isnan()
    size = torch.maximum(a.abs(), b.abs()) if either else b.abs()
    scale = size.nan_to_num(0, 0, 0).max().clamp(min=torch.finfo(b.dtype).tiny)
    shares = (a - b).abs() / scale
    return shares.masked_fill(alike, 0).nan_to_num(nan=math.inf).amax(-1)


def share(part, whole):
    """The largest number in `part` over the largest in `whole`, which has it too: 0 if all are
    zero, infinite if one is no number."""
    largest = whole.max().item()
    if largest == 0:
        return 0.0
    value = part.max().item() / largest
    return math.inf if math.isnan(value) else value


class Narrowing(TorchDispatchMode):
    """Counts the entries of results of float32 or less that came from numbers of float64."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wide = any(is_wide(value) for value in (*args, *kwargs.values()))
        result = function(*args, **kwargs)
        if wide and isinstance(result, torch.Tensor) and not is_wide(result):
            if result.is_floating_point() or result.is_complex():
                self.entries += result.numel()
        return result


def is_wide(value):
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float64, torch.complex128)


def precision_within(module, x):
    """The precision that a module really has on x (B, T, C): x's own, but float32 if it computes in
    float32 or less although x is float64. Differences within that are rounding."""
    if x.dtype != torch.float64:
        return x.dtype
    with torch.no_grad(), Narrowing() as narrowing:
        call(module, x)
    # an entry per token at least, at once or token by token
    return torch.float32 if narrowing.entries >= x.size(0) * x.size(1) else torch.float64


def leaks(module, x, cuts, lengths=True, huge=True, autocast=False, other=None):
    """The size of each kind of leak: kind -> size, to be held against KINDS. x (1 + len(cuts), T,
    C).

    Row i + 1 changes from token cuts[i] on, to `other` (as x; by default normal numbers), row 0
    nowhere; so two calls tell what all rows, before their cuts, depend on. lengths: also whether
    beginnings of row 0 alone are those of the whole. huge: also with HUGE changes; of little use
    behind a norm. autocast: of the forward pass to bfloat16, as in training.

    In training random numbers stand still where how many are drawn depends on what is asked."""
    B, T, _ = x.shape
    later = torch.arange(T) >= torch.tensor([T, *cuts])[:, None]  # (B, T)
    first = torch.arange(B)[:, None].expand(B, T) == 0
    earlier = ~later & ~first
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    other = normal if other is None else other
    sizes = {}

    x = x.detach()
    changed = torch.where(later[..., None], other, x)
    draws = drawn(module, x) if module.training else []
    still = bool(draws) and drawn(module, changed) != draws
    x.requires_grad_()
    y = call(module, x, autocast, still)
    if y.requires_grad:
        seen = y[earlier]
        direction = torch.randn(seen.shape, generator=generator, dtype=y.dtype)
        [gradient] = torch.autograd.grad((seen * direction).sum(), x, materialize_grads=True)
        gradient = gradient.abs().amax(-1)  # (B, T)
        sizes["gradient"] = share(gradient[later | first], gradient)

    x, y = x.detach(), y.detach()
    with torch.no_grad():
        # either: beside later tokens zeros need only be zeros but for their rounding
        moved = difference(call(module, changed, autocast, still), y, either=True)
        sizes["rows"] = moved[first].max().item()
        sizes["suffix"] = moved[earlier].max().item()
        # row 0 was the same in both calls
        sizes["repeat"] = sizes["rows"]
        if leaking(sizes):
            sizes["repeat"] = difference(call(module, x, autocast, still), y).max().item()
        if huge:
            changed = torch.where(later[..., None], HUGE * normal, x)
            sizes["huge"] = difference(call(module, changed, autocast, still), y)[~later].max()
            sizes["huge"] = sizes["huge"].item()
        if lengths:
            if draws and not still:
                y = call(module, x, autocast, still=True)
            sizes["length"] = 0.0
            for t in cuts:
                moved = difference(call(module, x[:1, :t], autocast, bool(draws)), y[:1, :t])
                moved = beyond_rounding(module, x[:1, :t], moved, limit("length"))
                sizes["length"] = max(sizes["length"], moved.max().item())
    return sizes


def sensitivity(module, x, draws=6):
    """By how much rounding the inputs x (B, T, C) moves the outputs of each row, (B, 1): what is
    not smooth there, as a choice of the largest among equals, differs by as much with the order of
    sums."""
    with torch.no_grad():
        y = call(module, x)
        most = torch.zeros(x.size(0), dtype=x.dtype)
        for seed in range(draws):
            generator = torch.Generator().manual_seed(seed)
            jitter = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            near = x * (1 + 4 * torch.finfo(x.dtype).eps * jitter)
            most = torch.maximum(most, difference(call(module, near), y).amax(1).to(x.dtype))
    return most[:, None]


def beyond_rounding(module, x, moved, limit):
    """`moved` (B, T) without what rounding moves as far. limit: above which it matters."""
    if moved.max() <= limit:
        return moved
    return moved.masked_fill(moved <= 100 * sensitivity(module, x), 0)


@torch.no_grad()
def remembered(module, C, noise, autocast=True, T=13):
    """mode -> by how much an output depends on what was asked before. module: a mixer with C
    channels that nobody has asked anything yet; it stays so, copies are asked, in float32.
    autocast: of the first of the calls before."""
    generator = torch.Generator().manual_seed(0)
    fresh = cast(copy.deepcopy(module), torch.float32).requires_grad_(False)
    for p in fresh.parameters():
        p += noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    x = torch.randn(2, T, C, generator=generator)
    same_ends = torch.cat([x[:, :1], x[:, 1:-1].flip(1), x[:, -1:]], 1)
    moved = {}
    for training in (False, True):
        used = copy.deepcopy(fresh)
        for mode in (not training, training) * 2:  # each turn may change something
            used.train(mode)
        y = last_output(copy.deepcopy(fresh).train(training), [x], False)
        y_behind = last_output(used, [3 * x.flip(1) + 1, same_ends, x], autocast)
        moved["training" if training else "evaluation"] = difference(y_behind, y).max().item()
    return moved


def last_output(module, inputs, autocast):
    """The output for the last of some inputs (B, T, C), each in the memory of the one before;
    autocast: of the first. Nothing is dropped."""
    given = torch.empty_like(inputs[0])
    with torch.random.fork_rng(devices=[]), Chance(still=True):
        for x in inputs:
            given.copy_(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y, _ = module(given)
            autocast = False
    return y


@dataclass
class Probe:
    """What is asked of a module: over how many tokens, what changes where (`cuts`), in which
    precision."""
    where: str  # "the model", "mixer lln"
    module: nn.Module
    tokens: int
    borders: set  # of tokens, from which on one sequence changes
    precision: torch.dtype = torch.float64
    lengths: bool = True
    huge: bool = True

    def found(self, C):
        """The kinds of leaks that there are, at C channels."""
        T = self.tokens
        cuts = sorted(t for t in self.borders if 0 < t < T) or [T]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1 + len(cuts), T, C, generator=generator, dtype=torch.float64)
        x = x.to(torch.promote_types(self.precision, torch.float32))
        autocast = self.precision == torch.bfloat16
        sizes = leaks(self.module, x, cuts, self.lengths, self.huge, autocast)
        if self.precision == torch.float64 and leaking(sizes):
            return leaking(sizes, precision_within(self.module, x))
        return leaking(sizes, self.precision)


def probes(model, dtype, trained):
    """Every question that find_leak asks: of the model, and of its parts, which are then named
    rather than the model.

    With noise on the weights in both modes, one with the other's sign, since a weight that starts
    at zero hides what it scales; then with the weights as they are, which are all there is to ask
    of a trained model."""
    config = model.config
    short = min(config.block_size, SHORT)
    borders = {1, config.n_embd // config.n_head, 64, short // 2, short - 1}
    long = config.block_size
    fresh = ((True, 0.1), (False, -0.1), (False, 0))
    for training, noise in ((True, 0), (False, 0)) if trained else fresh:
        bare = bare_copy(model, noise).train(training)
        yield Probe("the model", bare, short, borders, huge=False)
        for name, part in parts(bare).items():
            yield Probe(name, part, short, borders)
        cast(bare, torch.float32)
        for name, part in parts(bare).items():
            yield Probe(name, part, long, {long // 2, long - 1}, dtype, lengths=False, huge=False)


def find_leak(model, dtype=torch.float32, trained=False):
    """What leaks in a GPT, "mixer lln: an output depends on a later token", or None. dtype: of its
    heavy operations; trained: at the end of a run. BadInput, with the place, if a mixer's forward
    does not return (y, state).

    In float64 it asks about a sequence of a chunk of 64 and a bit, if block_size lets it; in the
    run's precision about one of block_size tokens; in float32 whether a call depends on those
    before."""
    check_forward(bare_copy(model, noise=0).eval())
    where = {}  # kind -> where it was found, in a part if it is in one
    for name, part in parts(bare_copy(model, noise=0)).items():
        if name.startswith("mixer "):
            moved = remembered(part, model.config.n_embd, 0 if trained else 0.1,
                               dtype == torch.bfloat16)
            if any(leaking({"repeat": size}, torch.float32) for size in moved.values()):
                where["repeat"] = name
    for probe in probes(model, dtype, trained):
        for kind in probe.found(model.config.n_embd):
            if probe.where != "the model" or kind not in where:
                where[kind] = probe.where
    for kind, (what, _) in KINDS.items():
        if kind in where:
            return f"{where[kind]}: {what}"
    return None


def refuse_leaks(model, options, trained=False):
    """BadInput if an output of the model sees what it must not: its losses would mean nothing. With
    allow_leak, one line."""
    try:
        leak = find_leak(model, getattr(torch, options.dtype), trained)
    except BadInput:  # it cannot be trained at all
        raise
    except Exception as error:  # of a mixer for GPUs alone, say
        name = f"mixer {options.mixer} could not be checked"
        if not options.allow_leak:
            error.add_note(f"{name} for leaks, in float64 on the CPU; "
                           "--allow_leak trains it unchecked")
            raise
        reason = " ".join(str(error).split())[:200]
        leak = f"{name}, {type(error).__name__}: {reason}"
    if leak and not options.allow_leak:
        mixer_file = f" --mixer_file={options.mixer_file}" if options.mixer_file else ""
        audit = f"python -m tools.audit{mixer_file} --mixer={options.mixer}"
        raise BadInput(f"{leak}; so nothing is reported. `{audit}` says more; "
                       "--allow_leak trains it all the same")
    if leak:
        print(f"warning    {leak}; its losses may not be compared", flush=True)
