"""The picture of tools/ladder.py: each arm's difference from the baseline, at one size beside the
other."""
from itertools import groupby

from tools.compare_plots import COLOURS
from tools.drawing import FONT, new_figure, plain
from tools.verdicts import in_words


def differences(ladder):
    """A Figure of [[Rung] of a size], the baseline first in each. A panel a size, a row an arm."""
    labels = []  # those of the largest size first, the best at the top
    for rungs in reversed(ladder):
        labels += [rung.label for rung in rungs[1:] if rung.label not in labels]
    figure, [axes] = new_figure(1.1 + 0.24 * len(labels), 1, len(ladder), sharey=True)
    lows, highs = zip(*(reach(rung) for rungs in ladder for rung in rungs[1:]))
    low, high = min(lows), max(highs)
    room = high - low  # of which the words take a part
    for ax, rungs in zip(axes, ladder):
        baseline = rungs[0]
        ax.axvspan(-baseline.margin, baseline.margin, color="0.93", zorder=0)
        ax.axvline(0, color="black", linewidth=1)
        for rung in rungs[1:]:
            draw(ax, labels.index(rung.label), rung)
        ax.set_title(f"{baseline.parameters / 1e6:.2g}M parameters\n{plain(baseline.label)} "
                     f"{baseline.loss:.3f}", fontsize=FONT + 1)
        ax.set_xlim(low - 0.05 * room, high + 0.5 * room)
    axes[0].set_yticks(range(len(labels)), [shortened(label) for label in labels])
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel(f"loss minus {plain(ladder[0][0].label)}'s, nats per target, and the interval "
                     "of its verdict; grey: the margin of equivalence", fontsize=FONT + 1)
    return figure


def shortened(label):
    """The same mixer in layer after layer as one word: a+a+b as 2 a+b."""
    parts = []
    for name, same in groupby(label.split("+")):
        count = len(list(same))
        parts.append(f"{count} {name}" if count > 1 else name)
    return plain("+".join(parts))


def reach(rung):
    """From where to where a Rung's row goes."""
    verdict = rung.verdict
    if verdict.difference_low is None:
        return verdict.difference, verdict.difference
    return verdict.difference_low, verdict.difference_high


def draw(ax, row, rung):
    verdict = rung.verdict
    colour = COLOURS.get(verdict.word, "0.4")
    low, high = reach(rung)
    ax.plot([low, high], [row, row], color=colour, linewidth=1.4)
    ax.plot(verdict.difference, row, "o", color=colour, markersize=5)
    ax.annotate(in_words(verdict), (high, row), (4, 0), textcoords="offset points", fontsize=FONT,
                color=colour, va="center")
