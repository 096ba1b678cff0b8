"""What a language model's logits must not depend on: asked of any function of tokens.

    subject = Subject("mine.py:model", logits, vocabulary=range(0, 65), ...)
    for answer in answers(subject): ...

logits: tokens (B, T) -> (B, T, V). Used by tools/audit_module.py, for a module of one's own, and
by tools/audit_hf.py, for those of transformers. B batch, T time, V vocabulary.

    suffix    outputs before token t, when the tokens from t on change
    gradient  of the outputs before t: it must not reach the embeddings of tokens from t on
    rows      outputs of a sequence, when another sequence of the batch changes
    repeat    the same call, after other calls
    length    outputs of a beginning alone, against those within a longer sequence
    one       outputs of a sequence alone, against those within a batch
    train     suffix once more, in training mode
"""
import contextlib
import inspect
import math
from dataclasses import dataclass, field
from typing import Callable, Optional

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from base.errors import is_out_of_memory
from base.user_code import frames_of, in_words, last, users_place
from tools.audit_answers import Answer, judged
from training.leaks import difference, limit, share

ROWS = 5
MOST_LOGITS = 2**26  # of a batch, half a GiB in float64
FEW = 40  # tokens up to which a smallest failing input is looked for one by one

class Wide(TorchFunctionMode):
    """Inside, what asks for float32 gets float64, so that rounding hides nothing and excuses
    nothing: norms and softmaxes that go to float32 stay exact."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = [wider(value) for value in args]
        kwargs = {name: wider(value) for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def wider(value):
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def in_float64():
    """Wide, and new tensors are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Subject:
    """logits: tokens (B, T) -> (B, T, V). module: what computes them, or None for a function.
    vocabulary: the tokens to ask with. lengths: of the sequences, ascending; borders: where
    sequences change, of what windows and blocks the model may have. shortest: some take no single
    token. distinct: no token twice in a sequence."""
    name: str
    logits: Callable
    vocabulary: range
    lengths: tuple
    borders: set = field(default_factory=set)
    module: Optional[nn.Module] = None
    dtype: torch.dtype = torch.float64
    shortest: int = 1
    distinct: bool = False

    def limit(self, question):
        """The most that may differ, as a share of the largest logit."""
        return limit("length" if question in ("length", "one") else question, self.dtype)

    def cuts(self, T):
        """Positions from which on one sequence each changes; as many as the logits leave room."""
        at_most = min(16, max(1, MOST_LOGITS // (T * len(self.vocabulary)) - 1))
        inside = sorted(t for t in {1, T // 2, T - 1} | self.borders if 0 < t < T)
        step = math.ceil(len(inside) / at_most)
        return sorted({*inside[::step], inside[-1]})[-at_most:]

    def tokens(self, B, T, seed=0):
        """Random ones; every other sequence has few different, many of them repeated."""
        generator = torch.Generator().manual_seed(seed)
        first, last = self.vocabulary[0], self.vocabulary[-1]
        if self.distinct:
            rows = [torch.randperm(last + 1 - first, generator=generator)[:T] for _ in range(B)]
            return first + torch.stack(rows)
        idx = torch.randint(first, last + 1, (B, T), generator=generator)
        idx[1::2] = first + (idx[1::2] - first) % min(3, len(self.vocabulary))
        return idx

    def __call__(self, idx):
        return self.of(self.logits, idx)

    @torch.no_grad()
    def of(self, function, idx):
        """function(tokens), in float64 throughout if that is the subject's precision."""
        with self.precision(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            y = function(idx.clone())
            return None if y is None else y.detach().clone()

    def precision(self):
        return in_float64() if self.dtype == torch.float64 else contextlib.nullcontext()


# Questions ----------------------------------------------------------------------------------------

def changed(subject, idx, cuts):
    """idx (1 + len(cuts), T), of which row i + 1 has other tokens from cuts[i] on."""
    starts = torch.tensor([idx.size(1), *cuts])[:, None]
    later = torch.arange(idx.size(1)) >= starts
    return torch.where(later, subject.tokens(*idx.shape, seed=1), idx), later


def suffix_at(subject, T, cuts):
    """(largest move, {"tokens": T, "changed from": t, "moved": position}) of the outputs before the
    cuts."""
    idx = subject.tokens(1 + len(cuts), T)
    other, later = changed(subject, idx, cuts)
    moved = difference(subject(other), subject(idx)).masked_fill(later, 0)  # (B, T)
    size = moved.max().item()
    row, position = divmod(moved.argmax().item(), T)
    return size, {"tokens": T, "changed from": [T, *cuts][row], "moved": position}


def suffix(subject):
    worst = 0.0
    most = subject.limit("suffix")
    for T in subject.lengths:
        size, found = suffix_at(subject, T, subject.cuts(T))
        worst = max(worst, size)
        if not size <= most:
            smallest = smaller(lambda n: suffix_at(subject, n, subject.cuts(n)), T, most) or found
            where = first_module(subject, smallest["tokens"], [smallest["changed from"]])
            return judged("suffix", size, most, smallest, where)
    return judged("suffix", worst, most)


def smaller(measure, T, most):
    """The description of the shortest sequence of 2 to T tokens of which measure(n) gives (size,
    description) with a size over `most`; between FEW and T by halving."""
    for n in range(2, min(T, FEW) + 1):
        size, found = measure(n)
        if not size <= most:
            return found
    low, high, found = FEW, T, None
    while high - low > 1:
        middle = (low + high) // 2
        size, candidate = measure(middle)
        if size <= most:
            low = middle
        else:
            high, found = middle, candidate
    return found


def gradient(subject):
    most = subject.limit("gradient")
    worst = 0.0
    for T in subject.lengths:
        size, found = gradient_at(subject, T, subject.cuts(T))
        if size is None:
            return Answer("gradient", None, "no embedding of the tokens (B, T) to differentiate by")
        worst = max(worst, size)
        if not size <= most:
            smallest = smaller(lambda n: gradient_at(subject, n, subject.cuts(n)), T, most) or found
            return judged("gradient", size, most, smallest)
    return judged("gradient", worst, most)


def gradient_at(subject, T, cuts):
    """(share of the largest gradient that reaches tokens from the cuts on, description); None
    instead of the share where no nn.Embedding reads the tokens."""
    if subject.module is None:
        return None, {}
    idx = subject.tokens(len(cuts), T)
    found = []

    def hook(embedding, inputs, output):
        reads = isinstance(inputs[0], torch.Tensor) and inputs[0].shape == idx.shape
        # some embed positions and only take the tokens' shape
        if reads and torch.equal(inputs[0], idx) and output.shape[:2] == idx.shape:
            leaf = output.detach().requires_grad_()
            found.append(leaf)
            return leaf.clone()

    hooks = []
    for module in subject.module.modules():
        if isinstance(module, nn.Embedding):
            hooks.append(module.register_forward_hook(hook))
    try:
        with torch.enable_grad(), subject.precision():
            y = subject.logits(idx.clone())
    finally:
        for handle in hooks:
            handle.remove()
    later = torch.arange(T) >= torch.tensor(cuts)[:, None]
    if not found or not y.requires_grad:
        return None, {}
    seen = y[~later]
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(seen.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad((seen * direction).sum(), found, materialize_grads=True)
    reached = sum(g.abs().amax(-1) for g in gradients)  # (B, T)
    late = reached.masked_fill(~later, 0)
    row, position = divmod(late.argmax().item(), T)
    where = {"tokens": T, "outputs before": cuts[row], "reaches": position}
    return share(late, reached), where


def rows_at(subject, T):
    idx = subject.tokens(ROWS, T)
    y = subject(idx)
    worst, where = 0.0, {}
    for row in range(ROWS):
        other = idx.clone()
        other[row] = subject.tokens(ROWS, T, seed=1)[row]
        moved = difference(subject(other), y)
        moved[row] = 0
        size = moved.max().item()
        if not size <= worst:
            moved_row, position = divmod(moved.argmax().item(), T)
            worst = size
            where = {"tokens": T, "rows": ROWS, "changed row": row, "moved row": moved_row,
                     "at": position}
    return worst, where


def train(subject):
    """suffix once more in training mode. What drops draws the same in both calls."""
    if subject.module is None:
        return Answer("train", None, "a function has no training mode")
    subject.module.train()
    try:
        answer = suffix(subject)
    finally:
        subject.module.eval()
    answer.question = "train"
    return answer


def repeat_at(subject, T):
    idx = subject.tokens(2, T)
    first = subject(idx)
    subject(subject.tokens(3, max(1, T - 3), seed=2))
    subject(subject.tokens(1, 2, seed=2))
    moved = difference(subject(idx), first)
    return moved.max().item(), {"tokens": T, "moved": moved.argmax().item() % T}


def length_at(subject, T):
    beginnings = [t for t in subject.cuts(T) if t >= subject.shortest]
    return part_alone(subject, subject.tokens(2, T),
                      [({"beginning": t}, slice(None), t) for t in beginnings])


def one_at(subject, T):
    return part_alone(subject, subject.tokens(ROWS, T),
                      [({"row": row}, slice(row, row + 1), T) for row in range(ROWS)])


def part_alone(subject, idx, parts):
    """The largest difference between a part of idx (B, T) alone and within the whole, and where.
    parts: each (its name, which rows, how many tokens)."""
    whole = subject(idx)
    worst, where = 0.0, {}
    for name, rows, t in parts:
        moved = difference(subject(idx[rows, :t]), whole[rows, :t])
        size = moved.max().item()
        if not size <= worst:
            worst = size
            where = {"tokens": idx.size(1), **name, "moved": moved.argmax().item() % t}
    return worst, where


def over_lengths(question, measure):
    """The question's function: measure(subject, T) at all lengths, then the shortest that fails."""
    def ask(subject):
        worst = 0.0
        most = subject.limit(question)
        for T in subject.lengths:
            size, found = measure(subject, T)
            worst = max(worst, size)
            if not size <= most:
                smallest = smaller(lambda n: measure(subject, n), T, most) or found
                return judged(question, size, most, smallest)
        return judged(question, worst, most)
    return ask


QUESTIONS = {
    "suffix": suffix,
    "gradient": gradient,
    "rows": over_lengths("rows", rows_at),
    "repeat": over_lengths("repeat", repeat_at),
    "length": over_lengths("length", length_at),
    "one": over_lengths("one", one_at),
    "train": train,
}


def answers(subject, questions):
    """Yields the Answer to each of the questions, name -> function. What a model's code raises is a
    FAIL."""
    for name, ask in questions.items():
        try:
            yield ask(subject)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            yield Answer(name, False, f"{in_words(error)} ({origin(error)})")


def origin(error):
    """Where an error was raised: in a user's file, or outside torch and these checks."""
    outside = [frame for frame in frames_of(error)
               if "/torch/" not in frame.filename and frame.filename != __file__]
    return users_place(error) or last(outside).rpartition("site-packages/")[2]


# Where a leak begins ------------------------------------------------------------------------------

def first_module(subject, T, cuts):
    """The innermost module whose outputs before the cut move although its inputs do not, as "name
    (Class.forward, file, line)", or "". Only tensors (B, T, ...) are looked at."""
    if subject.module is None:
        return ""
    names = {module: name for name, module in subject.module.named_modules()}
    idx = subject.tokens(1 + len(cuts), T)
    other, later = changed(subject, idx, cuts)

    def run(tokens):
        seen = []

        def hook(module, inputs, output):
            seen.append((module, timed(inputs), timed(output)))

        hooks = [module.register_forward_hook(hook) for module in names]
        try:
            subject(tokens)
        finally:
            for handle in hooks:
                handle.remove()
        return seen

    def timed(value):
        if isinstance(value, torch.Tensor):
            value = [value]
        elif hasattr(value, "values"):
            value = list(value.values())
        elif not isinstance(value, (tuple, list)):
            return []
        return [t.detach().double() for t in value if isinstance(t, torch.Tensor)
                and t.shape[:2] == idx.shape and t.dim() > 2 and not t.is_complex()]

    def moved(before, after):
        return any(difference(a.flatten(2), b.flatten(2))[~later].max() > subject.limit("suffix")
                   for a, b in zip(after, before))

    for (module, inputs, outputs), (_, new_inputs, new_outputs) in zip(run(idx), run(other)):
        if moved(outputs, new_outputs) and not moved(inputs, new_inputs):
            return f"{names[module] or 'the model'} ({described(module)})"
    return ""


def described(module):
    """"Attention.forward, model.py, line 29"."""
    forward = inspect.unwrap(type(module).forward)
    try:
        line = inspect.getsourcelines(forward)[1]
        file = inspect.getsourcefile(forward)
    except (OSError, TypeError):
        return type(module).__name__
    file = file.rpartition("site-packages/")[2]
    return f"{type(module).__name__}.forward, {file}, line {line}"
