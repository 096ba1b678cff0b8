"""What compute each arm needs for its loss, against a baseline, over several sizes of a model.

Run: python -m tools.ladder results/claims/books_small results/claims/books_medium

One folder a size: a sweep, a claim or their records. For every size, the arms by their loss, with

    multiplier    the compute with which the baseline reaches an arm's loss, over the arm's own:
                  above 1 the arm is the cheaper way to that loss

once in FLOPs of training, by each mixer's own formula, and once in seconds, as the machine took
them. The baseline's loss is interpolated between neighbouring sizes, over the logarithm of its
compute. It is not continued beyond them: what it has not reached gives a bound (> or <). The
interval is that of the arm's difference from the baseline at its size (see verdicts.py), carried
over to the compute; the baseline's own losses are taken as they are. Two or three sizes support no
law, so none is fitted. With --picture=FILE.png, a picture of the differences too.

    python -m tools.ladder results/books_small results/books_medium_short --rates

Do learning rates transfer from width to width? The losses that chose an arm's rate, and where a
parabola through the lowest and its neighbours, over the logarithm of the rate, has its lowest
point; of the next width as a multiple of that of the one before. One seed, so no interval: of
several to tune by the first, which alone has tried all rates.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Optional

import numpy as np

from base.command_line import paths_and_options
from base.errors import BadInput, exit_on_bad_input, printable
from base.options import checked, option
from tools.compare import baseline_of, margin_of, records_to_compare, tuning_records
from tools.compare_arms import (
    arms_of, check_alike, judge_arms, rate_of, tuning_arms_of, unequal_options)
from tools.compare_table import build, model_config_of
from tools.drawing import save
from tools.ladder_plot import differences
from tools.verdicts import MARGIN_BPB, Verdict, in_words
from training.device import choose_device


@checked
class LadderOptions:
    baseline: Optional[str] = option(
        None, "the arm that the others are compared with [default: softmax, or the first]")
    device: str = option(
        "auto", "cpu, cuda, cuda:1, mps, or auto, for runs that are not yet scored")
    rates: bool = option(False, "the losses that chose the learning rates, over widths, alone")
    picture: Optional[str] = option(
        None, "a .png file for a picture of the differences at each size", pattern=r"\.png$")


@dataclass
class Rung:
    """An arm at one size."""
    label: str
    parameters: int  # without embeddings
    loss: float      # nats per target, mean over the seeds
    verdict: Verdict
    margin: float    # of equivalence, in nats
    flops: Optional[float]  # of training, the mean
    seconds: float   # of training and evaluation, the median

    def if_different_by(self, difference):
        """The loss if that were the difference from the baseline."""
        # each block of text may be counted alike, so this is not the baseline's loss and it
        return self.loss - self.verdict.difference + difference


def rungs_of(name, options):
    """(the Rungs at one size, the baseline first, then by loss; the Records that they are of).
    BadInput if there are none."""
    records = records_to_compare([name], choose_device(options.device))
    arms = arms_of(records)
    baseline = baseline_of(options, arms)
    margin = margin_of(arms, baseline, MARGIN_BPB)
    verdicts = judge_arms(arms, baseline, margin)
    rungs = []
    for arm in arms:
        flops = [record.metrics[-1].get("flops") for record in arm.records if record.metrics]
        rungs.append(Rung(
            arm.label, parameters_of(arm.steady), mean(arm.reported("loss")),
            verdicts[arm.label], margin,
            None if None in flops or not flops else mean(flops),
            median(record.seconds() for record in arm.records)))
    rungs.sort(key=lambda rung: (rung.label != baseline, rung.loss))
    return rungs, records


def parameters_of(record):
    """A model's parameters but for those of its vocabulary and positions."""
    model = build(model_config_of(record), record)
    apart = [module for module in (model.embed, model.pos_embed, model.head) if module is not None]
    left_out = {id(p) for module in apart for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in left_out)


# The multiplier -------------------------------------------------------------------------------

def multiplier(loss, compute, baseline):
    """(the multiplier of an arm of that loss and compute, its sign: "", or "<" or ">" where it is a
    bound). baseline: [(compute, loss)] of its sizes, the loss falling from each to the next."""
    computes, losses = zip(*baseline)
    if loss > losses[0]:
        return computes[0] / compute, "<"
    if loss < losses[-1]:
        return computes[-1] / compute, ">"
    needed = np.interp(-loss, np.negative(losses), np.log(computes))
    return math.exp(needed) / compute, ""


def falls(baseline):
    """Whether more compute is a lower loss at each of the baseline's sizes, [(compute, loss)]."""
    pairs = list(zip(baseline, baseline[1:]))
    return bool(pairs) and all(one[0] < two[0] and one[1] > two[1] for one, two in pairs)


def multiplier_in_words(rung, compute, baseline):
    """With its interval: a higher loss is a smaller multiplier."""
    if not compute or not falls(baseline):
        return "n/a"

    def words(loss):
        value, sign = multiplier(loss, compute, baseline)
        return f"{sign}{value:.2f}"
    ends = rung.verdict.difference_high, rung.verdict.difference_low
    if None in ends:
        return words(rung.loss)
    low, high = (words(rung.if_different_by(end)) for end in ends)
    return f"{words(rung.loss)} [{low}, {high}]"


def lines_of(ladder):
    """The lines to print of [[Rung] of a size]."""
    flops = [(rungs[0].flops, rungs[0].loss) for rungs in ladder if rungs[0].flops is not None]
    seconds = [(rungs[0].seconds, rungs[0].loss) for rungs in ladder if rungs[0].seconds]
    rows = [("parameters", "arm", "loss", "verdict", "PFLOP", "multiplier", "seconds",
             "multiplier in time")]
    for rungs in ladder:
        for rung in rungs:
            rows.append((
                f"{rung.parameters:,}", printable(rung.label), f"{rung.loss:.4f}",
                in_words(rung.verdict),
                "n/a" if rung.flops is None else f"{rung.flops / 1e15:.3f}",
                multiplier_in_words(rung, rung.flops, flops), f"{rung.seconds:,.0f}",
                multiplier_in_words(rung, rung.seconds, seconds)))
    rule = ["---"] * len(rows[0])
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    lines.append("")
    for rungs in ladder:
        order = sorted(rungs, key=lambda rung: rung.loss)
        lines.append(f"by loss at {rungs[0].parameters:,} parameters: "
                     + ", ".join(printable(rung.label) for rung in order))
    return lines


# Rates over widths ----------------------------------------------------------------------------

def lowest_rate(losses):
    """Where the parabola through the lowest of {learning rate: loss} and its neighbours has its
    lowest point; None where the lowest has none on one side."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if at in (0, len(rates) - 1):
        return None
    near = rates[at - 1:at + 2]
    square, linear, _ = np.polyfit(np.log(near), [losses[rate] for rate in near], 2)
    return math.exp(-linear / (2 * square))


def lines_of_rates(records):
    """The lines to print of tuning runs of one width or more."""
    widths = sorted({record.config["n_embd"] for record in records})
    rates = sorted({rate_of(record) for record in records})
    rows = [("width", "steps", "arm", *(f"{rate:g}" for rate in rates), "lowest at", "times")]
    before = {}
    for width in widths:
        for arm in tuning_arms_of([r for r in records if r.config["n_embd"] == width]):
            losses = {rate_of(record): record.scores["select"]["loss"] for record in arm.records}
            found = lowest_rate(losses)
            times = found and before.get(arm.label) and found / before[arm.label]
            before[arm.label] = found
            rows.append((
                str(width), str(arm.records[0].config["max_iters"]), printable(arm.label),
                *(f"{losses[rate]:.4f}" if rate in losses else "" for rate in rates),
                f"{found:.2g}" if found else "n/a", f"{times:.2f}" if times else ""))
    rule = ["---"] * len(rows[0])
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


@exit_on_bad_input("tools.ladder")
def main():
    names, options, given = paths_and_options(LadderOptions, sys.argv[1:], __doc__.splitlines()[0])
    if options.rates:
        if given & {"baseline", "picture"}:
            raise BadInput("--rates compares no arms; leave --baseline and --picture out")
        records = [record for record in tuning_records(names) if record.config["seed"] == 0]
        if not records:
            raise BadInput(f"no run that chose a learning rate in {', '.join(names) or 'nothing'}; "
                           "name a sweep that had --tune, or its records")
        print("\n".join(lines_of_rates(records)))
        return
    if len(names) < 2:
        raise BadInput("name a folder for each of two sizes or more: python -m tools.ladder "
                       "results/claims/books_small results/claims/books_medium")
    ladder, everything = [], []
    for name in names:
        rungs, records = rungs_of(name, options)
        ladder.append(rungs)
        everything += records
    check_alike(everything, unequal_options(everything))
    if len({rungs[0].label for rungs in ladder}) > 1:
        raise BadInput("the sizes have other baselines: "
                       f"{', '.join(rungs[0].label for rungs in ladder)}; choose one by --baseline")
    if options.picture and all(len(rungs) == 1 for rungs in ladder):
        raise BadInput("--picture shows differences from the baseline, and nothing else is there")
    ladder.sort(key=lambda rungs: rungs[0].parameters)
    print("\n".join(lines_of(ladder)))
    if options.picture:
        print(f"picture: {save(Path(options.picture), differences(ladder))}")


if __name__ == "__main__":
    main()
