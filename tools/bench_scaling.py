"""What bench.py's figures say about the sequence length T: medians, ratios to softmax, exponents,
crossovers.

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
from base.terminal import fitting

FITTED = 3  # the longest lengths; at short ones what does not depend on T dominates

NAMES = ("mode", "batch", "length", "mixer")
MEASURED = ("first_token_ms", "peak_bytes", "rise_bytes", "ceiling_flops_per_s",
            "ceiling_bytes_per_s")
KNOWN = ("state_bytes", "flops_per_token", "read_bytes_per_token", "parameters")
COLUMNS = (*NAMES, "status", "error", "rounds", "ms", "ms_p20", "ms_p80", "ms_of_rounds",
           *MEASURED, *KNOWN, "tokens_per_s", "ms_per_token", "of_softmax", "of_ceiling")
IN_TABLE = {  # column: (characters, what it shows, its form, its unit)
    "length": (7, "length", ",", 1),
    "mixer": (21, "mixer", "", 1),
    "ms": (9, "ms", ",.2f", 1),
    "[p20, p80]": (19, "ms_p20", ",.2f", 1),
    "of softmax": (10, "of_softmax", ".2f", 1),
    "tokens/s": (10, "tokens_per_s", ",.0f", 1),
    "first ms": (9, "first_token_ms", ",.1f", 1),
    "peak MiB": (9, "peak_bytes", ",.1f", 2**20),
    "rise MiB": (9, "rise_bytes", ",.1f", 2**20),
    "state KiB": (9, "state_bytes", ",.1f", 2**10),
    "MFLOP/tok": (9, "flops_per_token", ",.2f", 1e6),
    "ceiling GFLOP/s": (15, "ceiling_flops_per_s", ",.0f", 1e9),
    "read KiB/tok": (12, "read_bytes_per_token", ",.1f", 2**10),
    "ceiling GB/s": (12, "ceiling_bytes_per_s", ",.1f", 1e9),
    "of ceiling": (10, "of_ceiling", ".1%", 1),
}
FIRST = ("length", "mixer", "ms", "of softmax", "[p20, p80]", "rise MiB", "tokens/s", "of ceiling",
         "state KiB", "first ms")  # what a narrow terminal shows rather


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
    # a token of training or prefill computes, one that is decoded reads
    work, ceiling = "flops_per_token", "ceiling_flops_per_s"
    if cell["mode"] == "decode":
        work, ceiling = "read_bytes_per_token", "ceiling_bytes_per_s"
    if line[work]:
        line["of_ceiling"] = median(
            1e3 * tokens * row[work] / row["ms"] / row[ceiling] for row in measured)
    return line


def ratio(rows, softmax_rows):
    """The median of ratios_of_rounds, or None."""
    ratios = ratios_of_rounds(rows, softmax_rows)
    return median(ratios) if ratios else None


def ratios_of_rounds(rows, softmax_rows):
    """Each row's time over that of softmax which was measured nearest in time; what failed has
    none."""
    softmax_rows = [row for row in softmax_rows if row["status"] == "ok"]
    ratios = []
    for row in rows:
        if row["status"] == "ok" and softmax_rows:
            nearest = min(softmax_rows, key=lambda other: abs(other["time"] - row["time"]))
            ratios.append(row["ms"] / nearest["ms"])
    return ratios


def columns_for(width):
    """The columns of IN_TABLE that fit into so many characters; None: all."""
    if width is None:
        return list(IN_TABLE)
    return fitting({name: column[0] for name, column in IN_TABLE.items()}, width, FIRST, gap=1)


def table_head(names):
    return " ".join(padded(name, name) for name in names)


def padded(name, text):
    width = IN_TABLE[name][0]
    return f" {text:<{width - 1}}" if name == "mixer" else f"{text:>{width}}"


def table_line(line, names):
    if line["status"] != "ok":
        start = " ".join(padded(name, in_table(line, name)) for name in ("length", "mixer"))
        error = f": {printable(line['error'])}" if line["error"] else ""
        return f"{start} {line['status']:>9}{error}"
    return " ".join(padded(name, in_table(line, name)) for name in names)


def in_table(line, name):
    _, key, form, unit = IN_TABLE[name]
    if name == "mixer":
        return line[key]
    if line[key] is None:
        return "n/a"
    if name == "[p20, p80]":
        return f"[{line['ms_p20']:,.2f}, {line['ms_p80']:,.2f}]"
    return format(line[key] / unit, form) if unit != 1 else format(line[key], form)


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
