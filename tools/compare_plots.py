"""The plots of tools/compare.py as PNG files: losses with their verdicts, and over the state; the
curves are tools/compare_curves.py's."""
from matplotlib.figure import Figure

from tools import compare_curves as curves
from tools.compare_curves import not_diverged
from tools.drawing import (
    BASELINE, FONT, WIDTH, doublings, draw_references, in_bytes, label_points, looks_of, near,
    new_figure, outlying, plain, plain_ticks, references_in_words, save)
from tools.verdicts import in_words

COLOURS = {"baseline": BASELINE, "better": "#2a7f4f", "worse": "#b5432a",
           "equivalent": "#3b6fb6"}  # of verdicts


def draw(folder, view, tuning=()):
    """Writes the plots that there is something to show in; yields their paths. tuning: the Arms of
    the runs that options were chosen by."""
    mixers = {label: records[0].config["mixer"] for label, records in view.groups.items()}
    looks = looks_of(mixers, view.baseline)
    yield save(folder / "verdicts.png", verdict_plot(view, looks))
    yield save(folder / "loss.png", curves.over_training(view, looks))
    if any(line.state_bytes is not None for line in view.lines):
        yield save(folder / "state.png", loss_over_state(view, looks))
    trained = {label: not_diverged(records) for label, records in view.groups.items()}
    if all(r.scores["by_position"] for records in trained.values() for r in records):
        yield save(folder / "position.png", curves.over_position(view, looks))
    if tuning:
        yield save(folder / "rates.png", curves.over_rate(view, tuning))


# Verdicts -------------------------------------------------------------------------------------

def verdict_plot(view, looks):
    lines = view.lines
    figure = Figure(figsize=(WIDTH, 1.2 + 0.26 * len(lines)), layout="constrained")
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
        colour = looks[line.mixer]["color"]
        draw_losses(ax, row, line, losses, colour)
        if line.mixer in beyond:
            ax.annotate(f"{line.loss:.3f} \N{RIGHTWARDS ARROW}", (1, row), (-4, 0),
                        xycoords=("axes fraction", "data"), textcoords="offset points",
                        ha="right", va="center", fontsize=FONT, color=colour)
    draw_references(ax.axvline, shown)
    right = ax.twinx()
    for side, texts in ((ax, [plain(line.mixer) for line in lines]),
                        (right, [beside(line) for line in lines])):
        side.set_yticks(range(len(lines)), texts)
        side.set_ylim(len(lines) - 0.5, -0.5)
        side.tick_params(labelsize=FONT + 1)
    for text, line in zip(right.get_yticklabels(), lines):
        text.set_color(COLOURS.get(line.word, "0.4"))
    right.tick_params(length=0)
    figure.suptitle(plain(view.title), fontsize=FONT + 1)
    words = "loss on the report data, nats per target: each seed, and the mean's 95 % interval"
    ax.set_xlabel(f"{words}\n{references_in_words(view.references, shown)}", fontsize=FONT + 1)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    return figure


def beside(line):
    """What stands at the right end of a row."""
    if line.word == "baseline":
        return line.word
    return f"{line.difference:+.3f} {in_words(line)}"


def draw_losses(ax, row, line, losses, colour):
    """A row: the seeds' losses, and their mean's interval."""
    half = line.loss_interval or 0
    if line.word == "baseline" and half:
        ax.axvspan(line.loss - half, line.loss + half, color="0.9", zorder=0)
    ax.errorbar(line.loss, row, xerr=line.loss_interval, fmt="none", color=colour, capsize=3,
                zorder=2)
    ax.plot(losses, [row] * len(losses), "o", color=colour, markersize=4, alpha=0.6, zorder=3)


# State ----------------------------------------------------------------------------------------

def loss_over_state(view, looks):
    """A mixer that does not say what its state takes is named below."""
    lines = [line for line in view.lines if line.state_bytes is not None]
    figure, [[ax]] = new_figure(5)
    far = outlying({line.mixer: [line.loss] for line in lines})
    beyond = [line for line in lines if line.mixer in far]
    sizes = [line.state_bytes for line in lines if line.state_bytes] or [1]
    nothing = min(sizes) / 8  # where a state of no bytes stands
    for line in [line for line in lines if line not in beyond]:
        ax.errorbar(line.state_bytes or nothing, line.loss, yerr=line.loss_interval, fmt="o",
                    color=looks[line.mixer]["color"], capsize=2, markersize=5)
    ax.set_xscale("log", base=2)
    ticks = doublings(min(sizes), max(sizes))
    is_nothing = any(not line.state_bytes for line in lines)
    ax.set_xlim((nothing if is_nothing else min(sizes)) / 3, max(sizes) * 4)
    plain_ticks(ax.xaxis, ticks)
    ax.set_xticklabels(map(in_bytes, ticks))
    if is_nothing:
        ax.set_xticks([nothing, *ticks], ["none", *map(in_bytes, ticks)])
    ax.margins(y=0.08)
    ax.set_ylim(ax.get_ylim())
    points, top = [], ax.get_ylim()[1]
    for line in lines:
        y, half, name = line.loss, line.loss_interval or 0, line.mixer
        if line in beyond:
            y, half, name = top, 0, f"{name} {line.loss:.3f} \N{UPWARDS ARROW}"
        points.append((line.state_bytes or nothing, y, name, looks[line.mixer]["color"], half))
    label_points(ax, points)
    figure.suptitle(plain(view.title), fontsize=FONT + 1)
    words = "state of one sequence at the end of the context"
    unknown = [line.mixer for line in view.lines if line.state_bytes is None]
    if unknown:
        words += f"\nmissing, as their state_bytes are not known: {', '.join(map(plain, unknown))}"
    ax.set_xlabel(words, fontsize=FONT + 1)
    ax.set_ylabel("loss on the report data, nats per target: mean, 95 % interval",
                  fontsize=FONT + 1)
    return figure
