"""The audit's questions about the state: pieces are the whole, an old state stays as it was, and a
state holds all that goes on, in as many bytes as declared."""
import copy
import dataclasses
import math
from collections import deque
from numbers import Number

import torch

from mixers.parts.heads import Room
from tools.audit_subject import (
    ROUGH, Row, Worst, asked, first_over, in_pieces, normal, step, tokens)
from training.chance import call
from training.leaks import bare_copy, beyond_rounding, cast, difference, limit, precision_within

SMALL_PIECES = [*range(1, 16), 2, 2, 6]  # each small size on top of a state, and before another
SPLITS = ([64, 66], [7, 1, 1, 9, 1, 90, 21], SMALL_PIECES, [104] + [1] * 26, [1] * 130,
          [200, 1, 199, 50])
STATE_LENGTHS = (1, 8, 63, 64, 100, 128)
SINGLE = 700  # tokens decoded one by one
LONGEST = 1024
PIECES = ([256] * 4, [333, 1, 1, 500, 165], [90] * 10 + [1] * 100,
          # each size from 16 to 65, and whole chunks, on top of a state and before another piece
          [*range(16, 48), 16], [*range(48, 66), 7], [1, 64, 64, 128, 128, 256, 2])
BFLOAT16_LIMIT = 16  # root mean square error over that of the output, in units of bfloat16's eps
BFLOAT16_EPS = torch.finfo(torch.bfloat16).eps


def gradients(y, inputs):
    """Of a fixed random combination of the outputs y."""
    return torch.autograd.grad((y * normal(*y.shape, seed=1)).sum(), inputs, materialize_grads=True)


def one_row(gradients):
    """(1, all entries): differences are then measured against the largest of all, since a gradient
    may be zero but for rounding, as that of a key's bias is."""
    return torch.cat([g.flatten() for g in gradients])[None]


def split(subject, splits=SPLITS):
    worst_y = worst_g = 0.0
    cut_off = set()  # dtypes of what no gradient goes through from piece to piece
    most = limit("length")
    for model in subject.bare():
        parameters = list(model.requires_grad_().parameters())
        x = normal(2, 0, model.config.n_embd)
        for sizes in splits:
            if sum(sizes) != x.size(1):
                x = normal(2, sum(sizes), model.config.n_embd)
                most = max(most, limit("length", precision_within(model, x)))
                whole = model(x.requires_grad_())[0]
                of_x, *of_parameters = gradients(whole, [x, *parameters])
            state = None
            ys = []
            for piece in x.split(sizes, dim=1):
                y, state = model.step(piece, state)
                ys.append(y)
            y = torch.cat(ys, dim=1)
            again_x, *again_parameters = gradients(y, [x, *parameters])
            error_x = difference(again_x, of_x).max().item()
            error_parameters = difference(one_row(again_parameters), one_row(of_parameters)).item()
            worst_y = max(worst_y, difference(y, whole).max().item())
            worst_g = max(worst_g, error_x, error_parameters)
            cut_off |= {str(t.dtype) for t in tensors(state) if not t.requires_grad}
    figures = f"outputs differ by {worst_y:.0e}, gradients by {worst_g:.0e}, limit {most:.0e}"
    if worst_g > most >= worst_y and cut_off:
        figures += (f"; outputs are the whole's, but no gradient goes through what the state holds "
                    f"in {', '.join(sorted(cut_off))}")
    yield Row("split", max(worst_y, worst_g) <= most, figures)


# what holds no tensors of its own; those beside a Room are views of it
WITHOUT_TENSORS = (type(None), Number, str, bytes, torch.dtype, torch.device, Room)


def tensors(state):
    """All tensors within a state, however nested. TypeError for what cannot be looked into."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, WITHOUT_TENSORS):
        return []
    if isinstance(state, dict):
        inner = state.values()
    elif isinstance(state, (tuple, list, deque)):
        inner = state
    elif dataclasses.is_dataclass(state):
        inner = [getattr(state, field.name) for field in dataclasses.fields(state)]
    elif hasattr(state, "__dict__") and not callable(state):
        inner = vars(state).values()
    else:
        raise TypeError(f"a {type(state).__name__} in a state hides what it holds; "
                        "use tensors, numbers, tuples, lists, dicts and dataclasses")
    found = []
    for value in inner:
        found += tensors(value)
    return found


def branch(subject):
    same = True
    for model in subject.bare():
        x = normal(2, 100, model.config.n_embd)
        # a cache may share storage only where no gradients are recorded
        for recording in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            for n in (10, 70):
                with recording():
                    _, early = model.requires_grad_(recording is torch.enable_grad).step(x[:, :n])
                    kept = [t.clone() for t in tensors(early)]
                    first, middle = model.step(x[:, n:n + 2], early)
                    # other continuations of the same state, and of a later one
                    for other in (x[:, 80:83], x[:, 90:91]):
                        model.step(other, early)
                        model.step(other, middle)
                    again, _ = model.step(x[:, n:n + 2], early)
                same = same and torch.equal(again, first)
                same = same and all(map(torch.equal, tensors(early), kept))
    if same:
        yield Row("branch", True, "an old state goes on to the same bits")
    else:
        yield Row("branch", False, "an old state was changed by going on from it")


def state_after(model, T):
    """Bytes of the state after T tokens, and of the storage that it keeps alive."""
    found = tensors(model.step(tokens(model, 1, T))[1])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(t.nbytes for t in found), sum(storages.values())


def largest_states(model, longest):
    """{T: bytes of the largest state over all lengths up to T}, for T = 1 to `longest`: what
    state_bytes(T) says."""
    most = 0
    largest = {}
    for T in range(1, longest + 1):
        size, _ = state_after(model, T)  # at once: a mixer need not decode to have a state
        most = max(most, size)
        largest[T] = most
    return largest


@torch.no_grad()
def state_size(subject):
    undeclared = False
    wrong = []
    constant = True
    hoards = False
    models = subject.build()
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        model = cast(models[i % len(models)], dtype)
        largest = largest_states(model, max(STATE_LENGTHS))
        for T in STATE_LENGTHS:
            declared = model.state_bytes(T, dtype)
            real = largest[T]
            if declared is None:
                undeclared = True
            elif declared != real:
                wrong.append(f"{declared:,} declared, {real:,} real within {T} tokens in {dtype}")
        T = 4 * math.lcm(model.config.n_embd // model.config.n_head, 64)  # whole blocks
        early, early_held = state_after(model, T)
        late, late_held = state_after(model, 2 * T)
        constant = constant and early == late
        hoards = hoards or early == late and late_held > early_held
    if undeclared:
        yield Row("bytes", None, "the mixer has no state_bytes")
    else:
        yield Row("bytes", not wrong, wrong[0] if wrong else "as declared")
    growth = "constant" if constant else f"{(late - early) / T:,.0f} bytes a token in bfloat16"
    yield Row("storage", not hoards, f"{growth}; {late:,} bytes after {2 * T} tokens, "
                                     f"in {late_held:,} of storage")


def whole_and_pieces(module, x, sizes):
    """The outputs for x (B, T, C) at once, and in pieces."""
    return call(module, x), in_pieces(module, x, sizes)


@torch.no_grad()
def decode(subject, single=SINGLE, pieces=PIECES):
    """Many single tokens and long pieces; several rows; and in the precisions of training."""
    worst = Worst(limit("length"))
    wrong_size = []
    for model in subject.bare(block_size=1100):
        for name, module in asked(model).items():
            T = LONGEST if not subject.trained else min(LONGEST, model.config.block_size)
            x = normal(2, T, model.config.n_embd)
            most = limit("length", precision_within(module, x[:, :71]))
            ways = [x[:, :T].size(1) * [1] if T <= single else single * [1] + [T - single]]
            ways += [sizes for sizes in pieces if sum(sizes) <= T]
            y = call(module, x)
            for sizes in ways:
                n = sum(sizes)
                note_pieces(worst, module, x[:, :n], y[:, :n], sizes, most, name)
            for B, length in ((1, 260), (16, 40)):
                rows = normal(B, length, model.config.n_embd)
                note_pieces(worst, module, rows, call(module, rows), length * [1], most,
                            f"{name}, {B} {'row' if B == 1 else 'rows'}")
            look_at_rough_steps(worst, module, x[:, :330], name)
            wrong_size += wrong_sizes(module, name, model.config.n_embd, min(T, single))
    yield worst.row("decode", "token by token is not the whole", f"; {single} single tokens")
    says = bool(subject.build()[0].state_bytes(1, torch.float32) is not None)
    figures = wrong_size[0] if wrong_size else f"at each of {single} single tokens"
    yield Row("declared", not wrong_size if says or wrong_size else None,
              figures if says or wrong_size else "the mixer has no state_bytes")


def note_pieces(worst, module, x, y, sizes, most, where):
    moved = beyond_rounding(module, x, difference(in_pieces(module, x, sizes), y), most)
    words = ""
    if moved.max() > most:
        row, position = first_over(moved, most)
        words = f"{position + 1} tokens, row {row}: output {position}; " + in_runs(sizes, position)
    worst.note(moved.max().item(), most, where, words)


def in_runs(sizes, position):
    """"fed as 700 x 1, 300": as far as the piece with that position."""
    runs = []
    fed = 0
    for size in sizes:
        if fed > position:
            break
        fed += size
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    return "fed as " + ", ".join(f"{n} x {size}" if n > 1 else f"{size}" for n, size in runs)


def look_at_rough_steps(worst, module, x, where):
    """In low precision single tokens may err as the whole does, and four times as much."""
    y = call(module, x)
    T = x.size(1)
    fifth = max(T // 5, 1)
    sizes = [fifth, *fifth * [1], T - 3 * fifth, *fifth * [1]]
    for precision in ROUGH:
        rough = cast(copy.deepcopy(module), precision.dtype)
        given = x.to(precision.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
            whole = call(rough, given, precision.autocast)
            stepped = in_pieces(rough, given, sizes)
        eps = torch.finfo(precision.rounding).eps
        allowed = 4 * max(error_of(whole, y), BFLOAT16_LIMIT * eps / 4)
        worst.note(error_of(stepped, y), allowed, f"{where}, token by token in {precision.name}",
                   f"{T} tokens, {in_runs(sizes, T - 1)}")


def error_of(y, expected):
    """The root mean square error over that of the outputs."""
    error = (y.double() - expected).square().mean() / expected.square().mean()
    return error.sqrt().nan_to_num(nan=math.inf).item()


def wrong_sizes(module, name, C, T):
    """Where what a mixer declares is not the largest state so far, token by token, in float32."""
    if not hasattr(module, "state_bytes") or name.startswith("mlp"):
        return []
    module = cast(copy.deepcopy(module), torch.float32)
    x = normal(1, T, C).float()
    state, largest = None, 0
    for t in range(T):
        _, state = step(module, x[:, t:t + 1], state)
        largest = max(largest, sum(found.nbytes for found in tensors(state)))
        declared = module.state_bytes(t + 1, torch.float32)
        if declared != largest:
            return [f"{name}: {declared:,} bytes declared, {largest:,} real after {t + 1} single "
                    "tokens"]
    return []


@torch.no_grad()
def carried(subject, T=150):
    """A state holds all that goes on: two sequences may take turns, another copy of the model may
    go on, and with another sequence's tensors a state is that sequence's."""
    worst = Worst(limit("length"))
    raised = None
    # of other weights throughout, also where a mixer starts from the same whatever the seed
    others = [bare_copy(model, -subject.noise or 0.2)
              for model in subject.build(seed=1, rope_base=500.0, block_size=700)]
    for model, fresh, other, elsewhere in zip(*(subject.bare() for _ in range(3)), others):
        names = {"model": (model, fresh, other, elsewhere)}
        every = [asked(m) for m in (model, fresh, other, elsewhere)]
        names |= {name: tuple(found[name] for found in every) for name in every[0]}
        for name, modules in names.items():
            C = model.config.n_embd
            a, b = normal(2, T, C), normal(2, T, C, seed=1)
            most = limit("length", precision_within(modules[0], a))
            for way, question in WAYS.items():
                try:
                    y, expected, x = question(*modules, a, b)
                except Exception as error:
                    error.add_note(f"{name}, {way}")
                    raised = raised or error
                    continue
                moved = beyond_rounding(modules[0], x, difference(y, expected), most)
                words = ""
                if moved.max() > most:
                    row, position = first_over(moved, most)
                    words = f"{x.size(1)} tokens, row {row}: output {position}"
                worst.note(moved.max().item(), most, f"{name}, {way}", words)
    yield worst.row("carried", "what goes on is not all in the state",
                    f"; {', '.join(WAYS)}")
    if raised:
        raise raised


CARRIED_PIECES = [40, 1, 1, 1, 67, 20, 10, 5, 5]


def taking_turns(module, fresh, other, elsewhere, a, b):
    """Two sequences piece by piece in turn, and another model's in between."""
    expected = call(fresh, a)
    states = [None, None, None]
    ys = []
    for piece, other_piece in zip(a.split(CARRIED_PIECES, 1), b.split(CARRIED_PIECES, 1)):
        y, states[0] = step(module, piece, states[0])
        _, states[1] = step(module, other_piece, states[1])
        _, states[2] = step(elsewhere, other_piece, states[2])
        ys.append(y)
    return torch.cat(ys, 1), expected, a


def another_copy(module, fresh, other, elsewhere, a, b):
    """Begun by one model, gone on with by its copy that has seen nothing."""
    first, second = copy.deepcopy(fresh), copy.deepcopy(fresh)
    half = a.size(1) // 2
    y, state = step(first, a[:, :half])
    again, _ = step(second, a[:, half:], state)
    return torch.cat([y, again], 1), call(fresh, a), a


def another_sequence(module, fresh, other, elsewhere, a, b):
    """A state of the sequence a with the tensors of b's goes on as b."""
    half = a.size(1) // 2
    _, of_a = step(fresh, a[:, :half])
    y, of_b = step(fresh, b[:, :half])
    pairs = zip(tensors(of_a), tensors(of_b), strict=True)
    as_b = copy.deepcopy(of_a, {id(mine): theirs.clone() for mine, theirs in pairs})
    again, _ = step(fresh, b[:, half:], as_b)
    return torch.cat([y, again], 1), call(other, b), b


def another_model_first(module, fresh, other, elsewhere, a, b, T=309):
    """At lengths that nobody has asked about, another model's call before: what is kept by length
    is then the other's."""
    x = normal(2, T + 1, a.size(2))
    call(elsewhere, x[:, :T])
    return call(module, x[:, :T]), call(fresh, x)[:, :T], x[:, :T]


WAYS = {"in turns": taking_turns, "in another copy": another_copy,
        "with another's tensors": another_sequence, "behind another model": another_model_first}
