"""Is a mixer real? Says pass or FAIL, with figures. Run: python -m tools.audit --mixer=lln

    python -m tools.audit --mixer=all                        every mixer, and a table: a minute
    python -m tools.audit --mixer_file=mine.py --mixer=mine  a mixer of your own: seconds
    python -m tools.audit --out_dir=out/shakespeare_lln      a run's newest checkpoint, as trained
    python -m tools.audit --hf=llama             a causal language model of transformers
    python -m tools.audit --module=model.py:GPT  a module of your own, tokens to logits
    python -m tools.audit --metric --out_dir=... a run's metric: probabilities, bytes, splits

Named mixers are built into two small models (GPT-2's and LLaMA's skeleton, the latter with RoPE and
grouped heads) with noise on all weights; everything runs on the CPU, in float64 unless a check is
about another dtype. Model options such as --lln_diag_mode are audited in a run that has them, of
two steps perhaps. Exit status 1 if anything fails.

The same is written as JSON: to mine.NAME.audit.json beside mine.py, to audit.json in a run's
folder, else to out/audit/NAME.json.

    forward   forward(x, state=None) returns (y, state), y shaped like x; if not, nothing else is
              asked
    repeat rows suffix gradient length huge
              what no output may depend on, see training/leaks.py; the first four in every dtype
    split     a sequence in pieces of any lengths, down to single tokens, is the whole: outputs and
              gradients
    branch    stepping on from a state leaves the state as it was
    bytes     state_bytes(T, dtype) is the size of the largest real state up to T (n/a where a mixer
              does not say)
    storage   a state of constant size does not hold on to storage that grows with T
    bfloat16  a bfloat16 model, float32 weights under autocast, and without, stay near float64
    finite    no infinity, no NaN in outputs or gradients at inputs of 1,000 times the usual size
    depth     gradient norms of the layers of a fresh model of 12, largest over smallest
    learns    every parameter that is trained gets a gradient
    bits      the same seed gives the same bits, forward and backward
    cost      exponents of T, of measured time, of memory kept for the backward pass and of the
              declared FLOPs; not judged
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import copy
import dataclasses
import importlib
import math
import re
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from numbers import Number
from pathlib import Path
from typing import Callable, Optional

import torch

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input, is_out_of_memory, printable
from base.files import write_json
from base.options import checked, option
from base.user_code import in_words, place
from mixers import MIXERS, layer_mixers, load_mixer_file
from mixers.parts.heads import Room
from model import GPT, GPTConfig
from training import checkpoint
from training.leaks import (KINDS, bare_copy, cast, check_builders, check_forward, difference,
                            leaking, leaks, limit, parts, precision_within)

SKELETONS = (dict(pos="none"), dict(arch="llama", n_kv_head=2, dropout=0.1))
LENGTHS = (2, 64, 130, 200, 256)
ROUGH_LENGTHS = (64, 130, 520)  # in the precisions of training
SPLITS = ([64, 66], [7, 1, 1, 9, 1, 90, 21], [104] + [1] * 26, [1] * 130)
STATE_LENGTHS = (1, 8, 63, 64, 100, 128)
COST_LENGTHS = (2048, 4096)
BFLOAT16_LIMIT = 16  # root mean square error over that of the output, in units of bfloat16's eps
FLOAT32_LIMIT = 0.1  # in the same units
LARGE = 1e3
DEPTH_LIMIT = 100
DRAWS = 8  # passes in which a parameter may get its gradient, where chance decides
VERDICT = {True: "pass", False: "FAIL", None: "n/a"}
BFLOAT16_EPS = torch.finfo(torch.bfloat16).eps


@checked
class AuditOptions:
    mixer: Optional[str] = option(
        None, "a name of the registry, a pattern over layers (softmax,lln), or all", min_length=1)
    out_dir: Optional[str] = option(
        None, "audit the newest checkpoint of this run folder", min_length=1)
    mixer_file: Optional[str] = option(
        None, "a Python file of yours that registers its mixer in mixers.MIXERS", min_length=1)


# What is audited ----------------------------------------------------------------------------------

@dataclass
class Subject:
    """build(n_layer, block_size) -> fresh float32 models in evaluation mode, the same every time.
    noise: for their weights. report: the JSON file."""
    name: str
    build: Callable
    noise: float
    report: Path

    def bare(self, n_layer=None):
        return [bare_copy(model, self.noise) for model in self.build(n_layer)]


def named(mixer, mixer_file=None):
    """The subject of a mixer of the registry, or of a pattern of them."""
    def build(n_layer=None, block_size=max(ROUGH_LENGTHS)):
        check_builders(mixer)
        torch.manual_seed(0)
        n_layer = max(n_layer or 2, len(layer_mixers(mixer)))
        sizes = dict(vocab_size=31, block_size=block_size, n_head=4, n_embd=32, n_layer=n_layer)
        return [GPT(GPTConfig(**sizes, mixer=mixer, **skeleton)).eval() for skeleton in SKELETONS]

    safe = re.sub(r"[^\w+,-]+", "_", mixer)[:80]
    report = Path("out", "audit", f"{safe}.json")
    if mixer_file:
        report = Path(mixer_file).with_name(f"{Path(mixer_file).stem[:80]}.{safe}.audit.json")
    return Subject(mixer, build, 0.2, report)


def trained(out_dir):
    """The subject of a run's newest checkpoint."""
    run = checkpoint.load(out_dir)

    def build(n_layer=None, block_size=None):
        model = checkpoint.build_model(run)
        # learned positions would end the sequences at block_size; mixers know nothing of them
        model.pos_embed = None
        return [model]

    build()
    return Subject(out_dir, build, 0, Path(out_dir) / "audit.json")


@dataclass
class Precision:
    """Of weights and inputs, and whether the forward pass is under autocast to bfloat16."""
    name: str
    dtype: torch.dtype
    autocast: bool = False

    @property
    def rounding(self):
        return torch.bfloat16 if self.autocast else self.dtype


EXACT = Precision("float64", torch.float64)
ROUGH = (Precision("float32", torch.float32), Precision("autocast", torch.float32, autocast=True),
         Precision("bfloat16", torch.bfloat16))


@dataclass
class Row:
    check: str
    passed: Optional[bool]  # None: nothing to judge
    figures: str


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(model, B, T):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (B, T), generator=generator)


# The checks: subject -> rows ----------------------------------------------------------------------

def forward(subject):
    for model in subject.build():
        check_forward(model, torch.float32)
    yield Row("forward", True, "(y, state), y shaped like x")


@dataclass
class Worst:
    """The worst that was found of one kind of leak."""
    limit: float
    size: float = 0.0
    where: str = ""

    def note(self, size, limit, where):
        if size / limit > self.size / self.limit:
            self.size = size
            self.limit = limit
            self.where = where

    def row(self, kind):
        figures = f"{self.size:.0e} of the largest at most, limit {self.limit:.0e}"
        if self.size <= self.limit:
            return Row(kind, True, figures)
        return Row(kind, False, f"{figures} ({self.where}): {KINDS[kind][0]}")


def look(worst, model, T, borders, precision):
    """Notes in `worst`, kind -> Worst, what leaks in a model and its parts over T tokens."""
    exact = precision is EXACT
    cuts = sorted(t for t in borders if 0 < t < T) or [T]
    x = normal(1 + len(cuts), T, model.config.n_embd).to(precision.dtype)
    for name, module in (("model", model), *parts(model).items()):
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
                worst[kind].note(size, limit(kind, rounding), where)


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
                cast(model, precision.dtype)
                check_forward(model.eval(), precision.dtype)
                for T in sorted({*rough_lengths, model.config.block_size}):
                    look(worst, model, T, {1, 64, 128, T // 2, T - 1}, precision)
            except Exception as error:
                raised = raised or in_precision(error, precision)
    for kind in KINDS:
        yield worst[kind].row(kind)
    if raised:
        raise raised


def in_precision(error, precision):
    error.add_note(f"in {precision.name}")
    return error


def gradients(y, inputs):
    """Of a fixed random combination of the outputs y."""
    return torch.autograd.grad((y * normal(*y.shape, seed=1)).sum(), inputs, materialize_grads=True)


def one_row(gradients):
    """(1, all entries): differences are then measured against the largest of all, since a gradient
    may be zero but for rounding, as that of a key's bias is."""
    return torch.cat([g.flatten() for g in gradients])[None]


def split(subject, splits=SPLITS):
    worst_y = worst_g = 0.0
    most = limit("length")
    for model in subject.bare():
        x = normal(2, sum(splits[0]), model.config.n_embd)
        most = max(most, limit("length", precision_within(model, x)))
        x.requires_grad_()
        parameters = list(model.requires_grad_().parameters())
        whole = model(x)[0]
        of_x, *of_parameters = gradients(whole, [x, *parameters])
        for sizes in splits:
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
    figures = f"outputs differ by {worst_y:.0e}, gradients by {worst_g:.0e}, limit {most:.0e}"
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
        x = normal(2, 40, model.config.n_embd)
        # a cache may share storage only where no gradients are recorded
        for recording in (False, True):
            with torch.set_grad_enabled(recording):
                _, early = model.requires_grad_(recording).step(x[:, :10])
                kept = [t.clone() for t in tensors(early)]
                first, middle = model.step(x[:, 10:12], early)
                # other continuations of the same state, and of a later one
                for other in (x[:, 20:23], x[:, 30:31]):
                    model.step(other, early)
                    model.step(other, middle)
                again, _ = model.step(x[:, 10:12], early)
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
    for model in subject.build():
        for dtype in (torch.float32, torch.bfloat16):
            cast(model, dtype)
            largest = largest_states(model, max(STATE_LENGTHS))
            for T in STATE_LENGTHS:
                declared = model.state_bytes(T, dtype)
                real = largest[T]
                if declared is None:
                    undeclared = True
                elif declared != real:
                    wrong.append(f"{declared:,} declared, {real:,} real within {T} tokens "
                                 f"in {dtype}")
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


def dtypes(subject):
    errors = {precision.name: 0.0 for precision in ROUGH}
    not_finite = set()
    for exact in subject.bare():
        x = normal(2, 130, exact.config.n_embd)
        expected = exact.requires_grad_()(x)[0].detach()
        for precision in ROUGH:
            rough = cast(copy.deepcopy(exact), precision.dtype)
            try:
                error = rough_error(rough, x, expected, precision)
                errors[precision.name] = max(errors[precision.name], error)
                not_finite |= overflowing(rough, x, precision)
            except Exception as error:
                raise in_precision(error, precision)
    passed = errors["float32"] <= FLOAT32_LIMIT
    passed = passed and max(errors["bfloat16"], errors["autocast"]) <= BFLOAT16_LIMIT
    yield Row("bfloat16", passed, f"error {errors['bfloat16']:.1f} eps, "
                                  f"under autocast {errors['autocast']:.1f}, "
                                  f"limit {BFLOAT16_LIMIT}; "
                                  f"in float32 {errors['float32']:.0e}, limit {FLOAT32_LIMIT}")
    figures = f"inputs {LARGE:,.0f} times the usual size"
    if not_finite:
        figures += f": not finite in {', '.join(sorted(not_finite))}"
    yield Row("finite", not not_finite, figures)


def rough_error(model, x, expected, precision):
    """The root mean square error of a model's outputs over that of the outputs, in units of
    bfloat16's eps."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
        y = model(x.to(precision.dtype))[0]
    error = (y.double() - expected).square().mean() / expected.square().mean()
    return error.sqrt().nan_to_num(nan=math.inf).item() / BFLOAT16_EPS


def overflowing(model, x, precision):
    """The parts, "mixer lln in float32", that are not finite at LARGE inputs, or whose gradients
    are not."""
    found = set()
    large = (LARGE * x).to(precision.dtype).requires_grad_()
    for name, module in parts(model).items():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
            y = module(large.clone())[0]
        [gradient] = torch.autograd.grad(y.double().sum(), large, materialize_grads=True)
        if not (y.isfinite().all() and gradient.isfinite().all()):
            found.add(f"{name} in {precision.name}")
    return found


def depth(subject):
    figures = []
    for model in subject.build(n_layer=12):
        idx = tokens(model, 2, 130)
        cast(model, torch.float64).train().loss(idx, idx.roll(-1, 1)).backward()
        norms = []
        for block in model.blocks:
            gradients = [p.grad.norm().item() for p in block.parameters() if p.grad is not None]
            norms.append(math.hypot(*gradients))
        usable = min(norms) > 0 and all(map(math.isfinite, norms))
        ratio = max(norms) / min(norms) if usable else math.inf
        figures.append((ratio, f"first layer {norms[0]:.1e}, last of {len(norms)} {norms[-1]:.1e}, "
                               f"largest / smallest {ratio:.1f}"))
    ratio, text = max(figures)
    yield Row("depth", ratio <= DEPTH_LIMIT, f"gradient norms: {text}, limit {DEPTH_LIMIT}")


def learns(subject):
    idle = set()
    count = 0
    for model in subject.build():
        bare = bare_copy(model, subject.noise)
        for module, fresh in zip(parts(bare).values(), parts(model).values()):
            trained = [name for name, p in fresh.named_parameters() if p.requires_grad]
            idle |= idle_parameters(module, trained, model.config.n_embd)
            count += len(trained)
    if idle:
        yield Row("learns", False, f"no gradient, or no finite one, for {', '.join(sorted(idle))}")
    else:
        yield Row("learns", True, f"{count} parameters")


def idle_parameters(module, trained, C):
    """Which of the parameters named in `trained` get no gradient, or no finite one, in several
    passes of training."""
    module.requires_grad_().train()
    parameters = {name: p for name, p in module.named_parameters() if name in trained}
    idle = set(parameters)
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        module.zero_grad()
        y = module(normal(2, 130, C).requires_grad_().clone())[0]
        (y * normal(*y.shape, seed=1)).sum().backward()
        for name, p in parameters.items():
            if p.grad is not None and 0 < p.grad.abs().max() < math.inf:
                idle.discard(name)
        if not idle:
            break
    return idle


def bits(subject):
    def once():
        found = []
        for model in subject.build():
            torch.manual_seed(0)
            idx = tokens(model, 4, 130)
            model.train().loss(idx, idx.roll(-1, 1)).backward()
            for p in model.parameters():
                found.append(p.detach())
                if p.grad is not None:
                    found.append(p.grad)
        return found

    same = all(map(torch.equal, once(), once()))
    yield Row("bits", same, f"the same seed gives {'the same' if same else 'other'} bits")


def cost(subject):
    """Never judged, not even by what a mixer raises at lengths that nobody asked it for."""
    model = subject.build(block_size=max(COST_LENGTHS))[0].train()
    for name, mixer in parts(model).items():
        if mixer is model.blocks[0].mlp:
            continue
        try:
            early, late = (costs(mixer, model.config.n_embd, T) for T in COST_LENGTHS)
        except Exception as error:
            yield Row("cost", None, f"{name} at {max(COST_LENGTHS):,} tokens: {in_words(error)}")
            continue
        exponents = []
        for what in early:
            if early[what]:  # a mixer without parameters may keep no memory
                exponents.append(f"{what} T^{math.log2(late[what] / early[what]):.2f}")
        milliseconds = f"{1e3 * late['time']:.0f} ms at {max(COST_LENGTHS):,} tokens"
        yield Row("cost", None, f"{name}: {', '.join(exponents)}; {milliseconds}")


def costs(mixer, C, T):
    """Seconds of a forward and backward pass over T tokens, the fastest of up to 3, bytes kept
    between the two, and FLOPs if declared."""
    times = []
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def give_back(t):
        return t

    for _ in range(3):
        x = normal(1, T, C).float().requires_grad_()
        kept.clear()
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
            y = mixer(x.clone())[0]
        y.sum().backward()
        times.append(time.perf_counter() - started)
        if times[-1] > 1:  # long enough for chance to matter little
            break
    found = {"time": min(times), "memory": sum(kept.values())}
    if hasattr(mixer, "flops_per_token"):
        found["declared FLOPs"] = T * mixer.flops_per_token(T)
    return found


CHECKS = (forward, causality, split, branch, state_size, dtypes, depth, learns, bits, cost)


def audit(subject, checks=CHECKS):
    """The rows of all checks. Whatever a mixer's code raises fails the check that it was raised in;
    the same error is told once. Nothing else is asked of a mixer that fails `forward`."""
    told = {}  # (an error's text, its place) -> the check that told it
    for check in checks:
        passed = True
        try:
            for row in check(subject):
                passed = passed and row.passed is not False
                yield row
        except Exception as error:
            if is_out_of_memory(error):
                raise
            passed = False
            yield Row(check.__name__, False, what_was_raised(error, check, told))
        if check is forward and not passed:
            return


def what_was_raised(error, check, told):
    """An error in one line with its place, or where it was told already."""
    if isinstance(error, BadInput):  # it names the place
        return str(error)
    where = place(error)
    if (str(error), where) in told:
        return f"the same error as in {told[str(error), where]}"
    told[str(error), where] = check.__name__
    return f"{in_words(error)} ({where})"


# The report ---------------------------------------------------------------------------------------

def subjects(options):
    if (options.mixer is None) == (options.out_dir is None):
        raise BadInput("audit what? name a mixer, --mixer=lln or --mixer=all, "
                       "or a run, --out_dir=out/shakespeare_lln")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    if options.out_dir:
        return [trained(options.out_dir)]
    names = sorted(MIXERS) if options.mixer == "all" else [options.mixer]
    try:
        return [named(",".join(layer_mixers(name)), options.mixer_file) for name in names]
    except ValueError as error:
        raise BadInput(f"--mixer: {error}") from error


def print_matrix(reports):
    """A row for each subject, a column for each check that is judged; reports: name -> rows."""
    columns = []
    for rows in reports.values():
        for row in rows:
            if row.check != "cost" and row.check not in columns:
                columns.append(row.check)
    width = max(map(len, reports))
    print(" ".join([" " * width, *(f"{check:>8}" for check in columns)]))
    for name, rows in reports.items():
        verdicts = {row.check: VERDICT[row.passed] for row in rows}
        cells = [f"{verdicts.get(check, '-'):>8}" for check in columns]
        print(" ".join([f"{printable(name):{width}}", *cells]))


def write_report(subject, rows, seconds):
    """The rows as JSON; where it cannot be written, a warning, since the verdict stands."""
    passed = all(row.passed is not False for row in rows)
    report = dict(audited=subject.name, passed=passed, seconds=round(seconds, 1),
                  torch=torch.__version__, rows=[asdict(row) for row in rows])
    try:
        write_json(subject.report, report)
        return f", report in {subject.report}"
    except BadInput as error:
        print(f"tools.audit: warning: no report, {error}", file=sys.stderr)
        return ""


@exit_on_bad_input("tools.audit")
def main():
    for kind in ("metric", "module", "hf"):  # audits of other things, with options of their own
        if any(word.split("=")[0] == f"--{kind}" for word in sys.argv[1:]):
            return importlib.import_module(f"tools.audit_{kind}").main()
    description = __doc__.splitlines()[0]
    options, *_ = parse_options(AuditOptions, sys.argv[1:], description, with_config_file=False)
    reports = {}
    for subject in subjects(options):
        started = time.perf_counter()
        rows = []
        reports[subject.name] = rows
        for row in audit(subject):
            rows.append(row)
            print(f"{row.check:9} {VERDICT[row.passed]}  {printable(row.figures)}", flush=True)
        seconds = time.perf_counter() - started
        failed = [row.check for row in rows if row.passed is False]
        verdict = f"FAIL ({', '.join(failed)})" if failed else "pass"
        where = write_report(subject, rows, seconds)
        print(printable(f"{subject.name}: {verdict}, {seconds:.1f} s{where}") + "\n", flush=True)
    if len(reports) > 1:
        print_matrix(reports)
    sys.exit(any(row.passed is False for rows in reports.values() for row in rows))


if __name__ == "__main__":
    main()
