"""Losses of a finished run, to choose by and to report apart. Run: python -m tools.score --out_dir=out/shakespeare_lln   (seconds)

A figure that was chosen for being low is too low. So the newest checkpoint (the last one: the best is a choice by validation
loss) is scored twice, on data that have nothing in common, and scores.json in the run's folder holds both:

    select    to choose learning rates by    of a text the first half of the validation windows, of a recall task its val split
    report    to compare mixers by           of a text the second half, of a recall task its test split

Each is {"loss": nats per target, "bpb": bits per byte or null, "accuracy": share of right answers or null}; beside them stand
"by_position", of a text, the loss in nats at each of the T positions of the report's windows, "by_cell", of a recall task, the
report's accuracy per difficulty, "iter" and "vocab_size" of the model, and "weights", the checksum of what was scored.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.files import read_json, write_file
from base.options import checked, option
from config import Options
from data import load_dataset
from mixers import load_mixer_file
from training import checkpoint
from training.device import choose_device
from training.run_folder import check_tokenizer

LOGITS_AT_ONCE = 2**24  # of a forward pass; more is no faster and needs memory
STRIDE = 4              # tokens between the windows whose last positions are scored


@checked
class ScoreOptions:
    out_dir: str = option("", "the run's folder")
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    mixer_file: str = option("", "the Python file of the mixer, if the run was trained with one")
    last_position: bool = option(False, "of a text, also the loss in the last position alone, where a mixer that leaks has no future to see; takes longer")


class Sums:
    """Of losses and right answers over the targets of some batches."""

    def __init__(self, T):
        self.loss, self.targets, self.right = (torch.zeros(T, dtype=torch.float64) for _ in range(3))

    def add(self, losses, right, due):
        for total, values in ((self.loss, losses), (self.targets, due), (self.right, right)):
            total[:values.size(1)] += values.double().sum(0).cpu()

    def result(self, bytes_per_token):
        loss, accuracy = ((total.sum() / self.targets.sum()).item() for total in (self.loss, self.right))
        if bytes_per_token is None:
            return {"loss": loss, "bpb": None, "accuracy": accuracy}
        return {"loss": loss, "bpb": loss / math.log(2) / bytes_per_token, "accuracy": None}


def batches(data, options):
    """Yields ("select" or "report", x, y, number of the difficulty cell); x and y (B, T), y -1 where nothing is due."""
    T, text = options.block_size, data.bytes_per_token is not None
    rows = max(1, LOGITS_AT_ONCE // (T * data.vocab_size))
    if not text:
        for part, split in (("select", "val"), ("report", "test")):
            for x, y, cell in data.eval_batches(split, T, rows, options.eval_tokens):
                if x.size(1) <= T or options.pos != "learned":
                    yield part, x, y, cell
        return
    windows = sum(len(x) for x, _ in data.val_batches(T, rows, options.eval_tokens))
    if windows < 2:
        raise BadInput(f"data/{data.name}: the validation split has {windows} window of {T} tokens, and two are needed, one to choose by and "
                       "one to report on; raise eval_tokens or use a longer text")
    seen = 0
    for x, y in data.val_batches(T, rows, options.eval_tokens):
        first = max(0, min(len(x), windows // 2 - seen))  # of these windows, how many are of the first half
        for part, which in (("select", slice(first)), ("report", slice(first, None))):
            if len(x[which]):
                yield part, x[which], y[which], 0
        seen += len(x)


def load(out_dir, device):
    """(checkpoint, model, data, options, autocast) of a run's newest checkpoint. BadInput if there is none, or its data are not here."""
    run = checkpoint.load(out_dir)
    model = checkpoint.build_model(run).to(device)
    options = Options(**{f.name: run.config[f.name] for f in fields(Options) if f.name in run.config})
    data = load_dataset(options.dataset, options.block_size)
    check_tokenizer(run, data)
    dtype = getattr(torch, options.dtype)
    return run, model, data, options, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def score(out_dir, device):
    """The scores of a run's newest checkpoint (dict, see above)."""
    run, model, data, options, autocast = load(out_dir, device)
    text = data.bytes_per_token is not None
    if not text and "test" not in data.cells:
        raise BadInput(f"data/{data.name} has no test split to report on; prepare it with one")
    longest = options.block_size if text else max(length for split in ("val", "test") for _, length, _ in data.sizes[split])
    sums, cells = {part: Sums(longest) for part in ("select", "report")}, {}
    for part, x, y, cell in batches(data, options):
        x, y = x.to(device), y.to(device)
        with autocast:
            logits, _ = model(x)
        losses = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none").view_as(y)
        values = losses, logits.argmax(-1) == y, y != -1
        sums[part].add(*values)
        if not text and part == "report":
            cells.setdefault(data.cells["test"][cell], Sums(longest)).add(*values)
    report = sums["report"]
    return {"weights": weights_of(run.folder), "vocab_size": data.vocab_size, "iter": run.trainer["iter"], **{part: sums[part].result(data.bytes_per_token) for part in sums},
            "by_position": (report.loss / report.targets).tolist() if text else None,
            "by_cell": None if text else {name: of_cell.result(None)["accuracy"] for name, of_cell in cells.items()}}


@torch.no_grad()
def last_position_loss(out_dir, device):
    """Of a text, nats per token: every STRIDE-th token of the second half of the validation split, each predicted from the T before it."""
    _, model, data, options, autocast = load(out_dir, device)
    if data.bytes_per_token is None:
        raise BadInput(f"--last_position is of a text, and data/{data.name} is a recall task; leave it out")
    T, tokens = options.block_size, torch.from_numpy(data.val.astype(np.int64))
    tokens = tokens[len(tokens) // 2:]
    if len(tokens) <= T:
        raise BadInput(f"data/{data.name}: half of the validation split has {len(tokens)} tokens, and --last_position needs {T + 1}; leave it out")
    windows = tokens.unfold(0, T + 1, STRIDE)  # (windows, T + 1)
    losses = []
    for part in windows.split(max(1, LOGITS_AT_ONCE // (T * data.vocab_size))):
        with autocast:
            logits, _ = model(part[:, :-1].to(device))
        losses.append(F.cross_entropy(logits[:, -1].float(), part[:, -1].to(device), reduction="none"))
    return torch.cat(losses).mean().item()


def weights_of(folder):
    """The checksum of a checkpoint's weights."""
    return read_json(folder / "manifest.json", checkpoint.REMEDY).get("model.safetensors")


def read_scores(out_dir):
    """What stands in a run's scores.json, or None if it is missing, damaged or not of the newest checkpoint there is."""
    folders = checkpoint.checkpoints(out_dir)
    try:
        scores = read_json(Path(out_dir) / "scores.json", "")
        whole = {type(scores[part]["loss"]) for part in ("select", "report")} == {float} and type(scores["iter"]) is type(scores["vocab_size"]) is int
        whole = whole and {"bpb", "accuracy"} <= scores["report"].keys() and {"by_position", "by_cell"} <= scores.keys()
        return scores if whole and (not folders or scores["weights"] == weights_of(folders[-1])) else None
    except (BadInput, KeyError, TypeError, AttributeError):
        return None


def scores_of(out_dir, device):
    """The scores of a run, made and written if they are not there."""
    scores = read_scores(out_dir)
    if scores:
        return scores
    scores = score(out_dir, device)
    write_file(Path(out_dir) / "scores.json", (json.dumps(scores, indent=1) + "\n").encode())
    return scores


@exit_on_bad_input("tools.score")
def main():
    options, _, _ = parse_options(ScoreOptions, sys.argv[1:], __doc__.splitlines()[0], with_config_file=False)
    if not options.out_dir:
        raise BadInput("which run? give --out_dir")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    device = choose_device(options.device)
    scores = scores_of(options.out_dir, device)
    for part in ("select", "report"):
        of_part = scores[part]
        other = f"{of_part['bpb']:.4f} bits per byte" if of_part["bpb"] is not None else f"accuracy {of_part['accuracy']:.4f}"
        print(f"{part:6}  loss {of_part['loss']:.4f} nats | {other}")
    if options.last_position:
        print(f"in the last position alone, every {STRIDE}th token: loss {last_position_loss(options.out_dir, device):.4f} nats")


if __name__ == "__main__":
    main()
