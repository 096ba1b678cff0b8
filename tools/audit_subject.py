"""What the audit is asked about, and what its checks are made of."""
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import torch

from mixers import layer_mixers
from model import GPT, GPTConfig
from training import checkpoint
from training.contract import check_builders
from training.leaks import bare_copy, parts

SKELETONS = (dict(pos="none"), dict(arch="llama", n_kv_head=2, dropout=0.1))
SMALL = dict(vocab_size=31, block_size=520, n_head=4, n_embd=32, n_layer=2)


@dataclass
class Subject:
    """build(**options) -> fresh float32 models in evaluation mode, the same every time; options of
    the model, as far as they can be chosen, and `skeletons`. noise: for their weights. report: the
    JSON file. argv: the options that name it to another process."""
    name: str
    build: Callable
    noise: float
    report: Path
    argv: list

    @property
    def trained(self):
        return self.noise == 0

    def bare(self, **options):
        return [bare_copy(model, self.noise) for model in self.build(**options)]


def named(mixer, mixer_file=None):
    """The subject of a mixer of the registry, or of a pattern of them."""
    def build(seed=0, skeletons=SKELETONS, **options):
        check_builders(mixer)
        torch.manual_seed(seed)
        sizes = SMALL | options
        sizes["n_layer"] = max(sizes["n_layer"], len(layer_mixers(mixer)))
        return [GPT(GPTConfig(**sizes | skeleton, mixer=mixer)).eval() for skeleton in skeletons]

    safe = re.sub(r"[^\w+,-]+", "_", mixer)[:80]
    report = Path("out", "audit", f"{safe}.json")
    argv = [f"--mixer={mixer}"]
    if mixer_file:
        report = Path(mixer_file).with_name(f"{Path(mixer_file).stem[:80]}.{safe}.audit.json")
        argv.append(f"--mixer_file={mixer_file}")
    return Subject(mixer, build, 0.2, report, argv)


def trained(out_dir):
    """The subject of a run's newest checkpoint, which has the sizes that it has."""
    run = checkpoint.load(out_dir)

    def build(**options):
        model = checkpoint.build_model(run)
        # learned positions would end the sequences at block_size; mixers know nothing of them
        model.pos_embed = None
        return [model]

    build()
    return Subject(out_dir, build, 0, Path(out_dir) / "audit.json", [f"--out_dir={out_dir}"])


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
HALF = Precision("float16", torch.float16)


@dataclass
class Row:
    """A line of the report. place: in the user's code; smallest: the least that shows it."""
    check: str
    passed: Optional[bool]  # None: nothing to judge
    figures: str
    place: str = ""
    smallest: str = ""


@dataclass
class Worst:
    """The worst that was found of one kind, in units of its limit."""
    limit: float
    size: float = 0.0
    where: str = ""
    smallest: str = ""
    explain: Optional[Callable] = None  # -> (smallest, place); only what failed is looked into

    def note(self, size, limit, where, smallest="", explain=None):
        if math.isnan(size):
            size = math.inf
        over, before = size / limit, self.size / self.limit
        # a mixer rather than the model around it, which has no place in a user's file
        model, model_before = where.startswith("model"), self.where.startswith("model")
        if min(over, before) > 1 and model != model_before:
            replaces = model_before
        else:
            replaces = over > before
        if replaces:
            self.size, self.limit, self.where = size, limit, where
            self.smallest, self.explain = smallest, explain

    @property
    def failed(self):
        return self.size > self.limit

    def row(self, check, what, passes=""):
        """what: happens, if it failed; passes: what was asked, if not."""
        figures = f"{self.size:.0e} of the largest at most, limit {self.limit:.0e}"
        if not self.failed:
            return Row(check, True, f"{figures}{passes}")
        smallest, place = self.smallest, ""
        if self.explain:
            found, place = self.explain()
            smallest = found or smallest
        return Row(check, False, f"{figures} ({self.where}): {what}", place, smallest)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(model, B, T):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (B, T), generator=generator)


def asked(model):
    """parts(model), without an FFN that sees one token at a time."""
    found = parts(model)
    if not model.config.mlp_activation.startswith("causal_"):
        found.popitem()
    return found


def step(module, x, state=None):
    """A mixer's or a model's outputs and state for x on top of a state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        stepping = module.step if isinstance(module, GPT) else module
        return stepping(x.clone(), state)


def in_pieces(module, x, sizes):
    """The outputs (B, T, C) of x (B, T, C), a piece after the other."""
    state = None
    ys = []
    for piece in x.split(sizes, dim=1):
        y, state = step(module, piece, state)
        ys.append(y)
    return torch.cat(ys, dim=1)


def first_over(moved, limit):
    """(row, position) of the first that moved (B, T) over a limit."""
    position = int((moved > limit).any(0).nonzero()[0])
    return int((moved[:, position] > limit).nonzero()[0]), position
