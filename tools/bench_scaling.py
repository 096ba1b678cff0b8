"""What bench.py's figures say about the sequence length T: medians, ratios to softmax, exponents, crossovers, plots.

An exponent is the slope of log(total time), or log(memory), over log(T) through the longest lengths, at most FITTED. The crossover
is the length from which on a mixer is as fast as softmax up to the longest measured, interpolated between lengths in logarithms.
"""
import csv
import math
from statistics import median

import numpy as np

FITTED = 3  # the longest lengths; at short ones what does not depend on T dominates

MEASURED = ("first_token_ms", "peak_bytes", "rise_bytes", "ceiling_flops_per_s")
KNOWN = ("state_bytes", "flops_per_token", "parameters")
COLUMNS = ("mode", "batch", "length", "mixer", "status", "rounds", "ms", "ms_p20", "ms_p80", "ms_of_rounds", *MEASURED, *KNOWN,
           "tokens_per_s", "ms_per_token", "of_softmax", "of_ceiling")
TABLE_HEAD = (f"{'length':>7}  {'mixer':<20} {'ms':>9} {'[p20, p80]':>19} {'of softmax':>10} {'tokens/s':>10} {'first ms':>9} "
              f"{'peak MiB':>9} {'rise MiB':>9} {'state KiB':>9} {'MFLOP/tok':>9} {'of ceiling':>10}")


def summary(cell, rows, softmax_rows):
    """One cell's line of the results, from its rows of all rounds. What is not known is None.

    Times are quantiles of the repeats of all rounds, each round weighing the same, everything else is a median over rounds."""
    measured = [row for row in rows if row["status"] == "ok"]
    softmax_rows = [row for row in softmax_rows if row["status"] == "ok"]
    line = dict.fromkeys(COLUMNS) | {key: cell[key] for key in ("mode", "batch", "length", "mixer")}
    line |= {"status": "ok" if measured else rows[-1]["status"], "rounds": len(measured)}
    if not measured:
        return line
    line |= {key: measured[0][key] for key in KNOWN}
    line |= {key: None if measured[0][key] is None else median(row[key] for row in measured) for key in MEASURED}
    decoding = cell["mode"] == "decode"
    tokens = cell["batch"] * (1 if decoding else cell["length"])  # of one measured step
    p20, ms, p80 = np.percentile([ms for row in measured for ms in row["ms_quantiles"]], [20, 50, 80]).tolist()
    line |= {"ms": ms, "ms_p20": p20, "ms_p80": p80, "ms_of_rounds": [row["ms"] for row in measured]}
    line |= {"tokens_per_s": 1e3 * tokens / ms,
             "ms_per_token": ms if decoding else ms / tokens}  # decoding: what a reader of one sequence waits for
    if softmax_rows:  # each round against the one of softmax that was measured nearest in time
        nearest = [min(softmax_rows, key=lambda other: abs(other["time"] - row["time"])) for row in measured]
        line["of_softmax"] = median(row["ms"] / other["ms"] for row, other in zip(measured, nearest))
    if line["flops_per_token"]:
        line["of_ceiling"] = median(1e3 * tokens * row["flops_per_token"] / row["ms"] / row["ceiling_flops_per_s"] for row in measured)
    return line


def table_line(line):
    shown = lambda key, form, scale=1: "n/a" if line[key] is None else format(line[key] / scale, form)
    start = f"{line['length']:>7,}  {line['mixer']:<20} "
    if line["status"] != "ok":
        return start + f"{line['status']:>9}"
    spread = f"[{line['ms_p20']:,.2f}, {line['ms_p80']:,.2f}]"
    return start + (f"{line['ms']:>9,.2f} {spread:>19} {shown('of_softmax', '.2f'):>10} {line['tokens_per_s']:>10,.0f} "
                    f"{shown('first_token_ms', ',.1f'):>9} {shown('peak_bytes', ',.1f', 2**20):>9} {shown('rise_bytes', ',.1f', 2**20):>9} "
                    f"{shown('state_bytes', ',.1f', 2**10):>9} {shown('flops_per_token', ',.2f', 1e6):>9} {shown('of_ceiling', '.1%'):>10}")


def exponent(values):
    """(slope, lengths) of {length: value} in logarithms over the FITTED longest lengths; None for fewer than two."""
    points = [(T, value) for T, value in sorted(values.items()) if value is not None and value > 0][-FITTED:]
    if len(points) < 2:
        return None, []
    T, value = np.log(np.array(points, dtype=float)).T
    return np.polyfit(T, value, 1)[0].item(), [T for T, _ in points]


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
    before, after = lengths[slower[-1]], lengths[slower[-1] + 1]
    share = math.log(ratios[before]) / math.log(ratios[before] / ratios[after])
    T = before * (after / before) ** share
    return T, f"from {T:,.0f} on"


def scaling(table):
    """A line for each mode, batch and mixer: how its time and memory go with the length, and where it passes softmax."""
    lines = []
    for mode, batch, mixer in dict.fromkeys((line["mode"], line["batch"], line["mixer"]) for line in table):
        own = {line["length"]: line for line in table
               if (line["mode"], line["batch"], line["mixer"], line["status"]) == (mode, batch, mixer, "ok")}
        time_exponent, time_lengths = exponent({T: line["ms"] for T, line in own.items()})
        memory_exponent, memory_lengths = exponent({T: line["rise_bytes"] for T, line in own.items()})
        ratios = {T: line["of_softmax"] for T, line in own.items() if line["of_softmax"]}
        T, words = crossover({} if mixer == "softmax" else ratios)
        lines.append({"mode": mode, "batch": batch, "mixer": mixer, "time_exponent": time_exponent, "time_lengths": time_lengths,
                      "memory_exponent": memory_exponent, "memory_lengths": memory_lengths, "crossover": T, "faster_than_softmax": words})
    return lines


def power(exponent, lengths):
    return f"T^{exponent:.2f} over {', '.join(f'{T:,}' for T in lengths)}" if lengths else "n/a"


def scaling_line(line):
    return (f"{line['mode']:<8} batch {line['batch']:<4} {line['mixer']:<20} time {power(line['time_exponent'], line['time_lengths'])}; "
            f"memory {power(line['memory_exponent'], line['memory_lengths'])}; faster than softmax: {line['faster_than_softmax']}")


def write_csv(path, table):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(line | {"ms_of_rounds": " ".join(f"{ms:.4g}" for ms in line["ms_of_rounds"] or [])} for line in table)


def plot(path, table, lines, title):
    """A log-log picture of one mode and batch: `table` and `lines` hold its cells and its scaling. A mixer keeps its colour."""
    import matplotlib  # takes a second, which the cells' processes need not spend
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker
    panels = {"ms_per_token": "time per token (ms)", "tokens_per_s": "tokens/s", "rise_bytes": "memory of a step (MiB)"}
    if table[0]["mode"] == "decode":
        panels = {"first_token_ms": "time to first token (ms)"} | panels
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.2 + 0.18 * len(lines)), layout="constrained")
    lengths = sorted({line["length"] for line in table})
    for axis, (key, label) in zip(axes, panels.items()):
        for i, line in enumerate(lines):
            scale = 2**20 if key == "rise_bytes" else 1
            points = [(cell["length"], cell[key] / scale) for cell in table
                      if cell["mixer"] == line["mixer"] and cell[key] is not None and cell[key] > 0]
            axis.plot(*zip(*points) if points else ((), ()), "o-", markersize=4, color=f"C{i}" if len(lines) <= 10 else plt.cm.tab20(i % 20))
        axis.set(xlabel="length T (tokens)", ylabel=label)
        if not any(len(line.get_xdata()) for line in axis.lines):
            continue  # nothing here that a logarithmic axis could show
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(lengths, [f"{T:,}" for T in lengths], rotation=45 if len(lengths) > 5 else 0)
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    time_of = "step" if table[0]["mode"] == "decode" else "total"
    short = lambda exponent: "n/a" if exponent is None else f"T^{exponent:.2f}"
    labels = [f"{line['mixer']}: {time_of} time {short(line['time_exponent'])}, memory {short(line['memory_exponent'])}"
              + ("" if line["mixer"] == "softmax" else f", faster than softmax: {line['faster_than_softmax']}") for line in lines]
    figure.legend(axes[0].lines, labels, loc="outside lower center", fontsize=8, ncols=1 + (len(lines) > 7))
    fitted = sorted({T for line in lines for T in line["time_lengths"] + line["memory_lengths"]})
    figure.suptitle(f"{title}\nexponents fitted over T = {', '.join(f'{T:,}' for T in fitted) or 'n/a'}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
