"""Arms, tuned alike, over seeds: what a sweep and a claim consist of.

    arms = {"softmax": {"mixer": "softmax"}, "lln": {"mixer": "lln"}}
    grid = {"learning_rate": [1e-3, 2e-3, 4e-3]}
    experiment = Experiment("out/sweeps/mine", "configs/shakespeare.py", {}, arms, tune=grid)
    print(experiment.cost(seeds=[1, 2, 3]))
    chosen = experiment.tune()
    records = experiment.run(chosen, seeds=[1, 2, 3])

Every run is an ordinary run of train.py in folder/<arm>-lr<rate>-seed<seed>, with its output in the
.log file beside it and, once it is scored, without its checkpoints. What is finished is left
alone, what was interrupted goes on, and what was trained elsewhere is taken from there (see
sweep_finished.py), so the same calls continue an experiment.

The tuning runs have seeds of their own and, of a text, leave a slice out of training to be judged
by: the validation split reports, and has chosen nothing. sweep.json names the runs to compare.
"""
import itertools
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median

import torch

from base.command_line import parse_options
from base.errors import BadInput
from base.terminal import wrapped
from config import Options
from data import load_dataset
from mixers import has_effect, layer_mixers, load_mixer_file
from tools.records import (
    RUN_NAME, checked_by, holds_run, read_run, record_of, write_records)
from tools.sweep_cost import Cost, seconds_of_run, time_left
from tools.sweep_file import SweepFile, locked, write_sweep_file
from tools.sweep_finished import FinishedRuns, dtype_on_cpu, is_cpu
from tools.sweep_runs import Run, carry_out
from tools.sweep_tuning import (
    DIVERGED, FINALISTS, Search, checked_grids, in_name, is_tuning_seed, tuning_seeds)
from tools.sweep_watch import Watch
from training.metrics import wandb_group
from training.run_folder import data_sha256

HOLDOUT = 0.1  # of the training split, in tuning runs


def check_mixer(arm, options):
    """BadInput if an arm's mixer is none."""
    if "mixer" not in options:
        raise BadInput(f"arm {arm} has no mixer; name one")
    try:
        layer_mixers(options["mixer"])
    except ValueError as error:
        raise BadInput(f"arm {arm}: {error}") from error


class Experiment:
    """See above. Options are given by name and value, as in a config file."""

    def __init__(self, folder, config_file, common, arms, tune=None, at_once=None, executor=None,
                 max_hours=None, keep_checkpoints=False, tune_seeds=1):
        """folder: of the runs. config_file: the recipe, or None. common: {option: value} of all
        runs, of which an arm takes those that matter to it. arms: {name: {option: value}}, "mixer"
        among them. tune: {option: [value]}, the grid to begin with, or None. at_once: runs at a
        time on this machine [default: on a CPU as many as cores, with a thread each; otherwise 1].
        executor: a cluster's, see sweep_runs.cluster. max_hours: after that many no run starts.
        tune_seeds: with how many the best two points of a grid are tried.

        BadInput for what train.py would refuse."""
        self.folder = Path(folder)
        self.config_file = config_file
        self.recipe = asdict(parse_options(Options, [config_file] if config_file else [], "")[0])
        self.common = common
        self.arms = arms
        self.grids = checked_grids(tune or {})
        self.tune_seeds = tune_seeds
        self.executor = executor
        self.max_hours = max_hours
        self.until = time.monotonic() + 3600 * max_hours if max_hours else math.inf
        self.keep_checkpoints = keep_checkpoints
        self.failed = {}  # name of a run -> error
        self.found = {}   # run known to be finished -> its Record
        self.data = {}    # name of a data set -> (its checksum, whether it is a text)
        self.finished_runs = FinishedRuns(self.folder)
        self.on_cpu = is_cpu((self.recipe | common)["device"])
        self.at_once = 1 if executor else at_once or self.runs_at_once()
        self.resolved = {arm: self.checked(arm) for arm in arms}  # arm -> {option: value}, all

    def checked(self, arm):
        """All options of an arm, as train.py would have them: {option: value}. BadInput, also for a
        point of its grids, for what train.py would refuse."""
        own = self.arms[arm]
        checked_by(RUN_NAME.validate_python, f"{arm}-seed1", f"arm {arm}", "rename it")
        if own.get("mixer_file"):
            load_mixer_file(own["mixer_file"])
        check_mixer(arm, own)
        grids = self.grids_of(arm)
        for option in grids:
            if option in self.common or option in own:
                raise BadInput(f"{option} is both set and tuned; leave it out in one place")
        for point in itertools.product(*grids.values()):
            self.run_with(self.options_of(arm) | dict(zip(grids, point)), "any").options()
        return self.run_with(self.options_of(arm), "any").options()

    def runs_at_once(self):
        """How many runs share this machine: one on a GPU, and on a CPU one for each thread that
        torch would take."""
        if not self.on_cpu:
            return 1
        threads = (self.recipe | self.common)["threads"] or 1
        return max(1, torch.get_num_threads() // threads)

    # What the runs are ---------------------------------------------------------------------------

    def matters(self, name, arm):
        own = self.arms[arm]
        return has_effect(name, own["mixer"], (self.recipe | self.common | own)["n_layer"])

    def options_of(self, arm):
        """{option: value} that an arm's runs are given, but for the seed and what is tuned."""
        common = {name: value for name, value in self.common.items() if self.matters(name, arm)}
        return common | self.arms[arm]

    def grids_of(self, arm):
        return {name: grid for name, grid in self.grids.items() if self.matters(name, arm)}

    def run_with(self, options, name):
        arguments = [self.config_file] if self.config_file else []
        arguments += [f"--{option}={value}" for option, value in options.items()]
        return Run(str(self.folder / name), tuple(arguments), self.keep_checkpoints)

    def run_of(self, arm, values, seed):
        """The Run of an arm with the tuned {option: value}; of some seeds, one to tune by."""
        options = self.options_of(arm) | values | {"seed": seed}
        if is_tuning_seed(seed) and self.data_of(self.resolved[arm])[1]:
            options["holdout"] = HOLDOUT
        return self.run_with(options, f"{self.name_of(arm, values)}-seed{seed}")

    def name_of(self, arm, values):
        """What the names of an arm's runs begin with: softmax-lr0.003, then what else is tuned."""
        rate = values.get("learning_rate", self.resolved[arm]["learning_rate"])
        others = [f"{name}{in_name(value)}" for name, value in values.items()
                  if name != "learning_rate"]
        return "-".join([arm, f"lr{rate:g}", *others])

    def runs_of(self, chosen, seeds):
        """Those to compare, of {arm: {option: value}}; seed by seed, so that an unfinished
        experiment has a few of each arm. BadInput for a seed to tune by."""
        for seed in filter(is_tuning_seed, seeds):
            raise BadInput(f"seed {seed} is one to tune by; report others")
        return [self.run_of(arm, values, seed) for seed in seeds for arm, values in chosen.items()]

    def data_of(self, options):
        """(checksum, whether it is a text) of a run's data set, prepared if it was not."""
        name = options["dataset"]
        if name not in self.data:
            data = load_dataset(name, options["block_size"])
            self.data[name] = data_sha256(data), data.bytes_per_token is not None
        return self.data[name]

    # What is finished ----------------------------------------------------------------------------

    def finished(self, run):
        """The Record of a run if it is finished, here or elsewhere, otherwise None. BadInput if its
        folder holds a run of other options, data or code."""
        if run not in self.found:
            record = self.look_for(run)
            if record is None:
                return None
            self.found[run] = record
        return self.found[run]

    def look_for(self, run):
        sha256, _ = self.data_of(run.options())
        if not holds_run(Path(run.folder)):
            return self.finished_runs.find(run, sha256, self.on_cpu)
        scores = run.scores(sha256)
        if scores is None:
            return None
        if scores["iter"] > run.options()["max_iters"]:  # its losses are of its end
            raise BadInput(f"{run.folder} was trained for {scores['iter']} steps, not "
                           f"{run.options()['max_iters']}; choose another --out_dir, or move it "
                           "away")
        record = read_run(run.folder)
        self.finished_runs.check_code(run, record)
        return record

    def take_over(self, runs):
        """Gives the folder records of the runs that were found elsewhere."""
        for run in runs:
            record, name = self.found[run], Path(run.folder).name
            is_own = record.source.parent in self.finished_runs.own_folders()
            if not is_own or record.name != name:
                with locked(self.folder):
                    write_records(self.folder, [replace(record, name=name)])

    # What is done --------------------------------------------------------------------------------

    def cost(self, seeds):
        """The Cost of what is not finished yet of tuning and of these seeds, as far as it can be
        known: the search may go beyond its grids."""
        left = {arm: 0 for arm in self.arms}  # runs
        for arm in self.arms:
            search, open_runs = self.search_so_far(arm)
            if open_runs:
                left[arm] = len(open_runs) + len(seeds)
                if max(map(len, search.losses.values()), default=1) == 1:
                    left[arm] += FINALISTS * (self.tune_seeds - 1)
            elif search.best() is not None:
                runs = self.runs_of({arm: search.values(search.best())}, seeds)
                left[arm] = sum(self.finished(run) is None for run in runs)
        seconds = {arm: self.seconds_of(arm) for arm in self.arms if left[arm]}
        known = [s for s in seconds.values() if s is not None]
        hours = None
        if known or not seconds:
            total = sum(left[arm] * (seconds[arm] or mean(known)) for arm in seconds)
            hours = total / self.at_once / 3600
        return Cost(sum(left.values()), hours)

    def seconds_of(self, arm):
        """Of a run of an arm: of those that have ended here, or tried out; None if neither can
        be."""
        ended = []
        for run, record in self.found.items():
            is_here = record.source == Path(run.folder) and record.metrics
            if is_here and Path(run.folder).name.startswith(f"{arm}-lr"):
                ended.append(record.seconds())
        ended = [seconds for seconds in ended if seconds]
        if ended:
            return median(ended)
        if not self.on_cpu or self.executor:
            return None
        run = self.run_of(arm, {}, seed=1)
        options = Options(**run.options() | {"dtype": dtype_on_cpu(run)})
        threads = 1 if self.at_once > 1 else options.threads or torch.get_num_threads()
        return seconds_of_run(options, threads)

    def check_hours(self, cost):
        """BadInput if a Cost is above max_hours."""
        if self.max_hours and cost.hours and cost.hours > self.max_hours:
            raise BadInput(f"--max_hours={self.max_hours:g} is not enough: {cost}; raise it, or "
                           "leave some arms, values or seeds out")

    def search_so_far(self, arm):
        """(the Search of an arm, its runs that are not finished yet)."""
        search = Search(self.grids_of(arm), self.tune_seeds)
        if not search.grids:
            search.losses[()] = [0.0]  # nothing to search
        while wanted := search.wanted():
            open_runs = []
            for point, number in wanted:
                run = self.tuning_run(arm, search, point, number)
                loss = self.tuning_loss(run)
                if loss is None:
                    open_runs.append(run)
                elif number == len(search.losses.get(point, ())):
                    search.losses.setdefault(point, []).append(loss)
            if open_runs:
                return search, open_runs
        return search, []

    def tuning_loss(self, run):
        """The loss to choose by of a run, None while it is not finished."""
        record = self.finished(run)
        if record and record.scores["select"]:
            return loss_to_choose_by(record.scores)
        return math.inf if Path(run.folder).name in self.failed else None

    def tuning_run(self, arm, search, point, number):
        seed = tuning_seeds(self.tune_seeds)[number]
        return self.run_of(arm, search.values(point), seed)

    def tuning_runs(self, arm, search):
        """The runs of an arm's Search so far."""
        if not search.grids:
            return []
        return [self.tuning_run(arm, search, point, number)
                for point, losses in search.losses.items() for number in range(len(losses))]

    def tune(self, to_come=0):
        """The best {option: value} of each arm, {arm: {...}}: trains what is missing for it. An arm
        of which no run was finished is left out. to_come: runs that follow, for the time left."""
        while True:
            open_runs = []
            for arm in self.arms:
                search, of_arm = self.search_so_far(arm)
                open_runs += of_arm
                for line in search.extensions():
                    print(wrapped(f"{arm}: {line}"), flush=True)
            if not open_runs:
                break
            self.carry_out(open_runs, to_come)
        chosen = {}
        for arm in self.arms:
            search, _ = self.search_so_far(arm)
            if search.best() is None:
                print(f"{arm}: no run to tune by has ended well; it is left out")
                continue
            chosen[arm] = search.values(search.best())
            if search.grids:
                print(wrapped(f"{arm:20} {search.choice()}"), flush=True)
        return chosen

    def run(self, chosen, seeds):
        """The Records of {arm: {option: value}} with these seeds: trains what is missing. What has
        failed is not among them, and says so in `failed`."""
        runs = self.runs_of(chosen, seeds)
        self.carry_out(runs, after_each=lambda: self.write_sweep_file(chosen, seeds, runs))
        done = [run for run in runs if self.finished(run)]
        return [record_of(self.folder, Path(run.folder).name) for run in done]

    def write_sweep_file(self, chosen, seeds, runs):
        """sweep.json as things are now."""
        names = {run: Path(run.folder).name for run in runs}
        there = [names[run] for run in runs if run in self.found]
        missing = [names[run] for run in runs if run not in self.found]
        now = SweepFile(config=self.config_file, tune=self.grids, seeds=seeds, chosen=chosen,
                        runs=there, missing=missing, failed=self.failed)
        prefixes = tuple(f"{arm}-lr" for arm in self.arms)
        chosen_prefixes = tuple(f"{self.name_of(arm, chosen[arm])}-seed" for arm in chosen)
        write_sweep_file(self.folder, now, prefixes, chosen_prefixes)

    def carry_out(self, runs, to_come=0, after_each=lambda: None):
        """Trains those of the runs that are not finished, says how each ended and how long the rest
        will take, to_come further runs among it. BadInput once max_hours are over."""
        before = [run for run in runs if self.finished(run)]
        left = [run for run in runs if run not in before]
        self.take_over(before)
        for number, run in enumerate(before, start=1):
            print(f"[{number}/{len(runs)}] {self.found[run]}: finished before")
        after_each()
        started = time.monotonic()
        ended = carry_out(left, self.at_once, self.executor, wandb_group(self.folder), self.until,
                          Watch(to_come))
        done = 0
        for done, (run, error) in enumerate(ended, start=1):
            name = Path(run.folder).name
            outcome = self.outcome(run, error)
            after_each()
            seconds_each = (time.monotonic() - started) / done
            rest = len(left) - done + to_come
            words = f" | {time_left(seconds_each * rest)}" if rest else ""
            print(f"[{len(before) + done}/{len(runs)}] {name}: {outcome}{words}", flush=True)
        if done < len(left):
            raise BadInput(f"--max_hours={self.max_hours:g} are over, {len(left) - done} of "
                           f"{len(runs)} runs are left; the same command goes on with them")

    def outcome(self, run, error):
        """Takes note of how a run ended. Returns it in words."""
        name = Path(run.folder).name
        if error is None:
            record = read_run(run.folder)
            if record.scores is not None:
                self.failed.pop(name, None)
                self.found[run] = record
                return losses_in_words(record.scores)
            error = "its scores cannot be read"
        self.failed[name] = error
        return f"failed: {error}"


def loss_to_choose_by(scores):
    return DIVERGED if scores.get("diverged") else scores["select"]["loss"]


def losses_in_words(scores):
    if scores.get("diverged"):
        return "diverged, which counts as an even guess"
    parts = [f"{part} loss {scores[part]['loss']:.4f}"
             for part in ("select", "report") if scores[part]]
    return ", ".join(parts)
