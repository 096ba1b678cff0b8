"""Is a language model of your own causal? Run: python -m tools.audit --module=model.py:build

    python -m tools.audit --module=FILE:NAME [--vocab_size=65] [--block_size=256]

NAME in FILE is one of

    an nn.Module                  tokens (B, T), int64 -> logits (B, T, V)
    a function of tokens          the same; it is asked as it is
    a function without arguments  that returns one of the two: def build(): return GPT(GPTConfig())

Small models are asked in seconds: 2 layers of 64 channels have all the code of a large one. Logits
may be a tensor, the first of a tuple, `.logits` or ["logits"]. A model that returns the last
position's alone unless it is given targets, as nanoGPT's does, is asked with targets, and two more
questions (see below). Of a module a copy is asked, in float64 if it can be, first as it is, then
with noise on all weights, for one that starts at zero hides what it scales.

The questions of tools/audit_tokens.py, and of a model that takes targets

    targets   logits, when the targets change
    last      logits without targets, against the last of those with them

Exit status 1 if anything fails. The same is written to FILE's folder, FILE.NAME.audit.json.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import contextlib
import copy
import inspect
import runpy
import sys
import time
from pathlib import Path
from typing import Optional

import torch
import torch.nn as nn

from base.command_line import nearest, parse_options, shortened
from base.errors import BadInput, exit_on_bad_input, is_out_of_memory
from base.files import is_file
from base.options import checked, option
from base.user_code import definition, files, in_words, users_place
from tools.audit_answers import MEANING, judged, print_answer, report
from tools.audit_tokens import QUESTIONS, Subject, answers
from training.contract import kind_of
from training.leaks import cast, difference

NOISE = 0.1
LONGEST = 1030  # tokens that are asked about, unless --block_size says more
MEANING |= {
    "targets": "logits depend on the targets: the answer is in the question; look at what the "
               "forward pass makes of them before the loss",
    "last": "logits without targets are not the last ones with them: sampling differs from "
            "training; look at the branch for sampling",
}


@checked
class ModuleOptions:
    module: str = option("", "FILE:NAME, see above", min_length=1)
    vocab_size: Optional[int] = option(None, "tokens are below this; found by trying", ge=2)
    block_size: Optional[int] = option(None, "the longest sequence; found by trying", ge=2)


# Loading ------------------------------------------------------------------------------------------

def load(path, name):
    """What `name` in a Python file is: a module, or a function of tokens. BadInput."""
    if not is_file(path):
        raise BadInput(f"--module: {shortened(path)} does not exist, or is no file; "
                       "--module=model.py:build names the function build in model.py")
    files.add(Path(path).resolve())
    try:
        with imports_from(Path(path).resolve().parent):
            names = runpy.run_path(path)
            if name in names:
                return made(path, name, names[name])
    except BadInput:
        raise
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises
        raise BadInput(f"--module: {users_place(error) or path}: {in_words(error)}") from error
    raise BadInput(f"--module: {path} has no {name!r}{nearest(name, list(names), '')}")


@contextlib.contextmanager
def imports_from(folder):
    """Inside, `import model` is the model.py of this folder, as `python FILE` has it, and not the
    one of ours that is loaded already."""
    own = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    aside = {}
    for module in list(sys.modules):
        if module.partition(".")[0] in own and module != "__main__":
            aside[module] = sys.modules.pop(module)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(aside)


def made(path, name, value):
    """The module or function of tokens that `value` is, or that it returns without arguments."""
    if isinstance(value, nn.Module):
        return value
    needed = required(value, f"--module: {path}: {name}")
    if needed and not isinstance(value, type):
        return value
    if needed:
        raise BadInput(f"--module: {path}: {name} takes ({', '.join(needed)}); name a function "
                       f"without arguments that returns one: def build(): return {name}(...)")
    try:
        value = value()
    except Exception as error:
        raise BadInput(f"--module: {users_place(error) or path}: {in_words(error)}") from error
    if isinstance(value, nn.Module) or callable(value) and required(value, name):
        return value
    raise BadInput(f"--module: {path}: {name}() returned {kind_of(value)}; it must return a module "
                   "or a function of tokens")


def required(value, what):
    """The names of the arguments that a call needs. BadInput for what is not called."""
    if not callable(value):
        raise BadInput(f"{what} is {kind_of(value)}; name a module or a function")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # of some builtins
        return ["tokens"]
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


# Calling ------------------------------------------------------------------------------------------

def tensor_of(returned):
    """The logits in what a model returned. BadInput."""
    for value in (returned, getattr(returned, "logits", None)):
        if isinstance(value, torch.Tensor):
            return value
    if isinstance(returned, dict) and isinstance(returned.get("logits"), torch.Tensor):
        return returned["logits"]
    if isinstance(returned, (tuple, list)) and returned:
        return tensor_of(returned[0])
    raise BadInput(f"the model returned {kind_of(returned)}; it must return logits (B, T, V)")


class Model:
    """tokens (B, T) -> logits (B, T, V), whatever the model's own interface is."""

    def __init__(self, function):
        self.function = function
        self.takes_targets = False

    def __call__(self, idx, targets=None):
        if not self.takes_targets:
            return self.checked(self.alone(idx), idx)
        return self.checked(tensor_of(self.function(idx, idx if targets is None else targets)), idx)

    def alone(self, idx):
        return tensor_of(self.function(idx))

    def checked(self, y, idx):
        if y.dim() != 3 or y.shape[:2] != idx.shape:
            raise BadInput(f"for tokens {tuple(idx.shape)} the model returned {kind_of(y)}; "
                           f"it must return logits (B, T, V) ({self.where()})")
        return y

    def where(self):
        function = self.function
        return definition(type(function).forward if isinstance(function, nn.Module) else function)

    def find_interface(self):
        """Whether it wants targets to give all positions. Returns V. BadInput."""
        idx = torch.zeros(2, 5, dtype=torch.long)
        y = self.alone(idx)
        if y.dim() == 3 and y.size(1) == 5:
            return y.size(2)
        try:
            y = tensor_of(self.function(idx, idx))
            self.takes_targets = True
        except Exception as error:
            raise BadInput(f"for tokens (2, 5) the model returned {kind_of(y)}, and it takes no "
                           f"targets that would make it return all positions; {in_words(error)} "
                           f"({self.where()})") from error
        return self.checked(y, idx).size(2)


def works(subject, T, token):
    try:
        subject(torch.full((1, T), token))
        return True
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False


def longest(subject, at_most):
    """The longest sequence, up to at_most tokens, that does not raise."""
    token = subject.vocabulary[0]
    if works(subject, at_most, token):
        return at_most
    low, high = 5, at_most
    while high - low > 1:
        middle = (low + high) // 2
        if works(subject, middle, token):
            low = middle
        else:
            high = middle
    return low


def subject_of(name, function, options):
    """The Subject of a module (a copy of which is asked) or function. BadInput."""
    module = None
    dtype = torch.float32
    if isinstance(function, nn.Module):
        module = cast(copy.deepcopy(function).cpu().eval(), torch.float64)
        try:
            probe(module)
            dtype = torch.float64
        except Exception:
            module = copy.deepcopy(function).cpu().eval()
        function = module
    model = Model(function)
    subject = Subject(name, model, range(2), (5,), module=module, dtype=dtype)
    try:
        with subject.precision(), torch.no_grad():
            V = model.find_interface()
            y = model(torch.zeros(1, 5, dtype=torch.long))
    except BadInput as error:
        raise BadInput(f"--module: {error}") from error
    except Exception as error:
        raise BadInput(f"--module: {users_place(error) or name}: {in_words(error)}") from error
    if dtype != torch.float64:
        subject.dtype = y.dtype if y.dtype.is_floating_point else torch.float32
    V = options.vocab_size or V
    if not works(subject, 5, V - 1):
        raise BadInput(f"--module: {name} does not take token {V - 1}, and its logits have {V}; "
                       "say how many tokens there are: --vocab_size=...")
    subject.vocabulary = range(V)
    subject.shortest = 1 if works(subject, 1, 0) else 2
    T = longest(subject, options.block_size or LONGEST)
    if options.block_size and T < options.block_size:
        raise BadInput(f"--module: {name} takes at most {T} tokens, "
                       f"not --block_size={options.block_size}")
    subject.lengths = tuple(sorted({min(T, 33), min(T, 200), T}))
    subject.borders = {31, 32, 33, 63, 64, 65, 128, 256, 512, T // 4}
    return subject


def probe(module):
    """Raises what a module raises in float64."""
    model = Model(module)
    with torch.no_grad():
        Subject("", lambda idx: model.alone(idx), range(2), (5,))(torch.zeros(1, 5).long())


@torch.no_grad()
def noisy(subject):
    """The same with noise on all weights."""
    generator = torch.Generator().manual_seed(0)
    for p in subject.module.parameters():
        if p.is_floating_point():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p += NOISE * noise.to(p.dtype)


# Questions ----------------------------------------------------------------------------------------

def targets(subject):
    T = subject.lengths[-1]
    idx = subject.tokens(2, T)
    y = subject(idx)
    worst, where = 0.0, {}
    for seed in (1, 2):
        other = subject.tokens(2, T, seed=seed)
        moved = difference(subject.of(lambda x: subject.logits(x, other), idx), y)
        if not moved.max() <= worst:
            worst = moved.max().item()
            where = {"tokens": T, "moved": moved.argmax().item() % T}
    most = subject.limit("repeat")
    return judged("targets", worst, most, None if worst <= most else where)


def last(subject):
    worst, where = 0.0, {}
    most = subject.limit("length")
    for T in subject.lengths:
        idx = subject.tokens(2, T)
        y = subject.of(subject.logits.alone, idx)
        moved = difference(y[:, -1:], subject(idx)[:, -1:]).max().item()
        if not moved <= worst:
            worst, where = moved, {"tokens": T, "moved": T - 1}
    return judged("last", worst, most, None if worst <= most else where)


def questions_of(subject):
    """name -> function, all that is asked of it."""
    more = {"targets": targets, "last": last} if subject.logits.takes_targets else {}
    return QUESTIONS | more


def audit(subject, questions):
    """The Answers; of a module also with noise on its weights, told where those fail."""
    first = list(answers(subject, questions))
    if subject.module is None:
        return first
    noisy(subject)
    told = []
    for answer, other in zip(first, answers(subject, questions)):
        if answer.passed is not False and other.passed is False:
            other.figures += "; with noise on the weights"
            answer = other
        told.append(answer)
    return told


@exit_on_bad_input("tools.audit")
def main():
    options, *_ = parse_options(ModuleOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    path, colon, name = options.module.rpartition(":")
    if not colon:
        raise BadInput(f"--module={options.module}: name what in the file, --module=model.py:build")
    started = time.perf_counter()
    subject = subject_of(options.module, load(path, name), options)
    precision = str(subject.dtype).removeprefix("torch.")
    print(f"{len(subject.vocabulary):,} tokens, sequences of {', '.join(map(str, subject.lengths))}"
          f" in {precision}" + (", with targets" if subject.logits.takes_targets else ""))
    found = audit(subject, questions_of(subject))
    for answer in found:
        print_answer(answer)
    beside = Path(path).with_name(f"{Path(path).stem[:80]}.{name[:80]}.audit.json")
    sys.exit(not report(options.module, found, time.perf_counter() - started, beside))


if __name__ == "__main__":
    main()
