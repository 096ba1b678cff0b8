"""The curves of tools/compare.py as pictures: loss over training, over the position, over the rate.

Few arms share a panel and are named at the ends of their lines. Of many, each has a panel of its
own, with the baseline in black and the others in grey behind it; over training, where that would be
three times as many, the best are in colour and the others grey.
"""
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from matplotlib.figure import Figure

from tools.compare_arms import is_diverged, rate_of
from tools.drawing import (
    BASELINE, FAINT, FONT, WIDTH, doublings, draw_references, label_ends, looks_of, near,
    new_figure, outlying, plain, plain_ticks, references_in_words, unit_of)

POSITIONS = 24  # bins of the context, growing with the position
FEW = 6         # arms that share a panel in colour
ACROSS = 5      # panels side by side, where each arm has its own


@dataclass
class View:
    """What is drawn."""
    title: str
    groups: dict       # {label: the Records of its seeds}, best first
    lines: list        # their TableLines, in the same order
    references: list   # of Reference
    baseline: str      # its label


@dataclass
class Curve:
    """An arm's line: x, and for each seed what stands there."""
    label: str
    look: dict
    x: list
    seeds: np.ndarray  # (seeds, len(x))
    crosses: list = field(default_factory=list)  # x of runs that diverged
    ring: bool = False  # around the lowest point

    @property
    def middle(self):
        return np.median(self.seeds, axis=0)

    @property
    def colour(self):
        return self.look["color"]


def not_diverged(records):
    return [record for record in records if not is_diverged(record)]


# Drawing --------------------------------------------------------------------------------------

def draw_curve(ax, curve, **more):
    """The median of the seeds, and their range."""
    if len(curve.x):
        ax.fill_between(curve.x, curve.seeds.min(0), curve.seeds.max(0), color=curve.colour,
                        alpha=0.15, linewidth=0)
        ax.plot(curve.x, curve.middle, label=plain(curve.label), linewidth=1.4, marker=".",
                markersize=4, **curve.look, **more)
    for x in curve.crosses:
        ax.plot(x, 1, "x", markersize=7, color=curve.colour, clip_on=False,
                transform=ax.get_xaxis_transform())
    if curve.ring and len(curve.x):
        best = int(np.argmin(curve.middle))
        ax.plot(curve.x[best], curve.middle[best], "o", markersize=9, color=curve.colour,
                markerfacecolor="none")


def draw_faintly(ax, curve):
    ax.plot(curve.x, curve.middle, color=FAINT, linewidth=0.8, zorder=1)


def limits(curves, beyond, first=0):
    """Of the losses to show: of the arms that are not `beyond`, from the first-th point on."""
    values = [loss for curve in curves if curve.label not in beyond and len(curve.x)
              for loss in curve.seeds[:, first:].flat]
    low, high = min(values, default=0), max(values, default=1)
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room


def picture(curves, baseline, references, titles, prepare, first=0):
    """A Figure of Curves. titles: (of the whole, below x, beside y). prepare(ax): its x axis.
    first: the number of the point from which on the losses have to be within the frame."""
    beyond = outlying({curve.label: list(curve.middle[first:]) for curve in curves})
    bottom, top = limits(curves, beyond, first)
    shown = near(references, bottom, top)
    bottom = min([bottom, *(r.loss - 0.03 * (top - bottom) for r in shown)])
    top = max([top, *(r.loss + 0.03 * (top - bottom) for r in shown)])
    is_few = len(curves) <= FEW
    columns = 1 if is_few else ACROSS
    rows = 1 if is_few else -(-len(curves) // ACROSS)
    figure, axes = new_figure(4.4 if is_few else 1 + 1.35 * rows, rows, columns, sharex=True,
                              sharey=True)
    whole, below, beside = titles
    figure.suptitle(plain(whole), fontsize=FONT + 1)
    figure.supxlabel(f"{below}\n{references_in_words(references, shown)}".strip(),
                     fontsize=FONT + 1)
    figure.supylabel(beside, fontsize=FONT + 1)
    for ax in axes.flat:
        prepare(ax)
        ax.set_ylim(bottom, top)
        draw_references(ax.axhline, shown)
    if is_few:
        draw_together(axes[0, 0], curves, baseline, beyond)
    else:
        draw_apart(axes, curves, baseline, beyond)
    return figure


def draw_together(ax, curves, baseline, beyond=()):
    ends = {}
    for curve in sorted(curves, key=lambda curve: curve.label == baseline):  # in front
        draw_curve(ax, curve)
        if len(curve.x):
            name = curve.label
            if name in beyond:
                name += f" {curve.middle[-1]:.3f} \N{UPWARDS ARROW}"
            y = min(curve.middle[-1], ax.get_ylim()[1])
            ends[name] = curve.x[-1], y, curve.colour
    label_ends(ax, ends)


def draw_apart(axes, curves, baseline, beyond):
    for ax, curve in zip(axes.flat, curves):
        for other in curves:
            if other.label not in (curve.label, baseline):
                draw_faintly(ax, other)
            elif other.label == baseline and curve.label != baseline:
                ax.plot(other.x, other.middle, color=BASELINE, linewidth=1, zorder=2)
        draw_curve(ax, curve)
        ax.set_title(plain(curve.label), fontsize=FONT, color=curve.colour, pad=3)
        if curve.label in beyond:
            ax.text(0.5, 0.9, f"{curve.middle.min():.3f} \N{UPWARDS ARROW}", ha="center", va="top",
                    transform=ax.transAxes, fontsize=FONT, color=curve.colour)
    for ax in axes.flat[len(curves):]:
        ax.set_axis_off()
    for ax in axes.flat[max(0, len(curves) - ACROSS):len(curves)]:
        ax.tick_params(labelbottom=True)


# Over training --------------------------------------------------------------------------------

def over_training(view, looks):
    """Validation loss over steps, FLOPs and seconds. Runs that diverged have no end to draw."""
    names = {"iter": "steps", "flops": "training", "seconds": "seconds of training and evaluation"}
    figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
    places = figure.subplot_mosaic([["iter", "iter"], ["flops", "seconds"]])
    others = [label for label in view.groups if label != view.baseline]
    in_colour = [view.baseline, *others[:FEW - 1]]
    for key, ax in places.items():
        curves = [training_curve(label, records, key, looks[label])
                  for label, records in view.groups.items()]
        curves = [curve for curve in curves if len(curve.x)]
        unit, prefix = unit_of([x for curve in curves for x in curve.x] if key == "flops" else [])
        for curve in curves:
            curve.x = [x / unit for x in curve.x]
        beyond = outlying({curve.label: [curve.middle[-1]] for curve in curves})
        bottom, top = limits(curves, beyond)
        shown = [r for r in near(view.references, bottom, top) if r.loss < top]
        ax.set_ylim(min([bottom, *(r.loss - 0.03 * (top - bottom) for r in shown)]), top)
        draw_references(ax.axhline, shown)
        few = [curve for curve in curves if curve.label in in_colour]
        for curve in curves:
            if curve not in few:
                draw_faintly(ax, curve)
        ax.set_xlabel(f"{names[key]} {prefix}FLOP" if key == "flops" else names[key],
                      fontsize=FONT + 1)
        ax.tick_params(labelsize=FONT)
        ax.grid(alpha=0.3)
        draw_together(ax, few, view.baseline, beyond)
    figure.supylabel("validation loss, nats per target", fontsize=FONT + 1)
    figure.suptitle(plain(view.title), fontsize=FONT + 1)
    words = []
    if len(others) >= FEW:
        words.append(f"in colour: the best {FEW - 1} and the baseline; grey: all others")
        words += [f"above the picture: {plain(line.mixer)} {line.val_loss:.3f}"
                  for line in view.lines if line.mixer in beyond]
    words = "; ".join(words), references_in_words(view.references, shown)
    figure.supxlabel("\n".join(filter(None, words)), fontsize=FONT + 1)
    return figure


def training_curve(label, records, key, look):
    """The Curve of validation losses over `key` where all seeds were evaluated; without points for
    a mixer without a FLOP formula."""
    of_runs = [validation_losses(record.metrics, key) for record in not_diverged(records)]
    steps = sorted(set.intersection(*map(set, of_runs))) if of_runs else []
    x = [median(of_run[step][0] for of_run in of_runs) for step in steps]
    losses = [[of_run[step][1] for step in steps] for of_run in of_runs]
    return Curve(label, look, x, np.array(losses, dtype=float))


def validation_losses(metrics, key):
    """{step: (value of `key` then, validation loss)} of the rows of metrics that have both."""
    return {row["iter"]: (row[key], row["val_loss"]) for row in metrics
            if row.get("val_loss") is not None and row.get(key) is not None}


# Over the position, over the rate -------------------------------------------------------------

def over_position(view, looks):
    curves = []
    for label, records in view.groups.items():
        records = not_diverged(records)
        if not records:
            continue
        losses = np.array([record.scores["by_position"] for record in records], dtype=float)
        edges = position_edges(losses.shape[1])
        x, means = [], []
        for first, last in zip(edges, edges[1:]):
            x.append((first + 1 + last) / 2)
            means.append(losses[:, first:last].mean(axis=1))
        curves.append(Curve(label, looks[label], x, np.transpose(means)))
    longest = max((edges[-1] for curve in curves), default=1)

    def prepare(ax):
        ax.set_xscale("log")
        plain_ticks(ax.xaxis, doublings(1, longest, most=4 if len(curves) > FEW else 10))

    # the first positions know little, and the losses there are far above all that comes
    first = sum(x < longest ** 0.5 for x in curves[0].x) if curves and longest > 16 else 0
    below = "position in the context, from 1"
    if first:
        below += "; at the first few, losses are above the picture"
    titles = (view.title, below, "loss on the report data, nats per token")
    return picture(curves, view.baseline, view.references, titles, prepare, first)


def position_edges(T):
    """Where the bins of T positions begin, and T: each about as much longer than the one before."""
    edges = np.round(np.geomspace(1, T + 1, POSITIONS + 1)).astype(int)
    return np.unique(edges) - 1


def over_rate(view, arms):
    """Of the runs that chose, as Arms: each arm's losses, the lowest ringed. A run that diverged is
    a cross at the upper edge: its loss is that of an even guess, far above."""
    looks = looks_of({arm.label: arm.mixer for arm in arms}, view.baseline)
    places = {label: place for place, label in enumerate(view.groups)}  # best first
    curves = []
    for arm in sorted(arms, key=lambda arm: places.get(arm.label, len(places))):
        kept = not_diverged(arm.records)
        losses = [[record.scores["select"]["loss"] for record in kept]]
        crosses = [rate_of(record) for record in arm.records if record not in kept]
        curves.append(Curve(arm.label, looks[arm.label], [rate_of(record) for record in kept],
                            np.array(losses), crosses, ring=True))
    rates = sorted({rate_of(record) for arm in arms for record in arm.records})

    def prepare(ax):
        ax.set_xscale("log")
        plain_ticks(ax.xaxis, rates[::-(-len(rates) // (4 if len(curves) > FEW else 10))])

    below = "learning rate; the chosen ones are ringed, runs that diverged crossed"
    titles = (f"{view.title}: what chose the rates", below,
              "loss on the data to choose by, nats per target")
    return picture(curves, view.baseline, [], titles, prepare)
