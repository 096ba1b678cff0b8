"""What runs will take: from those that have ended, else from a few steps that are timed."""
import statistics
import time
from dataclasses import dataclass
from typing import Optional

import torch

from data import load_dataset
from model import GPT, model_config
from training.optimizer import make_optimizer

TIMED_STEPS = 3
TIMED_TOKENS = 4096  # of a step at most, unless a row has more: longer ones are in proportion
SECONDS_AROUND = 5   # of a run: to start, to be checked and scored


@dataclass
class Cost:
    runs: int               # that are not finished yet
    hours: Optional[float]  # None: not known before the first have ended

    def __str__(self):
        if self.runs == 0:
            return "nothing is left to run"
        runs = f"{self.runs} run{'s' if self.runs > 1 else ''}"
        if self.hours is None:
            return f"{runs}; how long they take the first will tell"
        if self.hours < 1:
            minutes = max(1, round(60 * self.hours))
            return f"{runs}, about {minutes} minute{'s' if minutes > 1 else ''}"
        return f"{runs}, about {self.hours:.1f} hours"


def time_left(seconds):
    """About how long something still takes, in words."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s left"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} hours left"


def seconds_of_run(options, threads):
    """About how long a run of some Options takes on the CPU with that many threads, or None if it
    cannot be tried: why, the run itself will say."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            return timed(options)
    except Exception:
        return None
    finally:
        torch.set_num_threads(before)


def timed(options):
    data = load_dataset(options.dataset, options.block_size, options.holdout)
    device = torch.device("cpu")
    model = GPT(model_config(vars(options) | {"vocab_size": data.vocab_size}, "options"))
    optimizer = make_optimizer(model, options, device)
    row_length = data.meta.get("row_length", options.block_size)
    rows = options.batch_size * options.gradient_accumulation_steps
    taken = min(rows, max(1, TIMED_TOKENS // row_length))
    dtype = getattr(torch, options.dtype)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    seconds = []
    for step in range(1 + TIMED_STEPS):
        x, y = data.batch(options.seed, step, taken, options.block_size)
        started = time.perf_counter()
        with autocast:
            loss = model.loss(x, y.clamp(min=0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    step_seconds = statistics.median(seconds[1:]) * rows / taken  # the first one allocates
    evaluations = options.max_iters // options.eval_interval + 2  # the last step's, and the scores
    read = min(options.eval_tokens, data.val.size)
    evaluated = evaluations * read * seconds_per_token(model, data, options, autocast)
    return SECONDS_AROUND + options.max_iters * step_seconds + evaluated


@torch.no_grad()
def seconds_per_token(model, data, options, autocast):
    """Of an evaluation, which takes more rows at a time than a step does."""
    row_length = data.meta.get("row_length", options.block_size)
    x, y = data.batch(options.seed, 0, max(1, TIMED_TOKENS // row_length), options.block_size)
    started = time.perf_counter()
    with autocast:
        model.loss(x, y.clamp(min=0))
    return (time.perf_counter() - started) / x.numel()
