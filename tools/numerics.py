"""What a run's code computes, in a few numbers: its first losses.

A run with the same options on the same data is the same run only if the code is the same too. These
losses stand in scores.json and are computed anew where such a run is to be used again: a mixer, an
optimiser or a way to draw batches that has changed since gives others.
"""
import contextlib
import io
import math

import torch

from data import load_dataset
from model import GPT, model_config
from training.optimizer import make_optimizer
from training.run_folder import start_from, train_alone

STEPS = 3         # batches; the optimiser steps between them
TOKENS = 1000     # of a batch at most, unless a row has more
RATE = 1e-3       # whatever the run's own: one at which losses explode would show nothing but that
RATE_OF_TRAINED = 1e-5  # the same, from weights of init_from
TOLERANCE = 1e-3  # relative: processors and versions of PyTorch round sums differently


def first_losses(options):
    """The losses in nats, a list of floats, of a run's first STEPS batches (of its first rows), as
    its model learns from one after the other in float32 on the CPU.

    options: an Options. None if the weights that they start from, init_from, are not here any more,
    or if the model cannot be computed on a CPU."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            losses = losses_of_steps(options)
        except Exception:  # of a mixer for GPUs alone, say
            return None
    return losses if all(map(math.isfinite, losses)) else None


def losses_of_steps(options):
    data = load_dataset(options.dataset, options.block_size, options.holdout)
    torch.manual_seed(options.seed)
    model = GPT(model_config(vars(options) | {"vocab_size": data.vocab_size}, "options"))
    if options.init_from:
        with contextlib.redirect_stdout(io.StringIO()):
            names, _ = start_from(options, model, data)
            train_alone(model, names)
    optimizer = make_optimizer(model, options, torch.device("cpu"))
    for group in optimizer.param_groups:
        group["lr"] = RATE_OF_TRAINED if options.init_from else RATE
    row_length = data.meta.get("row_length", options.block_size)
    rows = min(options.batch_size, max(1, TOKENS // row_length))
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # for dropout
        x, y = data.batch(options.seed, step, rows, options.block_size)
        if (y == -1).all():
            y = y.clamp(min=0)  # a mean over no target is 0/0
        loss = model.loss(x, y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.apply_statistics()
    return losses


def agree(one, other):
    """Whether two lists of first losses are of the same code. None, unknown ones, agree with
    nothing."""
    if one is None or other is None or len(one) != len(other):
        return False
    return all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(one, other))
