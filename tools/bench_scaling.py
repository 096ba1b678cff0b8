"""What bench.py's figures say about the sequence length T: medians, ratios to softmax, exponents,
crossovers, plots.

An exponent is the slope of log(total time), or log(memory), over log(T) through the longest
lengths, at most FITTED. The crossover is the length from which on a mixer is as fast as softmax up
to the longest measured, interpolated between lengths in logarithms.
"""
import csv
import io
import math
from statistics import median

import numpy as np

from base.errors import printable
from base.files import write_file

FITTED = 3  # the longest lengths; at short ones what does not depend on T dominates

NAMES = ("mode", "batch", "length", "mixer")
MEASURED = ("first_token_ms", "peak_bytes", "rise_bytes", "ceiling_flops_per_s")
KNOWN = ("state_bytes", "flops_per_token", "parameters")
COLUMNS = (*NAMES, "status", "error", "rounds", "ms", "ms_p20", "ms_p80", "ms_of_rounds",
           *MEASURED, *KNOWN, "tokens_per_s", "ms_per_token", "of_softmax", "of_ceiling")
TABLE_HEAD = (
    f"{'length':>7}  {'mixer':<20} {'ms':>9} {'[p20, p80]':>19} {'of softmax':>10} "
    f"{'tokens/s':>10} {'first ms':>9} {'peak MiB':>9} {'rise MiB':>9} {'state KiB':>9} "
    f"{'MFLOP/tok':>9} {'of ceiling':>10}")


# The table ----------------------------------------------------------------------------------------

def summary(cell, rows, softmax_rows):
    """One cell's line of the results, from its rows of all rounds. What is not known is None.

    Times are quantiles of the repeats of all rounds put together, each round weighing the same, so
    that p20 and p80 hold the spread between processes too; the rest is a median over rounds."""
    measured = [row for row in rows if row["status"] == "ok"]
    line = dict.fromkeys(COLUMNS)
    for name in NAMES:
        line[name] = cell[name]
    line["rounds"] = len(measured)
    if not measured:
        line["status"] = rows[-1]["status"]
        line["error"] = rows[-1].get("error")
        return line
    line["status"] = "ok"
    for name in KNOWN:
        line[name] = measured[0][name]
    for name in MEASURED:
        if measured[0][name] is not None:
            line[name] = median(row[name] for row in measured)
    repeats = np.concatenate([row["ms_quantiles"] for row in measured])  # as many of each round
    line["ms_p20"], line["ms"], line["ms_p80"] = np.percentile(repeats, [20, 50, 80]).tolist()
    line["ms_of_rounds"] = [row["ms"] for row in measured]
    if cell["mode"] == "decode":
        tokens = cell["batch"]  # of one measured step
        line["ms_per_token"] = line["ms"]  # what a reader of one sequence waits for
    else:
        tokens = cell["batch"] * cell["length"]
        line["ms_per_token"] = line["ms"] / tokens
    line["tokens_per_s"] = 1e3 * tokens / line["ms"]
    line["of_softmax"] = ratio(measured, softmax_rows)
    if line["flops_per_token"]:
        line["of_ceiling"] = median(
            1e3 * tokens * row["flops_per_token"] / row["ms"] / row["ceiling_flops_per_s"]
            for row in measured)
    return line


def ratio(rows, softmax_rows):
    """The median of each row's time over that of softmax which was measured nearest in time."""
    softmax_rows = [row for row in softmax_rows if row["status"] == "ok"]
    if not softmax_rows:
        return None
    ratios = []
    for row in rows:
        distances = [abs(other["time"] - row["time"]) for other in softmax_rows]
        nearest = softmax_rows[distances.index(min(distances))]
        ratios.append(row["ms"] / nearest["ms"])
    return median(ratios)


def table_line(line):
    start = f"{line['length']:>7,}  {line['mixer']:<20} "
    if line["status"] != "ok":
        error = f": {printable(line['error'])}" if line["error"] else ""
        return start + f"{line['status']:>9}{error}"

    def value_of(name, form, unit=1):
        return "n/a" if line[name] is None else format(line[name] / unit, form)

    spread = f"[{line['ms_p20']:,.2f}, {line['ms_p80']:,.2f}]"
    return start + " ".join([
        f"{line['ms']:>9,.2f}",
        f"{spread:>19}",
        f"{value_of('of_softmax', '.2f'):>10}",
        f"{line['tokens_per_s']:>10,.0f}",
        f"{value_of('first_token_ms', ',.1f'):>9}",
        f"{value_of('peak_bytes', ',.1f', 2**20):>9}",
        f"{value_of('rise_bytes', ',.1f', 2**20):>9}",
        f"{value_of('state_bytes', ',.1f', 2**10):>9}",
        f"{value_of('flops_per_token', ',.2f', 1e6):>9}",
        f"{value_of('of_ceiling', '.1%'):>10}",
    ])


def write_csv(path, table):
    """The table as CSV; the times of rounds are joined by spaces."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for line in table:
        of_rounds = [f"{ms:.4g}" for ms in line["ms_of_rounds"] or []]
        writer.writerow(line | {"ms_of_rounds": " ".join(of_rounds)})
    write_file(path, text.getvalue().encode())


# Over the length ----------------------------------------------------------------------------------

def exponent(values):
    """(slope, lengths) of {length: value} in logarithms over the FITTED longest lengths; None for
    fewer than two."""
    points = []
    for T in sorted(values):
        if values[T] is not None and values[T] > 0:
            points.append((T, values[T]))
    points = points[-FITTED:]
    if len(points) < 2:
        return None, []
    log_T, log_value = np.log(np.array(points, dtype=float)).T
    return np.polyfit(log_T, log_value, 1)[0].item(), [T for T, _ in points]


def crossover(ratios):
    """(length or None, words) for {length: time over softmax's}."""
    lengths = sorted(ratios)
    if not lengths:
        return None, "n/a"
    slower = [i for i, T in enumerate(lengths) if ratios[T] > 1]
    if not slower:
        return lengths[0], f"at all lengths, from {lengths[0]:,} on"
    if slower[-1] == len(lengths) - 1:
        return None, f"none up to {lengths[-1]:,}"
    before = lengths[slower[-1]]
    after = lengths[slower[-1] + 1]
    share = math.log(ratios[before]) / math.log(ratios[before] / ratios[after])
    T = before * (after / before) ** share
    return T, f"from {T:,.0f} on"


def scaling(table):
    """A line (dict) for each mode, batch and mixer: how its time and memory go with the length, and
    where it passes softmax."""
    series = {}  # (mode, batch, mixer) -> lines of the table that were measured
    for line in table:
        of_one = series.setdefault((line["mode"], line["batch"], line["mixer"]), [])
        if line["status"] == "ok":
            of_one.append(line)
    lines = []
    for (mode, batch, mixer), of_one in series.items():
        time = {line["length"]: line["ms"] for line in of_one}
        memory = {line["length"]: line["rise_bytes"] for line in of_one}
        ratios = {line["length"]: line["of_softmax"] for line in of_one if line["of_softmax"]}
        time_exponent, time_lengths = exponent(time)
        memory_exponent, memory_lengths = exponent(memory)
        T, words = crossover({} if mixer == "softmax" else ratios)
        lines.append({
            "mode": mode, "batch": batch, "mixer": mixer,
            "time_exponent": time_exponent, "time_lengths": time_lengths,
            "memory_exponent": memory_exponent, "memory_lengths": memory_lengths,
            "crossover": T, "faster_than_softmax": words,
        })
    return lines


def power(exponent, lengths):
    if not lengths:
        return "n/a"
    return f"T^{exponent:.2f} over {', '.join(f'{T:,}' for T in lengths)}"


def scaling_line(line):
    time = power(line["time_exponent"], line["time_lengths"])
    memory = power(line["memory_exponent"], line["memory_lengths"])
    return (f"{line['mode']:<8} batch {line['batch']:<4} {line['mixer']:<20} time {time}; "
            f"memory {memory}; faster than softmax: {line['faster_than_softmax']}")


# The picture --------------------------------------------------------------------------------------

def plot(path, table, lines, title):
    """A log-log picture of one mode and batch: `table` and `lines` hold its cells and its scaling.
    A mixer keeps its colour."""
    import matplotlib  # takes a second, which the cells' processes need not spend
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    decoding = table[0]["mode"] == "decode"
    panels = {"ms_per_token": "time per token (ms)", "tokens_per_s": "tokens/s",
              "rise_bytes": "memory of a step (MiB)"}
    if decoding:
        panels = {"first_token_ms": "time to first token (ms)"} | panels
    size = (4.2 * len(panels), 4.2 + 0.18 * len(lines))
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (column, label) in zip(axes, panels.items()):
        axis.set(xlabel="length T (tokens)", ylabel=label)
        draw(axis, table, lines, column)
    labels = [legend(line, "step" if decoding else "total") for line in lines]
    figure.legend(axes[0].lines, labels, loc="outside lower center", fontsize=8,
                  ncols=2 if len(lines) > 7 else 1)
    fitted = set()
    for line in lines:
        fitted.update(line["time_lengths"], line["memory_lengths"])
    over = ", ".join(f"{T:,}" for T in sorted(fitted)) or "n/a"
    figure.suptitle(f"{title}\nexponents fitted over T = {over}", fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, dpi=130)
    plt.close(figure)
    write_file(path, content.getvalue())


def draw(axis, table, lines, column):
    """A column of the table over the length, a curve for each mixer."""
    from matplotlib import colormaps, ticker

    unit = 2**20 if column == "rise_bytes" else 1
    anything = False
    for i, line in enumerate(lines):
        lengths, values = [], []
        for cell in table:
            if cell["mixer"] == line["mixer"] and cell[column] is not None and cell[column] > 0:
                lengths.append(cell["length"])
                values.append(cell[column] / unit)
        colour = f"C{i}" if len(lines) <= 10 else colormaps["tab20"](i % 20)
        axis.plot(lengths, values, "o-", markersize=4, color=colour)
        anything = anything or bool(values)
    if not anything:
        return  # nothing here that a logarithmic axis could show
    ticks = sorted({cell["length"] for cell in table})
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(ticks, [f"{T:,}" for T in ticks], rotation=45 if len(ticks) > 5 else 0)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def legend(line, time_of):
    def short(exponent):
        return "n/a" if exponent is None else f"T^{exponent:.2f}"

    words = (f"{line['mixer']}: {time_of} time {short(line['time_exponent'])}, "
             f"memory {short(line['memory_exponent'])}")
    if line["mixer"] == "softmax":
        return words
    return f"{words}, faster than softmax: {line['faster_than_softmax']}"
