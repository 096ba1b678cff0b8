"""Makes a Top-Theta run from one with softmax attention: thresholds in place of training.

    python -m tools.calibrate --out_dir=out/shakespeare_softmax --k=16      (about ten seconds)
    python train.py --eval_only --out_dir=out/shakespeare_softmax_toptheta

Reads the run's newest checkpoint and text of its *training* split. There every layer keeps exactly
the k largest scores of a row, so that deeper layers see what they will see; the threshold of a
head for rows of n tokens is the (k + 1)-th largest score, on average over the text, and 0.1
standard deviations more, as in the authors' code. The new folder is a run as any other, with mixer
toptheta and its options set; the weights are those of the old one.

Prints, and writes to calibration.json in the folder, the validation loss of the softmax model, of
exactly k scores a row and of the thresholds; and of the validation split, for rows of more than k
tokens, how many scores each layer kept and how many rows of V it read (of heads that share keys and
values, those that any of them kept).
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import contextlib
import math
import os
import shutil
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Literal, Optional

import torch

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input, printable
from base.files import exists, write_json, writing
from base.options import checked, option
from mixers import layer_mixers, load_mixer_file
from mixers.toptheta import TopTheta
from model import GPT, model_config
from tools.score import load_scored
from training import checkpoint
from training.device import choose_device
from training.evaluation import evaluate
from training.machine import Machine
from training.parallel import World

TOKENS_AT_ONCE = 8192  # in a forward pass
MARGIN = 0.1           # standard deviations that a threshold lies above the mean


@checked
class CalibrateOptions:
    out_dir: str = option("", "the folder of the run with softmax attention")
    k: int = option(64, "scores of a row to keep", ge=1)
    placement: Literal["pre", "post"] = option(
        "pre", "thresholds for scores, before the softmax, or for its weights")
    sdc: Literal["none", "exact", "threshold", "offline"] = option(
        "none", "what the denominator of placement pre has for the dropped scores, see "
        "mixers/toptheta.py")
    vmc: bool = option(False, "the weight that lacks to 1 goes to the mean of the values")
    dense_layers: int = option(
        0, "first layers that stay softmax; the paper keeps 512 scores in two", ge=0)
    windows: int = option(256, "windows of the training split to calibrate on", ge=1)
    out: Optional[str] = option(
        None, "the new run's folder [default: out_dir and _toptheta behind it]", min_length=1)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    mixer_file: Optional[str] = option(
        None, "the Python file of a mixer, if the run was trained with one")
    other_data: bool = option(
        False, "calibrate although the data set of that name has changed since the training")


# What stands in for the thresholds --------------------------------------------------------------

class ExactTopK:
    """Keeps exactly the k largest of each row in place of what a layer's thresholds keep, and
    collects what thresholds for it should be. A forward hook on a Thresholds that keeps all."""

    def __init__(self, thresholds):
        H, L = thresholds.theta.shape
        self.k = thresholds.k
        self.rows = torch.zeros(L, dtype=torch.float64)  # by n - 1, as all of these
        self.border, self.squares, self.missing = torch.zeros(3, H, L, dtype=torch.float64)

    def __call__(self, module, args, visible):
        values, n = args  # (B, H, T, S), (T)
        if n[-1] <= self.k:
            return visible
        top = values.topk(self.k + 1, dim=3)
        largest = torch.zeros_like(visible).scatter(3, top.indices[..., :-1], True)
        kept = visible & (largest | (n <= self.k)[:, None])
        column = n[n > self.k].cpu() - 1
        border = top.values[:, :, n > self.k, -1].cpu().double()  # (B, H, rows)
        self.rows[column] += len(border)
        self.border[:, column] += border.sum(0)
        self.squares[:, column] += border.square().sum(0)
        terms = (values - top.values[..., :1]).exp()  # of scores; unused where these are weights
        dropped = (terms * (visible & ~kept)).sum(3)[:, :, n > self.k]
        self.missing[:, column] += dropped.cpu().double().sum(0)
        return kept

    def set(self, thresholds):
        """Gives a layer what was collected. Rows longer than all that were seen take the last."""
        seen = self.rows.nonzero().flatten()
        n_rows = self.rows[seen]
        mean = self.border[:, seen] / n_rows
        deviation = (self.squares[:, seen] / n_rows - mean.square()).clamp(min=0).sqrt()
        found = (thresholds.theta, mean + MARGIN * deviation), (
            thresholds.missing, self.missing[:, seen] / n_rows)
        for table, values in found:
            table[:, seen] = values.to(table)
            table[:, seen[-1] + 1:] = table[:, seen[-1], None]


class Kept:
    """Counts what a layer's thresholds keep in rows of more than k tokens. A forward hook on a
    Thresholds; groups: of heads that share keys and values."""

    def __init__(self, k, groups):
        self.k, self.groups = k, groups
        self.rows = self.visible = self.kept = self.read = 0

    def __call__(self, module, args, kept):
        _, n = args
        long = n > self.k
        B, H = kept.shape[:2]
        self.rows += B * int(long.sum())
        self.visible += B * int(n[long].sum())
        self.kept += int(kept[:, :, long].sum()) / H
        read = kept.unflatten(1, (self.groups, -1)).any(2)  # (B, G, T, S)
        self.read += int(read[:, :, long].sum()) / self.groups

    def means(self):
        """Per row and head: scores visible and kept; per row and group: rows of V read."""
        names = ("visible", "kept", "read")
        return {name: getattr(self, name) / max(self.rows, 1) for name in names}


@contextlib.contextmanager
def hooked(layers, hooks):
    """Inside, each TopTheta's thresholds have their hook."""
    with contextlib.ExitStack() as stack:
        for mixer, hook in zip(layers, hooks):
            stack.enter_context(mixer.thresholds.register_forward_hook(hook))
        yield


# The model --------------------------------------------------------------------------------------

def sparse_options(run_config, options, source):
    """The options of a run (dict) with toptheta in place of softmax. BadInput if it has none, or if
    its rows are too short to drop anything."""
    config = model_config(run_config, source)
    names = layer_mixers(config.mixer, config.n_layer)
    replaced = []
    for layer, name in enumerate(names):
        if name == "softmax" and layer >= options.dense_layers:
            replaced.append(layer)
            names[layer] = "toptheta"
    if not replaced:
        first = f" from layer {options.dense_layers} on" if options.dense_layers else ""
        raise BadInput(f"{options.out_dir}: no layer of mixer {config.mixer!r} is softmax{first}; "
                       "name a run with softmax attention, or lower --dense_layers")
    if options.k >= config.block_size:
        raise BadInput(f"--k={options.k}: rows have at most block_size {config.block_size} tokens, "
                       "so nothing would be dropped; choose less")
    return run_config | dict(
        mixer="toptheta" if set(names) == {"toptheta"} else ",".join(names),
        toptheta_k=options.k, toptheta_placement=options.placement, toptheta_sdc=options.sdc,
        toptheta_vmc=options.vmc)


@torch.no_grad()
def calibrate(model, data, autocast, options):
    """Sets the thresholds of a model that keeps everything, on windows of the training split."""
    layers = [mixer for mixer in model.mixers() if isinstance(mixer, TopTheta)]
    T = model.config.block_size
    device = model.norm.weight.device
    collectors = [ExactTopK(mixer.thresholds) for mixer in layers]
    rows = max(1, TOKENS_AT_ONCE // T)
    with hooked(layers, collectors):
        for start in range(0, options.windows, rows):
            x, _ = data.batch(0, start, min(rows, options.windows - start), T)
            if x.size(1) <= options.k:
                raise BadInput(f"--k={options.k}: the rows of data/{data.name} have {x.size(1)} "
                               "tokens, so nothing would be dropped; choose less")
            with autocast:
                h, _ = model.hidden(x.to(device))
            if not h.isfinite().all():
                raise BadInput(f"{options.out_dir}: what the model makes of its training text is "
                               "not finite; nothing can be calibrated on it")
    for mixer, collector in zip(layers, collectors):
        collector.set(mixer.thresholds)
        if not mixer.pre:
            mixer.thresholds.missing.zero_()


def loss_of(model, scored, device, hooks=()):
    """The validation loss in nats, as train.py evaluates it."""
    machine = Machine(device, scored.autocast, World())
    layers = [mixer for mixer in model.mixers() if isinstance(mixer, TopTheta)]
    with hooked(layers, hooks):
        loss = evaluate(model, scored.data, scored.options, machine).loss
    model.eval()
    if not math.isfinite(loss):
        raise BadInput(f"{scored.checkpoint.folder}: its validation loss is {loss}; "
                       "there is nothing to calibrate")
    return loss


# The folder -------------------------------------------------------------------------------------

def refuse_used(out):
    if out.is_symlink():
        raise BadInput(f"--out={out} is a link; name the folder itself")
    if exists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise BadInput(f"{out} already exists; choose another folder with --out, or delete it")


def write_run(out, model, saved, config, report):
    """The run's folder: written aside, then renamed, so that it is whole or absent."""
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    trainer = saved.trainer | dict(val_loss=report["loss"], best_val_loss=report["loss"],
                                   wandb_id=None)
    of_options = {name: value for name, value in config.items() if name != "vocab_size"}
    try:
        with writing(out):
            aside.mkdir(parents=True)
        checkpoint.save(aside, checkpoint.model_tensors(model), saved.optimizer, trainer, config,
                        saved.tokenizer.to_json(), keep_last=1)
        write_json(aside / "config.json", of_options)
        write_json(aside / "calibration.json", report)
        with writing(out):
            os.replace(aside, out)  # goes through for an empty folder there, for no other
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def summary(report):
    """The printed table."""
    lines = ["layer  tokens visible   kept  rows of V read"]
    for row in report["layers"]:
        lines.append(f"{row['layer']:>5} {row['visible']:>15.1f} {row['kept']:>6.1f} "
                     f"{row['read']:>15.1f}")
    lines.append(f"validation loss, nats: softmax {report['loss_softmax']:.4f} | exactly "
                 f"{report['k']} {report['loss_exact_top_k']:.4f} | thresholds "
                 f"{report['loss']:.4f}")
    return "\n".join(lines)


@exit_on_bad_input("tools.calibrate")
def main():
    options, *_ = parse_options(CalibrateOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    if not options.out_dir:
        raise BadInput("which run? name its folder: --out_dir=out/shakespeare_softmax")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    name = options.out or f"{options.out_dir.rstrip('/')}_toptheta"
    out = Path(os.path.abspath(name))
    with writing(out):
        refuse_used(out)
    device = choose_device(options.device)
    scored = load_scored(options.out_dir, device, options.other_data)
    saved = scored.checkpoint
    config = sparse_options(saved.config, options, saved.folder / "config.json")
    config["out_dir"] = name
    model = GPT(model_config(config, "options")).requires_grad_(False)
    checkpoint.init_model(model, saved.model, saved.folder)
    model.to(device).eval()
    layers = [(i, block.mixer) for i, block in enumerate(model.blocks)
              if isinstance(block.mixer, TopTheta)]
    report = dict(source=str(saved.folder), **asdict(options))
    report["loss_softmax"] = loss_of(scored.model, scored, device)
    exact = [ExactTopK(mixer.thresholds) for _, mixer in layers]
    report["loss_exact_top_k"] = loss_of(model, scored, device, exact)
    calibrate(model, scored.data, scored.autocast, options)
    counters = [Kept(options.k, mixer.c_attn.sizes[1]) for _, mixer in layers]
    report["loss"] = loss_of(model, scored, device, counters)
    report["layers"] = [dict(layer=i, **counter.means())
                        for (i, _), counter in zip(layers, counters)]
    write_run(out, model, saved, config, report)
    print(summary(report))
    print(printable(f"{saved.folder} -> {name}"))


if __name__ == "__main__":
    main()
