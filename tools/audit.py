"""Is a mixer real? Checks it and says pass or FAIL, with figures. Run: python -m tools.audit --mixer=lln   (a few seconds on two CPU cores)

    python -m tools.audit --mixer=all                                 every mixer and a table of all, about a minute
    python -m tools.audit --mixer_file=mine.py --mixer=mine           a mixer of your own
    python -m tools.audit --out_dir=out/shakespeare_lln               the newest checkpoint of a run, as trained

Named mixers are built into two small models (GPT-2's and LLaMA's skeleton, the latter with RoPE and grouped heads) with noise
on all weights; everything runs on the CPU, in float64 unless a check is about another dtype. Model options such as
--lln_diag_mode are audited in a run that has them, of two steps perhaps. Exit status 1 if anything fails.

    repeat rows suffix gradient length huge     what an output must not depend on, see causality.py; the first four in every dtype
    split     a sequence in pieces of any lengths, down to single tokens, is the whole: outputs and gradients
    branch    stepping on from a state leaves the state as it was
    bytes     state_bytes(T, dtype) is the size of the largest real state up to T (n/a where a mixer does not say)
    storage   a state of constant size does not hold on to storage that grows with T
    bfloat16  a bfloat16 model, float32 weights under autocast, and without, stay near float64
    finite    no infinity, no NaN in outputs or gradients at inputs of 1,000 times the usual size, in no dtype
    depth     gradient norms of the layers of a fresh model of 12, largest over smallest
    learns    every parameter gets a gradient
    bits      the same seed gives the same bits, forward and backward
    cost      exponents of T: of measured time and of memory kept for the backward pass, and the declared FLOPs'; not judged
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import copy
import math
import sys
import time
from typing import Callable, NamedTuple, Optional

import torch

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.options import checked, option
from mixers import MIXERS, layer_mixers, load_mixer_file
from mixers.parts.heads import Room
from model import GPT, GPTConfig
from training import checkpoint
from training.leaks import KINDS, bare_copy, difference, leaks, limit, parts

SKELETONS = (dict(pos="none"), dict(arch="llama", n_kv_head=2, dropout=0.1))
LENGTHS = (2, 64, 130, 200, 256)
ROUGH_LENGTHS = (130, 520)  # in the precisions of training
SPLITS = ([64, 66], [7, 1, 1, 9, 1, 90, 21], [104] + [1] * 26, [1] * 130)
SPLIT_LIMIT = KINDS["length"][1]  # of the largest output or gradient
BFLOAT16_LIMIT = 16  # root mean square error over that of the output, in units of bfloat16's eps
FLOAT32_LIMIT = 0.1  # in the same units
LARGE = 1e3
DEPTH_LIMIT = 100
VERDICT = {True: "pass", False: "FAIL", None: "n/a"}


@checked
class AuditOptions:
    mixer: Optional[str] = option(None, "a name of the registry, a pattern over layers (softmax,lln), or all", min_length=1)
    out_dir: Optional[str] = option(None, "audit the newest checkpoint of this run folder", min_length=1)
    mixer_file: Optional[str] = option(None, "a Python file of yours that registers its mixer in mixers.MIXERS", min_length=1)


class Subject(NamedTuple):
    """What is audited: build(n_layer) -> fresh float32 models in evaluation mode, the same every time; noise for the weights."""
    name: str
    build: Callable
    noise: float

    def bare(self, n_layer=None):
        return [bare_copy(model, self.noise) for model in self.build(n_layer)]


def named(mixer):
    def build(n_layer=None):
        torch.manual_seed(0)
        n_layer = max(n_layer or 2, len(layer_mixers(mixer)))
        sizes = dict(vocab_size=31, block_size=64, n_head=4, n_embd=32, n_layer=n_layer, mixer=mixer)
        return [GPT(GPTConfig(**sizes, **skeleton)).eval() for skeleton in SKELETONS]
    return Subject(mixer, build, noise=0.2)


def trained(out_dir):
    run = checkpoint.load(out_dir)

    def build(n_layer=None):
        model = checkpoint.build_model(run)
        model.pos_embed = None  # learned positions would end the sequences at block_size; mixers know nothing of them
        return [model]
    build()
    return Subject(out_dir, build, noise=0)


class Row(NamedTuple):
    check: str
    passed: Optional[bool]  # None: nothing to judge
    figures: str


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(model, B, T):
    return torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))


# The checks: subject -> rows -----------------------------------------------------------------------------------------

def causality(subject, lengths=LENGTHS, rough_lengths=ROUGH_LENGTHS):
    worst = {kind: (0.0, 0.0, limit(kind), "") for kind in KINDS}  # size over its limit, size, limit, where

    def look(model, T, borders, dtype, lengths=False, huge=False, autocast=False):
        cuts = sorted(t for t in borders if 0 < t < T) or [T]
        x = normal(1 + len(cuts), T, model.config.n_embd).to(dtype)
        for where, module in (("model", model), *parts(model).items()):
            for training in (False, True):
                found = leaks(module.train(training), x, cuts, lengths and not (training and model.config.dropout), huge, autocast)
                at = f"{where}, {T} tokens, {'training' if training else 'evaluation'}, {'autocast' if autocast else str(dtype)[6:]}"
                for kind, size in found.items():
                    most = limit(kind, torch.bfloat16 if autocast else dtype)
                    worst[kind] = max(worst[kind], (size / most, size, most, at), key=lambda figures: figures[0])

    for model in subject.bare(n_layer=3):
        D = model.config.n_embd // model.config.n_head
        for T in lengths:
            look(model, T, {1, D - 1, D, D + 1, 63, 64, 65, T // 2, 128, T - 1}, torch.float64, lengths=True, huge=True)
        for T in sorted({*rough_lengths, model.config.block_size}):
            for dtype, autocast in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
                look(model.to(dtype), T, {1, 64, 128, T // 2, T - 1}, dtype, autocast=autocast)
    for kind, (what, _) in KINDS.items():
        over, size, most, at = worst[kind]
        figures = f"{size:.0e} of the largest at most, limit {most:.0e}"
        yield Row(kind, over <= 1, figures if over <= 1 else f"{figures} ({at}): {what}")


def gradients(y, inputs):
    """Of a fixed random combination of the outputs y."""
    return torch.autograd.grad((y * normal(*y.shape, seed=1)).sum(), inputs, materialize_grads=True)


def split(subject, splits=SPLITS):
    worst_y = worst_g = 0.0
    for model in subject.bare():
        x = normal(2, sum(splits[0]), model.config.n_embd).requires_grad_()
        inputs = [x, *model.requires_grad_().parameters()]
        whole = model(x)[0]
        expected = gradients(whole, inputs)
        for sizes in splits:
            state, ys = None, []
            for piece in x.split(sizes, dim=1):
                y, state = model.step(piece, state)
                ys.append(y)
            y = torch.cat(ys, dim=1)
            worst_y = max(worst_y, difference(y, whole).max().item())
            worst_g = max(worst_g, *(difference(a, b).max().item() for a, b in zip(gradients(y, inputs), expected)))
    yield Row("split", max(worst_y, worst_g) <= SPLIT_LIMIT, f"outputs differ by {worst_y:.0e}, gradients by {worst_g:.0e}, limit {SPLIT_LIMIT:.0e}")


def tensors(state):
    """All tensors within a state, however it is nested. TypeError for what cannot be looked into."""
    if isinstance(state, torch.Tensor):
        return [state]
    if state is None or isinstance(state, (int, float, Room)):  # the tensors beside a Room are views of it
        return []
    if not isinstance(state, (tuple, list, dict)):
        raise TypeError(f"a {type(state).__name__} in a state hides what it holds; use tensors, numbers, tuples, lists and dicts")
    return [t for part in (state.values() if isinstance(state, dict) else state) for t in tensors(part)]


def branch(subject):
    same = True
    for model in subject.bare():
        x = normal(2, 40, model.config.n_embd)
        for recording in (False, True):  # a cache may share storage only where no gradients are recorded
            with torch.set_grad_enabled(recording):
                _, early = model.requires_grad_(recording).step(x[:, :10])
                kept = [t.clone() for t in tensors(early)]
                first, middle = model.step(x[:, 10:12], early)
                for other in (x[:, 20:23], x[:, 30:31]):  # other continuations of the same state, and of a later one
                    model.step(other, early)
                    model.step(other, middle)
                again, _ = model.step(x[:, 10:12], early)
                same = same and torch.equal(again, first) and all(map(torch.equal, tensors(early), kept))
    yield Row("branch", same, "an old state goes on to the same bits" if same else "an old state was changed by going on from it")


@torch.no_grad()
def state_size(subject):
    def after(model, T):
        """Bytes of the state after T tokens, and of the storage that it keeps alive."""
        found = tensors(model.step(tokens(model, 1, T))[1])
        return sum(t.nbytes for t in found), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())

    def largest(model):
        """T -> bytes of the largest state over all lengths up to T, which is what state_bytes(T) says."""
        most, found = 0, {}
        for n in range(1, 129):
            most = found[n] = max(most, after(model, n)[0])
        return found

    undeclared, wrong, constant, hoards = False, [], True, False
    for model in subject.build():
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            found = largest(model)
            for T in (1, 8, 63, 64, 100, 128):
                declared, real = model.state_bytes(T, dtype), found[T]
                undeclared = undeclared or declared is None
                if declared not in (None, real):
                    wrong.append(f"{declared:,} declared, {real:,} real within {T} tokens in {dtype}")
        T = 4 * math.lcm(model.config.n_embd // model.config.n_head, 64)  # whole blocks
        (early, early_held), (late, late_held) = after(model, T), after(model, 2 * T)
        constant, hoards = constant and early == late, hoards or early == late and late_held > early_held
    yield Row("bytes", None if undeclared else not wrong, "the mixer has no state_bytes" if undeclared else wrong[0] if wrong else "as declared")
    growth = "constant" if constant else f"{(late - early) / T:,.0f} bytes a token in bfloat16"
    yield Row("storage", not hoards, f"{growth}; {late:,} bytes after {2 * T} tokens, in {late_held:,} of storage")


def dtypes(subject):
    errors, bad = dict.fromkeys(("float32", "autocast", "bfloat16"), 0.0), set()
    for exact in subject.bare():
        x = normal(2, 130, exact.config.n_embd)
        expected = exact.requires_grad_()(x)[0]
        for name in errors:
            dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
            rough = copy.deepcopy(exact).to(dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
                error = (rough(x.to(dtype))[0] - expected).square().mean() / expected.square().mean()
                large = (LARGE * x).to(dtype).requires_grad_()
                ys = {where: module(large)[0] for where, module in parts(rough).items()}
            errors[name] = max(errors[name], error.sqrt().nan_to_num(nan=math.inf).item() / torch.finfo(torch.bfloat16).eps)
            bad |= {f"{where} in {name}" for where, y in ys.items()
                    if not (y.isfinite().all() and torch.autograd.grad(y.double().sum(), large)[0].isfinite().all())}
    passed = max(errors["bfloat16"], errors["autocast"]) <= BFLOAT16_LIMIT and errors["float32"] <= FLOAT32_LIMIT
    yield Row("bfloat16", passed, f"error {errors['bfloat16']:.1f} eps, under autocast {errors['autocast']:.1f}, limit {BFLOAT16_LIMIT}; "
                                  f"in float32 {errors['float32']:.0e}, limit {FLOAT32_LIMIT}")
    yield Row("finite", not bad, f"inputs {LARGE:,.0f} times the usual size" + (f": not finite in {', '.join(sorted(bad))}" if bad else ""))


def depth(subject):
    figures = []
    for model in subject.build(n_layer=12):
        model.double().train().loss(tokens(model, 2, 130), tokens(model, 2, 130).roll(-1, 1)).backward()
        norms = [math.hypot(*(p.grad.norm().item() for p in block.parameters() if p.grad is not None)) for block in model.blocks]
        ratio = max(norms) / min(norms) if min(norms) > 0 and all(map(math.isfinite, norms)) else math.inf
        figures.append((ratio, f"first layer {norms[0]:.1e}, last of {len(norms)} {norms[-1]:.1e}, largest / smallest {ratio:.1f}"))
    ratio, text = max(figures)
    yield Row("depth", ratio <= DEPTH_LIMIT, f"gradient norms: {text}, limit {DEPTH_LIMIT}")


def learns(subject):
    idle, count = set(), 0
    for model in subject.bare():
        x = normal(2, 130, model.config.n_embd).requires_grad_()
        for module in parts(model).values():
            y = module.requires_grad_().train()(x)[0]
            (y * normal(*y.shape, seed=1)).sum().backward()
            parameters = dict(module.named_parameters())
            idle |= {name for name, p in parameters.items() if p.grad is None or not 0 < p.grad.abs().max() < math.inf}
            count += len(parameters)
    yield Row("learns", not idle, f"no gradient, or no finite one, for {', '.join(sorted(idle))}" if idle else f"{count} parameters")


def bits(subject):
    def once():
        for model in subject.build():
            torch.manual_seed(0)
            model.train().loss(tokens(model, 4, 130), tokens(model, 4, 130).roll(-1, 1)).backward()
            yield from (t for p in model.parameters() for t in (p.detach(), p.grad) if t is not None)
    same = all(map(torch.equal, once(), once()))
    yield Row("bits", same, f"the same seed gives {'the same' if same else 'other'} bits")


def cost(subject):
    model = subject.build()[0].train()
    for where, mixer in list(parts(model).items())[:-1]:  # all but the FFN
        early, late = (costs(mixer, model.config.n_embd, T) for T in (2048, 4096))
        exponents = [f"{what} T^{math.log2(late[what] / early[what]):.2f}" for what in early]
        yield Row("cost", None, f"{where}: {', '.join(exponents)}; {1e3 * late['time']:.0f} ms at 4,096 tokens")


def costs(mixer, C, T):
    """Seconds of a forward and backward pass over T tokens, the fastest of 3, bytes kept between the two, and FLOPs if declared."""
    times, kept = [], {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    for _ in range(3):
        x, started = normal(1, T, C).float().requires_grad_(), time.perf_counter()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = mixer(x)[0]
        y.sum().backward()
        times.append(time.perf_counter() - started)
    declared = {"declared FLOPs": T * mixer.flops_per_token(T)} if hasattr(mixer, "flops_per_token") else {}
    return {"time": min(times), "memory": sum(kept.values())} | declared


CHECKS = (causality, split, branch, state_size, dtypes, depth, learns, bits, cost)


def audit(subject, checks=CHECKS):
    """The rows of all checks. Whatever a mixer's code raises fails the check that it was raised in."""
    for check in checks:
        try:
            yield from check(subject)
        except Exception as error:
            yield Row(check.__name__, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


# The report ----------------------------------------------------------------------------------------------------------

def subjects(options):
    if (options.mixer is None) == (options.out_dir is None):
        raise BadInput("audit what? name a mixer, --mixer=lln or --mixer=all, or a run, --out_dir=out/shakespeare_lln")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    if options.out_dir:
        return [trained(options.out_dir)]
    try:
        return [named(",".join(layer_mixers(name))) for name in (sorted(MIXERS) if options.mixer == "all" else [options.mixer])]
    except ValueError as error:
        raise BadInput(f"--mixer: {error}") from error


def print_matrix(reports):
    columns = list(dict.fromkeys(row.check for rows in reports.values() for row in rows if row.check != "cost"))
    width = max(map(len, reports))
    print(" ".join([" " * width, *(f"{check:>8}" for check in columns)]))
    for name, rows in reports.items():
        verdicts = {row.check: VERDICT[row.passed] for row in rows}
        print(" ".join([f"{name:{width}}", *(f"{verdicts.get(check, '-'):>8}" for check in columns)]))


@exit_on_bad_input("tools.audit")
def main():
    options, *_ = parse_options(AuditOptions, sys.argv[1:], __doc__.splitlines()[0], with_config_file=False)
    reports = {}
    for subject in subjects(options):
        started, rows = time.perf_counter(), []
        reports[subject.name] = rows
        for row in audit(subject):
            rows.append(row)
            print(f"{row.check:9} {VERDICT[row.passed]}  {row.figures}", flush=True)
        failed = [row.check for row in rows if row.passed is False]
        verdict = f"FAIL ({', '.join(failed)})" if failed else "pass"
        print(f"{subject.name}: {verdict}, {time.perf_counter() - started:.1f} s\n", flush=True)
    if len(reports) > 1:
        print_matrix(reports)
    sys.exit(any(row.passed is False for rows in reports.values() for row in rows))


if __name__ == "__main__":
    main()
