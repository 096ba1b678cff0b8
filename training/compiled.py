"""One token's step of a model compiled ahead of time, for decoding on a CPU: torch.export, then
AOTInductor and a C++ compiler. Of small models at batch 1 most of a step is the dispatch of its
many operations, which a compiled step has not.

    one_token = compiled_step(model, dtype, batch)      # before ready_to_decode
    logits, state = one_token(idx, state)               # idx (B, 1): as model.step

The mixers know nothing of it. A state's tensors are inputs and outputs; the number of tokens, which
states hold as a Python number, comes in as the length of an empty tensor and is a symbol in the
export, like the sizes of a cache that grows. So a step can be compiled if its state's sizes are
constant, once it is filled, or the number of tokens, and if it takes the same way at every number;
all others are refused by name.

Kept for the next call: compiling takes 10 to 20 s. A package is a shared library, so to load one is
to run it. It is therefore no part of a run's folder, which people exchange, but lies in the user's
own cache, $XDG_CACHE_HOME/nanomix or ~/.cache/nanomix, a folder that nobody else may read or write:
what runs is what this user has compiled, as with Python's own __pycache__. Its name is a checksum
of all that it depends on, the weights included, which are laid out for their products in it.
Of more than KEPT the oldest go; whatever is there may be deleted at any time.

B batch, n tokens so far.
"""
import contextlib
import copy
import hashlib
import io
import json
import os
import platform
import stat
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import mixers
from base.errors import BadInput
from base.files import ROOT, shown, write_file, writing
from mixers.parts.products import without_autocast
from model import State
from training.device import lacks_compiler, ready_to_decode

GROWS = -1  # in place of a size: it is the number of tokens
FEWEST = 2  # tokens behind which a compiled step is asked: exports hold sizes of 1 for constants
EXAMPLE = 256  # tokens behind which a step is exported, or half of block_size where that is less
KEPT = 16     # packages of 4 to 45 MB
LEFT_OVER_SECONDS = 3600
CODE = ("model.py", "training/compiled.py", "training/device.py")  # and all of mixers/


class Flat(NamedTuple):
    """The State of a compiled step: its tensors alone."""
    n: int
    tensors: tuple


class Step(nn.Module):
    """model.step of one token with nothing but tensors, in the form of the State `example`; what
    has another number in `later`, a token behind it, is the number of tokens."""

    def __init__(self, model, example, later, dtype):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.leaves, self.tree = tree_flatten(example.blocks)
        self.later = tree_flatten(later.blocks)[0]

    def forward(self, idx, count, *tensors):
        n, tensors = count.size(0), iter(tensors)
        leaves = []
        for leaf, later in zip(self.leaves, self.later):
            if isinstance(leaf, torch.Tensor):
                leaves.append(next(tensors))
            else:  # a count, a constant, or a cache's room, which recorded gradients do not use
                leaves.append(leaf if leaf == later else n)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            logits, state = self.model.step(idx, State(n, tree_unflatten(leaves, self.tree)))
        return logits, *tensors_of(state)


class CompiledStep:
    """What compiled_step returns. Where a state does not fit, being that of fewer tokens than a
    window has, the model itself makes the step."""

    def __init__(self, model, package, shapes, dtypes, numbers):
        from torch._inductor import aoti_load_package  # as the two below: a second, for few
        self.model, self.shapes, self.dtypes, self.numbers = model, shapes, dtypes, numbers
        self.run = aoti_load_package(io.BytesIO(package))

    def __call__(self, idx, state):
        """logits (B, 1, V) of idx (B, 1) behind `state`, the model's or one from here, and the new
        state."""
        if self.model.config.pos == "learned" and state.n >= self.model.config.block_size:
            raise ValueError(f"{state.n + 1} tokens, but the model has learned positions for "
                             f"block_size {self.model.config.block_size} only")
        n, tensors = state.n, state.tensors if isinstance(state, Flat) else tensors_of(state)
        if isinstance(state, State) and not self.fits(state, tensors):
            return self.model.step(idx, state)
        with without_autocast(idx.device):
            # a column of a larger tensor would be read in the layout of the example
            logits, *tensors = self.run(idx.contiguous(), torch.empty(n, 0), *tensors)
        return logits, Flat(n + 1, tensors)

    def fits(self, state, tensors):
        """Whether the compiled step takes a State with these tensors: once full, none changes."""
        def now(sizes):
            return tuple(state.n if size == GROWS else size for size in sizes)

        same = [tuple(t.shape) for t in tensors] == [now(shape) for shape in self.shapes]
        same = same and [t.dtype for t in tensors] == self.dtypes
        return same and state.n >= FEWEST and tuple(numbers_of(state)) == now(self.numbers)


def compiled_step(model, dtype, batch):
    """A CompiledStep of a model, not yet ready_to_decode, that is to decode on a CPU with the heavy
    operations in dtype. From the cache, or compiled now, of which standard error is told.

    BadInput where there is no compiler, or if the step cannot be compiled."""
    device = model.head.weight.device
    if device.type != "cpu":
        raise BadInput(f"--compile: decoding is compiled for the CPU only, not for {device}; leave "
                       "it out")
    own = copy.deepcopy(model).requires_grad_(False).eval()
    ready_to_decode(own, dtype, pack=False)
    name = model.config.mixer
    examples = example_states(own, dtype, batch, name)
    shapes = shapes_of(*examples, name)
    path = cache_folder() / f"{checksum(model, dtype, batch)}.pt2"
    dtypes = [t.dtype for t in tensors_of(examples[0])]
    numbers = [a if a == b else GROWS for a, b in zip(*map(numbers_of, examples))]
    package = read_own(path)
    if package is not None:
        try:
            return CompiledStep(model, package, shapes, dtypes, numbers)
        except Exception:  # it is damaged: whatever PyTorch makes of that
            print(f"{shown(path)} is damaged", file=sys.stderr)
    if lacks_compiler(device):
        raise BadInput("--compile: no C++ compiler found; install one or leave it out")
    print(f"compiling a step of {name}, kept in {shown(path.parent)}", file=sys.stderr)
    with warnings.catch_warnings():  # torch's about itself
        warnings.simplefilter("ignore")
        package = compile_package(export(own, *examples, shapes, dtype, batch))
    write_file(path, package)
    remove_oldest(path.parent)
    return CompiledStep(model, package, shapes, dtypes, numbers)


# States as tensors --------------------------------------------------------------------------------

def tensors_of(state):
    """The tensors in a State, in the layout that is compiled for."""
    leaves, _ = tree_flatten(state.blocks)
    return [leaf.contiguous() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def numbers_of(state):
    """The whole numbers in a State."""
    return [leaf for leaf in tree_flatten(state.blocks)[0] if isinstance(leaf, int)]


@torch.no_grad()
def example_states(model, dtype, batch, name):
    """The States behind n and n + 1 tokens, n being large enough for a window to be full."""
    n = min(EXAMPLE, model.config.block_size // 2)
    if n < FEWEST:
        raise BadInput(f"--compile: block_size {model.config.block_size} is too small to compile a "
                       f"step of {name}; leave it out")
    tokens = torch.zeros(batch, n + 1, dtype=torch.int64)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        _, earlier = model.step(tokens[:, :n])
        _, later = model.step(tokens[:, n:], earlier)
    return earlier, later


def shapes_of(earlier, later, name):
    """The shapes of a state's tensors, GROWS where a size is the number of tokens, from two States
    a token apart. BadInput if its sizes follow another rule."""
    (old, tree), (new, new_tree) = tree_flatten(earlier.blocks), tree_flatten(later.blocks)
    shapes, regular = [], tree == new_tree
    for a, b in zip(old, new):
        sizes = [(a, b)] if isinstance(a, int) else []
        if isinstance(a, torch.Tensor):
            regular = regular and a.dtype == b.dtype and a.dim() == b.dim()
            sizes = list(zip(a.shape, b.shape))
            shapes.append(tuple(GROWS if x == earlier.n and y == later.n else x for x, y in sizes))
        regular = regular and all(x == y or (x, y) == (earlier.n, later.n) for x, y in sizes)
    if not regular:
        raise cannot(name, "the sizes of its state are neither constant nor the number of tokens")
    return shapes


def cannot(name, reason):
    return BadInput(f"--compile: a step of {name} cannot be compiled: {reason}; leave it out")


# Compiling ----------------------------------------------------------------------------------------

def export(model, example, later, shapes, dtype, batch):
    """torch.export's program of a step, for every number of tokens; example, later: States a token
    apart. BadInput if there is none."""
    tensors = tensors_of(example)
    config = model.config
    most = config.block_size - 1 if config.pos == "learned" else None
    n = torch.export.Dim("n", min=FEWEST, max=most)  # torch refuses what not every n satisfies
    sizes = tuple({i: n for i, size in enumerate(shape) if size == GROWS} for shape in shapes)
    inputs = torch.zeros(batch, 1, dtype=torch.int64), torch.empty(example.n, 0), *tensors
    dynamic_shapes = (None, {0: n}, sizes) if sizes else (None, {0: n})
    step = Step(model, example, later, dtype)
    try:
        # with gradients recorded a cache is a new tensor at each step; the weights record none
        with torch.enable_grad():
            program = torch.export.export(
                step, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # of torch's many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.startswith("Constraints violated"):
            reason = "it takes another way at some numbers of tokens"
        raise cannot(config.mixer, reason[:200]) from error
    refuse_other_sizes(program, shapes, config.mixer)
    return program


def refuse_other_sizes(program, shapes, name):
    """BadInput unless a program's new state has the sizes of the old one, a token later."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true
    nodes = list(program.graph.nodes)
    inputs = [node.meta["val"] for node in nodes if node.op == "placeholder"]
    before = inputs[len(inputs) - len(shapes):]
    after = [node.meta["val"] for node in nodes[-1].args[0][1:]]
    for old, new, shape in zip(before, after, shapes, strict=True):
        for a, b, size in zip(old.shape, new.shape, shape, strict=True):
            if not statically_known_true(b == (a + 1 if size == GROWS else a)):
                raise cannot(name, "the sizes of its state follow a rule of their own")


def compile_package(program):
    """The bytes of a compiled program."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.utils import fresh_cache
    buffer = io.BytesIO()
    settings = {"freezing": True}  # lays weights out for their products
    try:
        with torch.no_grad(), fresh_cache():  # what is left of compiling is removed
            aoti_compile_and_package(program, package_path=buffer, inductor_configs=settings)
    except Exception as error:  # the compiler's own
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"--compile: it failed with {type(error).__name__}: {reason}; leave it "
                       "out") from error
    return buffer.getvalue()


# The cache ----------------------------------------------------------------------------------------

def cache_folder():
    """This user's folder of compiled steps; made where it is missing. BadInput if others could
    write to it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "nanomix"
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not mine or status.st_mode & 0o077:
        raise BadInput(f"{folder}, from which code is loaded, must be a folder of your own that "
                       "nobody else may read or write, and no link; chmod 700 or remove it")
    return folder


def read_own(path):
    """The bytes of a package in the cache; None if there is none, or it is a link or of others."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
        return file.read() if mine else None


def remove_oldest(folder):
    """Removes all packages in the cache but the last KEPT that were made, and what killed processes
    have left half-written."""
    packages = made_at(folder.glob("*.pt2"))
    left_over = made_at(folder.glob(".*.pt2.*.tmp"))
    old = [path for path, made in left_over.items() if time.time() - made > LEFT_OVER_SECONDS]
    for path in [*sorted(packages, key=packages.get)[:-KEPT], *old]:
        path.unlink(missing_ok=True)


def made_at(paths):
    """{path: when it was made, in seconds} of what is still there: another process may be at it
    too."""
    made = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            made[path] = path.lstat().st_mtime
    return made


def checksum(model, dtype, batch):
    """Of all that a package depends on."""
    found = hashlib.sha256()
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "batch": batch,
             "dtype": str(dtype), "machine": processor(), "model": asdict(model.config)}
    found.update(json.dumps(facts, sort_keys=True).encode())
    for file in [*(ROOT / name for name in CODE), *sorted((ROOT / "mixers").rglob("*.py"))]:
        found.update(file.read_bytes())
    for path, (code, _) in sorted(mixers.loaded.items()):  # the user's own mixers
        found.update(code)
    for file in sorted(mixers.imported):
        found.update(file.read_bytes())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:32]


def processor():
    """What says which instructions a processor has: a compiled step may use all of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
