"""Losses of a finished run, to choose by and to report apart.

Run: python -m tools.score --out_dir=out/shakespeare_lln        (seconds)

A figure that was chosen for being low is too low. So the newest checkpoint (the last one: the best
is a choice by validation loss) is scored on data that chose nothing, and scores.json in the run's
folder holds

    select    to choose options by    of a text what --holdout left out of training, or null,
                                      of a recall task its val split
    report    to compare mixers by    of a text the whole validation split, or null with --holdout,
                                      of a recall task its test split

Each is {"loss": nats per target, "bpb": bits per byte or null, "accuracy": share of right answers
or null}. Beside them stand, of a text's report, "by_position", the loss in nats at each of the T
positions of the windows, and "by_block", that of each of its blocks: of one author each, "authors"
in the same order, where the data set names them, otherwise of about 2,000 bytes, all of as many
windows (or one more), and "authors" null, and "beyond", the losses in windows of 4 T tokens, of
each quarter of their positions, the first of which was trained on (null for learned positions, that
end at T); of a recall task "by_cell", the report's accuracy per difficulty;
"iter" and "vocab_size" of the model; "weights", the checksum of what was scored; and
"first_losses", which tell what code trained it (see tools/numerics.py), or null.

A run whose loss became infinite or NaN counts as the worst there is, it is not dropped: with
--diverged all its losses are those of an even guess, log(vocab_size), "iter" is where it should
have ended, and "diverged" is true.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from base.command_line import one_line, parse_options
from base.errors import BadInput, exit_on_bad_input
from base.files import exists, read_json, write_json
from base.options import checked, option
from config import Options
from data import load_dataset
from data.dataset import window_starts
from mixers import load_mixer_file
from tools.numerics import first_losses
from training import checkpoint
from training.device import choose_device
from training.metrics import start_wandb
from training.run_folder import check_data

LOGITS_AT_ONCE = 2**24  # of a forward pass; more is no faster and needs memory
BLOCK_BYTES = 2000      # of text in a block
STRIDE = 4              # tokens between the windows whose last positions are scored
LONGER = 4              # times the length of the training, for what goes on beyond it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@checked
class ScoreOptions:
    out_dir: str = option("", "the run's folder")
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    mixer_file: str = option("", "the Python file of the mixer, if the run was trained with one")
    last_position: bool = option(
        False, "of a text, also the loss in the last position alone, where a mixer that leaks has "
        "no future to see; takes longer")
    other_data: bool = option(
        False, "score although the data set of that name has changed since the training")
    diverged: bool = option(
        False, "the loss became infinite or NaN: score the run as the worst, an even guess")
    wandb_log: bool = option(False, "add the report loss to the run's summary in wandb")
    wandb_project: str = option("nanomix", "wandb project", min_length=1)


# scores.json ----------------------------------------------------------------------------------

# finite, and so far from the largest number that sums and squares of it stay finite
Measured = Annotated[float, Field(ge=-1e30, le=1e30)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Lenient(BaseModel):
    """Of what is read back: the types are strict, further keys are let be."""
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Part(Lenient):
    loss: Measured
    bpb: Optional[Measured]
    accuracy: Optional[Measured]


class Scores(Lenient):
    """Runs of earlier versions have the two halves of the validation split as select and report,
    and no by_block."""
    weights: Optional[str] = None
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    iter: Count
    select: Optional[Part]
    report: Optional[Part]
    by_position: Optional[Annotated[list[Optional[Measured]], Field(min_length=1)]]
    by_block: Optional[Annotated[list[Measured], Field(min_length=1)]] = None
    authors: Optional[list[Annotated[str, Field(max_length=200)]]] = None
    beyond: Optional[Annotated[list[Measured], Field(min_length=LONGER)]] = None
    by_cell: Optional[dict[str, Optional[Measured]]]
    first_losses: Optional[list[Measured]] = None
    diverged: bool = False


def weights_of(folder):
    """The checksum of a checkpoint's weights."""
    return read_json(folder / "manifest.json", checkpoint.REMEDY).get("model.safetensors")


def read_scores(out_dir):
    """What stands in a run's scores.json (dict), or None if it is missing, damaged or not of the
    newest checkpoint there is."""
    path = Path(out_dir) / "scores.json"
    if not exists(path):
        return None
    try:
        scores = read_json(path, "")
        Scores.model_validate(scores)
        newest = newest_checkpoint(out_dir)
        if newest is not None and scores.get("weights") != weights_of(newest):
            return None
    except (BadInput, ValidationError):
        return None
    return scores


def newest_checkpoint(out_dir):
    """The folder of a run's newest checkpoint, or None."""
    if not exists(Path(out_dir) / "checkpoints"):
        return None
    folders = checkpoint.checkpoints(out_dir)
    return folders[-1] if folders else None


# Scoring --------------------------------------------------------------------------------------

@dataclass
class Scored:
    """A run that is ready to be scored: its newest checkpoint, and what goes with it."""
    checkpoint: checkpoint.Checkpoint
    weights: str         # the checksum of the checkpoint's weights
    model: torch.nn.Module
    data: Any            # of load_dataset
    options: Options
    autocast: torch.autocast

    @property
    def is_text(self):
        return self.data.bytes_per_token is not None


class Sums:
    """Of losses and right answers over the targets of some batches, for each of T positions."""

    def __init__(self, T):
        self.loss = torch.zeros(T, dtype=torch.float64)
        self.right = torch.zeros(T, dtype=torch.float64)
        self.targets = torch.zeros(T, dtype=torch.float64)

    def add(self, losses, right, due):
        """Three tensors (B, up to T): nats, whether the answer is right, whether one was due."""
        T = losses.size(1)
        self.loss[:T] += losses.double().sum(0).cpu()
        self.right[:T] += right.double().sum(0).cpu()
        self.targets[:T] += due.double().sum(0).cpu()

    def mean_loss(self):
        return (self.loss.sum() / self.targets.sum()).item()

    def accuracy(self):
        return (self.right.sum() / self.targets.sum()).item()

    def by_position(self):
        """The loss at each position; None where nothing was due."""
        losses = (self.loss / self.targets).tolist()
        return [None if math.isnan(loss) else loss for loss in losses]

    def part(self, bytes_per_token):
        """A part of the scores; bytes_per_token None: of a recall task."""
        loss = self.mean_loss()
        if bytes_per_token is None:
            return {"loss": loss, "bpb": None, "accuracy": self.accuracy()}
        return {"loss": loss, "bpb": loss / math.log(2) / bytes_per_token, "accuracy": None}


def read_newest(out_dir):
    """(checkpoint, checksum of its weights) of a run's newest checkpoint. BadInput if there is
    none, or it is damaged.

    A run that is being trained deletes old ones: what vanishes while it is read is no damage, a
    newer one is there."""
    while True:
        newest = newest_checkpoint(out_dir)
        if newest is None:
            raise BadInput(f"no checkpoint in {out_dir}; train one with: "
                           f"python train.py configs/<name>.py --out_dir={out_dir}")
        try:
            saved = checkpoint.load(out_dir)
            return saved, weights_of(saved.folder)
        except (BadInput, OSError) as error:
            if newest_checkpoint(out_dir) != newest:
                continue
            if isinstance(error, OSError):
                raise BadInput(f"{newest} cannot be read: {error}; {checkpoint.REMEDY}") from error
            raise


def load_scored(out_dir, device, other_data=False):
    """A run's newest checkpoint, as Scored. BadInput if there is none, its data are not here, or
    are others than it was trained on, unless other_data insists."""
    saved, weights = read_newest(out_dir)
    options = options_of(saved.config, saved.folder)
    model = checkpoint.build_model(saved).to(device)
    data = load_dataset(options.dataset, options.block_size, options.holdout)
    check_data(saved, data, insist=other_data)
    dtype = DTYPES[options.dtype]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return Scored(saved, weights, model, data, options, autocast)


def options_of(config, folder):
    """The Options in the config.json of a run or checkpoint. BadInput if it is damaged."""
    known = {f.name for f in fields(Options)}
    try:
        options = Options(**{name: config[name] for name in known & config.keys()})
    except ValidationError as error:
        raise BadInput(f"{folder}/config.json is damaged: {one_line(error)}; "
                       f"{checkpoint.REMEDY}") from error
    if options.dtype not in DTYPES:
        raise BadInput(f"{folder}/config.json is damaged: dtype {options.dtype} is not what "
                       f"a run was trained in; {checkpoint.REMEDY}")
    return options


def batches(data, options):
    """Yields ("select" or "report", x, y, number of the difficulty cell); x and y (B, T), y -1
    where nothing is due."""
    rows = max(1, LOGITS_AT_ONCE // (options.block_size * data.vocab_size))
    if data.bytes_per_token is None:
        return recall_batches(data, options, rows)
    return text_batches(data, options, rows)


def recall_batches(data, options, rows):
    """Of a recall task the val split, then the test split, up to `rows` rows at a time."""
    T = options.block_size
    for part, split in (("select", "val"), ("report", "test")):
        for x, y, cell in data.eval_batches(split, T, rows, options.eval_tokens):
            if x.size(1) <= T or options.pos != "learned":
                yield part, x, y, cell


def text_batches(data, options, rows):
    """Of a text the validation windows, `rows` at a time: to choose by if they were held out of
    training, otherwise to report."""
    part = "select" if options.holdout else "report"
    for x, y in data.val_batches(options.block_size, rows, options.eval_tokens):
        yield part, x, y, 0


def block_losses(losses, T, bytes_per_token):
    """The mean loss, in nats, of each block of a text: losses of its windows of T tokens in their
    order, a list of floats."""
    windows_a_block = max(1, BLOCK_BYTES / (T * bytes_per_token))
    blocks = max(1, round(len(losses) / windows_a_block))
    return [float(block.mean()) for block in np.array_split(losses, blocks)]


def author_losses(losses, data, T, max_tokens):
    """{author: mean loss in nats} of the validation windows whose middle is theirs; None where the
    authors are not known."""
    starts, _ = window_starts(len(data.val), T, max_tokens)
    authors = data.val_authors(starts + T // 2)
    if authors is None:
        return None
    return mean_by_author(authors, losses)


def mean_by_author(authors, losses):
    """{author: mean of the losses that are theirs}, in the order of their first."""
    by_author = {}
    for author, loss in zip(authors, losses):
        by_author.setdefault(author, []).append(loss)
    return {author: float(np.mean(of_one)) for author, of_one in by_author.items()}


def losses_beyond(data, options, logits_of):
    """The losses, in nats, in each of the LONGER equal stretches of validation windows as many
    times as long as those that were trained on; None if the model's positions or the text do not
    reach so far."""
    T = LONGER * options.block_size
    if options.pos == "learned" or len(data.val) <= T:
        return None
    rows = max(1, LOGITS_AT_ONCE // (T * data.vocab_size))
    stretches = []  # (B, LONGER) each
    for x, y in data.val_batches(T, rows, options.eval_tokens):
        if x.size(1) == T:
            logits = logits_of(x)
            losses = token_losses(logits, y.to(logits.device)).double()
            stretches.append(losses.view(len(x), LONGER, -1).mean(2))
    return torch.cat(stretches).mean(0).tolist()


def token_losses(logits, y):
    """The loss in nats (B, T) of logits (B, T, V); 0 where y is -1."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(),
                             ignore_index=-1, reduction="none")
    return losses.view_as(y)


def longest_row(data, options):
    """The most positions that a batch of the data may have."""
    if data.bytes_per_token is not None:
        return options.block_size
    sizes = data.sizes["val"] + data.sizes["test"]
    return max(length for _, length, _ in sizes)


def score(out_dir, device, other_data=False):
    """The scores of a run's newest checkpoint (dict, see above)."""
    scored = load_scored(out_dir, device, other_data)

    def logits_of(x):
        with scored.autocast:
            return scored.model(x.to(device))[0]

    result = measured(scored.data, scored.options, logits_of)
    for part in ("select", "report"):
        if result[part] and not math.isfinite(result[part]["loss"]):
            raise BadInput(f"{scored.checkpoint.folder}: its loss on the {part} data is "
                           f"{result[part]['loss']}; there is nothing to compare, leave it out")
    return result | {"weights": scored.weights, "iter": scored.checkpoint.trainer["iter"]}


def score_diverged(out_dir):
    """The scores of a run whose loss became infinite or NaN (dict, see above)."""
    out_dir = Path(out_dir)
    options = options_of(read_json(out_dir / "config.json", checkpoint.REMEDY), out_dir)
    data = load_dataset(options.dataset, options.block_size, options.holdout)

    def even(x):
        return torch.zeros(*x.shape, data.vocab_size)

    newest = newest_checkpoint(out_dir)
    weights = newest and weights_of(newest)
    result = measured(data, options, even)
    return result | {"weights": weights, "iter": options.max_iters, "diverged": True}


@torch.no_grad()
def measured(data, options, logits_of):
    """The scores, but for "weights" and "iter", of logits_of: tokens (B, T) -> logits (B, T, V)."""
    is_text = data.bytes_per_token is not None
    if not is_text and "test" not in data.cells:
        raise BadInput(f"data/{data.name} has no test split to report on; prepare it with one")
    T = longest_row(data, options)
    sums = {}     # "select" or "report" -> Sums
    cells = {}    # name of a difficulty -> Sums
    windows = []  # mean loss of each, of a text
    for part, x, y, cell in batches(data, options):
        logits = logits_of(x)
        y = y.to(logits.device)
        losses = token_losses(logits, y)
        values = losses, logits.argmax(-1) == y, y != -1
        sums.setdefault(part, Sums(T)).add(*values)
        if is_text and x.size(1) == T:  # what is left over at the end makes no window
            windows += losses.double().mean(1).tolist()
        elif not is_text and part == "report":
            name = data.cells["test"][cell]
            cells.setdefault(name, Sums(T)).add(*values)
    parts = {part: sums[part].part(data.bytes_per_token) for part in sums}
    result = {
        "vocab_size": data.vocab_size,
        "select": parts.get("select"),
        "report": parts.get("report"),
        "by_position": None,
        "by_block": None,
        "authors": None,
        "beyond": None,
        "by_cell": None,
        "first_losses": first_losses(options),
    }
    if not is_text:
        result["by_cell"] = {name: cell.accuracy() for name, cell in cells.items()}
    elif result["report"]:
        result["by_position"] = sums["report"].by_position()
        by_author = author_losses(windows, data, T, options.eval_tokens)
        if by_author:
            result["by_block"] = list(by_author.values())
            result["authors"] = list(by_author)
        else:
            result["by_block"] = block_losses(windows, T, data.bytes_per_token)
        result["beyond"] = losses_beyond(data, options, logits_of)
    return result


@torch.no_grad()
def last_position_loss(out_dir, device, other_data=False):
    """Of a text, nats per token: every STRIDE-th token of the validation split, each predicted from
    the T before it."""
    scored = load_scored(out_dir, device, other_data)
    data = scored.data
    if not scored.is_text:
        raise BadInput(f"--last_position is of a text, and data/{data.name} is a recall task; "
                       "leave it out")
    T = scored.options.block_size
    tokens = torch.from_numpy(data.val.astype(np.int64))
    windows = tokens.unfold(0, T + 1, STRIDE)  # (windows, T + 1)
    rows = max(1, LOGITS_AT_ONCE // (T * data.vocab_size))
    losses = []
    for some in windows.split(rows):
        x, y = some[:, :-1].to(device), some[:, -1].to(device)
        with scored.autocast:
            logits, _ = scored.model(x)
        losses.append(F.cross_entropy(logits[:, -1].float(), y, reduction="none"))
    return torch.cat(losses).mean().item()


def scores_of(out_dir, device, other_data=False, diverged=False):
    """The scores of a run, made and written if they are not there."""
    scores = None if diverged else read_scores(out_dir)
    if scores is None:
        scores = score_diverged(out_dir) if diverged else score(out_dir, device, other_data)
        write_json(Path(out_dir) / "scores.json", scores)
    return scores


def log_to_wandb(options, scores):
    """Adds the report's figures to the summary of the wandb run that the training was."""
    folder = newest_checkpoint(options.out_dir)
    report = scores["report"]
    wandb_id = folder and checkpoint.read_trainer(folder)["wandb_id"]
    if not wandb_id or not report:
        return
    run = start_wandb(options.wandb_project, None, options.out_dir, id=wandb_id, resume="allow")
    run.summary.update({f"report_{key}": value for key, value in report.items()
                        if value is not None})
    run.finish()


@exit_on_bad_input("tools.score")
def main():
    options, _, _ = parse_options(ScoreOptions, sys.argv[1:], __doc__.splitlines()[0],
                                  with_config_file=False)
    if not options.out_dir:
        raise BadInput("which run? give --out_dir")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    device = choose_device(options.device)
    scores = scores_of(options.out_dir, device, options.other_data, options.diverged)
    if options.wandb_log:
        log_to_wandb(options, scores)
    for name in ("select", "report"):
        part = scores[name]
        if part is None:
            continue
        if part["bpb"] is not None:
            other = f"{part['bpb']:.4f} bits per byte"
        elif part["accuracy"] is not None:
            other = f"accuracy {part['accuracy']:.4f}"
        else:
            other = "neither bytes nor answers are known"
        print(f"{name:6}  loss {part['loss']:.4f} nats | {other}")
    if options.last_position:
        loss = last_position_loss(options.out_dir, device, options.other_data)
        print(f"in the last position alone, every {STRIDE}th token: loss {loss:.4f} nats")


if __name__ == "__main__":
    main()
