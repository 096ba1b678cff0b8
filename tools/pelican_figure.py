"""The Pelican paper's Figure 3 with all four cells.

Run: python -m tools.pelican_figure --dataset=shakespeare     (an hour on one core)

    python -m tools.pelican_figure --dataset=shakespeare --out_dir=results/pelican    from records

Trains {LLaMA, Pelican} x {tau 1, tau 0.1} by the configs/cosmopedia_*.py of CELLS, one after the
other; runs that are finished, or whose records (see tools/records.py) are in the folder, stay,
unfinished ones go on, and more --max_iters extend them. Writes figure3.png and figure3.md, the
table, to out/pelican/<dataset>, which holds the runs. Losses are in nats per token. The dashed
lines are counted: see tools/ngrams.py.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import math
import sys
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Optional

import numpy as np
from matplotlib.figure import Figure

from base.command_line import parse_options, read_config_file
from base.errors import BadInput, exit_on_bad_input, printable
from base.files import write_file
from base.options import checked, option
from config import Options
from data import load_dataset
from tools.colours import colour_of
from tools.drawing import BASELINE, GREY, save
from tools.ngrams import ngram_losses
from tools.records import find_record, holds_run, read_run
from tools.sweep_runs import ROOT, Run, carry_out, difference, end_like_ctrl_c

CELLS = {
    "llama": "LLaMA, tau 1",
    "llama_tau01": "LLaMA, tau 0.1",
    "pelican_tau1": "Pelican, tau 1",
    "pelican": "Pelican, tau 0.1",
}
SMOOTH = 10     # steps that the training loss is a mean of
ROWS = 8        # most evaluations in the table
HEADROOM = 2.0  # nats that the picture shows above the unigrams' loss


@checked
class FigureOptions:
    dataset: str = option("cosmopedia", "a text of data/; prepared when missing")
    max_iters: int = option(
        150, "optimiser steps; the paper's figure has 150, a larger number goes on from there",
        ge=1)
    batch_size: Optional[int] = option(
        None, "windows of 128 tokens a step [default: the paper's 32]", ge=1)
    eval_interval: Optional[int] = option(
        None, "steps between evaluations [default: 25]", ge=1)
    eval_tokens: Optional[int] = option(
        None, "most validation tokens an evaluation reads [default: 40960]", ge=1)
    seed: Optional[int] = option(
        None, "of the weights and the batches [default: 1337]", ge=0, lt=2**63)
    out_dir: Optional[str] = option(
        None, "the folder of the runs and the figure [default: out/pelican/<dataset>]",
        min_length=1)


# The runs -------------------------------------------------------------------------------------

def runs_of(options, out_dir):
    """{cell: its Run}, the options of this command set for all."""
    arguments = []
    for f in fields(options):
        value = getattr(options, f.name)
        if f.name != "out_dir" and value is not None:
            arguments.append(f"--{f.name}={value}")
    runs = {}
    for cell in CELLS:
        runs[cell] = Run(str(out_dir / cell), (str(config_file(cell)), *arguments))
    return runs


def config_file(cell):
    return ROOT / f"configs/cosmopedia_{cell}.py"


def record_of_cell(out_dir, cell):
    """The Record of a cell: its run's, or the one in the folder's file of records, or None."""
    if holds_run(out_dir / cell):
        return read_run(out_dir / cell)
    return find_record(out_dir, cell)


def is_there(run, out_dir, cell):
    """Whether a cell need not be trained. BadInput if it was run with other options."""
    if holds_run(out_dir / cell):
        return run.finished()
    record = find_record(out_dir, cell)
    if record is None:
        return False
    other = difference(run.options(), record.config)
    if other:
        raise BadInput(f"{record} was run with {other.name} {other.ran}, not {other.wanted}; "
                       "choose another --out_dir, or give that option")
    return record.reached(run.options()["max_iters"])


def train_missing(runs, out_dir):
    """Trains the cells that are not there. BadInput if one fails."""
    missing = [run for cell, run in runs.items() if not is_there(run, out_dir, cell)]
    for run, error in carry_out(missing):
        if error:
            raise BadInput(f"{run.folder}: {error}; the same command goes on")
        print(printable(f"{run.folder} is trained; what it said is in {run.folder}.log"),
              flush=True)


@dataclass
class Curves:
    """The losses of a cell, {step: nats per token}."""
    training: dict
    validation: dict

    def smoothed(self):
        """{step: mean of the last SMOOTH training losses, or of as many as there are}."""
        return smooth(self.training)


def smooth(training):
    values = np.array(list(training.values()))
    smoothed = {}
    for i, step in enumerate(training):
        smoothed[step] = values[max(0, i - SMOOTH + 1):i + 1].mean()
    return smoothed


def curves_of(record, max_iters):
    """The Curves of a Record up to max_iters. BadInput if it was not evaluated there."""
    curves = Curves({}, {})
    for row in record.metrics:
        step = row["iter"]
        if step <= max_iters and row.get("train_loss") is not None:
            curves.training[step] = row["train_loss"]
        if step <= max_iters and row.get("val_loss") is not None:
            curves.validation[step] = row["val_loss"]
    if max_iters not in curves.training or max_iters not in curves.validation:
        raise BadInput(f"{record} was not evaluated at step {max_iters}; "
                       "choose a --max_iters at which it was")
    return curves


# The table ------------------------------------------------------------------------------------

@dataclass
class Counted:
    """What counting reaches on the whole validation split, in nats per token."""
    unigram: float
    bigram: float


@dataclass
class Shares:
    """Pelican's lead as in the paper, in nats, and the shares of it that tau alone brings to LLaMA
    and to Pelican; None where there is no lead."""
    lead: float
    llama: Optional[float] = None
    pelican: Optional[float] = None


def shares(losses):
    """The Shares of {cell: loss}."""
    lead = losses["llama"] - losses["pelican"]
    if lead <= 0:
        return Shares(lead)
    return Shares(lead, (losses["llama"] - losses["llama_tau01"]) / lead,
                  (losses["pelican_tau1"] - losses["pelican"]) / lead)


def percent(share):
    return "-" if share is None else f"{share:.0%}"


def table_row(name, losses):
    row = [name]
    for cell in CELLS:
        row.append(f"{losses[cell]:.3f}")
    found = shares(losses)
    return [*row, f"{found.lead:+.3f}", percent(found.llama), percent(found.pelican)]


def table(curves, counted):
    """The figure in words, as Markdown. curves: {cell: Curves}; counted: Counted."""
    steps = sorted(set.intersection(*(set(of_cell.validation) for of_cell in curves.values())))
    last = steps[-1]
    chosen = np.linspace(0, len(steps) - 1, min(ROWS, len(steps)))
    rows = [["loss", *CELLS.values(),
             "Pelican's lead", "tau alone, LLaMA", "tau alone, Pelican"]]
    for i in chosen:
        step = steps[round(i)]
        losses = {cell: curves[cell].validation[step] for cell in CELLS}
        rows.append(table_row(f"validation, step {step}", losses))
    smoothed = {cell: curves[cell].smoothed()[last] for cell in CELLS}
    rows.append(table_row(f"training, step {last}", smoothed))
    lowest = {}  # cell -> the step of its lowest validation loss
    for cell in CELLS:
        validation = curves[cell].validation
        lowest[cell] = min(validation, key=validation.get)
    words = [f"{curves[cell].validation[step]:.3f} at {step}" for cell, step in lowest.items()]
    rows.append(["lowest validation", *words, "", "", ""])
    overfitted = [CELLS[cell] for cell in CELLS if lowest[cell] < last]
    return "\n".join([*markdown(rows), "", *notes(counted, overfitted, last), ""])


def markdown(rows):
    """The lines of a Markdown table, aligned; the first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        padded = [text.ljust(width) for text, width in zip(row, widths)]
        lines.append("| " + " | ".join(padded) + " |")
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]


def notes(counted, overfitted, last):
    lines = [
        f"Nats per token; training is the mean of the last {SMOOTH} steps. Lead: LLaMA with tau 1 "
        "less Pelican with tau 0.1, the",
        "paper's two; tau alone: what tau 0.1 instead of 1 takes off the loss of LLaMA, or of "
        "Pelican, as a share of that lead.",
        "Counted on the training split, for the whole validation split: "
        f"unigrams {counted.unigram:.3f}, bigrams {counted.bigram:.3f} "
        "(modified Kneser-Ney).",
    ]
    if overfitted:
        lines.append(f"Past its lowest validation loss at step {last}: {'; '.join(overfitted)}.")
    return lines


# The picture ----------------------------------------------------------------------------------

def picture(curves, counted, title, vocab_size):
    """Training loss on the left, validation loss on the right, which at step 0 is ln V: the head
    starts at zero."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for cell, label in CELLS.items():
        style = {
            "color": colour_of("pelican") if cell.startswith("pelican") else BASELINE,
            "linestyle": "-" if label.endswith("0.1") else "--",
            "linewidth": 1.8,
            "label": label.replace("tau", "$\\tau$ ="),
        }
        smoothed = curves[cell].smoothed()
        evaluated = {0: math.log(vocab_size)} | curves[cell].validation
        marker = "o" if len(evaluated) < 30 else None
        left.plot(smoothed.keys(), smoothed.values(), **style)
        right.plot(evaluated.keys(), evaluated.values(), marker=marker, markersize=4, **style)
    draw_counted(right, "unigrams", counted.unigram, above=True)
    draw_counted(right, "bigrams", counted.bigram, above=False)
    left.set_ylim(top=min(counted.unigram + HEADROOM, math.log(vocab_size) + 0.1))
    left.set(title=f"training loss, mean of {SMOOTH} steps", ylabel="nats per token")
    right.set(title="validation loss")
    for ax in (left, right):
        ax.set_xlabel(f"step (all start at ln {vocab_size:,} = {math.log(vocab_size):.2f})")
        ax.grid(color="0.93")
        ax.margins(x=0.01)
        ax.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_counted(ax, name, loss, above):
    """A dotted line at a loss, its name above or below it."""
    ax.axhline(loss, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
    ax.annotate(f"{name}, counted: {loss:.2f}", (1, loss), (-4, 3 if above else -4),
                xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8,
                ha="right", va="bottom" if above else "top", color="0.35")


@exit_on_bad_input("tools.pelican_figure")
def main():
    options, *_ = parse_options(FigureOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    end_like_ctrl_c()
    block_size = read_config_file(config_file("llama"), Options)["block_size"]
    data = load_dataset(options.dataset, block_size)
    if not data.bytes_per_token:
        raise BadInput(f"--dataset={options.dataset} is a recall task; "
                       "choose a text, such as shakespeare")
    out_dir = Path(options.out_dir or f"out/pelican/{options.dataset}")
    runs = runs_of(options, out_dir)
    train_missing(runs, out_dir)
    records = {cell: record_of_cell(out_dir, cell) for cell in CELLS}
    curves = {cell: curves_of(record, options.max_iters) for cell, record in records.items()}
    counted = Counted(*islice(ngram_losses(data.train, data.val, data.vocab_size), 2))
    tokens = runs["llama"].options()["batch_size"] * block_size
    words = table(curves, counted)
    write_file(out_dir / "figure3.md", words.encode())
    title = (f"{data.name}, vocabulary {data.vocab_size:,}, {tokens:,} tokens a step, "
             f"{len(data.train):,} to train on; one seed")
    save(out_dir / "figure3.png", picture(curves, counted, title, data.vocab_size))
    print(f"{title}\n\n{words}\nin {printable(str(out_dir))}: figure3.png, figure3.md")


if __name__ == "__main__":
    main()
