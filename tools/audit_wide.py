"""The same questions more widely: batches, unusual inputs, other sizes of the model, with and
without gradients, and compiled. All of mixers alone, in float64, where nothing rounds."""
import copy
import logging

import torch

from base.user_code import in_words
from model import GPT
from tools.audit_leaks import explain
from tools.audit_place import entering
from tools.audit_subject import (
    SKELETONS, Row, Worst, asked, first_over, in_pieces, normal)
from training.chance import call, drawn
from training.leaks import (
    KINDS, beyond_rounding, cast, difference, leaks, limit, precision_within)

ROWS = 65
SIZES = (  # heads of 64, 128 and 6 channels, up to 12 heads, several layers, learned positions
    dict(n_embd=128, n_head=2, n_layer=5),
    dict(n_embd=128, n_head=1, n_layer=1),
    dict(n_embd=384, n_head=12, n_layer=1),
    dict(n_embd=48, n_head=8, n_kv_head=2, bias=False, pos="rope"),
    dict(n_embd=32, n_head=2, pos="learned", block_size=144),
    dict(n_embd=96, n_head=3, arch="llama", block_size=144),
)


def in_both_modes(model):
    """(name, mixer, "evaluation" or "training"), each mixer in that mode."""
    for name, module in asked(model).items():
        for training in (False, True):
            yield name, module.train(training), "training" if training else "evaluation"


def special(kind, B, T, C):
    """Two inputs (B, T, C) of that kind: a sequence, and what it changes to."""
    x, other = normal(B, T, C), normal(B, T, C, seed=1)
    if kind == "repeated tokens":  # of five
        generator = torch.Generator().manual_seed(0)
        words = normal(5, C)
        return (words[torch.randint(5, (B, T), generator=generator)] for _ in range(2))
    if kind == "equal tokens":
        return normal(1, 1, C).expand(B, T, C).clone(), other
    if kind == "other, then equal tokens":
        return x, normal(1, 1, C).expand(B, T, C).clone()
    if kind == "zeros among others":
        rare = normal(B, T, 1, seed=2) > 0.5
        return torch.where(rare, 0, x), torch.where(rare, other, 0)
    if kind == "zeros":
        return torch.zeros(B, T, C, dtype=x.dtype), other
    if kind == "zeros later":
        return x, torch.zeros(B, T, C, dtype=x.dtype)
    if kind == "positive":
        return x.abs(), other.abs() + 5
    if kind == "negative":
        return -x.abs(), -other.abs() - 5
    if kind == "one large channel":
        x[:, :, 0] *= 100
        return x, other
    if kind == "earlier tokens again":
        return x, x.roll(T // 3, 1)
    scale = {"tiny": 1e-4, "large": 30, "very large": 1e3}[kind]
    return scale * x, scale * other


INPUTS = ("repeated tokens", "equal tokens", "other, then equal tokens", "zeros among others",
          "zeros", "zeros later", "positive", "negative", "one large channel",
          "earlier tokens again", "tiny", "large", "very large")


def inputs(subject, T=71):
    """Inputs that are no normal numbers: causal, finite, and whole as in pieces."""
    worst = Worst(limit("suffix"))
    not_finite = []
    cuts = [1, 20, 64, T - 1]
    for model in subject.bare():
        for name, module, mode in in_both_modes(model):
            for kind in INPUTS:
                x, other = special(kind, 1 + len(cuts), T, model.config.n_embd)
                if not finite_on(module, x):
                    not_finite.append(f"{name}, {mode}, {kind}")
                    continue
                sizes = leaks(module, x, cuts, lengths=False, huge=False, other=other)
                precision = precision_within(module, x)
                for found, size in sizes.items():
                    most = limit(found, precision)
                    worst.note(size, most, f"{name}, {mode}, {kind}: {KINDS[found][0]}",
                               explain=explain(module, found, x, most, other=other))
                if not module.training:
                    look_at_pieces(worst, module, x, limit("length", precision), f"{name}, {kind}")
    if not_finite:
        yield Row("inputs", False, f"not finite, outputs or gradients: {'; '.join(not_finite)}")
    else:
        yield worst.row("inputs", "what holds for normal numbers does not hold for these",
                        f"; {', '.join(INPUTS)}")


def finite_on(module, x):
    x = x.detach().requires_grad_()
    y = call(module, x)
    [gradient] = torch.autograd.grad(y.sum(), x, materialize_grads=True)
    return bool(y.isfinite().all() and gradient.isfinite().all())


@torch.no_grad()
def look_at_pieces(worst, module, x, most, where):
    try:
        y = in_pieces(module, x, [30, 1, 1, x.size(1) - 32])
    except Exception:  # `split` says so
        return
    moved = beyond_rounding(module, x, difference(y, call(module, x)), most)
    worst.note(moved.max().item(), most, f"{where}: in pieces", f"{x.size(1)} tokens in pieces of "
               f"30, 1, 1 and {x.size(1) - 32}")


@torch.no_grad()
def batches(subject, rows=ROWS, T=12):
    """Each row of a batch is as if it were alone, and wherever it stands."""
    worst = Worst(limit("rows"))
    for model in subject.bare():
        C = model.config.n_embd
        look_at_batch(worst, model.eval(), rows, T, C, "model, evaluation")
        for name, module, mode in in_both_modes(model):
            look_at_batch(worst, module, rows, T, C, f"{name}, {mode}")
            look_at_gradients(worst, module, rows, T, C, f"{name}, {mode}")
            # which may go another way
            look_at_batch(worst, cast(copy.deepcopy(module), torch.float32), rows, T, C,
                          f"{name}, {mode}, float32", torch.float32)
    yield worst.row("batches", "a row is not on its own", f"; {rows} rows and fewer")


def look_at_batch(worst, module, B, T, C, where, dtype=torch.float64):
    x, other = (normal(B, T, C, seed=seed).to(dtype) for seed in (0, 1))
    precision = precision_within(module, x)
    most = limit("rows", precision)
    draws = drawn(module, x) if module.training else []
    still = bool(draws) and drawn(module, other) != draws
    y = call(module, x, still=still)
    # any two rows differ in a binary digit of their numbers: one of them then changes alone
    for digit in range(max(B - 1, 1).bit_length()):
        for value in (0, 1):
            changes = torch.arange(B) >> digit & 1 == value
            changed = torch.where(changes[:, None, None], other, x)
            moved = difference(call(module, changed, still=still), y)
            moved[changes] = 0
            note_rows(worst, module, moved, most, where, x, changed, ~changes)
    if draws:
        return
    most = limit("length", precision)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    batches = [order[:size] for size in (1, 2, 5, 12, 16, 32) if size <= B] + [order]
    for chosen in batches:
        moved = difference(call(module, x[chosen]), y[chosen])
        moved = beyond_rounding(module, x[chosen], moved, most)
        note_rows(worst, module, moved, most, f"{where}, {len(chosen)} rows of {B}, in another "
                  "order")


@torch.enable_grad()
def look_at_gradients(worst, module, B, T, C, where):
    """The gradients for a batch, of weights and inputs, are the sum of those for its parts."""
    x, combine = normal(B, T, C), normal(B, T, C, seed=1)
    most = limit("length", precision_within(module, x))
    if module.training and drawn(module, x):
        return
    inputs = [x.requires_grad_(), *module.requires_grad_().parameters()]

    def gradients(rows):
        total = (call(module, x[rows]) * combine[rows]).sum()
        of_x, *found = torch.autograd.grad(total, inputs, materialize_grads=True)
        return of_x.flatten(), torch.cat([g.flatten() for g in found or [total.detach()]])

    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    of_parts = [sum(part) for part in zip(*map(gradients, order.tensor_split((1, 4, 11))))]
    for what, whole, parts in zip(("the input", "weights"), gradients(order), of_parts):
        worst.note(difference(whole[None], parts[None]).item(), most,
                   f"{where}, gradients of {what}", f"{B} rows of {T} tokens, and in parts")
    module.requires_grad_(False)


def note_rows(worst, module, moved, most, where, x=None, changed=None, kept=None):
    """x (B, T, C), of which other rows than `kept` (B) became `changed`; None: another order."""
    words = explanation = ""
    if moved.max() > most:
        row, position = first_over(moved, most)
        words = f"{len(moved)} rows of {moved.size(1)} tokens: output {position} of row {row}"
        if x is not None:
            training = module.training

            def explanation():
                module.train(training)
                return words, entering(module, x, changed, rows=kept)
    worst.note(moved.max().item(), most, where, words, explanation or None)


def sizes(subject, T=130):
    """Other widths, heads, positions, and each of 12 layers."""
    worst = Worst(limit("suffix"))
    not_built = []
    asked_of = 0
    if subject.trained:
        yield Row("sizes", None, "of a run: those that it has")
        return
    for options in (*SIZES, dict(n_layer=12)):
        words = ", ".join(f"{name} {value}" for name, value in options.items())
        try:
            [model] = subject.bare(skeletons=[options])
            model(normal(1, 70, model.config.n_embd))
        except Exception as error:  # a mixer may want a number of heads, say
            not_built.append(f"{words}: {in_words(error)}")
            continue
        asked_of += 1
        every_layer = {f"layer {i} of {len(model.blocks)}": block.mixer
                       for i, block in enumerate(model.blocks) if block.mixer is not None}
        look_at_size(worst, {"model": model, **every_layer}, words, min(T, 130))
    passes = f"; {asked_of} sizes"
    if not_built:
        passes += f", not asked: {'; '.join(not_built)}"
    yield worst.row("sizes", "what holds for one size of the model does not hold for another",
                    passes)


def look_at_size(worst, modules, words, T):
    cuts = [1, 64, T - 1]
    for name, module in modules.items():
        C = module.config.n_embd if isinstance(module, GPT) else modules["model"].config.n_embd
        x = normal(1 + len(cuts), T, C)
        precision = precision_within(module, x)
        for training in (False, True):
            module.train(training)
            for kind, size in leaks(module, x, cuts, huge=False).items():
                most = limit(kind, precision)
                worst.note(size, most, f"{words}, {name}: {KINDS[kind][0]}",
                           explain=explain(module, kind, x, most))
        module.eval()
        look_at_pieces(worst, module, x[:2], limit("length", precision), f"{words}, {name}")


@torch.no_grad()
def modes(subject, lengths=(130, 256)):
    """Outputs are the same whether gradients are recorded or not."""
    worst = Worst(limit("length"))
    for model in subject.bare():
        for name, module, mode in in_both_modes(model):
            for T in lengths:
                look_at_modes(worst, module, model.config.n_embd, T, f"{name}, {mode}")
    # there a mixer that writes into its input writes into what goes on beside it
    for model in [] if subject.trained else subject.bare(skeletons=[dict(norm="none")]):
        look_at_modes(worst, model, model.config.n_embd, lengths[0], "model without norms")
        look_at_writing(worst, model, lengths[0])
    yield worst.row("modes", "outputs depend on whether gradients are recorded, on the number of "
                    "threads, or on a write into the input",
                    "; with gradients and without, with other threads, without norms")


def look_at_modes(worst, module, C, T, where):
    x = normal(3, T, C)
    most = limit("length", precision_within(module, x))
    still = module.training and bool(drawn(module, x))
    outputs = {"no_grad": call(module, x, still=still)}
    with torch.inference_mode():
        outputs["inference_mode"] = call(module, x, still=still).clone()
    threads = torch.get_num_threads()
    other = 3 if threads == 1 else 1
    torch.set_num_threads(other)
    try:
        outputs[f"{other} {'thread' if other == 1 else 'threads'}"] = call(module, x, still=still)
    finally:
        torch.set_num_threads(threads)
    with torch.enable_grad():
        with_x = x.clone().requires_grad_()
        outputs["a gradient of the input"] = call(module, with_x, still=still).detach()
        module.requires_grad_()
        outputs["gradients of weights"] = call(module, x, still=still).detach()
        sizes = leaks(module, x, [64, T - 1], huge=False)
        module.requires_grad_(False)
    for what, y in outputs.items():
        moved = beyond_rounding(module, x, difference(y, outputs["no_grad"]), most)
        worst.note(moved.max().item(), most, f"{where}, {what}", f"{T} tokens")
    if worst.failed:  # then a leak is hard to tell from that
        return
    for kind, size in sizes.items():
        allowed = limit(kind, precision_within(module, x))
        worst.note(size, allowed, f"{where}, weights with gradients: {KINDS[kind][0]}",
                   f"{T} tokens")


def look_at_writing(worst, model, T):
    """Whether a model's outputs are others where each mixer is given a copy of its input."""
    x = normal(3, T, model.config.n_embd)
    y = call(model, x)
    for mixer in model.mixers():
        mixer.register_forward_pre_hook(lambda _, given: (given[0].clone(), *given[1:]))
    moved = difference(call(model, x), y)
    worst.note(moved.max().item(), limit("repeat"), "model without norms, whose residual stream a "
               "mixer writes into", f"{T} tokens")


def compiled(subject, T=40, backend="aot_eager"):
    """Outputs are the same when torch.compile has seen the mixer."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # what it cannot trace is no fault
    worst = Worst(limit("length"))
    raised = ""
    for model in subject.bare(skeletons=[SKELETONS[1]]):
        for name, module, mode in in_both_modes(model):
            x = normal(2, T, model.config.n_embd)
            most = limit("length", precision_within(module, x))
            still = module.training and bool(drawn(module, x))
            if still:  # compiled code draws its own
                continue
            expected = call(module, x)
            torch.compiler.reset()
            try:
                y = call(torch.compile(module, backend=backend), x)
            except Exception as error:
                raised = f"{name}: torch.compile cannot: {in_words(error)[:150]}"
                continue
            with torch.no_grad():
                moved = beyond_rounding(module, x, difference(y, expected), most)
            worst.note(moved.max().item(), most, f"{name}, {mode}", f"2 rows of {T} tokens")
    torch.compiler.reset()
    row = worst.row("compiled", "compiled code gives other outputs", "; as without torch.compile")
    if raised and row.passed:
        row = Row("compiled", None, raised)
    yield row
