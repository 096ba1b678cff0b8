"""What a benchmark found, mixer against length, from its record. Run: python -m tools.bench_table

    python -m tools.bench_table out/bench       what bench.py has measured there, by the last code
    python -m tools.bench_table results/speed   a record: its cells.jsonl, packed as cells.gz

A table for each mode and batch, in Markdown: softmax's times, those of the others over softmax's
(the median over the rounds, with the least and the most of them), the exponent of the time over the
longest lengths, and the length from which on a mixer is as fast as softmax.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import sys
from pathlib import Path
from statistics import median

from base.command_line import paths_and_options
from base.errors import BadInput, exit_on_bad_input, printable
from base.files import JSON_BYTES, exists, read_bytes
from base.options import checked
from tools.bench_results import REMEDY, rows_of
from tools.bench_scaling import ratios_of_rounds, scaling, summary
from tools.records import unpack

MACHINE = "machine", "device", "threads", "torch", "dtype", "code"
MODEL = "arch", "n_layer", "n_head", "n_embd"


@checked
class TableOptions:
    pass


def read_rows(folder):
    """The rows of a benchmark's record. BadInput if there is none."""
    path = Path(folder) / "cells.jsonl"
    packed = path.with_name("cells.gz")
    if exists(packed):
        return rows_of(packed, unpack(packed))
    if not exists(path):
        raise BadInput(f"{printable(str(folder))} has no cells.jsonl or cells.gz; name a "
                       "folder that bench.py wrote into")
    return rows_of(path, read_bytes(path, JSON_BYTES, REMEDY))


def groups_of(rows):
    """{(mode, batch): {length: {mixer: its rows}}} in the order measured. Of rows by several
    machines, codes or sizes of a model those like the last."""
    groups = {}
    for row in rows:
        cell = row["cell"]
        if setting(cell) == setting(rows[-1]["cell"]):
            lengths = groups.setdefault((cell["mode"], cell["batch"]), {})
            lengths.setdefault(cell["length"], {}).setdefault(cell["mixer"], []).append(row)
    return groups


def setting(cell):
    return [cell.get(name) for name in MACHINE] + [cell["model"].get(name) for name in MODEL]


def table_of(mode, batch, lengths):
    """The lines of a table. lengths: {length: {mixer: rows}}."""
    summaries = []
    cells = {}  # (mixer, length) -> what the table says
    for length, mixers in lengths.items():
        of_softmax = mixers.get("softmax", [])
        for mixer, rows in mixers.items():
            line = summary(rows[0]["cell"], rows, of_softmax)
            summaries.append(line)
            cells[mixer, length] = entry(line, ratios_of_rounds(rows, of_softmax))
    head = [f"{mode}, batch {batch}", *(f"{length:,}" for length in lengths), "exponent",
            "as fast as softmax"]
    lines = [row_of(head), row_of(["---"] * len(head))]
    for of_mixer in scaling(summaries):
        mixer, exponent = of_mixer["mixer"], of_mixer["time_exponent"]
        lines.append(row_of([
            mixer, *(cells.get((mixer, length), "") for length in lengths),
            "n/a" if exponent is None else f"{exponent:.2f}",
            "" if mixer == "softmax" else of_mixer["faster_than_softmax"]]))
    return lines


def row_of(entries):
    return f"| {' | '.join(entries)} |"


def entry(line, ratios):
    if line["status"] != "ok":
        return line["status"]
    if line["mixer"] == "softmax" or not ratios:
        return f"{line['ms']:,.3g} ms"
    return f"{line['of_softmax']:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def machine_of(rows):
    """What was measured on, in words."""
    cell = rows[-1]["cell"]
    model = cell["model"]
    ceilings = [row["ceiling_flops_per_s"] for row in rows if row.get("ceiling_flops_per_s")]
    words = (f"{cell['machine']}, {cell['device']}, {cell['threads']} threads, PyTorch "
             f"{cell['torch']}, {cell['dtype']}; {model['n_layer']} layers of {model['n_embd']} "
             f"channels, {model['n_head']} heads")
    if ceilings:
        words += f"; products alone: {median(ceilings) / 1e9:,.0f} GFLOP/s"
    return words


@exit_on_bad_input("bench_table")
def main():
    paths, _, _ = paths_and_options(TableOptions, sys.argv[1:], __doc__.splitlines()[0])
    if len(paths) != 1:
        raise BadInput("name one folder that bench.py wrote into, for example out/bench")
    rows = read_rows(paths[0])
    if not rows:
        raise BadInput(f"{printable(paths[0])} has no measurements yet")
    print(printable(machine_of(rows)))
    for (mode, batch), lengths in groups_of(rows).items():
        print()
        print("\n".join(printable(line) for line in table_of(mode, batch, lengths)))


if __name__ == "__main__":
    main()
