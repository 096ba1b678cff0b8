"""Is a loss what it says? Run: python -m tools.audit --metric --out_dir=out/shakespeare_lln

    python -m tools.audit --metric --out_dir=RUN               a run's newest checkpoint and data
    python -m tools.audit --metric --dataset=shakespeare_char  a data set: seconds
    python -m tools.audit --metric --module=model.py:build     (idx, targets) -> (logits, loss), a
                                                               model of your own

Of a model, whose loss is the mean over the targets, in nats:

    sums      probabilities over the vocabulary sum to 1: exp(-loss), over all targets of a position
    targets   logits, when the targets change
    order     a loss is that of the model before it has seen the targets; scoring changes nothing

Of a data set (tools/audit_metric_text.py):

    bytes     bytes per token are those of the decoded text
    tokens    text -> tokens -> text is the same; so is tokens -> text -> tokens, in number
    overlap   no long pieces of the validation text are in the training text

Exit status 1 if anything fails; the same as JSON, to audit_metric.json in the run's folder, beside
the module's file, or to out/audit.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import torch
import torch.nn as nn

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.loss import cross_entropy
from base.options import checked, option
from base.user_code import in_words, users_place
from data import load_dataset
from mixers import load_mixer_file
from tools import audit_module
from tools.audit_answers import MEANING, Answer, judged, print_answer, report
from tools.audit_metric_text import about_text
from tools.audit_tokens import answers
from training import checkpoint
from training.leaks import difference

POSITIONS = 6     # tokens of a sequence that is scored
TARGETS = 1024    # at most so many targets of a position; more are drawn
LIMIT = 1e-3      # nats, and of a sum of probabilities
MEANING |= {
    "sums": "probabilities do not sum to 1, so the loss is no code length: look at what is added "
            "to the loss, at label smoothing, and at logits that know their target",
    "targets": "logits depend on the targets: the answer is in the question",
    "order": "the loss is that of a model that has seen the targets: score a text first, then "
             "learn from it",
}


@checked
class MetricOptions:
    metric: bool = option(False, "audit a metric; needs one of the next three")
    out_dir: Optional[str] = option(None, "the newest checkpoint of this run folder", min_length=1)
    dataset: Optional[str] = option(None, "a data set, data/NAME", min_length=1)
    module: Optional[str] = option(None, "FILE:NAME, see tools/audit_module.py", min_length=1)
    vocab_size: Optional[int] = option(None, "of a module: tokens are below this", ge=2)
    mixer_file: Optional[str] = option(None, "the Python file of the run's mixer", min_length=1)


@dataclass
class Metric:
    """model: an nn.Module. score(model, x, y) -> (logits (B, T, V), mean loss over the targets)."""
    name: str
    model: nn.Module
    score: Callable
    vocab_size: int

    def of(self, x, y, model=None):
        """(logits, loss in float64) by a copy: a call may change a model for good."""
        model = copy.deepcopy(self.model) if model is None else model
        logits, loss = self.score(model, x.clone(), y.clone())
        return logits.detach().double(), loss.detach().double()

    def text(self, B=1, seed=0):
        """x and y, both (B, POSITIONS)."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocab_size, (B, POSITIONS + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]


# Questions ----------------------------------------------------------------------------------------

def sums(metric):
    """exp(-loss), summed over the targets of the last position; where there are too many, against
    softmax for some of them."""
    x, y = metric.text()
    V = metric.vocab_size
    log_p = metric.of(x, (y + 1) % V)[0].log_softmax(-1)[0]  # by other targets
    before = -log_p[:-1].gather(1, y[0, :-1, None]).sum()    # nats of the targets in front
    some = torch.arange(V)
    if V > TARGETS:
        some = torch.randperm(V, generator=torch.Generator().manual_seed(1))[:64]
    nats = []
    for target in some.tolist():
        y[0, -1] = target
        nats.append(POSITIONS * metric.of(x, y)[1] - before)
    nats = torch.stack(nats)
    if V <= TARGETS:
        total = (-nats).exp().sum().item()
        size, figures = abs(total - 1), f"the sum over {V:,} targets is {total:.6f}"
    else:
        size = (nats + log_p[-1, some]).abs().max().item()
        figures = f"{len(some)} of {V:,} targets, against softmax: {size:.0e} nats"
    return Answer("sums", size <= LIMIT, f"{figures}, limit {LIMIT:.0e}", size, LIMIT,
                  None if size <= LIMIT else {"tokens": x[0].tolist(), "targets before": y[0, :-1]
                                              .tolist()})


def targets(metric):
    x, y = metric.text(2)
    expected = metric.of(x, y)[0]
    size = 0.0
    for shift in (1, metric.vocab_size // 2):
        logits = metric.of(x, (y + shift) % metric.vocab_size)[0]
        size = max(size, difference(logits, expected).max().item())
    where = {"tokens": x.tolist(), "targets": y.tolist()}
    return judged("targets", size, 1e-6, None if size <= 1e-6 else where)


def order(metric):
    """The loss against that of logits by a copy that has seen other targets, and whether scoring
    changes the model."""
    x, y = metric.text(2)
    logits, _ = metric.of(x, (y + 1) % metric.vocab_size)
    expected = cross_entropy(logits.flatten(0, 1), y).item()
    model = copy.deepcopy(metric.model)
    loss = metric.of(x, y, model)[1].item()
    again = metric.of(x, y, model)[1].item()
    size = abs(loss - expected)
    figures = f"{loss:.4f} nats, {expected:.4f} by its logits before, limit {LIMIT:.0e}"
    if abs(again - loss) > LIMIT:
        figures += f"; scored once more {again:.4f}, so it learns from what it has scored"
    return Answer("order", size <= LIMIT, figures, size, LIMIT,
                  None if size <= LIMIT else {"tokens": x.tolist(), "targets": y.tolist()})


QUESTIONS = {"sums": sums, "targets": targets, "order": order}


# What is audited ----------------------------------------------------------------------------------

def of_run(out_dir):
    """(Metric, name of the data set) of a run's newest checkpoint. What training and evaluation
    take, model.loss, is asked. BadInput."""
    run = checkpoint.load(out_dir)
    model = checkpoint.build_model(run).eval()

    @torch.no_grad()
    def score(model, x, y):
        return model(x)[0], model.loss(x, y)

    return Metric(out_dir, model, score, model.config.vocab_size), run.config["dataset"]


def of_module(name, options):
    """The Metric of a user's module. BadInput."""
    path, colon, attribute = name.rpartition(":")
    if not colon:
        raise BadInput(f"--module={name}: name what in the file, --module=model.py:build")
    model = audit_module.load(path, attribute)
    if not isinstance(model, nn.Module):
        raise BadInput(f"--module={name}: the metric of an nn.Module is audited, not of a function")
    model = model.cpu().eval()

    def score(model, x, y):
        returned = model(x, y)
        if not isinstance(returned, (tuple, list)) or len(returned) < 2:
            raise BadInput(f"--module={name}: it must return (logits, loss) for (idx, targets)")
        return returned[0], returned[1]

    idx = torch.zeros(1, POSITIONS, dtype=torch.long)
    try:
        logits, loss = score(copy.deepcopy(model), idx, idx)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"--module: {users_place(error) or name}: {in_words(error)}") from error
    if logits.shape[:2] != idx.shape or loss.numel() != 1:
        raise BadInput(f"--module={name}: for (idx, targets), both {tuple(idx.shape)}, it must "
                       f"return logits of all positions and the mean loss, not "
                       f"{tuple(logits.shape)} and {tuple(loss.shape)}")
    return Metric(name, model, score, options.vocab_size or logits.size(-1))


def found_by(options):
    """(name, path of the report, Answers one by one) of what the options name. BadInput."""
    given = [options.out_dir, options.dataset, options.module]
    if sum(value is not None for value in given) != 1:
        raise BadInput("audit which metric? name one: --out_dir=RUN, --dataset=NAME or "
                       "--module=FILE:NAME")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    if options.module:
        metric = of_module(options.module, options)
        path, _, name = options.module.rpartition(":")
        beside = Path(path).with_name(f"{Path(path).stem[:80]}.{name[:80]}.audit_metric.json")
        return metric.name, beside, answers(metric, QUESTIONS)
    if options.dataset:
        data = load_dataset(options.dataset, block_size=1)
        return options.dataset, Path("out/audit", f"metric.{options.dataset}.json"), \
            about_text(data)
    metric, dataset = of_run(options.out_dir)

    def both():
        yield from answers(metric, QUESTIONS)
        yield from about_text(load_dataset(dataset, block_size=1))

    return options.out_dir, Path(options.out_dir) / "audit_metric.json", both()


@exit_on_bad_input("tools.audit")
def main():
    options, *_ = parse_options(MetricOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    started = time.perf_counter()
    name, path, found = found_by(options)
    told = []
    for answer in found:
        told.append(answer)
        print_answer(answer)
    sys.exit(not report(name, told, time.perf_counter() - started, path))


if __name__ == "__main__":
    main()
