"""The Pelican paper's Figure 3 with all four cells. Run: python -m tools.pelican_figure --dataset=shakespeare   (an hour on one core)

Trains {LLaMA, Pelican} x {tau 1, tau 0.1} by configs/cosmopedia_{llama,llama_tau01,pelican,pelican_tau1}.py, one after the other;
runs that are finished stay, unfinished ones go on, and more --max_iters extend them. Writes figure3.png and figure3.md, the table,
to out/pelican/<dataset>, which holds the runs. Losses are in nats per token. The dashed lines are counted: see tools/ngrams.py.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import json
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Optional

import numpy as np
from matplotlib.figure import Figure

from base.command_line import parse_options, read_config_file
from base.errors import BadInput, exit_on_bad_input
from base.files import read_json, write_file
from base.options import checked, option
from config import Options
from data import load_dataset
from tools.inspect_plots import COLOURS, GREY, save
from tools.ngrams import counted_losses
from tools.sweep_runs import ROOT, Run, carry_out, end_like_ctrl_c

CELLS = {"llama": "LLaMA, tau 1", "llama_tau01": "LLaMA, tau 0.1", "pelican_tau1": "Pelican, tau 1", "pelican": "Pelican, tau 0.1"}
SMOOTH = 10     # steps that the training loss is a mean of
ROWS = 8        # most evaluations in the table
HEADROOM = 2.0  # nats that the picture shows above the unigrams' loss


@checked
class FigureOptions:
    dataset: str = option("cosmopedia", "a text of data/; prepared when missing")
    max_iters: int = option(150, "optimiser steps; the paper's figure has 150, a larger number goes on from there", ge=1)
    batch_size: Optional[int] = option(None, "windows of 128 tokens a step [default: the paper's 32]", ge=1)
    eval_interval: Optional[int] = option(None, "steps between evaluations [default: 25]", ge=1)
    eval_tokens: Optional[int] = option(None, "most validation tokens an evaluation reads [default: 40960]", ge=1)
    seed: Optional[int] = option(None, "of the weights and the batches [default: 1337]", ge=0, lt=2**63)
    out_dir: Optional[str] = option(None, "the folder of the runs and the figure [default: out/pelican/<dataset>]", min_length=1)


# The runs ------------------------------------------------------------------------------------------------------------

def runs_of(options, out_dir):
    """{cell: its Run}, the options of this command set for all."""
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "out_dir"}
    arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return {cell: Run(str(out_dir / cell), (str(config_file(cell)), *arguments)) for cell in CELLS}


def config_file(cell):
    return ROOT / f"configs/cosmopedia_{cell}.py"


def curves(folder, max_iters):
    """(training loss, validation loss) of a run, each {step: nats per token}, up to max_iters."""
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["iter"] <= max_iters]
        training, validation = ({row["iter"]: row[name] for row in rows if row[name] is not None} for name in ("train_loss", "val_loss"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'metrics.jsonl'} is damaged ({error!r}); clear the folder") from error
    if max_iters not in training or max_iters not in validation:
        raise BadInput(f"{folder} was not evaluated at step {max_iters}; choose a --max_iters at which it was")
    return training, validation


def smooth(training):
    """{step: mean of the last SMOOTH training losses, or of as many as there are}."""
    values = np.array(list(training.values()))
    return {step: values[max(0, i - SMOOTH + 1):i + 1].mean() for i, step in enumerate(training)}


# The table -----------------------------------------------------------------------------------------------------------

def shares(losses):
    """Of {cell: loss}: Pelican's lead as in the paper, and the shares of it that tau alone brings to LLaMA and to Pelican; None
    where there is no lead."""
    lead = losses["llama"] - losses["pelican"]
    if lead <= 0:
        return lead, None, None
    return lead, (losses["llama"] - losses["llama_tau01"]) / lead, (losses["pelican_tau1"] - losses["pelican"]) / lead


def table_row(name, losses):
    lead, *of_tau = shares(losses)
    percent = ["-" if share is None else f"{share:.0%}" for share in of_tau]
    return [name, *(f"{losses[cell]:.3f}" for cell in CELLS), f"{lead:+.3f}", *percent]


def table(training, validation, counted):
    """The figure in words, as Markdown."""
    steps = sorted(set.intersection(*(set(curve) for curve in validation.values())))
    last, (unigram, d, bigram, k) = steps[-1], counted
    thinned = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(ROWS, len(steps)))]
    rows = [["loss", *CELLS.values(), "Pelican's lead", "tau alone, LLaMA", "tau alone, Pelican"]]
    rows += [table_row(f"validation, step {step}", {cell: validation[cell][step] for cell in CELLS}) for step in thinned]
    rows.append(table_row(f"training, step {last}", {cell: smooth(training[cell])[last] for cell in CELLS}))
    lowest = {cell: min(validation[cell], key=validation[cell].get) for cell in CELLS}
    rows.append(["lowest validation", *(f"{validation[cell][step]:.3f} at {step}" for cell, step in lowest.items()), "", "", ""])
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = lambda row: "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    overfitted = [CELLS[cell] for cell in CELLS if lowest[cell] < last]
    notes = [f"Nats per token; training is the mean of the last {SMOOTH} steps. Lead: LLaMA with tau 1 less Pelican with tau 0.1, the",
             "paper's two; tau alone: what tau 0.1 instead of 1 takes off the loss of LLaMA, or of Pelican, as a share of that lead.",
             f"Counted on the training split, for the whole validation split: unigrams {unigram:.3f} (d = {d:.2g}), bigrams {bigram:.3f} (k = {k:g})."]
    if overfitted:
        notes.append(f"Past its lowest validation loss at step {last}: {'; '.join(overfitted)}.")
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:]), "", *notes, ""])


# The picture ---------------------------------------------------------------------------------------------------------

def picture(training, validation, counted, title, vocab_size):
    """Training loss on the left, validation loss on the right, which at step 0 is ln V: the head starts at zero."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for cell, label in CELLS.items():
        style = dict(color=COLOURS[cell.startswith("pelican")], linestyle="-" if label.endswith("0.1") else "--",
                     linewidth=1.8, label=label.replace("tau", "$\\tau$ ="))
        smoothed = smooth(training[cell])
        evaluated = {0: math.log(vocab_size)} | validation[cell]
        axes[0].plot(smoothed.keys(), smoothed.values(), **style)
        axes[1].plot(evaluated.keys(), evaluated.values(), marker="o" if len(evaluated) < 30 else None, markersize=4, **style)
    unigram, _, bigram, _ = counted
    for name, loss, above in (("unigrams", unigram, True), ("bigrams", bigram, False)):
        axes[1].axhline(loss, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
        axes[1].annotate(f"{name}, counted: {loss:.2f}", (1, loss), (-4, 3 if above else -4), xycoords=("axes fraction", "data"), fontsize=8,
                         textcoords="offset points", ha="right", va="bottom" if above else "top", color="0.35")
    axes[0].set_ylim(top=min(unigram + HEADROOM, math.log(vocab_size) + 0.1))
    axes[0].set(title=f"training loss, mean of {SMOOTH} steps", ylabel="nats per token")
    axes[1].set(title="validation loss")
    for ax in axes:
        ax.set_xlabel(f"step (all start at ln {vocab_size:,} = {math.log(vocab_size):.2f})")
        ax.grid(color="0.93")
        ax.margins(x=0.01)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


@exit_on_bad_input("tools.pelican_figure")
def main():
    options, *_ = parse_options(FigureOptions, sys.argv[1:], __doc__.splitlines()[0], with_config_file=False)
    end_like_ctrl_c()
    data = load_dataset(options.dataset, read_config_file(config_file("llama"), Options)["block_size"])
    if not data.bytes_per_token:
        raise BadInput(f"--dataset={options.dataset} is a recall task; choose a text, such as shakespeare")
    out_dir = Path(options.out_dir or f"out/pelican/{options.dataset}")
    for run, error in carry_out([run for run in runs_of(options, out_dir).values() if not run.finished()]):
        if error:
            raise BadInput(f"{run.folder}: {error}; the same command goes on")
        print(f"{run.folder} is trained; what it said is in {run.folder}.log", flush=True)
    training, validation = ({cell: curves(out_dir / cell, options.max_iters)[i] for cell in CELLS} for i in (0, 1))
    counted = counted_losses(data.train, data.val, data.vocab_size)
    tokens = read_json(out_dir / "llama" / "config.json", "clear the folder")["batch_size"] * 128
    words = table(training, validation, counted)
    write_file(out_dir / "figure3.md", words.encode())
    title = f"{data.name}, vocabulary {data.vocab_size:,}, {tokens:,} tokens a step, {len(data.train):,} to train on"
    save(out_dir / "figure3.png", picture(training, validation, counted, title, data.vocab_size))
    print(f"{title}\n\n{words}\nin {out_dir}: figure3.png, figure3.md")


if __name__ == "__main__":
    main()
