"""The pictures of bench.py: a mode and batch each, over the sequence length T."""
from matplotlib import ticker
from matplotlib.figure import Figure

from base.errors import printable
from tools.drawing import FONT, WIDTH, label_ends, looks_of, plain, plain_ticks, save

PANELS = {"first_token_ms": "time to first token (ms)", "ms_per_token": "time per token (ms)",
          "tokens_per_s": "tokens/s", "rise_bytes": "memory of a step (MiB)"}
LINE, LETTER = 13, 5  # points that a line of the scaling takes, and a letter at most


def plot(path, table, lines, title):
    """Writes the picture of one mode and batch: `table` and `lines` hold its cells and its
    scaling. A mixer has its colour, softmax is black."""
    decoding = table[0]["mode"] == "decode"
    panels = list(PANELS) if decoding else list(PANELS)[1:]
    looks = looks_of({line["mixer"]: line["mixer"] for line in lines}, "softmax")
    words = LINE / 72 * (len(lines) + 2)  # inches that the scaling takes
    if decoding:  # there it is below the panels, otherwise beside the third of them
        rows, heights = [panels[:2], panels[2:], ["words", "words"]], [3.1, 3.1, words]
    else:
        rows, heights = [panels[:2], [panels[2], "words"]], [3.1, max(3.1, words)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained")
    axes = figure.subplot_mosaic(rows, gridspec_kw={"height_ratios": heights})
    for column in panels:
        axes[column].tick_params(labelsize=FONT)
        axes[column].grid(alpha=0.3)
        axes[column].set_axisbelow(True)
        axes[column].set_xlabel("length T (tokens)", fontsize=FONT)
        axes[column].set_ylabel(PANELS[column], fontsize=FONT)
        draw(axes[column], table, lines, column, looks)
    write_scaling(axes["words"], lines, "step" if decoding else "total", looks)
    figure.suptitle(plain(title), fontsize=FONT + 1)
    return save(path, figure)


def draw(axis, table, lines, column, looks):
    """A column of the table over the length, a curve for each mixer."""
    unit = 2**20 if column == "rise_bytes" else 1
    ends = {}
    for line in lines:
        mixer, points = line["mixer"], []
        for cell in table:
            if cell["mixer"] == mixer and cell[column] is not None and cell[column] > 0:
                points.append((cell["length"], cell[column] / unit))
        if points:
            axis.plot(*zip(*points), marker="o", markersize=4, label=plain(mixer), **looks[mixer])
            ends[printable(mixer)] = *points[-1], looks[mixer]["color"]
    if not ends:
        return  # nothing here that a logarithmic axis could show
    axis.set(xscale="log", yscale="log")
    plain_ticks(axis.xaxis, sorted({cell["length"] for cell in table}), "{:,}")
    if len(axis.get_xticks()) > 5:
        axis.tick_params(axis="x", rotation=45)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.set_ylim(axis.get_ylim())
    label_ends(axis, ends)


def write_scaling(axis, lines, time_of, looks):
    """How time and memory grow, a line a mixer, in columns."""
    fitted = sorted({T for line in lines for T in (*line["time_lengths"], *line["memory_lengths"])})
    rows = [("black", "", f"{time_of} time", "memory", "faster than softmax")]
    for line in lines:
        colour = looks[line["mixer"]]["color"]
        faster, _, _ = line["faster_than_softmax"].partition(", ")  # at all lengths
        faster = "" if line["mixer"] == "softmax" else faster
        rows.append((colour, plain(line["mixer"]), power(line["time_exponent"]),
                     power(line["memory_exponent"]), faster))
    longest = max(len(row[1]) for row in rows)
    starts = [0, *(LETTER * longest + x for x in (6, 54, 94))]
    over = ", ".join(f"{T:,}" for T in fitted)
    first = f"growth fitted over T = {over}" if over else "too few lengths for a fit"
    axis.set_axis_off()
    for number, (colour, *cells) in enumerate([("black", first), *rows], start=1):
        for x, cell in zip(starts, cells):
            axis.annotate(cell, (0, 1), (x, -LINE * number), xycoords="axes fraction",
                          textcoords="offset points", fontsize=FONT, color=colour)


def power(exponent):
    return "n/a" if exponent is None else f"T^{exponent:.2f}"
