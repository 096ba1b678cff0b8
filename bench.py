"""Speed and memory over the sequence length, for each mixer. Run: python bench.py   (about ten minutes on two CPU cores)

    python bench.py configs/shakespeare.py --mixers=softmax,lln --lengths=256,1024 --mode=train     a minute or two
    python bench.py --mixers=all --mode=decode --batch=1 --lengths=256,2048,16384 --n_embd=256      any model option
    python bench.py configs/shakespeare.py --mixers=softmax,softmax+lln,previous --mixer_file=mine.py

Modes. train: forward, backward, clipping and AdamW, as train.py does it. prefill: one forward pass over the sequence that
keeps logits and state. decode: a prefix of that length, fed in pieces of bounded size, then one token at a time on top of
the state. Tokens are random; positions are RoPE or none, so that the length adds no parameters.

Every cell (mixer, mode, batch, length) is measured in `rounds` rounds, each time in a process of its own, and the mixers of a
length take turns: a machine changes its speed within minutes, and from process to process. Times are median, p20 and p80 of
synchronised repeats after a warm-up, of all rounds, each weighing the same; the ratio to softmax is the median over pairs of rounds
close in time. Memory is that of one step after all the timing: its peak, and the rise over what was held before (decode:
before the prefix). On CUDA the allocator counts; on Linux the resident memory does (files mapped into it in the peak only), with malloc
told to return every freed block from 64 KiB up at once, so that only what lives counts.
FLOPs are the mixer's own formula, three times that in training (decode: n/a, as it is an average over a sequence); the
ceiling is the rate of the model's own matrix products alone, measured in the same process just before.

Writes out_dir/cells.jsonl (a line as soon as a cell is measured; the same command goes on from there), results.csv and
plots; the last line on stdout is all of it in JSON.
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
from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.files import write_file, writing
from base.options import checked, option
from config import ModelOptions, Options
from data.files import check_name
from mixers import has_effect, load_mixer_file, mechanism_of, mixer_names
from model import model_config
from tools.bench_measure import run_cell
from tools.bench_scaling import TABLE_HEAD, plot, scaling, scaling_line, summary, table_line, write_csv
from training.device import choose_device, choose_dtype, lacks_compiler

BATCHES = {"train": "4", "prefill": "4", "decode": "1,32"}  # the modes, and their batches unless set
ONE_OF_EACH_KIND = "softmax,linformer,lln,causal_max,pelican"
VOCABULARY = 65  # where the data set is not prepared
ROOT = Path(__file__).resolve().parent


@checked
class BenchOptions(ModelOptions):
    mixers: Optional[str] = option(None, "names, layer patterns joined by + (softmax,softmax+lln), or all [default: one of each kind, and the config's]")
    lengths: str = option("256,512,1024,2048", "sequence lengths in tokens")
    mode: str = option("train,prefill,decode", "what to measure")
    batch: Optional[str] = option(None, "sequences at once [default: 4; for decode 1,32]")
    rounds: int = option(5, "times each cell is measured", ge=1)
    seconds: float = option(0.5, "of timing in each cell and round, after the warm-up", gt=0)
    cell_seconds: float = option(120.0, "most seconds for a cell and round, with start and warm-up", gt=0)
    out_dir: str = option("out/bench", "the folder of the results", min_length=1)
    overwrite: bool = option(False, "clear the results that out_dir already holds")
    dataset: str = option("shakespeare_char", f"the data set whose vocabulary to take, if prepared; otherwise {VOCABULARY}")
    mixer_file: Optional[str] = option(None, "a Python file of yours that registers its mixer in mixers.MIXERS", min_length=1, first=load_mixer_file)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of the heavy operations; auto: bfloat16 where it is fast")
    compile: bool = option(False, "torch.compile training and prefill; decoding is never compiled")



# Which cells, and in which order -------------------------------------------------------------------------------------

def listed(name, text, choices=None):
    """The entries of a list option: one of `choices` each, or a whole number from 1 up."""
    entries = list(dict.fromkeys(entry.strip() for entry in text.split(",")))
    for entry in entries:
        if choices and entry not in choices or not choices and not (entry.isdecimal() and 0 < int(entry) < 2**31):
            raise BadInput(f"--{name}={text}: {entry!r} is not {'one of ' + ', '.join(choices) if choices else 'a whole number from 1 up'}")
    return entries if choices else [int(entry) for entry in entries]


def model_of(options, mixer, length, vocab_size):
    """All options of a GPTConfig, as a dict."""
    values = {f.name: getattr(options, f.name) for f in fields(ModelOptions) if has_effect(f.name, mixer, options.n_layer)}
    values |= {"mixer": mixer, "block_size": length, "pos": "none" if options.pos == "none" else "rope", "vocab_size": vocab_size}
    return asdict(model_config(values, "options"))


def vocabulary(name):
    """(symbols of a data set, or VOCABULARY if it is not prepared; words that say so)"""
    check_name(name)
    folder = data.dataset.DATA / name
    if (folder / "meta.json").exists():
        return data.dataset.read_meta(folder)["vocab_size"], f"that of data/{name}"
    return VOCABULARY, f"assumed, as data/{name} is not prepared"


def machine_of(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    return platform.processor() or platform.machine()


def code_of(mixer_file):
    """A checksum of all code that is measured: figures of other code do not count."""
    files = [path for folder in ("base", "mixers", "training") for path in sorted((ROOT / folder).rglob("*.py"))]
    files += [ROOT / name for name in ("model.py", "train.py", "tools/bench_measure.py")]
    files += [mixer_file] if mixer_file else []
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def git_revision():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


class Results:
    """cells.jsonl: a line for every cell and round, {"cell": what it is, "round", "time", "status", its figures}."""

    def __init__(self, out_dir, overwrite):
        self.path = Path(out_dir) / "cells.jsonl"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for path in (self.path, *self.path.parent.glob("*_batch*.png"), self.path.with_name("results.csv")):
                    path.unlink(missing_ok=True)
            self.path.touch()
            lines = self.path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):  # power failed in the middle of a line
            write_file(self.path, "".join(whole).encode())
        try:
            self.rows = [json.loads(line) for line in whole]
            self.rows = [row for row in self.rows if row["cell"] and row["status"] != "error"]  # errors get another chance
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{self.path} is damaged ({error!r}); clear it with --overwrite") from error

    def add(self, row):
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)

    def of(self, cell):
        return [row for row in self.rows if row["cell"] == cell]

    def finished(self, cell, round, cell_seconds):
        """A cell that failed is done with, but for more time it gets another chance."""
        return any(row["round"] == round if row["status"] == "ok" else row["status"] == "oom" or row["cell_seconds"] >= cell_seconds
                   for row in self.of(cell))


def to_measure(group, round, results, options):
    """The cells of a group (of all mixers, otherwise alike) that are left to measure in a round."""
    missing = [cell for cell in group if not results.finished(cell, round, options.cell_seconds)]
    # beside new figures softmax gets new ones too: ratios are of times close to each other
    again = [cell for cell in group if missing and cell not in missing and cell["mixer"] == "softmax" and results.of(cell)[-1]["status"] == "ok"]
    return again + missing


@exit_on_bad_input("bench.py")
def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, and the cell's process with it
    options, _, given = parse_options(BenchOptions, sys.argv[1:], __doc__.splitlines()[0], file_class=Options,
                                      leave_out=("out_dir", "overwrite"))  # of a training
    for name, here in (("mixer", "mixers"), ("block_size", "lengths")):
        if name in given:
            raise BadInput(f"--{name} is of one model; give --{here} instead")
    names, lengths = mixer_names(options.mixers or f"{ONE_OF_EACH_KIND},{options.mixer.replace(',', '+')}"), listed("lengths", options.lengths)
    for name in given:
        if not any(has_effect(name, mixer, options.n_layer) for mixer in names):
            raise BadInput(f"--{name} has no effect: none of {', '.join(names)} is {mechanism_of(name)}; leave it out")
    batches = {mode: listed("batch", options.batch or BATCHES[mode]) for mode in listed("mode", options.mode, BATCHES)}
    device = choose_device(options.device)
    if options.compile and lacks_compiler(device):
        raise BadInput("--compile: no C++ compiler found; install one or leave it out")
    dtype = str(choose_dtype(options.dtype, device, options.n_embd)).removeprefix("torch.")
    vocab_size, whose = vocabulary(options.dataset)
    machine = {"machine": machine_of(device), "device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    common = machine | {"dtype": dtype, "code": code_of(options.mixer_file)}
    groups = [[{"mode": mode, "batch": batch, "length": length, "mixer": name, "model": model_of(options, name, length, vocab_size),
                "compile": options.compile and mode != "decode", **common} for name in names]
              for mode in batches for batch in batches[mode] for length in lengths]
    machine |= {"python": platform.python_version(), "numpy": np.__version__, "git": git_revision()}
    results = Results(options.out_dir, options.overwrite)
    run = lambda cell: run_cell(cell, options.mixer_file, options.seconds, options.cell_seconds)

    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    first = groups[0][0]
    m = first["model"]
    print(f"model      {m['arch']}, {m['n_layer']} layers, {m['n_embd']} channels, {m['n_head']} heads, vocabulary {vocab_size:,} ({whose}), "
          f"positions {m['pos']}, {dtype}{', compiled' if options.compile else ''}")
    ceiling = run(first | {"mode": "ceiling"}).get("ceiling_flops_per_s")
    print(f"ceiling    {f'{ceiling / 1e9:,.0f} GFLOP/s' if ceiling else 'not measured'} in the products of {m['mixer']}'s linear layers alone", flush=True)
    table = []
    bar = tqdm(total=len(groups) * len(names) * options.rounds, unit="cell", disable=not sys.stderr.isatty())
    for group in groups:
        if group[0]["length"] == lengths[0]:
            bar.write(f"\n{group[0]['mode']}, batch {group[0]['batch']}\n{TABLE_HEAD}", file=sys.stdout)
        for round in range(options.rounds):
            for cell in to_measure(group, round, results, options):
                row = {"cell": cell, "round": round, "time": time.time(), "cell_seconds": options.cell_seconds}
                results.add(row | run(cell))
            bar.update(len(group))
        softmax = next((results.of(cell) for cell in group if cell["mixer"] == "softmax"), [])
        for cell in group:
            table.append(summary(cell, results.of(cell), softmax))
            bar.write(table_line(table[-1]), file=sys.stdout)
    bar.close()

    lines = scaling(table)
    print("\n" + "\n".join(map(scaling_line, lines)))
    title = f"{m['n_layer']} layers x {m['n_embd']}, {dtype}, {machine['machine']}, {machine['threads']} threads"
    with writing(results.path.parent):
        write_csv(results.path.with_name("results.csv"), table)
        for mode, batch in dict.fromkeys((line["mode"], line["batch"]) for line in lines):
            of_this = lambda rows: [row for row in rows if (row["mode"], row["batch"]) == (mode, batch)]
            plot(results.path.with_name(f"{mode}_batch{batch}.png"), of_this(table), of_this(lines), f"{mode}, batch {batch}: {title}")
    print(f"cells.jsonl, results.csv and plots are in {options.out_dir}")
    print(json.dumps({**machine, "dtype": dtype, "compile": options.compile, "vocab_size": vocab_size, "ceiling_flops_per_s": ceiling,
                      "out_dir": options.out_dir, "cells": table, "scaling": lines}))
    if any(line["status"] == "error" for line in table):
        sys.exit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a table that is read while it grows
    main()
