"""The audit's questions about numbers: precision, size, gradients."""
import copy
import math

import torch
from torch.overrides import TorchFunctionMode

from base.errors import is_out_of_memory
from tools.audit_leaks import in_precision
from tools.audit_state import BFLOAT16_EPS, BFLOAT16_LIMIT
from tools.audit_subject import EXACT, ROUGH, Row, Worst, asked, normal, tokens
from training.chance import call, drawn
from training.leaks import bare_copy, cast, parts, precision_within

FLOAT32_LIMIT = 0.1  # as BFLOAT16_LIMIT
LARGE = 1e3
LONG = 1000  # tokens that are to be near float64
LATE = 3000  # tokens that are to be finite
DEPTH_LIMIT = 1000  # over 12 layers: 1.8 times from one to the next
FLOAT32_GRADIENT_LIMIT = 0.05  # error over size
ROUGH_GRADIENT_LIMIT = 0.5
DERIVATIVE_LIMIT = 1e-4  # of a difference quotient
DRAWS = 8  # passes in which a parameter may get its gradient, where chance decides


def dtypes(subject):
    errors = {precision.name: 0.0 for precision in ROUGH}
    most = BFLOAT16_LIMIT
    not_finite = set()
    for exact in subject.bare(block_size=LONG):
        x = normal(2, 130, exact.config.n_embd)
        exact.requires_grad_()
        # mixers alone also where bfloat16 cannot count: from 256 on
        long = normal(2, min(LONG, exact.config.block_size), x.size(2))
        for module, given in [(exact, x), *((mixer, long) for mixer in asked(exact).values())]:
            expected = module(given.clone())[0].detach()
            # a choice of the largest falls otherwise for rounded numbers, however exact it is made
            rounded = cast(cast(copy.deepcopy(module), torch.bfloat16), torch.float64)
            most = max(most, 4 * rough_error(rounded, given.bfloat16(), expected, EXACT))
            for precision in ROUGH:
                rough = cast(copy.deepcopy(module), precision.dtype)
                try:
                    error = rough_error(rough, given, expected, precision)
                except Exception as error:
                    raise in_precision(error, precision)
                errors[precision.name] = max(errors[precision.name], error)
        for precision in ROUGH:
            rough = cast(copy.deepcopy(exact), precision.dtype)
            not_finite |= overflowing(rough, x, precision)
            not_finite |= overflowing_late(rough, precision)
    passed = errors["float32"] <= FLOAT32_LIMIT
    passed = passed and max(errors["bfloat16"], errors["autocast"]) <= most
    yield Row("bfloat16", passed, f"error {errors['bfloat16']:.1f} eps, "
                                  f"under autocast {errors['autocast']:.1f}, "
                                  f"limit {most:.0f}; "
                                  f"in float32 {errors['float32']:.0e}, limit {FLOAT32_LIMIT}")
    figures = f"inputs {LARGE:,.0f} times the usual size, {LATE:,} tokens"
    if not_finite:
        figures += f": not finite in {', '.join(sorted(not_finite))}"
    yield Row("finite", not not_finite, figures)


def rough_error(model, x, expected, precision):
    """The root mean square error of a model's outputs over that of the outputs, in units of
    bfloat16's eps."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
        y = model(x.to(precision.dtype).clone())[0]
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


@torch.no_grad()
def overflowing_late(model, precision):
    """The same for a long sequence of usual inputs. Some mixers refuse it."""
    found = set()
    x = normal(1, LATE, model.config.n_embd).to(precision.dtype)
    for name, module in asked(model).items():
        try:
            y = call(module, x, precision.autocast)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            continue
        if not y.isfinite().all():
            found.add(f"{name}, {LATE:,} tokens, in {precision.name}")
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


def derivative(subject, T=9):
    """Gradients are the derivatives of the outputs, twice, and in whatever order."""
    worst = Worst(DERIVATIVE_LIMIT)
    bits = []
    notes = []
    for model in subject.build():
        bare = asked(bare_copy(model, subject.noise))
        for (name, module), fresh in zip(bare.items(), asked(model).values()):
            frozen = {name for name, p in fresh.named_parameters() if not p.requires_grad}
            for training in (False, True):
                module.train(training).requires_grad_()
                mode = f"{name}, {'training' if training else 'evaluation'}"
                for length in (T, 70):
                    look_at_derivative(worst, notes, module, frozen, mode, length,
                                       model.config.n_embd)
                bits += backward_again(module, mode, 70, model.config.n_embd)
                module.requires_grad_(False)
    if bits:
        yield Row("backward", False, "; ".join(bits))
    else:
        yield Row("backward", True, "twice the same, in whatever order, and in proportion")
    figures = f"; {'; '.join(sorted(set(notes)))}" if notes else "; inputs and parameters"
    yield worst.row("derivative", "a gradient is not the derivative of the output", figures)


def look_at_derivative(worst, notes, module, frozen, where, T, C):
    """Central differences along random directions of the input and of each parameter that is not
    frozen, of a random combination of the outputs."""
    x = normal(2, T, C).requires_grad_()
    combine = normal(2, T, C, seed=1)
    rough = precision_within(module, x.detach()) == torch.float32
    limit, h = (0.3, 1e-2) if rough else (DERIVATIVE_LIMIT, 1e-6)
    still = module.training and bool(drawn(module, x))
    with Detached() as detached:
        total = (call(module, x, still=still) * combine).sum()
    inputs = {"the input": x}
    inputs |= {name: p for name, p in module.named_parameters() if name not in frozen}
    gradients = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
    largest = max(g.norm().item() for g in gradients)
    for (name, p), gradient in zip(inputs.items(), gradients):
        found = []  # (gradient's, difference's) along each direction
        for seed in range(3):
            pair = along(module, x, p, gradient, combine, still, h, seed)
            if pair is not None:
                found.append(pair)
        if len(found) < 2:  # not smooth
            continue
        small = 1e-4 * largest
        errors = [abs(a - b) / max(abs(a), abs(b), small) for a, b in found]
        if min(errors) <= limit:
            continue
        if all(abs(b) <= 1e-6 * abs(a) for a, b in found):
            notes.append(f"{name} passes a gradient although it changes nothing: straight-through")
            continue
        ratios = [a / b for a, b in found if b]
        constant = ratios and max(ratios) - min(ratios) <= 1e-3 * abs(ratios[0])
        if detached.found and not constant:
            notes.append(f"part of the gradient of {name} is cut off by a detach")
            continue
        words = f"2 rows of {T} tokens: {name}"
        if constant:
            words += f", whose gradient is {ratios[0]:.2g} times what it should be"
        worst.note(min(errors), limit, where, words)


@torch.no_grad()
def along(module, x, p, gradient, combine, still, h, seed):
    """The derivative along a random direction of p: by the gradient, and by differences of two
    sizes; None if those are not alike."""
    direction = normal(*p.shape, seed=10 + seed).to(p.dtype)
    before = p.detach().clone()
    slopes = []
    for distance in (h, h / 4):
        ends = []
        for sign in (1, -1):
            p.copy_(before + sign * distance * direction)
            ends.append((call(module, x.detach(), still=still) * combine).sum().item())
        slopes.append((ends[0] - ends[1]) / (2 * distance))
    p.copy_(before)
    if abs(slopes[0] - slopes[1]) > 0.1 * max(map(abs, slopes)) + 1e-6 * abs(ends[0]):
        return None
    return (gradient * direction).sum().real.item(), slopes[1]


# have no derivative: code with a gradient of its own then passes another on purpose
STEPS = {"round", "round_", "floor", "ceil", "trunc", "sign", "heaviside", "argmax", "topk",
         "gt", "ge", "lt", "le", "long", "int"}


class Detached(TorchFunctionMode):
    """Notes whether a tensor is taken out of the graph, or rounded within a custom Function, which
    records no gradients either."""
    found = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        taken_out = function is torch.Tensor.data.__get__ or "detach" in name
        switched_off = name == "_set_grad_enabled" and not args[0]
        stepped = name in STEPS and not torch.is_grad_enabled()
        if taken_out or switched_off or stepped or torch.is_inference_mode_enabled():
            self.found = True
        return function(*args, **(kwargs or {}))


def backward_again(module, where, T, C):
    """What is wrong with a backward pass that runs twice, behind that of a later call, or with
    larger gradients; or that writes into those that come in, which the residual stream shares."""
    def gradients_of(y, x, keep=False, factor=1.0):
        inputs = [x, *module.parameters()]
        coming = combine * factor
        found = torch.autograd.grad(y, inputs, coming, retain_graph=keep, materialize_grads=True)
        written.append(not torch.equal(coming, combine * factor))
        return found

    combine = normal(2, T, C, seed=1)
    written = []
    x, other = (normal(2, T, C, seed=seed).requires_grad_() for seed in (0, 2))
    still = bool(drawn(module, x.detach()))
    y = call(module, x, still=still)
    once, twice = gradients_of(y, x, keep=True), gradients_of(y, x, keep=True)
    large = gradients_of(y, x, factor=2.0**20)
    found = []
    if not all(map(torch.equal, once, twice)):
        found.append(f"{where}: the second backward pass through the same graph gives others")
    elif not all(torch.allclose(a / 2**20, b, rtol=1e-4, atol=1e-9) for a, b in zip(large, once)):
        found.append(f"{where}: gradients are not in proportion to those that come in")
    y, other_y = (call(module, t, still=still) for t in (x, other))
    gradients_of(other_y, other)
    behind = gradients_of(y, x)
    if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(once, behind)):
        found.append(f"{where}: the backward pass of a call gives others after a later call's")
    if any(written):
        found.append(f"{where}: the backward pass writes into the gradient that it is given")
    return found


def rough_gradients(subject, T=66):
    """In the precisions of training gradients are near those of float64."""
    worst = Worst(ROUGH_GRADIENT_LIMIT)
    for model in subject.bare():
        for name, module in asked(model).items():
            for training in (False, True):
                module.train(training)
                x = normal(2, T, model.config.n_embd)
                still = training and bool(drawn(module, x))
                exact = all_gradients(module, x, EXACT, still)
                rounded = cast(cast(copy.deepcopy(module), torch.bfloat16), torch.float64)
                by_rounding = off(all_gradients(rounded, x.bfloat16(), EXACT, still), exact)[0]
                for precision in ROUGH:
                    found = all_gradients(module, x, precision, still)
                    error, of = off(found, exact)
                    most = FLOAT32_GRADIENT_LIMIT
                    if precision.rounding == torch.bfloat16:
                        most = max(ROUGH_GRADIENT_LIMIT, 4 * by_rounding)
                    mode = "training" if training else "evaluation"
                    worst.note(error, most, f"{name}, {mode}, {precision.name}, of {of}",
                               f"2 rows of {T} tokens")
    row = worst.row("slopes", "a gradient is another than in float64", "; in every precision")
    row.figures = row.figures.replace("of the largest at most", "off at most")
    yield row


def all_gradients(module, x, precision, still):
    """name -> the gradient of a random combination of the outputs, in a copy of a module."""
    module = cast(copy.deepcopy(module), precision.dtype).requires_grad_()
    x = x.to(precision.dtype).requires_grad_()
    y = call(module, x, precision.autocast, still)
    inputs = {"the input": x} | dict(module.named_parameters())
    total = (y.double() * normal(*y.shape, seed=1)).sum()
    found = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
    return dict(zip(inputs, found))


def off(gradients, exact):
    """(error of the gradient that is off by most, its name), over its own size; a gradient that is
    next to nothing is measured by the largest."""
    largest = max(g.norm().item() for g in exact.values())
    errors = {}
    for name, g in exact.items():
        error = (gradients[name].to(g.dtype) - g).norm().item()
        errors[name] = error / max(g.norm().item(), 0.05 * largest, 1e-300)
    of = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[of], of
