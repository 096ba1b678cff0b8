"""The plots of tools/compare.py: {label: its runs' records}, best first, as PNG files."""
from statistics import median

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from tools.inspect_plots import save

AXES = {"iter": "steps", "flops": "training FLOPs", "seconds": "seconds of training and evaluation"}
COLOURS = {"baseline": "black", "better": "#2a7f4f", "worse": "#b5432a"}  # of verdicts; the rest is grey
POSITIONS = 24  # bins of the context, growing with the position


def draw(folder, groups, lines):
    """Writes the plots that there is something to show in; yields their paths."""
    look = {label: look_of(number) for number, label in enumerate(groups)}
    yield save(folder / "verdicts.png", verdicts(groups, lines))
    yield save(folder / "loss.png", losses(groups, look))
    with_state = [line for line in lines if line["state_bytes"] is not None]
    if with_state:
        yield save(folder / "state.png", loss_over_state(with_state, look))
    if all(record.scores["by_position"] for records in groups.values() for record in records):
        yield save(folder / "position.png", loss_over_position(groups, look))


def verdicts(groups, lines):
    figure = Figure(figsize=(8, 0.8 + 0.3 * len(lines)), layout="constrained")
    ax = figure.subplots()
    for row, line in enumerate(lines):
        colour = COLOURS.get(line["verdict"], "0.55")
        if line["verdict"] == "baseline" and line["loss_interval"] is not None:
            ax.axvspan(line["loss"] - line["loss_interval"], line["loss"] + line["loss_interval"], color="0.9", zorder=0)
        ax.errorbar(line["loss"], row, xerr=line["loss_interval"], fmt="none", color=colour, capsize=3, zorder=2)
        losses = [record.scores["report"]["loss"] for record in groups[line["mixer"]]]
        ax.plot(losses, [row] * len(losses), "o", color=colour, markersize=4, alpha=0.6, zorder=3)
        if line["verdict"] != "baseline":
            ax.annotate(f"  {line['difference']:+.3f} {line['verdict']}", (max(*losses, line["loss"] + (line["loss_interval"] or 0)), row), xytext=(4, 0), textcoords="offset points", va="center",
                        fontsize=8, color=colour)
    ax.set_yticks(range(len(lines)), [line["mixer"] for line in lines])
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.margins(x=0.25)
    ax.set_xlabel("loss on the report data, nats per target: each seed, and the mean's 95 % interval")
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    return figure


def look_of(number):
    """A line's colour and style, different for the first 40."""
    return {"color": colormaps["tab20"](number % 20 * 2 % 20 + number % 20 // 10), "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def band(ax, x, curves, label, look):
    """The median of several curves (seeds, len(x)), and their range."""
    ax.plot(x, np.median(curves, axis=0), label=label, linewidth=1.4, marker=".", markersize=4, **look)
    ax.fill_between(x, np.min(curves, axis=0), np.max(curves, axis=0), color=look["color"], alpha=0.15, linewidth=0)


def losses(groups, look):
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    for ax, (key, name) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items()):
        for label, records in groups.items():
            curves = [{row["iter"]: (row[key], row["val_loss"]) for row in record.rows if row.get("val_loss") is not None and row.get(key) is not None}
                      for record in records]
            steps = sorted(set.intersection(*map(set, curves)))  # at which all seeds were evaluated
            if steps:  # a mixer without a FLOP formula has none
                x = [median(curve[step][0] for curve in curves) for step in steps]
                band(ax, x, [[curve[step][1] for step in steps] for curve in curves], label, look[label])
        ax.set_xlabel(name)
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss, nats per target")
    seeds = sorted({len(records) for records in groups.values()})
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, title=f"best first, {'-'.join(map(str, seeds))} seeds", title_fontsize=8)
    return figure


def loss_over_state(lines, look):
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    ax = figure.subplots()
    near, labels = 0.03 * (lines[-1]["loss"] - lines[0]["loss"]), []  # points with one label: [state, loss, names]
    for line in sorted(lines, key=lambda line: (line["state_bytes"], line["loss"])):
        ax.errorbar(line["state_bytes"], line["loss"], yerr=line["loss_interval"], fmt="o", color=look[line["mixer"]]["color"], capsize=2)
        if labels and labels[-1][0] == line["state_bytes"] and line["loss"] - labels[-1][1] < near:
            labels[-1][2].append(line["mixer"])
        else:
            labels.append([line["state_bytes"], line["loss"], [line["mixer"]]])
    for state, loss, names in labels:
        ax.annotate(", ".join(names), (state, loss), xytext=(5, 4), textcoords="offset points", fontsize=8)
    ax.set_xscale("symlog", linthresh=max(1, min((line["state_bytes"] for line in lines if line["state_bytes"]), default=1)))
    ax.set_xlabel("bytes of state of one sequence at the end of the context")
    ax.set_ylabel("loss on the report data, nats per target")
    ax.margins(x=0.15)
    ax.grid(alpha=0.3)
    return figure


def loss_over_position(groups, look):
    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    for label, records in groups.items():
        curves = np.array([record.scores["by_position"] for record in records])
        T = curves.shape[1]
        edges = np.unique(np.round(np.geomspace(1, T + 1, POSITIONS + 1)).astype(int)) - 1  # 0 to T
        x = [(first + last - 1) / 2 + 1 for first, last in zip(edges, edges[1:])]
        band(ax, x, [[curve[first:last].mean() for first, last in zip(edges, edges[1:])] for curve in curves], label, look[label])
    ax.set_xscale("log")
    ax.set_xlabel("position in the context, from 1")
    ax.set_ylabel("loss on the report data, nats per token")
    ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure
