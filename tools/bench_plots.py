"""The pictures of bench.py: a mode and batch each, over the sequence length T."""
from matplotlib import ticker

from base.errors import printable
from tools.drawing import FONT, label_ends, looks_of, new_figure, plain, plain_ticks, save

PANELS = {"first_token_ms": "time to first token (ms)", "ms_per_token": "time per token (ms)",
          "tokens_per_s": "tokens/s", "rise_bytes": "memory of a step (MiB)"}


def plot(path, table, lines, title):
    """Writes the picture of one mode and batch: `table` and `lines` hold its cells and its
    scaling. A mixer has its colour, softmax is black."""
    decoding = table[0]["mode"] == "decode"
    panels = list(PANELS) if decoding else list(PANELS)[1:]
    columns = 2
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(3.1 * rows + 0.6 + 0.16 * len(lines), rows, columns)
    looks = looks_of({line["mixer"]: line["mixer"] for line in lines}, "softmax")
    for axis, column in zip(axes.flat, panels):
        axis.set_xlabel("length T (tokens)", fontsize=FONT)
        axis.set_ylabel(PANELS[column], fontsize=FONT)
        draw(axis, table, lines, column, looks)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    fitted = sorted({T for line in lines for T in (*line["time_lengths"], *line["memory_lengths"])})
    over = ", ".join(f"{T:,}" for T in fitted) or "n/a"
    words = [legend(line, "step" if decoding else "total") for line in lines]
    figure.supxlabel("\n".join(map(plain, words)), fontsize=FONT)
    figure.suptitle(f"{plain(title)}\nexponents fitted over T = {over}", fontsize=FONT + 1)
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


def legend(line, time_of):
    def short(exponent):
        return "n/a" if exponent is None else f"T^{exponent:.2f}"

    words = (f"{line['mixer']}: {time_of} time {short(line['time_exponent'])}, "
             f"memory {short(line['memory_exponent'])}")
    if line["mixer"] == "softmax":
        return words
    return f"{words}, faster than softmax: {line['faster_than_softmax']}"
