"""Runs of train.py one after the other, several at a time, or handed to a cluster; what is finished is left alone.

    for run, error in carry_out([Run("out/a", ("configs/shakespeare.py", "--mixer=lln"))], at_once=2): ...

Every run is a train.py of its own in run.folder, then its scores (see tools/score.py); what they print goes to the .log file
beside the folder. An interrupted run goes on from its checkpoint.
"""
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from base.errors import BadInput
from base.files import read_json
from tools.score import read_scores
from training import checkpoint
from training.run_folder import OF_ONE_COMMAND, holds_run, read_options

ROOT = Path(__file__).resolve().parents[1]
# options that change neither what is trained nor how
ASIDE = {"out_dir", "device", "eval_interval", "keep_last", "log_interval", "wandb_log", "wandb_project", "wandb_run_name", *OF_ONE_COMMAND}
stopping = threading.Event()  # set by a signal: all processes are told to end, and no more are started


@dataclass(frozen=True)
class Run:
    folder: str
    arguments: tuple  # of train.py, without --out_dir and --resume

    def command(self):
        return ["train.py", *self.arguments, f"--out_dir={self.folder}"]

    def options(self):
        """As train.py would have them. BadInput for what it would refuse."""
        options, _ = read_options([*self.command()[1:], "--overwrite"], "")  # or it would refuse the folder
        return asdict(options)

    def finished(self):
        """Whether its last checkpoint and its scores are there. BadInput if the folder holds a run of other options."""
        path = Path(self.folder) / "config.json"
        if not path.exists():
            return False
        wanted, ran = self.options(), read_json(path, "move the run away")
        aside = set(ASIDE)
        if wanted["lr_decay_iters"] == ran.get("lr_decay_iters"):  # then a shorter run is the beginning of a longer one
            aside.add("max_iters")
        for name, value in wanted.items():
            if value != "auto" and name not in aside and ran.get(name, value) != value:
                raise BadInput(f"{self.folder} was run with {name} {ran[name]}, not {value}; choose another --out_dir, or move it away")
        scores = read_scores(self.folder)
        return bool(checkpoint.checkpoints(self.folder)) and scores is not None and scores["iter"] >= wanted["max_iters"]


def read_sweep(folder):
    """The sweep.json of a folder: "runs" to compare, "missing" ones and "failed" {run: error}. BadInput if it is damaged."""
    remedy = "run the same tools.sweep once more"
    sweep = read_json(Path(folder) / "sweep.json", remedy)
    try:
        return {"runs": list(sweep["runs"]), "missing": list(sweep.get("missing", [])), "failed": dict(sweep["failed"])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder}/sweep.json is damaged ({error!r}); {remedy}") from error


def train_and_score(run, threads=None, group=None):
    """Returns None, or what went wrong in one line. Called here or on a machine of the cluster."""
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | ({"WANDB_RUN_GROUP": group} if group else {})
    env["PYTHONPATH"] = with_root()
    train = run.command() + (["--resume"] if holds_run(run.folder) else [])
    score = ["tools/score.py", f"--out_dir={run.folder}", *(a for a in run.arguments if a.startswith(("--mixer_file=", "--device=")))]
    Path(run.folder).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run.folder}.log", "a") as log:
        for script, *arguments in (train, score):
            # in a session of its own: Ctrl-C in the terminal reaches us alone, and we pass it on once
            process = subprocess.Popen([sys.executable, ROOT / script, *arguments], env=env, stdout=log, stderr=log, start_new_session=True)
            try:
                while process.poll() is None and not stopping.wait(0.1):
                    pass
            finally:  # stopped, here or as a job of the cluster
                if process.poll() is None:
                    process.terminate()  # train.py saves a checkpoint
                    process.wait()
            if stopping.is_set():
                return "interrupted"
            if process.returncode < 0:
                return f"killed by signal {-process.returncode}, for want of memory perhaps; see {log.name}"
            if process.returncode:
                lines = Path(log.name).read_text(errors="replace").split("\n")
                return next((line[-300:] for line in reversed(lines) if line.strip()), f"exit status {process.returncode}")


def with_root():
    """PYTHONPATH with this repository first."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def cluster(name, folder, settings):
    """submitit's executor for "slurm", or "local", a rehearsal on this machine. settings: what submitit takes, "partition=gpu,timeout_min=600".
    BadInput if submitit is not there or does not know them."""
    try:
        import submitit
    except ImportError as error:
        raise BadInput("--cluster needs submitit; pip install submitit") from error
    try:
        executor = submitit.AutoExecutor(folder=Path(folder) / "jobs", cluster=name)
        pairs = dict(pair.split("=", 1) for pair in settings.split(",") if pair)
        executor.update_parameters(**{key: int(value) if value.isdecimal() else value for key, value in pairs.items()})
    except (ValueError, TypeError, NameError, RuntimeError) as error:
        raise BadInput(f"--cluster={name} --cluster_options={settings}: {error}; the options are name=value,name=value as submitit.AutoExecutor "
                       "takes them") from error
    os.environ["PYTHONPATH"] = with_root()  # where the jobs find this module
    return executor


def carry_out(runs, at_once=1, executor=None, group=None):
    """Yields (run, error or None) as they end, with finished ones first. executor: a cluster's; otherwise this machine's cores are
    shared among `at_once` runs at a time. A signal stops all of them, with a checkpoint each, and raises KeyboardInterrupt."""
    waiting = []
    for run in runs:
        if run.finished():
            yield run, None
        else:
            waiting.append(run)
    threads = None if executor or at_once == 1 else max(1, torch.get_num_threads() // at_once)
    here = None if executor else ThreadPoolExecutor(at_once)
    jobs = {run: (executor or here).submit(train_and_score, run, threads, group) for run in waiting}
    try:
        while jobs:
            for run in [run for run, job in jobs.items() if job.done()]:
                yield run, result_of(jobs.pop(run))
            time.sleep(0.1)
    except (KeyboardInterrupt, GeneratorExit):
        stopping.set()
        for job in jobs.values():
            job.cancel()
        raise
    finally:
        if here:
            here.shutdown(cancel_futures=True)  # returns when the last one has saved


def result_of(job):
    try:
        return job.result()
    except Exception as error:  # of the cluster: out of time, cancelled, no such partition
        return " ".join(str(error).split())[-300:]


def end_like_ctrl_c():
    """SIGTERM raises KeyboardInterrupt from now on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
