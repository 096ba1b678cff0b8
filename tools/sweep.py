"""Mixers x learning rates x seeds over one recipe. Run: python -m tools.sweep configs/shakespeare.py --mixers=softmax,lln --seeds=3

    python -m tools.sweep configs/shakespeare.py --mixers=all --learning_rates=5e-4,1e-3,2e-3 --seeds=5 --at_once=2 --dry_run
    python -m tools.sweep configs/shakespeare.py --mixers=softmax,lln --match=params --n_layer=2            any option of train.py
    python -m tools.sweep configs/shakespeare.py --mixers=all --cluster=slurm --cluster_options=slurm_partition=gpu,timeout_min=600
    python -m tools.compare out/sweeps/shakespeare                                                          what came out

Every run is an ordinary run of train.py in out_dir/<mixer>-lr<rate>-seed<seed>, its output in the .log file beside it. What is finished
is left alone and what was interrupted goes on, so the same command continues a sweep; a run that failed is listed with its error.

With several learning rates each mixer gets the one whose run ends with the lowest loss on the *select* data (see tools/score.py). Those
runs have seed 0 and are not compared themselves: one that was chosen for being low is too low. The seeds 1, 2, ... then run at that
rate alone. sweep.json holds the choice and names the runs to compare, also while the sweep goes on. Those of an earlier sweep in the
same folder stay in it, unless their mixer now has another rate.

--match changes the other mixers' n_embd in steps of n_head channels (two a head where RoPE pairs them), then ffn_hidden, until their
parameters, or their FLOPs per token, are within 2 % of the baseline's; it says what it changed.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import json
import math
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal, Optional

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.files import write_file
from base.options import checked, option
from config import Options
from data import load_dataset
from mixers import has_effect, layer_mixers, mechanism_of, mixer_names
from tools.score import read_scores
from tools.sweep_matching import matched
from tools.sweep_runs import Run, carry_out, cluster, end_like_ctrl_c, read_sweep
from training.run_folder import holds_run


@checked
class SweepOptions(Options):
    mixers: str = option("softmax,pelican", "names, layer patterns joined by + (softmax,softmax+lln), or all", min_length=1)
    learning_rates: Optional[str] = option(None, "rates to choose from for each mixer [default: the config's alone]")
    seeds: int = option(3, "runs of each mixer, with the seeds 1, 2, ...", ge=1)
    match: Optional[Literal["params", "flops"]] = option(None, "give all mixers as many parameters, or FLOPs per token, as the baseline")
    baseline: str = option("softmax", "the mixer that --match goes by")
    at_once: int = option(1, "runs at a time on this machine, which share its cores", ge=1)
    cluster: Optional[Literal["slurm", "local"]] = option(None, "hand the runs to SLURM through submitit (pip install submitit); local: a rehearsal of that")
    cluster_options: str = option("", "of submitit, which ends a job after 5 minutes unless told: timeout_min=600,slurm_partition=gpu,gpus_per_node=1")
    dry_run: bool = option(False, "only say what would run")


OWN = {f.name for f in fields(SweepOptions)} - {f.name for f in fields(Options)} | {"out_dir"}
ONE_RUN = {"mixer": "--mixers", "learning_rate": "--learning_rates", "seed": "--seeds", "resume": None, "overwrite": None, "eval_only": None, "eval_split": None,
           "wandb_run_name": None}


def rates_of(options):
    text = options.learning_rates or str(options.learning_rate)
    try:
        rates = sorted({float(rate) for rate in text.split(",")})
    except ValueError as error:
        raise BadInput(f"--learning_rates={text}: {error}; write 5e-4,1e-3") from error
    if not all(0 < rate < math.inf for rate in rates):
        raise BadInput(f"--learning_rates={text}: rates must be above 0")
    return rates


class Sweep:
    """The runs of a sweep by (mixer, rate, seed), and what became of them."""

    def __init__(self, options, config_file, given, mixers):
        self.options, self.rates, self.mixers = options, rates_of(options), mixers
        self.folder = Path(options.out_dir or f"out/sweeps/{Path(config_file).stem if config_file else options.dataset}")
        given = given | {name for name in ("mixer_file", "device") if getattr(options, name) not in (None, "auto")}  # scoring reads no config file
        self.common = ([config_file] if config_file else []) + [f"--{name}={getattr(options, name)}" for name in sorted(given - OWN)]
        self.config_file, self.changed, self.failed = config_file, {}, {}
        if options.match:
            self.match()

    def match(self):
        vocab_size = load_dataset(self.options.dataset, self.options.block_size).vocab_size
        for mixer in self.mixers:
            changed, size, target = matched(asdict(self.options), mixer, self.options.baseline, self.options.match, vocab_size)
            what = ", ".join(f"{name} {before} -> {value}" for name, (before, value) in changed.items())
            self.changed[mixer] = {name: value for name, (_, value) in changed.items()}
            print(f"{mixer:20} {size:>14,.0f} {self.options.match}, {size / target - 1:+.1%} of {self.options.baseline}: {what or 'as it is'}")

    def run(self, mixer, rate, seed):
        own = [f"--{name}={value}" for name, value in self.changed.get(mixer, {}).items()]
        common = [a for a in self.common if not a.startswith("--") or has_effect(a[2:].split("=")[0], mixer, self.options.n_layer)]
        name = f"{mixer.replace(',', '+')}-lr{rate:g}-seed{seed}"
        return Run(str(self.folder / name), (*common, f"--mixer={mixer.replace('+', ',')}", f"--learning_rate={rate}", f"--seed={seed}", *own))

    def to_choose_by(self):
        """The runs that the rates are chosen by; none where there is one rate."""
        return [self.run(mixer, rate, 0) for rate in self.rates for mixer in self.mixers] if len(self.rates) > 1 else []

    def to_compare(self, chosen):
        return [self.run(mixer, rate, seed) for seed in range(1, self.options.seeds + 1) for mixer, rate in chosen.items()]

    def choose(self):
        """{mixer: rate} by the loss on the select data; a mixer without a finished run is left out."""
        if len(self.rates) == 1:
            return dict.fromkeys(self.mixers, self.rates[0])
        chosen = {}
        for mixer in self.mixers:
            runs = {rate: self.run(mixer, rate, 0) for rate in self.rates}
            losses = {rate: read_scores(run.folder)["select"]["loss"] for rate, run in runs.items() if run.finished()}
            if losses:
                rate = chosen[mixer] = min(losses, key=losses.get)
                edge = " - the edge of what was tried" if rate in (self.rates[0], self.rates[-1]) else ""
                tried = ", ".join(f"{rate:g}: {f'{losses[rate]:.4f}' if rate in losses else 'failed'}" for rate in self.rates)
                print(f"{mixer:20} {tried} -> learning rate {rate:g}{edge}")
        return chosen

    def record(self, chosen, runs):
        """Writes sweep.json: which of `runs`, those to compare, are there, behind those of an earlier sweep. Returns their names."""
        path, names = self.folder / "sweep.json", [Path(run.folder).name for run in runs]
        ours = tuple(f"{mixer}-lr" for mixer in self.mixers)
        at_the_rate = tuple(Path(self.run(mixer, rate, "").folder).name for mixer, rate in chosen.items())
        earlier = [name for name in (read_sweep(self.folder)["runs"] if path.exists() else []) if name not in names and holds_run(self.folder / name)
                   and (name.startswith(at_the_rate) or not name.startswith(ours))]
        there = [Path(run.folder).name for run in runs if run.finished()]
        record = {"config": self.config_file, "mixers": self.mixers, "learning_rates": self.rates, "seeds": self.options.seeds, "match": self.options.match,
                  "chosen": chosen, "runs": earlier + there, "missing": [name for name in names if name not in there], "failed": self.failed}
        write_file(path, (json.dumps(record, indent=1) + "\n").encode())
        return record["runs"]

    def carry_out(self, runs, still_to_come):
        """Runs them, says how each ended and how long the rest of the sweep will take. Yields after each."""
        options = self.options
        executor = cluster(options.cluster, self.folder, options.cluster_options) if options.cluster else None
        started, done = time.perf_counter(), 0
        already = sum(run.finished() for run in runs)
        for number, (run, error) in enumerate(carry_out(runs, options.at_once, executor, self.folder.name), start=1):
            line = f"[{number}/{len(runs)}] {Path(run.folder).name}: "
            if error:
                self.failed[run.folder] = error
            if number <= already:
                print(line + "finished before")
                continue
            done += 1
            left = (time.perf_counter() - started) / done * (len(runs) - number + still_to_come) / 60
            outcome = f"failed: {error}" if error else f"report loss {read_scores(run.folder)['report']['loss']:.4f}"
            print(f"{line}{outcome} | about {left:.0f} min left" if left else line + outcome, flush=True)
            yield run


@exit_on_bad_input("tools.sweep")
def main():
    end_like_ctrl_c()
    options, config_file, given = parse_options(SweepOptions, sys.argv[1:], __doc__.splitlines()[0])
    for name in sorted(given & ONE_RUN.keys()):
        raise BadInput(f"--{name} is of one run; " + (f"give {ONE_RUN[name]} instead" if ONE_RUN[name] else "leave it out: a sweep goes on by itself"))
    mixers = mixer_names(options.mixers)
    for name, needed in (("baseline", "match"), ("cluster_options", "cluster")):
        if name in given and not getattr(options, needed):
            raise BadInput(f"--{name} is for --{needed}; leave it out" + (", and give it to tools.compare" if name == "baseline" else ""))
    if options.match:
        try:
            layer_mixers(options.baseline)
        except ValueError as error:
            raise BadInput(f"--baseline={options.baseline}: {error}") from error
    counting = [*mixers, options.baseline] if options.match else mixers
    for name in given:
        if not any(has_effect(name, mixer, options.n_layer) for mixer in counting):
            raise BadInput(f"--{name} has no effect: none of {', '.join(counting)} is {mechanism_of(name)}; leave it out")
    sweep = Sweep(options, config_file, given, mixers)
    to_choose_by = sweep.to_choose_by()
    for run in to_choose_by or sweep.to_compare(sweep.choose()):
        run.options()  # what train.py would refuse is refused before anything has run
    if options.dry_run:
        left = [run for run in to_choose_by if not run.finished()]
        for run in to_choose_by + ([] if left else sweep.to_compare(sweep.choose())):
            print(("finished   " if run.finished() else "would run  ") + "python " + " ".join(run.command()))
        if left:
            print(f"then {options.seeds * len(mixers)} runs: seeds 1 to {options.seeds} of each mixer at the rate chosen for it")
        return
    load_dataset(options.dataset, options.block_size)  # prepared once, not by several runs at the same time
    if not (sweep.folder / "sweep.json").exists():
        sweep.record({}, [])
    for _ in sweep.carry_out(to_choose_by, still_to_come=options.seeds * len(mixers)):
        pass
    chosen = sweep.choose()
    runs = sweep.to_compare(chosen)
    for _ in sweep.carry_out(runs, still_to_come=0):
        sweep.record(chosen, runs)
    there = sweep.record(chosen, runs)
    for folder, error in sweep.failed.items():
        print(f"failed: {folder}: {error}")
    print(f"{len(there)} runs to compare: python -m tools.compare {sweep.folder}")
    sys.exit(1 if sweep.failed else 0)


if __name__ == "__main__":
    main()
