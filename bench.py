"""Speed and memory over the sequence length, for each mixer. Run: python bench.py   (ten minutes)

    python bench.py configs/shakespeare.py --mixers=softmax,lln --lengths=256,1024 --mode=train
    python bench.py --mixers=all --mode=decode --batch=1 --lengths=256,2048 --n_embd=256
    python bench.py configs/shakespeare.py --mixers=softmax,softmax+lln,mine --mixer_file=mine.py

Modes. train: forward, backward, clipping and AdamW, as train.py does it. prefill: one forward pass
over the sequence that keeps logits and state. decode: a prefix of that length, fed in pieces of
bounded size, then one token at a time on top of the state. Tokens are random; positions are RoPE
or none, so that the length adds no parameters.

Every cell (mixer, mode, batch, length) is measured in `rounds` rounds, each time in a process of
its own, and the mixers of a length take turns: a machine changes its speed within minutes, and from
process to process. Times are median, p20 and p80 of synchronised repeats after a warm-up, those of
all rounds put together and each round weighing the same, so that the spread between processes is
in them; the ratio to softmax is the median over pairs of rounds close in time. Memory is that of
one step after all the timing: its peak, and the rise over what was held before (decode: before
the prefix). On CUDA the allocator counts; on Linux the resident memory does (files mapped into it
in the peak only), with malloc told to return every freed block from 64 KiB up at once, so that only
what lives counts. FLOPs are the mixer's own formula, three times that in training (decode: n/a, as
it is an average over a sequence); the ceiling is the rate of the model's own matrix products alone,
measured in the same process just before. Decoding reads more than it computes: a token's bytes are
those of its state and its share of the weights, which the sequences at once read together, and the
ceiling is the rate at which a matrix of as many bytes as a step's is read.

Writes out_dir/cells.jsonl (a line as soon as a cell is measured; the same command goes on from
there, and cells of other commands stay), and of this command's cells results.csv, results.json and
plots; where standard output is no terminal, its last line is that JSON too. A terminal shows as
many columns as it has room for. tools/bench_measure.py measures a cell, tools/bench_scaling.py says
what the figures mean.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import contextlib
import hashlib
import json
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
from tqdm import tqdm

import data.dataset
from base.command_line import one_spelling, read_given
from base.errors import BadInput, exit_on_bad_input, printable
from base.files import is_file, write_json
from base.options import checked, option
from base.terminal import is_terminal, width, wrapped
from config import ModelOptions, Options
from data.files import check_name
from mixers import has_effect, load_mixer_file, mixer_names, mixers_in_words
from model import model_config
from tools import bench_scaling as scaling
from tools.bench_measure import run_cell
from tools.bench_results import Results
from training.device import choose_device, choose_dtype, lacks_compiler

# the modes, and their batches unless set
BATCHES = {"train": "4", "prefill": "4", "decode": "1,32"}
ONE_OF_EACH_KIND = "softmax,linformer,lln,causal_max,pelican"
VOCABULARY = 65  # where the data set is not prepared
ROOT = Path(__file__).resolve().parent


@checked
class BenchOptions(ModelOptions):
    mixers: Optional[str] = option(
        None, "names, layer patterns joined by + (softmax,softmax+lln), or all "
        "[default: one of each kind, and the config's]")
    lengths: str = option("256,512,1024,2048", "sequence lengths in tokens")
    mode: str = option("all", "what to measure: train, prefill, decode, several of them or all")
    batch: Optional[str] = option(None, "sequences at once [default: 4; for decode 1,32]")
    rounds: int = option(5, "times each cell is measured", ge=1, le=1000)
    seconds: float = option(
        0.5, "of timing in each cell and round, after the warm-up", gt=0, le=1e6)
    cell_seconds: float = option(
        120.0, "most seconds for a cell and round, with start and warm-up", gt=0, le=1e6)
    out_dir: str = option("out/bench", "the folder of the results", min_length=1)
    overwrite: bool = option(False, "clear the results that out_dir already holds")
    dataset: str = option(
        "shakespeare_char",
        f"the data set whose vocabulary to take, if prepared; otherwise {VOCABULARY}")
    mixer_file: Optional[str] = option(
        None, "a Python file of yours that registers its mixer in mixers.MIXERS", min_length=1,
        first=load_mixer_file)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the heavy operations; auto: bfloat16 where it is fast")
    compile: bool = option(
        False, "torch.compile training and prefill; a step of decoding ahead of time (on a CPU, "
        "where its first cell takes 10 to 60 s more), kept in ~/.cache/nanomix")


# What is asked for --------------------------------------------------------------------------------

def entries_of(text):
    """The entries of a list option, each once."""
    return list(dict.fromkeys(entry.strip() for entry in text.split(",")))


def whole_numbers(name, text):
    """The numbers of the list option --name=text. BadInput for one that is none from 1 up."""
    for entry in entries_of(text):
        if not entry.isascii() or not entry.isdecimal() or not 0 < float(entry) < 2**31:
            raise BadInput(f"--{name}={text}: {entry!r} is not a whole number from 1 up")
    return list(dict.fromkeys(int(entry) for entry in entries_of(text)))


def modes_of(text):
    if text == "all":
        return list(BATCHES)
    for entry in entries_of(text):
        if entry not in BATCHES:
            raise BadInput(f"--mode={text}: {entry!r} is not one of {', '.join(BATCHES)}")
    return entries_of(text)


def mixers_of(options, given):
    """The names to measure. BadInput for what cannot be or has no effect on any of them."""
    for name, instead in (("mixer", "mixers"), ("block_size", "lengths")):
        if name in given:
            raise BadInput(f"--{name} is of one model; give --{instead} instead")
    of_the_config = options.mixer.replace(",", "+")
    names = mixer_names(options.mixers or f"{ONE_OF_EACH_KIND},{of_the_config}")
    for name in given:
        if not any(has_effect(name, mixer, options.n_layer) for mixer in names):
            raise BadInput(f"--{name} has no effect: none of {', '.join(names)} is "
                           f"{mixers_in_words(name)}; leave it out")
    return names


def model_of(given, mixer, length, vocab_size):
    """All options of a GPTConfig, as a dict, of what was Given."""
    options = given.options(mixer=one_spelling(mixer))
    values = {f.name: getattr(options, f.name) for f in fields(ModelOptions)
              if has_effect(f.name, mixer, options.n_layer)}
    values["mixer"] = mixer
    values["block_size"] = length
    values["pos"] = "none" if options.pos == "none" else "rope"
    values["vocab_size"] = vocab_size
    return asdict(model_config(values, "options"))


def vocabulary(name):
    """(symbols of a data set, or VOCABULARY if it is not prepared; words that say so)"""
    check_name(name)
    folder = data.dataset.DATA / name
    if is_file(folder / "meta.json"):
        return data.dataset.read_meta(folder)["vocab_size"], f"that of data/{name}"
    return VOCABULARY, f"assumed, as data/{name} is not prepared"


def groups_of(given, names, vocab_size, common):
    """The cells, a list of those that are alike but for the mixer for each mode, batch and length.
    A cell is a dict that says all that its figures depend on; `common` is what all of them have."""
    options = given.options()
    groups = []
    for mode in modes_of(options.mode):
        for batch in whole_numbers("batch", options.batch or BATCHES[mode]):
            for length in whole_numbers("lengths", options.lengths):
                shape = {"mode": mode, "batch": batch, "length": length}
                on_cpu = common["device"] == "cpu"
                compiled = options.compile and (mode != "decode" or on_cpu)
                groups.append([
                    {**shape, "mixer": name, "model": model_of(given, name, length, vocab_size),
                     "compile": compiled, **common} for name in names])
    return groups


# On what ------------------------------------------------------------------------------------------

def machine_of(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def code_of(mixer_file):
    """A checksum of all code that is measured: figures of other code do not count."""
    files = [ROOT / name for name in ("model.py", "train.py", "tools/bench_measure.py")]
    for folder in ("base", "mixers", "training"):
        files += sorted((ROOT / folder).rglob("*.py"))
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    if mixer_file:
        total.update(Path(mixer_file).read_bytes())
    return total.hexdigest()[:16]


def git_revision():
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


# Measuring ----------------------------------------------------------------------------------------

def to_measure(group, round, results, options):
    """The cells of a group that are left to measure in a round. Beside new figures softmax gets new
    ones too: ratios are of times close to each other."""
    missing = [cell for cell in group
               if not results.finished(cell, round, options.cell_seconds)]
    again = []
    for cell in group:
        if missing and cell not in missing and cell["mixer"] == "softmax":
            if results.of(cell)[-1]["status"] == "ok":
                again.append(cell)
    return again + missing


def measure(groups, results, options):
    """The table, a line (dict) for each cell, printed as it grows."""
    table = []
    total = sum(map(len, groups)) * options.rounds
    bar = tqdm(total=total, unit="cell", disable=not sys.stderr.isatty())
    block = None
    columns = scaling.columns_for(width() if is_terminal() else None)
    for group in groups:
        mode, batch = group[0]["mode"], group[0]["batch"]
        if block != (mode, batch):
            block = mode, batch
            words = f"\n{mode}, batch {batch}{reused(groups, block, results, options)}"
            bar.write(f"{words}\n{scaling.table_head(columns)}", file=sys.stdout)
        for round in range(options.rounds):
            for cell in to_measure(group, round, results, options):
                row = {"cell": cell, "round": round, "time": time.time(),
                       "cell_seconds": options.cell_seconds}
                row |= run_cell(cell, options.mixer_file, options.seconds, options.cell_seconds)
                results.add(row)
            bar.update(len(group))
        softmax = []
        for cell in group:
            if cell["mixer"] == "softmax":
                softmax = results.of(cell)
        for cell in group:
            line = scaling.summary(cell, results.of(cell), softmax)
            table.append(line)
            bar.write(scaling.table_line(line, columns), file=sys.stdout)
    bar.close()
    return table


def reused(groups, block, results, options):
    """How many of a table's cells were measured before, in words; "" for none."""
    cells = [(cell, round) for group in groups for cell in group for round in range(options.rounds)
             if (cell["mode"], cell["batch"]) == block]
    before = sum(results.finished(cell, round, options.cell_seconds) for cell, round in cells)
    if not before:
        return ""
    return (f": {before} of {len(cells)} measurements are from {printable(str(results.path))}, "
            "not made again")


def print_header(options, machine, model, vocabulary_in_words, dtype):
    print(wrapped(", ".join(f"{key} {value}" for key, value in machine.items())))
    compiled = ", compiled" if options.compile else ""
    print(wrapped(
        f"model      {model['arch']}, {model['n_layer']} layers, {model['n_embd']} channels, "
        f"{model['n_head']} heads, vocabulary {model['vocab_size']:,} ({vocabulary_in_words}), "
        f"positions {model['pos']}, {dtype}{compiled}"))


def measure_ceiling(cell, options):
    """FLOP/s of the matrix products of a cell's model alone, or None. Says what it is."""
    figures = run_cell(cell | {"mode": "ceiling"}, options.mixer_file, options.seconds,
                       options.cell_seconds)
    ceiling = figures.get("ceiling_flops_per_s")
    rate = f"{ceiling / 1e9:,.0f} GFLOP/s" if ceiling else "not measured"
    mixer = cell["model"]["mixer"]
    print(wrapped(f"ceiling    {rate} now, in the products of {mixer}'s linear layers alone; "
                  "`of ceiling` is of each cell's own, measured beside it, and in decoding of the "
                  "rate at which as many bytes are read"), flush=True)
    return ceiling


def write_results(folder, table, lines, title):
    """results.csv, and a picture for each mode and batch."""
    from tools.bench_plots import plot  # takes a second, which the cells' processes need not spend
    scaling.write_csv(folder / "results.csv", table)
    for mode, batch in dict.fromkeys((line["mode"], line["batch"]) for line in lines):
        cells = [line for line in table if (line["mode"], line["batch"]) == (mode, batch)]
        trends = [line for line in lines if (line["mode"], line["batch"]) == (mode, batch)]
        path = folder / f"{mode}_batch{batch}.png"
        plot(path, cells, trends, f"{mode}, batch {batch}: {title}")


@exit_on_bad_input("bench.py")
def main():
    # ends like Ctrl-C, and the cell's process with it
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = read_given(BenchOptions, sys.argv[1:], __doc__.splitlines()[0], file_class=Options,
                       leave_out=("out_dir", "overwrite"))  # of a training
    options = given.options()
    names = mixers_of(options, set(given.on_command_line))
    device = choose_device(options.device)
    if options.compile and lacks_compiler(device):
        raise BadInput("--compile: no C++ compiler found; install one or leave it out")
    dtype = str(choose_dtype(options.dtype, device, options.n_embd)).removeprefix("torch.")
    vocab_size, vocabulary_in_words = vocabulary(options.dataset)
    machine = {"machine": machine_of(device), "device": str(device),
               "threads": torch.get_num_threads(), "torch": torch.__version__}
    common = machine | {"dtype": dtype, "code": code_of(options.mixer_file)}
    groups = groups_of(given, names, vocab_size, common)
    first = groups[0][0]
    machine |= {"python": platform.python_version(), "numpy": np.__version__,
                "git": git_revision()}

    with Results(options.out_dir, options.overwrite) as results:
        print_header(options, machine, first["model"], vocabulary_in_words, dtype)
        ceiling = measure_ceiling(first, options)
        table = measure(groups, results, options)
        lines = scaling.scaling(table)
        print()
        for line in lines:
            print(wrapped(scaling.scaling_line(line)))
        recipe = f"{given.config_file}, " if given.config_file else ""
        title = (f"{recipe}{options.n_layer} layers x {options.n_embd}, {dtype}, "
                 f"rounds {options.rounds}, {machine['machine']}, threads {machine['threads']}")
        folder = results.path.parent
        write_results(folder, table, lines, title)
        found = {
            **machine, "dtype": dtype, "compile": options.compile, "vocab_size": vocab_size,
            "ceiling_flops_per_s": ceiling, "out_dir": options.out_dir, "cells": table,
            "scaling": lines}
        write_json(folder / "results.json", found)
    print(f"cells.jsonl, results.csv, results.json and plots are in {printable(options.out_dir)}")
    if not is_terminal():
        print(json.dumps(found))
    if any(line["status"] == "error" for line in table):
        sys.exit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a table that is read while it grows
    main()
