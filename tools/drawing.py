"""What the pictures of the tools share: their width, a mixer's look, labels that keep clear of each
other, ticks in plain numbers, the PNG file.
"""
import io
import math

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from base.errors import printable
from base.files import write_file
from tools.colours import colour_of

WIDTH = 8.3     # inches of a picture: README shows it 830 points wide, so that a font is what it is
DPI = 120       # dots an inch; for screens with more than one to a point
BASELINE = "black"
GREY = "0.55"   # of what needs no model, and of what is not in colour
FAINT = "0.86"  # of the other curves, behind one in colour
STYLES = ("-", "--", ":", "-.")
FONT = 8
UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def save(path, figure):
    """Writes a Figure as PNG and returns the path."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI, pil_kwargs={"optimize": True})
    write_file(path, image.getvalue())
    return path


def plain(text):
    """A label as it is to be read: no control characters, and no formula between dollar signs."""
    return printable(text).replace("$", r"\$")


def looks_of(mixers, baseline):
    """{label: colour and style of its line} of {label: mixer}; arms of one mixer share its colour,
    the baseline is black."""
    looks, numbers = {}, {}
    for label, mixer in mixers.items():
        number = numbers.get(mixer, 0)
        numbers[mixer] = number + 1
        colour = BASELINE if label == baseline else colour_of(mixer)
        looks[label] = {"color": colour, "linestyle": STYLES[number % len(STYLES)]}
    return looks


def new_figure(height, rows=1, columns=1, **options):
    """(a Figure of WIDTH and that height in inches, its axes as a 2-D array)"""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.tick_params(labelsize=FONT)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return figure, axes


# What is within the frame ---------------------------------------------------------------------

def near(references, low, high):
    """Those that can be shown beside what lies from low to high, without squeezing it to less than
    half."""
    reach = high - low
    return [r for r in references if low - reach <= r.loss <= high + reach]


def outlying(losses):
    """The names, of {name: losses of an arm}, that are named at a picture's edge alone: of more
    than four arms the worst, as long as all others together would take less than a quarter of
    it."""
    left = sorted((name for name in losses if losses[name]), key=lambda name: min(losses[name]))
    found = set()
    while len(left) > 4:
        *rest, worst = left
        others = [loss for name in rest for loss in losses[name]]
        if max(losses[worst]) - min(others) <= 4 * (max(others) - min(others)):
            break
        found.add(worst)
        left = rest
    return found


def draw_references(line, references):
    """What needs no model, by `line`, ax.axhline or ax.axvline."""
    for reference, style in zip(references, STYLES[1:] * len(references)):
        line(reference.loss, color=GREY, linestyle=style, linewidth=1, zorder=1,
             label=plain(reference.name))


def references_in_words(references, shown):
    """What the lines of draw_references(line, shown) are, and what is not shown; "" for none."""
    words = []
    for reference, style in zip(shown, ("dashed", "dotted", "dash-dotted") * len(shown)):
        words.append(f"{style}: {plain(reference.name)} {reference.loss:.3f}")
    for reference in references:
        if reference not in shown:
            words.append(f"not in the picture: {plain(reference.name)} {reference.loss:.3f}")
    return "; ".join(words)


# Labels -----------------------------------------------------------------------------------------

def spread(values, gap, low, high):
    """The numbers nearest to `values` that are `gap` apart, in the same order, and from low to high
    as far as there is room."""
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(values))
    found = isotonic_regression(np.asarray(values, dtype=float)[order] - steps).x
    found = np.clip(found, low, max(low, high - gap * (len(values) - 1))) + steps
    placed = np.empty(len(values))
    placed[order] = found
    return placed


def label_ends(ax, ends):
    """Writes names at the right edge, each level with the end of its line or a little off, and
    joined to it. ends: {name: (x, y, colour)}. The limits of `ax` must be final."""
    if not ends:
        return
    ax.figure.draw_without_rendering()  # after which the height is known
    box = ax.get_window_extent()
    heights = [ax.transData.transform((x, y))[1] for x, y, _ in ends.values()]
    gap = 1.25 * FONT / 72 * ax.figure.dpi
    heights = spread(heights, gap, box.y0 + gap / 2, box.y1 - gap / 2)
    for (name, (x, y, colour)), height in zip(ends.items(), heights):
        ax.annotate(
            plain(name), (x, y), (1.03, (height - box.y0) / box.height), xycoords="data",
            textcoords="axes fraction", fontsize=FONT, color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.7,
                        "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)})


def label_points(ax, points):
    """Writes a name beside each of the points, [(x, y, name, colour, half its bar's height)], clear
    of the others and their bars and within `ax`; joined to it where it is not next to it. The
    limits of `ax` must be final."""
    ax.figure.draw_without_rendering()
    frame, taken = ax.get_window_extent(), []
    for x, y, _, _, half in points:
        left, bottom = ax.transData.transform((x, y - half))
        top = ax.transData.transform((x, y + half))[1]
        taken.append((left - 4, bottom - 4, left + 4, top + 4))
    for x, y, name, colour, _ in points:
        text = ax.annotate(plain(name), (x, y), textcoords="offset points", fontsize=FONT,
                           color=colour, va="center", xytext=(0, 0))
        for distance, angle in places():
            dx, dy = distance * math.cos(angle), distance * math.sin(angle)
            text.set_ha("left" if dx > 1 else "right" if dx < -1 else "center")
            text.set_position((dx, dy))
            box = text.get_window_extent().extents
            within = (frame.x0 < box[0] and box[2] < frame.x1
                      and frame.y0 < box[1] and box[3] < frame.y1)
            if within and not any(overlap(box, other) for other in taken):
                break
        taken.append(tuple(box))
        if distance > 10:
            ax.annotate("", (x, y), (dx, dy), textcoords="offset points", arrowprops={
                "arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.7})


def places():
    """Where a label may stand, as (distance in points, angle), the best first."""
    for distance in (7, 12, 18, 26, 36, 48, 62):
        for eighth in (0, 4, 2, 6, 1, 7, 3, 5):
            yield distance, eighth * math.pi / 4


def overlap(one, other):
    return (one[0] < other[2] and other[0] < one[2]
            and one[1] < other[3] and other[1] < one[3])


# Ticks ------------------------------------------------------------------------------------------

def plain_ticks(axis, values, form="{:,g}"):
    """Ticks at these values of a logarithmic axis, and no others."""
    axis.set_ticks(values, [form.format(value) for value in values])
    axis.set_ticks([], minor=True)


def doublings(low, high, most=8):
    """Powers of two from low to high, at most so many."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    step = max(1, -(-(last - first + 1) // most))
    return [2**power for power in range(first, last + 1, step) if 2**power <= high]


def unit_of(values):
    """(size, prefix) of the unit in which the largest of some numbers is a short one: (1e12, "T")
    of 8.6e12."""
    largest = max(values, default=1)
    return next(((size, name) for size, name in UNITS if largest >= size), UNITS[-1])


def in_bytes(count):
    """1024 as 1 KiB."""
    for unit, name in BYTES:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return "none"
