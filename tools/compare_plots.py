"""The plots of tools/compare.py as PNG files. What is drawn comes as `groups`, {label: the Records
of its seeds}, best first, and `lines`, their TableLines in the same order."""
from dataclasses import dataclass
from statistics import median

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from base.errors import printable
from tools.inspect_plots import save

AXES = {
    "iter": "steps",
    "flops": "training FLOPs",
    "seconds": "seconds of training and evaluation",
}
COLOURS = {"baseline": "black", "better": "#2a7f4f", "worse": "#b5432a"}  # of verdicts
GREY = "0.55"   # of all other verdicts
STYLES = ("-", "--", ":", "-.")
POSITIONS = 24  # bins of the context, growing with the position


def draw(folder, groups, lines):
    """Writes the plots that there is something to show in; yields their paths."""
    looks = {label: look_of(number) for number, label in enumerate(groups)}
    yield save(folder / "verdicts.png", verdict_plot(groups, lines))
    yield save(folder / "loss.png", loss_curves(groups, looks))
    with_state = [line for line in lines if line.state_bytes is not None]
    if with_state:
        yield save(folder / "state.png", loss_over_state(with_state, looks))
    records = [record for of_label in groups.values() for record in of_label]
    if all(record.scores["by_position"] for record in records):
        yield save(folder / "position.png", loss_over_position(groups, looks))


def plain(text):
    """A label as it is to be read: no control characters, and no formula between dollar signs."""
    return printable(text).replace("$", r"\$")


def look_of(number):
    """A line's colour and style, different for the first 40: ten strong colours, then their pale
    ones, then again with another style."""
    i = number % 20
    colour = 2 * i if i < 10 else 2 * (i - 10) + 1  # tab20 has each strong one before its pale one
    return {"color": colormaps["tab20"](colour), "linestyle": STYLES[number // 10 % 4]}


def band(ax, x, curves, label, look):
    """The median of several curves (seeds, len(x)), and their range."""
    middle = np.median(curves, axis=0)
    low, high = np.min(curves, axis=0), np.max(curves, axis=0)
    ax.plot(x, middle, label=plain(label), linewidth=1.4, marker=".", markersize=4, **look)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


# The pictures ---------------------------------------------------------------------------------

def verdict_plot(groups, lines):
    figure = Figure(figsize=(8, 0.8 + 0.3 * len(lines)), layout="constrained")
    ax = figure.subplots()
    for row, line in enumerate(lines):
        losses = [record.scores["report"]["loss"] for record in groups[line.mixer]]
        draw_verdict(ax, row, line, losses)
    ax.set_yticks(range(len(lines)), [plain(line.mixer) for line in lines])
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.margins(x=0.25)
    ax.set_xlabel("loss on the report data, nats per target: "
                  "each seed, and the mean's 95 % interval")
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    return figure


def draw_verdict(ax, row, line, losses):
    """A row: the seeds' losses, their mean's interval, and the verdict in words."""
    colour = COLOURS.get(line.verdict, GREY)
    half = line.loss_interval or 0
    if line.verdict == "baseline" and half:
        ax.axvspan(line.loss - half, line.loss + half, color="0.9", zorder=0)
    ax.errorbar(line.loss, row, xerr=line.loss_interval, fmt="none", color=colour, capsize=3,
                zorder=2)
    ax.plot(losses, [row] * len(losses), "o", color=colour, markersize=4, alpha=0.6, zorder=3)
    if line.verdict != "baseline":
        right = max(*losses, line.loss + half)
        ax.annotate(f"  {line.difference:+.3f} {line.verdict}", (right, row), xytext=(4, 0),
                    textcoords="offset points", va="center", fontsize=8, color=colour)


def loss_curves(groups, looks):
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, len(AXES), sharey=True)
    for ax, (key, name) in zip(axes, AXES.items()):
        for label, records in groups.items():
            curves = [validation_curve(record.metrics, key) for record in records]
            steps = sorted(set.intersection(*map(set, curves)))  # where all seeds were evaluated
            if not steps:  # a mixer without a FLOP formula has none
                continue
            x = [median(curve[step].x for curve in curves) for step in steps]
            losses = [[curve[step].loss for step in steps] for curve in curves]
            band(ax, x, losses, label, looks[label])
        ax.set_xlabel(name)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats per target")
    seeds = sorted({len(records) for records in groups.values()})
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8,
                  title=f"best first, {'-'.join(map(str, seeds))} seeds", title_fontsize=8)
    return figure


@dataclass
class Evaluation:
    x: float     # steps, FLOPs or seconds until then
    loss: float  # on the validation data, nats per target


def validation_curve(metrics, key):
    """{step: Evaluation} over the axis `key`, from the rows of metrics that have it."""
    curve = {}
    for row in metrics:
        if row.get("val_loss") is not None and row.get(key) is not None:
            curve[row["iter"]] = Evaluation(row[key], row["val_loss"])
    return curve


@dataclass
class Point:
    """Arms of one state size, and of losses so near each other that they share a label."""
    state_bytes: int
    loss: float
    names: list


def loss_over_state(lines, looks):
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    ax = figure.subplots()
    for line in lines:
        ax.errorbar(line.state_bytes, line.loss, yerr=line.loss_interval, fmt="o",
                    color=looks[line.mixer]["color"], capsize=2)
    for point in labelled_points(lines):
        ax.annotate(", ".join(map(plain, point.names)), (point.state_bytes, point.loss),
                    xytext=(5, 4), textcoords="offset points", fontsize=8)
    sizes = [line.state_bytes for line in lines if line.state_bytes > 0]
    ax.set_xscale("symlog", linthresh=min(sizes, default=1))
    ax.set_xlabel("bytes of state of one sequence at the end of the context")
    ax.set_ylabel("loss on the report data, nats per target")
    ax.margins(x=0.15)
    ax.grid(alpha=0.3)
    return figure


def labelled_points(lines):
    """The Points of lines that are sorted by loss."""
    near = 0.03 * (lines[-1].loss - lines[0].loss)
    points = []
    for line in sorted(lines, key=state_and_loss):
        last = points[-1] if points else None
        if last and last.state_bytes == line.state_bytes and line.loss - last.loss < near:
            last.names.append(line.mixer)
        else:
            points.append(Point(line.state_bytes, line.loss, [line.mixer]))
    return points


def state_and_loss(line):
    return line.state_bytes, line.loss


def loss_over_position(groups, looks):
    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    for label, records in groups.items():
        curves = np.array([record.scores["by_position"] for record in records], dtype=float)
        edges = position_edges(curves.shape[1])
        x, losses = [], []
        for first, last in zip(edges, edges[1:]):
            x.append((first + 1 + last) / 2)
            losses.append(curves[:, first:last].mean(axis=1))
        band(ax, x, np.transpose(losses), label, looks[label])
    ax.set_xscale("log")
    ax.set_xlabel("position in the context, from 1")
    ax.set_ylabel("loss on the report data, nats per token")
    ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def position_edges(T):
    """Where the bins of T positions begin, and T: each about as much longer than the one before."""
    edges = np.round(np.geomspace(1, T + 1, POSITIONS + 1)).astype(int)
    return np.unique(edges) - 1
