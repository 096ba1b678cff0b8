"""The plots of tools/compare.py as PNG files."""
from dataclasses import dataclass
from statistics import median

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from base.errors import printable
from tools.compare_arms import is_diverged, rate_of
from tools.inspect_plots import save
from tools.verdicts import in_words

AXES = {
    "iter": "steps",
    "flops": "training FLOPs",
    "seconds": "seconds of training and evaluation",
}
BASELINE = "black"
COLOURS = {"baseline": BASELINE, "better": "#2a7f4f", "worse": "#b5432a",
           "equivalent": "#3b6fb6"}  # of verdicts
GREY = "0.55"   # of all other verdicts, and of what needs no model
STYLES = ("-", "--", ":", "-.")
POSITIONS = 24  # bins of the context, growing with the position


@dataclass
class View:
    """What is drawn."""
    title: str
    groups: dict       # {label: the Records of its seeds}, best first
    lines: list        # their TableLines, in the same order
    references: list   # of Reference
    baseline: str      # its label


def draw(folder, view, tuning=()):
    """Writes the plots that there is something to show in; yields their paths. tuning: the Arms of
    the runs that options were chosen by."""
    looks = looks_of(view.groups, view.baseline)
    yield save(folder / "verdicts.png", verdict_plot(view))
    yield save(folder / "loss.png", loss_curves(view, looks))
    with_state = [line for line in view.lines if line.state_bytes is not None]
    if with_state:
        yield save(folder / "state.png", loss_over_state(view.title, with_state, looks))
    trained = {label: not_diverged(records) for label, records in view.groups.items()}
    if all(r.scores["by_position"] for records in trained.values() for r in records):
        yield save(folder / "position.png", loss_over_position(view, looks))
    if tuning:
        labels = [*view.groups, *(arm.label for arm in tuning if arm.label not in view.groups)]
        yield save(folder / "rates.png",
                   loss_over_rate(view.title, tuning, looks_of(labels, view.baseline)))


def not_diverged(records):
    return [record for record in records if not is_diverged(record)]


def plain(text):
    """A label as it is to be read: no control characters, and no formula between dollar signs."""
    return printable(text).replace("$", r"\$")


def looks_of(labels, baseline):
    """{label: colour and style of its line}; the baseline's is black."""
    others = [label for label in labels if label != baseline]
    looks = {label: look_of(number) for number, label in enumerate(others)}
    looks[baseline] = {"color": BASELINE, "linestyle": "-"}
    return looks


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


def near(references, low, high):
    """Those that can be shown beside what lies from low to high, without squeezing it to less than
    half."""
    reach = high - low
    return [r for r in references if low - reach <= r.loss <= high + reach]


def draw_references(line, references, shown):
    """What needs no model, by `line`, ax.axhline or ax.axvline; those not among `shown` are named
    in the legend alone."""
    for reference, style in zip(references, STYLES[1:] * len(references)):
        beyond = "" if reference in shown else ", not in the picture"
        line(reference.loss if reference in shown else np.nan, color=GREY, linestyle=style,
             linewidth=1, label=f"{plain(reference.name)} {reference.loss:.3f}{beyond}", zorder=1)


# The pictures ---------------------------------------------------------------------------------

def verdict_plot(view):
    lines = view.lines
    figure = Figure(figsize=(9, 1.3 + 0.3 * len(lines)), layout="constrained")
    ax = figure.subplots()
    of_lines = [[record.scores["report"]["loss"] for record in view.groups[line.mixer]]
                for line in lines]
    beyond = outlying({line.mixer: losses for line, losses in zip(lines, of_lines)})
    drawn = [losses for line, losses in zip(lines, of_lines) if line.mixer not in beyond]
    low, high = min(map(min, drawn)), max(map(max, drawn))
    shown = near(view.references, low, high)
    ends = [low, high, *(reference.loss for reference in shown)]
    room = 0.06 * (max(ends) - min(ends)) or 0.01  # intervals that are wider are cut off
    ax.set_xlim(min(ends) - room, max(ends) + room)
    for row, (line, losses) in enumerate(zip(lines, of_lines)):
        draw_verdict(ax, row, line, losses)
        if line.mixer in beyond:
            ax.annotate(f"{line.loss:.3f} \N{RIGHTWARDS ARROW}", (1, row), (-4, 0),
                        xycoords=("axes fraction", "data"), textcoords="offset points",
                        ha="right", va="center", fontsize=8, color=colour_of(line))
    draw_references(ax.axvline, view.references, shown)
    right = ax.twinx()
    for side, texts in ((ax, [plain(line.mixer) for line in lines]),
                        (right, [beside(line) for line in lines])):
        side.set_yticks(range(len(lines)), texts)
        side.set_ylim(len(lines) - 0.5, -0.5)
    for text, line in zip(right.get_yticklabels(), lines):
        text.set_color(colour_of(line))
    right.tick_params(length=0)
    ax.set_title(plain(view.title), fontsize=10)
    ax.set_xlabel("loss on the report data, nats per target: "
                  "each seed, and the mean's 95 % interval")
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    if view.references:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2,
                      fontsize=8, frameon=False)
    return figure


def outlying(losses):
    """The names, of {name: losses of an arm}, that are named at a picture's edge alone: of more
    than four arms the worst, as long as all others together would take less than a fifth of it."""
    left = sorted((name for name in losses if losses[name]), key=lambda name: min(losses[name]))
    found = set()
    while len(left) > 4:
        *rest, worst = left
        others = [loss for name in rest for loss in losses[name]]
        if max(losses[worst]) - min(others) <= 5 * (max(others) - min(others)):
            break
        found.add(worst)
        left = rest
    return found


def colour_of(line):
    return COLOURS.get(line.word, GREY)


def beside(line):
    """What stands at the right end of a row."""
    if line.word == "baseline":
        return line.word
    return f"{line.difference:+.3f} {in_words(line)}"


def draw_verdict(ax, row, line, losses):
    """A row: the seeds' losses, and their mean's interval."""
    colour = colour_of(line)
    half = line.loss_interval or 0
    if line.word == "baseline" and half:
        ax.axvspan(line.loss - half, line.loss + half, color="0.9", zorder=0)
    ax.errorbar(line.loss, row, xerr=line.loss_interval, fmt="none", color=colour, capsize=3,
                zorder=2)
    ax.plot(losses, [row] * len(losses), "o", color=colour, markersize=4, alpha=0.6, zorder=3)


def loss_curves(view, looks):
    """Runs that diverged have no end to draw."""
    figure = Figure(figsize=(15, 4.9), layout="constrained")
    axes = figure.subplots(1, len(AXES), sharey=True)
    for ax, (key, name) in zip(axes, AXES.items()):
        for label, records in view.groups.items():
            curves = [validation_curve(r.metrics, key) for r in not_diverged(records)]
            steps = set.intersection(*map(set, curves)) if curves else ()
            if not steps:  # a mixer without a FLOP formula has none
                continue
            steps = sorted(steps)  # where all seeds were evaluated
            x = [median(curve[step].x for curve in curves) for step in steps]
            losses = [[curve[step].loss for step in steps] for curve in curves]
            band(ax, x, losses, label, looks[label])
        ax.set_xlabel(name)
        ax.grid(alpha=0.3)
    shown = near(view.references, *axes[0].get_ylim())
    for ax in axes:
        draw_references(ax.axhline, view.references, shown)
    axes[0].set_ylabel("validation loss, nats per target")
    figure.suptitle(plain(view.title), fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8,
                  title="best first", title_fontsize=8)
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


def loss_over_state(title, lines, looks):
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    ax = figure.subplots()
    for line in lines:
        ax.errorbar(line.state_bytes, line.loss, yerr=line.loss_interval, fmt="o",
                    color=looks[line.mixer]["color"], capsize=2)
    for point in labelled_points(lines):
        ax.annotate(", ".join(map(plain, point.names)), (point.state_bytes, point.loss),
                    xytext=(5, 4), textcoords="offset points", fontsize=8)
    ax.set_title(plain(title), fontsize=10)
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


def loss_over_position(view, looks):
    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    for label, records in view.groups.items():
        records = not_diverged(records)
        if not records:
            continue
        curves = np.array([record.scores["by_position"] for record in records], dtype=float)
        edges = position_edges(curves.shape[1])
        x, losses = [], []
        for first, last in zip(edges, edges[1:]):
            x.append((first + 1 + last) / 2)
            losses.append(curves[:, first:last].mean(axis=1))
        band(ax, x, np.transpose(losses), label, looks[label])
    ax.set_xscale("log")
    draw_references(ax.axhline, view.references, near(view.references, *ax.get_ylim()))
    ax.set_title(plain(view.title), fontsize=10)
    ax.set_xlabel("position in the context, from 1")
    ax.set_ylabel("loss on the report data, nats per token")
    ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def position_edges(T):
    """Where the bins of T positions begin, and T: each about as much longer than the one before."""
    edges = np.round(np.geomspace(1, T + 1, POSITIONS + 1)).astype(int)
    return np.unique(edges) - 1


def loss_over_rate(title, arms, looks):
    """Of the runs that chose: each arm's losses, the lowest ringed. A run that diverged is a cross
    at the upper edge: its loss is that of an even guess, far above."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    losses_of = {arm.label: [record.scores["select"]["loss"] for record in
                             not_diverged(arm.records)] for arm in arms}
    beyond = outlying(losses_of)
    for arm in arms:
        look = looks[arm.label]
        kept, losses = not_diverged(arm.records), losses_of[arm.label]
        if arm.label in beyond:
            text = f"{plain(arm.label)}: {min(losses):.3f}, above the picture"
            ax.plot([], [], label=text, **look)
            continue
        for record in arm.records:
            if record not in kept:
                ax.plot(rate_of(record), 1, "x", markersize=9, color=look["color"],
                        transform=ax.get_xaxis_transform(), clip_on=False)
        rates = [rate_of(record) for record in kept]
        ax.plot(rates, losses, label=plain(arm.label), linewidth=1.4, marker=".", **look)
        if losses:
            best = int(np.argmin(losses))
            ax.plot(rates[best], losses[best], "o", markersize=10, color=look["color"],
                    markerfacecolor="none")
    ax.set_xscale("log")
    ax.set_title(f"{plain(title)}: what chose the rates", fontsize=10)
    ax.set_xlabel("learning rate; the chosen ones are ringed, runs that diverged crossed")
    ax.set_ylabel("loss on the data to choose by, nats per target")
    ax.grid(alpha=0.3, which="both")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure
