"""Mixers x rates x seeds over one recipe. Run: python -m tools.sweep configs/shakespeare.py

    python -m tools.sweep configs/shakespeare.py --mixers=all --learning_rates=5e-4,1e-3 --dry_run
    python -m tools.sweep configs/shakespeare.py --match=params --n_layer=2   any option of train.py
    python -m tools.sweep configs/shakespeare.py --cluster=slurm \
        --cluster_options=slurm_partition=gpu,timeout_min=600
    python -m tools.compare out/sweeps/shakespeare                            what came out

Every run is an ordinary run of train.py in out_dir/<mixer>-lr<rate>-seed<seed>, its output in the
.log file beside it. What is finished is left alone and what was interrupted goes on, so the same
command continues a sweep; a run that failed is listed with its error. A run of the same options
that results/<name of out_dir> has a record of counts as finished. On a CPU as many runs as there
are cores go at a time, with a thread each: that is more work in an hour than one run with all
threads does.

With several learning rates each mixer gets the one whose run ends with the lowest loss on the
*select* data (see tools/score.py). Those runs have seed 0 and are not compared themselves: one
that was chosen for being low is too low. The seeds 1, 2, ... then run at that rate alone.
sweep.json holds the choice and names the runs to compare, also while the sweep goes on. Those of
an earlier sweep in the same folder stay in it, unless their mixer now has another rate.

--match changes the other mixers' n_embd in steps of n_head channels (two a head where RoPE pairs
them), then ffn_hidden, until their parameters, or their FLOPs per token, are within 2 % of the
baseline's; it says what it changed.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import contextlib
import fcntl
import math
import os
import sys
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Literal, Optional

import torch

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.files import exists, write_json, writing
from base.options import checked, option
from config import Options
from data import load_dataset
from mixers import has_effect, layer_mixers, mixer_names, mixers_in_words
from tools.records import holds_run, kept_record
from tools.sweep_matching import matched
from tools.sweep_runs import (
    Run, SweepFile, carry_out, cluster, difference, end_like_ctrl_c, read_sweep_file)
from training.device import choose_device
from training.run_folder import data_sha256


@checked
class SweepOptions(Options):
    mixers: str = option(
        "softmax,pelican", "names, layer patterns joined by + (softmax,softmax+lln), or all",
        min_length=1)
    learning_rates: Optional[str] = option(
        None, "rates to choose from for each mixer [default: the config's alone]")
    seeds: int = option(3, "runs of each mixer, with the seeds 1, 2, ...", ge=1, le=1000)
    match: Optional[Literal["params", "flops"]] = option(
        None, "give all mixers as many parameters, or FLOPs per token, as the baseline")
    baseline: str = option("softmax", "the mixer that --match goes by")
    at_once: Optional[int] = option(
        None, "runs at a time on this machine, with one thread each if more than one "
        "[default: on a CPU as many as cores, otherwise 1]", ge=1, le=4096)
    cluster: Optional[Literal["slurm", "local"]] = option(
        None, "hand the runs to SLURM through submitit (pip install submitit); "
        "local: a rehearsal of that")
    cluster_options: str = option(
        "", "of submitit, which ends a job after 5 minutes unless told: "
        "timeout_min=600,slurm_partition=gpu,gpus_per_node=1")
    dry_run: bool = option(False, "only say what would run")


OF_SWEEP = {*SweepOptions.__annotations__, "out_dir"}  # the rest is handed on to train.py
NOT_OF_A_SWEEP = {  # options of one run, and what to do instead
    "mixer": "give --mixers instead",
    "learning_rate": "give --learning_rates instead",
    "seed": "give --seeds instead",
    "resume": "leave it out: a sweep goes on by itself",
    "overwrite": "leave it out: a sweep goes on by itself",
    "eval_only": "leave it out: a sweep goes on by itself",
    "eval_split": "leave it out: every run is scored",
    "wandb_run_name": "leave it out: a run has its folder's name",
}


# Options ------------------------------------------------------------------------------------------

def rates_of(options):
    """The learning rates, ascending. BadInput for what is none, and for two that would share a
    folder."""
    text = options.learning_rates or str(options.learning_rate)
    try:
        rates = sorted({float(rate) for rate in text.split(",")})
    except ValueError as error:
        raise BadInput(f"--learning_rates={text}: {error}; write 5e-4,1e-3") from error
    if not all(0 < rate < math.inf for rate in rates):
        raise BadInput(f"--learning_rates={text}: rates must be above 0")
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        raise BadInput(f"--learning_rates={text}: two rates agree in the six digits "
                       "of a run's name; leave one out")
    return rates


def check_options(options, given):
    """The mixers of the sweep. BadInput for what cannot be or has no effect."""
    for name in NOT_OF_A_SWEEP:
        if name in given:
            raise BadInput(f"--{name} is of one run; {NOT_OF_A_SWEEP[name]}")
    if "cluster_options" in given and not options.cluster:
        raise BadInput("--cluster_options is for --cluster; leave it out")
    if "at_once" in given and options.cluster:
        raise BadInput("--at_once is for this machine; leave it out, --cluster hands all runs on")
    if "baseline" in given and not options.match:
        raise BadInput("--baseline is for --match; leave it out, and give it to tools.compare")
    mixers = mixer_names(options.mixers)
    models = list(mixers)
    if options.match:
        try:
            layer_mixers(options.baseline)
        except ValueError as error:
            raise BadInput(f"--baseline={options.baseline}: {error}") from error
        models.append(options.baseline)
    for name in given:
        if not any(has_effect(name, mixer, options.n_layer) for mixer in models):
            raise BadInput(f"--{name} has no effect: none of {', '.join(models)} is "
                           f"{mixers_in_words(name)}; leave it out")
    return mixers


def runs_at_once(options):
    """How many runs share this machine: unless set, one on a GPU, and on a CPU one for each
    thread that torch would take."""
    if options.device.startswith("cuda"):
        on_a_cpu = False  # not tried here: it would hold memory there as long as the sweep goes on
    elif options.device == "auto":
        on_a_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    else:
        on_a_cpu = choose_device(options.device).type == "cpu"
    if options.at_once:
        return options.at_once
    if not on_a_cpu:
        return 1
    return max(1, torch.get_num_threads() // (options.threads or 1))


# The sweep ----------------------------------------------------------------------------------------

class Sweep:
    """The runs of a sweep by mixer, rate and seed, and what became of them."""

    def __init__(self, options, config_file, given, mixers):
        self.options = options
        self.config_file = config_file
        self.mixers = mixers
        self.rates = rates_of(options)
        name = Path(config_file).stem if config_file else options.dataset
        self.folder = Path(options.out_dir or f"out/sweeps/{name}")
        self.common = self.common_arguments(given)
        self.changed = {}  # mixer -> {option: value}, by --match
        self.failed = {}   # name of a run -> error
        self.done = {}     # run known to be finished -> its scores
        self.kept_record = cache(kept_record)  # reads a file each time
        self.data_sha256 = None  # of the data set, once it is prepared
        self.at_once = 1 if options.cluster else runs_at_once(options)
        if options.match:
            self.match()

    def common_arguments(self, given):
        """{option: value} that all runs are given; the config file says the rest."""
        names = given - OF_SWEEP
        if self.options.mixer_file:
            names.add("mixer_file")  # also from the config file, which scoring does not read
        if self.options.device != "auto":
            names.add("device")
        return {name: getattr(self.options, name) for name in sorted(names)}

    def match(self):
        options = self.options
        vocab_size = load_dataset(options.dataset, options.block_size).vocab_size
        for mixer in self.mixers:
            found = matched(asdict(options), mixer, options.baseline, options.match, vocab_size)
            self.changed[mixer] = {change.name: change.value for change in found.changes}
            words = [f"{change.name} {change.before} -> {change.value}" for change in found.changes]
            off = found.reached / found.target - 1
            print(f"{mixer:20} {found.reached:>14,.0f} {options.match}, {off:+.1%} of "
                  f"{options.baseline}: {', '.join(words) or 'as it is'}")

    def name_of(self, mixer, rate, seed):
        return f"{mixer}-lr{rate:g}-seed{seed}"

    def run(self, mixer, rate, seed):
        arguments = [self.config_file] if self.config_file else []
        for name, value in self.common.items():
            if has_effect(name, mixer, self.options.n_layer):
                arguments.append(f"--{name}={value}")
        arguments.append(f"--mixer={mixer.replace('+', ',')}")
        arguments.append(f"--learning_rate={rate}")
        arguments.append(f"--seed={seed}")
        for name, value in self.changed.get(mixer, {}).items():
            arguments.append(f"--{name}={value}")
        return Run(str(self.folder / self.name_of(mixer, rate, seed)), tuple(arguments))

    def to_choose_by(self):
        """The runs that the rates are chosen by; none where there is one rate."""
        if len(self.rates) == 1:
            return []
        return [self.run(mixer, rate, 0) for rate in self.rates for mixer in self.mixers]

    def to_compare(self, chosen):
        """The runs of {mixer: rate}, seed by seed, so that an unfinished sweep has a few of each
        mixer."""
        seeds = range(1, self.options.seeds + 1)
        return [self.run(mixer, rate, seed) for seed in seeds for mixer, rate in chosen.items()]

    def finished(self, run):
        if run not in self.done:
            if holds_run(Path(run.folder)):
                scores = run.scores(self.data_sha256)
            else:
                scores = self.recorded_scores(run)
            if scores:
                self.done[run] = scores
        return run in self.done

    def recorded_scores(self, run):
        """The scores of a run of the same options that results/<sweep> holds, or None."""
        record = self.kept_record(self.folder.name, Path(run.folder).name)
        wanted = run.options()
        if record is None or not record.reached(wanted["max_iters"]):
            return None
        if wanted["mixer_file"] != record.config.get("mixer_file"):
            return None
        if difference(wanted, record.config, self.data_sha256):
            return None
        return record.scores

    def choose(self):
        """{mixer: rate} by the loss on the select data; a mixer without a finished run is left
        out."""
        if len(self.rates) == 1:
            return dict.fromkeys(self.mixers, self.rates[0])
        chosen = {}
        for mixer in self.mixers:
            losses = {}
            for rate in self.rates:
                run = self.run(mixer, rate, 0)
                if self.finished(run):
                    losses[rate] = self.done[run]["select"]["loss"]
            if losses:
                chosen[mixer] = min(losses, key=losses.get)
                print(self.choice(mixer, chosen[mixer], losses))
        return chosen

    def choice(self, mixer, rate, losses):
        """The line that says why `rate` is chosen from {rate: loss}."""
        tried = []
        for other in self.rates:
            result = f"{losses[other]:.4f}" if other in losses else "failed"
            tried.append(f"{other:g}: {result}")
        at_the_edge = rate in (self.rates[0], self.rates[-1])
        edge = " - the edge of what was tried" if at_the_edge else ""
        return f"{mixer:20} {', '.join(tried)} -> learning rate {rate:g}{edge}"

    # what is on the disk

    @contextlib.contextmanager
    def locked(self):
        """Inside, no other sweep of this folder changes its sweep.json."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def earlier(self):
        """The folder's SweepFile, an empty one if there is none. BadInput if it is damaged."""
        if exists(self.folder / "sweep.json"):
            return read_sweep_file(self.folder)
        return SweepFile(runs=[], failed={})

    def record(self, chosen, runs):
        """Writes sweep.json: which of `runs`, those to compare, are there. What it says of other
        mixers stays, and so do runs of ours that an earlier sweep has made at the same rate.
        Returns the names of the runs that are there."""
        names = [Path(run.folder).name for run in runs]
        there = [Path(run.folder).name for run in runs if self.finished(run)]
        missing = [name for name in names if name not in there]
        ours = tuple(f"{mixer}-lr" for mixer in self.mixers)
        at_the_rate = tuple(self.name_of(mixer, rate, "") for mixer, rate in chosen.items())

        def is_kept(name):
            is_there = holds_run(self.folder / name) or self.kept_record(self.folder.name, name)
            same_rate = name.startswith(at_the_rate) or not name.startswith(ours)
            return name not in names and is_there and same_rate

        with self.locked():
            earlier = self.earlier()
            others = [mixer for mixer in earlier.mixers if mixer not in self.mixers]
            rates_of_others = {mixer: rate for mixer, rate in earlier.chosen.items()
                               if mixer in others}
            kept = [name for name in earlier.runs if is_kept(name)]
            missing_of_others = [name for name in earlier.missing if not name.startswith(ours)]
            failed_of_others = {name: error for name, error in earlier.failed.items()
                                if not Path(name).name.startswith(ours)}
            write_json(self.folder / "sweep.json", {
                "config": self.config_file,
                "mixers": others + self.mixers,
                "learning_rates": self.rates,
                "seeds": self.options.seeds,
                "match": self.options.match,
                "chosen": rates_of_others | chosen,
                "runs": kept + there,
                "missing": missing_of_others + missing,
                "failed": failed_of_others | self.failed,
            })
        return kept + there

    # what happens

    def say_what_is_recorded(self, runs):
        count = sum(not holds_run(Path(run.folder)) for run in runs)
        if count:
            print(f"{count} runs are recorded in results/{self.folder.name} and not trained again; "
                  "with another --out_dir they would be")

    def carry_out(self, runs, executor, still_to_come):
        """Carries out those not yet finished, says how each ended and how long the rest of the
        sweep will take. Yields after each."""
        before = [run for run in runs if self.finished(run)]
        left = [run for run in runs if run not in before]
        self.say_what_is_recorded(before)
        for number, run in enumerate(before, start=1):
            print(f"[{number}/{len(runs)}] {Path(run.folder).name}: finished before")
        ended = carry_out(left, self.at_once, executor, self.folder.name)
        started = time.perf_counter()
        for done, (run, error) in enumerate(ended, start=1):
            name = Path(run.folder).name
            if error:
                self.failed[name] = error
                outcome = f"failed: {error}"
            else:
                outcome = f"report loss {run.scores()['report']['loss']:.4f}"
            minutes_each = (time.perf_counter() - started) / done / 60
            to_come = len(left) - done + still_to_come
            rest = f" | about {minutes_each * to_come:.0f} min left" if to_come else ""
            print(f"[{len(before) + done}/{len(runs)}] {name}: {outcome}{rest}", flush=True)
            yield run


def say_what_would_run(sweep):
    to_choose_by = sweep.to_choose_by()
    chosen_yet = all(sweep.finished(run) for run in to_choose_by)
    to_compare = sweep.to_compare(sweep.choose()) if chosen_yet else []
    sweep.say_what_is_recorded([run for run in to_choose_by + to_compare if sweep.finished(run)])
    for run in to_choose_by + to_compare:
        state = "finished   " if sweep.finished(run) else "would run  "
        print(f"{state}python {' '.join(run.command())}")
    if not chosen_yet:
        seeds = sweep.options.seeds
        print(f"then {seeds * len(sweep.mixers)} runs: seeds 1 to {seeds} of each mixer "
              "at the rate chosen for it")


@exit_on_bad_input("tools.sweep")
def main():
    end_like_ctrl_c()
    options, config_file, given = parse_options(SweepOptions, sys.argv[1:], __doc__.splitlines()[0])
    mixers = check_options(options, given)
    sweep = Sweep(options, config_file, given, mixers)
    for rate in sweep.rates:
        for mixer in mixers:  # what train.py would refuse is refused before anything has run
            sweep.run(mixer, rate, 1).options()
    if options.dry_run:
        say_what_would_run(sweep)
        return
    executor = None
    if options.cluster:
        executor = cluster(options.cluster, sweep.folder, options.cluster_options)
    data = load_dataset(options.dataset, options.block_size)  # prepared once, not by several runs
    sweep.data_sha256 = data_sha256(data)
    if exists(sweep.folder / "sweep.json"):
        sweep.earlier()  # were it damaged, nothing should be trained first
    else:
        sweep.record({}, [])
    still_to_come = options.seeds * len(mixers)
    for _ in sweep.carry_out(sweep.to_choose_by(), executor, still_to_come):
        pass
    chosen = sweep.choose()
    runs = sweep.to_compare(chosen)
    for _ in sweep.carry_out(runs, executor, still_to_come=0):
        sweep.record(chosen, runs)
    there = sweep.record(chosen, runs)
    for name, error in sweep.failed.items():
        print(f"failed: {name}: {error}")
    print(f"{len(there)} runs to compare: python -m tools.compare {sweep.folder}")
    sys.exit(1 if sweep.failed else 0)


if __name__ == "__main__":
    main()
