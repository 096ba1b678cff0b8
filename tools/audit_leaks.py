"""The audit's first questions: is it a mixer, and does an output see what it must not?"""
import copy
import math

import torch

from tools.audit_place import entering
from tools.audit_subject import EXACT, HALF, ROUGH, Row, Worst, asked, first_over, normal
from training.contract import check_forward
from training.chance import call, drawn
from training.leaks import (
    HUGE, KINDS, bare_copy, cast, difference, leaking, leaks, limit, precision_within, remembered)

LENGTHS = (2, 64, 130, 200)
ROUGH_LENGTHS = (64, 130, 256, 520)  # in the precisions of training; the last two of mixers alone


def forward(subject):
    for model in subject.build():
        check_forward(model, torch.float32)
    yield Row("forward", True, "(y, state), y shaped like x")


def explain(module, kind, x, limit, autocast=False, other=None):
    """(the smallest that shows a leak in words, its place): the first length, then the first token
    whose change is seen."""
    training = module.training
    short = range(2, min(x.size(1), 80))

    def at(T):
        for cut in sorted({T - 1, T // 2}, reverse=True):
            two = x[:1, :T].expand(2, -1, -1).clone()
            late = None if other is None else other[-1:, :T].expand(2, -1, -1)
            sizes = leaks(module, two, [cut], kind == "length", kind == "huge", autocast, late)
            if not sizes.get(kind, 0) <= limit:
                return words(module, kind, two, cut, limit, late)

    def explanation():
        module.train(training)
        for T in (*short, *range(80, x.size(1), 8), x.size(1)):
            found = at(T)
            if found and T > 80:  # within the last eight
                found = next(filter(None, map(at, range(T - 7, T))), found)
            if found:
                return found
        return "", ""
    return explanation


def words(module, kind, x, cut, limit, other):
    """What is seen in the smallest example, x (2, T, C), and its place."""
    T = x.size(1)
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    late = normal if other is None else other
    changed = x.clone()
    changed[1, cut:] = (HUGE * normal if kind == "huge" else late)[1, cut:]
    if kind == "gradient":
        return (f"{T} tokens: the gradient of an output before token {cut} reaches it",
                entering(module, x, changed, time=(T, cut)))
    if kind == "length":
        return (f"{T} tokens: outputs are others if the sequence ends before token {cut}",
                entering(module, x, x[:, :cut]))
    if kind == "repeat":
        return f"{T} tokens, called twice", entering(module, x, x)
    with torch.no_grad():
        moved = difference(call(module, changed), call(module, x))
    moved[1, cut:] = 0
    if kind == "rows":
        where = entering(module, x, changed, rows=torch.tensor([True, False]))
    else:
        where = entering(module, x, changed, time=(T, cut))
    if not (moved > limit).any():
        return f"{T} tokens", where
    row, position = first_over(moved, limit)
    return (f"{T} tokens, 2 rows: output {position} of row {row} moves by {moved.max():.0e} "
            f"when row 1 changes from token {cut} on"), where


def look(worst, model, T, borders, precision, whole=True):
    """Notes in `worst`, kind -> Worst, what leaks in a model and its mixers over T tokens. whole:
    ask the model too."""
    exact = precision.dtype == torch.float64
    cuts = sorted(t for t in borders if 0 < t < T)
    x = normal(1 + len(cuts), T, model.config.n_embd).to(precision.dtype)
    every = {"model": model} if whole else {}
    for name, module in (every | asked(model)).items():
        for training in (False, True):
            module.train(training)
            sizes = leaks(module, x, cuts, lengths=exact, huge=exact, autocast=precision.autocast)
            rounding = precision.rounding
            inside = ""
            if exact and leaking(sizes) and precision_within(module, x) == torch.float32:
                rounding = torch.float32
                inside = ", float32 inside"
            mode = "training" if training else "evaluation"
            where = f"{name}, {T} tokens, {mode}, {precision.name}{inside}"
            for kind, size in sizes.items():
                most = limit(kind, rounding)
                worst[kind].note(size, most, where,
                                 explain=explain(module, kind, x, most, precision.autocast))


def causality(subject, lengths=LENGTHS, rough_lengths=ROUGH_LENGTHS):
    worst = {kind: Worst(limit(kind)) for kind in KINDS}
    raised = None  # by the precisions of training; the others are asked all the same
    for model in subject.bare(n_layer=3):
        D = model.config.n_embd // model.config.n_head
        for T in lengths:
            borders = {1, D - 1, D, D + 1, 63, 64, 65, T // 2, 128, T - 1}
            look(worst, model, T, borders, EXACT)
        for precision in ROUGH:
            try:
                rough = cast(copy.deepcopy(model), precision.dtype)
                check_forward(rough.eval(), precision.dtype)
                for T in sorted({*rough_lengths, model.config.block_size}):
                    look(worst, rough, T, {1, 64, 128, T // 2, T - 1}, precision, T < 200)
            except Exception as error:
                raised = raised or in_precision(error, precision)
        look_in_float16(worst, model)
    for kind in KINDS:
        yield worst[kind].row(kind, KINDS[kind][0])
    if raised:
        raise raised


def before(subject):
    """Of a model that was just built, the same call gives the same whatever was asked before."""
    worst = Worst(limit("repeat", torch.float32))
    for model in subject.build():
        for name, module in asked(bare_copy(model, noise=0)).items():
            try:
                moved = remembered(module, model.config.n_embd, subject.noise)
            except Exception as error:
                error.add_note("one of the calls was under autocast to bfloat16")
                raise
            for mode, size in moved.items():
                worst.note(size, worst.limit, f"{name}, {mode}", "2 rows of 13 tokens, behind a "
                           "call under autocast, one with the same first and last tokens, and "
                           "turns between evaluation and training")
    yield worst.row("before", "an output depends on what was asked before", "; the first call sets "
                    "nothing, and nothing is looked up that another call left")


@torch.no_grad()
def chance(subject, seeds=200, T=12):
    """Whatever is drawn in training: with the same draws a change moves no earlier token and no
    other row."""
    worst = Worst(limit("suffix"))
    draws = False
    for model in subject.bare():
        for name, module in asked(model).items():
            x = normal(2, T, model.config.n_embd)
            changed = x.clone()
            changed[0, T // 2:] = normal(T - T // 2, model.config.n_embd, seed=1)
            numbers = drawn(module.train(), x)
            if not numbers or drawn(module, changed) != numbers:
                continue
            draws = True
            most = limit("suffix", precision_within(module, x))
            for seed in range(seeds):
                y, of_changed = (call_drawing(module, given, seed) for given in (x, changed))
                moved = difference(of_changed, y)
                moved[0, T // 2:] = 0
                worst.note(moved.max().item(), most, f"{name}, training", f"seed {seed}")
    if draws:
        yield worst.row("chance", "in some passes an output depends on a later token or another "
                        "sequence", f"; {seeds} draws")
    else:
        yield Row("chance", None, "the mixer draws nothing")


def call_drawing(module, x, seed):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return module(x.clone())[0]


def look_in_float16(worst, model, T=64):
    """Nothing is trained in float16 here: a mixer may raise in it, and overflow."""
    found = {kind: Worst(limit(kind)) for kind in KINDS}
    try:
        look(found, cast(copy.deepcopy(model), HALF.dtype), T, {1, T // 2, T - 1}, HALF, False)
    except Exception:
        return
    for kind, its in found.items():
        if math.isfinite(its.size):
            worst[kind].note(its.size, its.limit, its.where, its.smallest, its.explain)


def in_precision(error, precision):
    error.add_note(f"in {precision.name}")
    return error
