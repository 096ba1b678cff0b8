"""Mixers, tuned alike, over seeds. Run: python -m tools.sweep configs/shakespeare.py

    python -m tools.sweep configs/shakespeare.py --mixers=all --seeds=5 \
        --tune="learning_rate=1e-3,2e-3,4e-3,8e-3,16e-3" --dry_run
    python -m tools.sweep configs/shakespeare.py --match=params --n_layer=2   any option of train.py
    python -m tools.sweep configs/shakespeare.py --cluster=slurm \
        --cluster_options=slurm_partition=gpu,timeout_min=600
    python -m tools.compare out/sweeps/shakespeare                            what came out

Every run is an ordinary run of train.py in out_dir/<mixer>-lr<rate>-seed<seed>, its output in the
.log file beside it. What is finished is left alone and what was interrupted goes on, so the same
command continues a sweep; a run that failed is listed with its error. A run that another sweep has
made, or of which results/ has a record, is not made again: see tools/sweep_finished.py. On a CPU as
many runs as there are cores go at a time, with a thread each: that is more work in an hour than one
run with all threads does. Once a run is scored, its checkpoints go, unless --keep_checkpoints.

--tune gives each mixer the values whose run ends with the lowest loss on data that are not reported
on (see tools/score.py): all begin with the same values, and where the best is at the edge of them
the search goes on beyond it. Those runs have seed 0 and are not compared themselves: one that was
chosen for being low is too low. Where an arm does well with some seeds only, one tells little:
--tune_seeds=3 runs the best two values with two further seeds, and the mean of three decides. The
seeds 1, 2, ... then run with the chosen values alone. sweep.json
holds the choice and names the runs to compare, also while the sweep goes on. Those of an earlier
sweep in the same folder stay in it, unless their mixer now has other values.

What it will take is said before anything starts; --max_hours refuses more than that. On a terminal
each run that goes has a line, with its losses and the time left; a log gets the finished ones.

--match changes the other mixers' n_embd in steps of n_head channels (two a head where RoPE pairs
them), then ffn_hidden, until their parameters, or their FLOPs per token, are within 2 % of the
baseline's; it says what it changed.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal, Optional

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.files import exists
from base.options import checked, option
from config import Options
from data import load_dataset
from mixers import has_effect, layer_mixers, mixer_names, mixers_in_words
from tools.experiment import Experiment
from tools.sweep_file import read_sweep_file
from tools.sweep_matching import matched
from tools.sweep_runs import cluster, end_like_ctrl_c
from tools.sweep_tuning import grids_in
from training.metrics import say_how_to_sync


@checked
class SweepOptions(Options):
    mixers: str = option(
        "softmax,pelican", "names, layer patterns joined by + (softmax,softmax+lln), or all",
        min_length=1)
    tune: Optional[str] = option(
        None, "options to tune for each mixer, with the values to begin with: "
        "\"learning_rate=1e-3,2e-3,4e-3 dropout=0,0.1\" [default: the config's own]")
    tune_seeds: int = option(
        1, "seeds to tune by: with more, those of the best two values decide by their mean",
        ge=1, le=100)
    seeds: int = option(3, "runs of each mixer, with the seeds 1, 2, ...", ge=1, le=1000)
    match: Optional[Literal["params", "flops"]] = option(
        None, "give all mixers as many parameters, or FLOPs per token, as the baseline")
    baseline: str = option("softmax", "the mixer that --match goes by")
    at_once: Optional[int] = option(
        None, "runs at a time on this machine, with one thread each if more than one "
        "[default: on a CPU as many as cores, otherwise 1]", ge=1, le=4096)
    max_hours: Optional[float] = option(
        None, "refuse a sweep that takes longer, and start no run after that many", gt=0, le=1e6)
    keep_checkpoints: bool = option(False, "keep those of the runs that are scored")
    cluster: Optional[Literal["slurm", "local"]] = option(
        None, "hand the runs to SLURM through submitit (pip install submitit); "
        "local: a rehearsal of that")
    cluster_options: str = option(
        "", "of submitit, which ends a job after 5 minutes unless told: "
        "timeout_min=600,slurm_partition=gpu,gpus_per_node=1")
    dry_run: bool = option(False, "only say what would run, and what it would take")


OF_SWEEP = {*SweepOptions.__annotations__, "out_dir"}  # the rest is handed on to train.py
NOT_OF_A_SWEEP = {  # options of one run, and what to do instead
    "mixer": "give --mixers instead",
    "seed": "give --seeds instead",
    "holdout": "leave it out: the runs that --tune makes have one",
    "resume": "leave it out: a sweep goes on by itself",
    "overwrite": "leave it out: a sweep goes on by itself",
    "eval_only": "leave it out: a sweep goes on by itself",
    "eval_split": "leave it out: every run is scored",
    "wandb_run_name": "leave it out: a run has its folder's name",
}


def check_options(options, given):
    """The mixers of the sweep. BadInput for what cannot be or has no effect."""
    for name in NOT_OF_A_SWEEP:
        if name in given:
            raise BadInput(f"--{name} is of one run; {NOT_OF_A_SWEEP[name]}")
    if "tune_seeds" in given and "tune" not in given:
        raise BadInput("--tune_seeds is for --tune; leave it out")
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


def common_options(options, given):
    """{option: value} that all runs are given; the config file says the rest."""
    names = given - OF_SWEEP
    if options.mixer_file:
        names.add("mixer_file")  # also from the config file, which scoring does not read
    if options.device != "auto":
        names.add("device")
    return {name: getattr(options, name) for name in sorted(names)}


def arms_of(options, mixers):
    """{mixer: {option: value}}, with what --match changes, which it says."""
    arms = {mixer: {"mixer": mixer.replace("+", ",")} for mixer in mixers}
    if options.match:
        vocab_size = load_dataset(options.dataset, options.block_size).vocab_size
        for mixer in mixers:
            found = matched(asdict(options), mixer, options.baseline, options.match, vocab_size)
            arms[mixer] |= {change.name: change.value for change in found.changes}
            words = [f"{change.name} {change.before} -> {change.value}" for change in found.changes]
            off = found.reached / found.target - 1
            print(f"{mixer:20} {found.reached:>14,.0f} {options.match}, {off:+.1%} of "
                  f"{options.baseline}: {', '.join(words) or 'as it is'}")
    return arms


def folder_of(options, config_file):
    name = Path(config_file).stem if config_file else options.dataset
    return Path(options.out_dir or f"out/sweeps/{name}")


def say_what_would_run(experiment, seeds):
    runs, chosen = [], {}
    for arm in experiment.arms:
        search, open_runs = experiment.search_so_far(arm)
        runs += experiment.tuning_runs(arm, search) + open_runs
        if not open_runs and search.best() is not None:
            chosen[arm] = search.values(search.best())
            if search.grids:
                print(f"{arm:20} {search.choice()}")
    runs += experiment.runs_of(chosen, seeds)
    for run in runs:
        state = "finished   " if experiment.finished(run) else "would run  "
        print(f"{state}python {' '.join(run.command())}")
    unknown = len(experiment.arms) - len(chosen)
    if unknown:
        print(f"then {len(seeds) * unknown} runs: seeds 1 to {len(seeds)} of each mixer "
              "with the values chosen for it")


@exit_on_bad_input("tools.sweep")
def main():
    end_like_ctrl_c()
    options, config_file, given = parse_options(SweepOptions, sys.argv[1:], __doc__.splitlines()[0])
    mixers = check_options(options, given)
    folder = folder_of(options, config_file)
    executor = None
    if options.cluster and not options.dry_run:
        executor = cluster(options.cluster, folder, options.cluster_options)
    experiment = Experiment(
        folder, config_file, common_options(options, given), arms_of(options, mixers),
        grids_in(options.tune or ""), options.at_once, executor, options.max_hours,
        options.keep_checkpoints, options.tune_seeds)
    read_sweep_file(folder)  # were it damaged, nothing should be trained first
    seeds = list(range(1, options.seeds + 1))
    cost = experiment.cost(seeds)
    if options.dry_run:
        say_what_would_run(experiment, seeds)
        print(cost)
        return
    print(cost, flush=True)
    experiment.check_hours(cost)
    if not exists(folder / "sweep.json"):
        experiment.write_sweep_file({}, seeds, [])
    chosen = experiment.tune(to_come=len(seeds) * len(mixers))
    records = experiment.run(chosen, seeds)
    for name, error in experiment.failed.items():
        print(f"failed: {name}: {error}")
    too = " --wandb_log" if options.wandb_log else ""  # or the verdicts would not be in wandb
    print(f"{len(records)} runs to compare: python -m tools.compare {folder}{too}")
    if options.wandb_log:
        say_how_to_sync(folder)
    sys.exit(1 if experiment.failed else 0)


if __name__ == "__main__":
    main()
