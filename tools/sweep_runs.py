"""Runs of train.py one after the other, several at a time, or handed to a cluster.

    runs = [Run("out/a", ("configs/shakespeare.py", "--mixer=lln"))]
    for run, error in carry_out([run for run in runs if not run.finished()], at_once=2): ...

Every run is a train.py of its own in run.folder, then its scores (see tools/score.py); what they
print goes to the .log file beside the folder. One that diverges is scored as the worst. Checkpoints
that are not to be kept go once there are scores. An interrupted run goes on from its checkpoint. A
run that another process is at, one whose sweep was killed say, is waited for. What is started
here ends with this process (see tools/sweep_child.py).
"""
import contextlib
import fcntl
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from base.errors import BadInput, printable
from base.files import exists, read_json, writing
from config import Options, filled_in
from tools.records import holds_run
from tools.score import read_scores
from tools.sweep_watch import Watch
from training.checkpoint import remove_all
from training.run_folder import OF_ONE_COMMAND, open_plainly, read_options, weights_sha256

ROOT = Path(__file__).resolve().parents[1]
# options that change neither what is trained nor how, but for rounding
ASIDE = {"out_dir", "device", "threads", "checkpoint_activations", "eval_interval", "keep_last",
         "log_interval", "wandb_log", "wandb_project", "wandb_run_name", *OF_ONE_COMMAND}
OF_SCORING = ("--mixer_file=", "--device=", "--wandb_log=", "--wandb_project=")
IN_USE = "in use by another process"  # what train_and_score returns then
DIVERGED = re.compile(r"step \d+: .* is not finite")  # how train.py ends then
stopping = threading.Event()  # set by a signal: all processes are told to end, no more are started


# What a run is ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    folder: str
    arguments: tuple  # of train.py, without --out_dir and --resume
    keep_checkpoints: bool = True

    def command(self):
        return ["train.py", *self.arguments, f"--out_dir={self.folder}"]

    @cache  # a sweep asks time and again, and all of train.py's options are parsed for it
    def options(self):
        """As train.py would have them, name -> value. BadInput for what it would refuse."""
        arguments = [*self.command()[1:], "--overwrite"]  # or it would refuse the folder
        options, _ = read_options(arguments, "")
        return asdict(options)

    def scores(self, data_sha256=None):
        """What its scores.json says if it is finished, otherwise None. BadInput if the folder
        holds a run of other options, or on data with another checksum."""
        path = Path(self.folder) / "config.json"
        if not exists(path):
            return None
        config = read_json(path, "move the run away")
        other = difference(self.options(), config, data_sha256)
        if other:
            raise BadInput(f"{self.folder} was run with {other.name} {shortened(other.ran)}, "
                           f"not {other.wanted}; choose another --out_dir, or move it away")
        scores = read_scores(self.folder)
        if scores is None or scores["iter"] < self.options()["max_iters"]:
            return None
        return scores

    def finished(self):
        return self.scores() is not None


def resolved(values):
    """Options, name -> value, with those of the model that follow from others filled in."""
    return asdict(filled_in(Options(**values)))


@dataclass
class Difference:
    name: str    # of an option
    wanted: Any
    ran: Any


def difference(wanted, ran, data_sha256=None):
    """The first Difference that makes a run with the config `ran` another one than that of the
    options `wanted` on data with this checksum (None: not known), or None. The weights that both
    start from, init_from, are compared too.

    A config that lacks an option, which has come since, counts as run with its default."""
    aside = ASIDE | {"vocab_size"}
    if wanted["lr_decay_iters"] == ran.get("lr_decay_iters"):
        aside.add("max_iters")  # a shorter run is then the beginning of a longer one
    defaults = asdict(Options())
    lacking = {name: value for name, value in defaults.items() if name not in ran}
    with_defaults = resolved(wanted | lacking)
    for name, value in wanted.items():
        of_run = ran.get(name, with_defaults[name])
        if value != "auto" and name not in aside and of_run != value:
            return Difference(name, value, of_run)
    recorded = ran.get("data_sha256")
    if data_sha256 and recorded and recorded != data_sha256:
        return Difference("data_sha256", data_sha256, recorded)
    start = wanted["init_from"] and ran.get("init_sha256")
    if start and start_of(wanted["init_from"]) not in (None, start):
        return Difference("init_sha256", start_of(wanted["init_from"]), start)
    return None


@cache  # for all runs of a process
def start_of(init_from):
    """The checksum of the weights that init_from names, or None if they are not here any more."""
    try:
        return weights_sha256(init_from)
    except BadInput:
        return None


def shortened(value):
    """A value from a file, as a message may show it."""
    text = printable(str(value))
    return text if len(text) <= 60 else text[:57] + "..."


# Carrying runs out --------------------------------------------------------------------------------

def with_root():
    """PYTHONPATH with this repository first."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def environment(threads, group):
    env = dict(os.environ, PYTHONPATH=with_root())
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    if group:
        env["WANDB_RUN_GROUP"] = group
    return env


@contextlib.contextmanager
def locked_log(run):
    """Inside, the .log file of a run, open for appending and locked; None if another process has
    locked it.

    What is started with the file as its output holds the lock too, and goes on holding it should
    we be killed."""
    path = Path(f"{run.folder}.log")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        log = open_plainly(path)
    with log:
        log.seek(0, os.SEEK_END)
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        except OSError:
            pass  # a file system without locks
        yield log


def is_locked(path):
    """Whether a process holds the lock on a file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def is_in_use(run):
    """Whether another process is at a run: a sweep, what a killed sweep has left, or a train.py
    by hand."""
    return is_locked(f"{run.folder}.log") or is_locked(Path(run.folder) / "lock")


def train_and_score(run, threads=None, group=None):
    """Trains a run, from its checkpoint on if there is one, and scores it. Here or on a machine
    of the cluster.

    Returns None, IN_USE, or what went wrong in one line."""
    env = environment(threads, group)
    train = ["train", *run.command()[1:]]
    if holds_run(Path(run.folder)):
        train.append("--resume")
        if threads and not any(word.startswith("--threads") for word in train):
            # it may have begun alone, with more: two that share a core wait for each other's turns
            train.append(f"--threads={threads}")
    score = ["tools.score", f"--out_dir={run.folder}"]
    score += [word for word in run.arguments if word.startswith(OF_SCORING)]
    with locked_log(run) as log:
        if log is None:
            return IN_USE
        error = carry_out_child([*train, "--then", *score], run, env, log)
        if error and DIVERGED.search(error):
            error = carry_out_child([*score, "--diverged"], run, env, log)
        if error is None and not run.keep_checkpoints:
            remove_all([Path(run.folder) / "checkpoints"])
    return error and error[-300:]


def carry_out_child(command, run, env, log):
    """None, IN_USE, or what went wrong in one line, of a command of ours on a run."""
    status = run_child(command, env, log)
    if stopping.is_set():
        return "interrupted"
    if status == 0:
        return None
    if is_locked(Path(run.folder) / "lock"):
        return IN_USE  # a train.py by hand has it
    if status < 0:
        return f"killed by signal {-status}, for want of memory perhaps; see {run.folder}.log"
    return last_line(f"{run.folder}.log") or f"exit status {status}"


def run_child(command, env, log):
    """The exit status of a command of ours, which ends when we end."""
    # in a session of its own: Ctrl-C in the terminal reaches us alone, and we pass it on once
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools/sweep_child.py", *command],
        env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
    try:
        while process.poll() is None and not stopping.wait(0.1):
            pass
    finally:  # also if we are stopped, here or as a job of the cluster
        process.stdin.close()  # train.py saves a checkpoint
        process.wait()
    return process.returncode


def last_line(path):
    """The last line with something in it, or None."""
    lines = Path(path).read_text(errors="replace").splitlines()
    written = [line for line in lines if line.strip()]
    return printable(written[-1]) if written else None


def cluster(name, folder, settings):
    """submitit's executor for "slurm", or "local", a rehearsal on this machine. settings: what
    submitit takes, "slurm_partition=gpu,timeout_min=600". BadInput if submitit is not there or
    does not know them."""
    try:
        import submitit
    except ImportError as error:
        raise BadInput("--cluster needs submitit; pip install submitit") from error
    parameters = {}
    for pair in filter(None, settings.split(",")):
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise BadInput(f"--cluster_options={settings}: {pair!r} is not name=value")
        parameters[key] = int(value) if value.isdecimal() else value
    try:
        executor = submitit.AutoExecutor(folder=Path(folder) / "jobs", cluster=name)
        executor.update_parameters(**parameters)
    except Exception as error:  # of submitit, for what it does not know or find
        raise BadInput(f"--cluster={name} --cluster_options={settings}: {error}; the options are "
                       "name=value,name=value as submitit.AutoExecutor takes them") from error
    os.environ["PYTHONPATH"] = with_root()  # where the jobs find this module
    return executor


def carry_out(runs, at_once=1, executor=None, group=None, until=math.inf, watch=None):
    """Yields (run, error or None) as they end. executor: a cluster's, which gets all of them at
    once; otherwise at_once run here at a time, with a thread each if that is more than one. A run
    in use by another process is waited for, after the others. From `until` on, a time.monotonic(),
    none is started. A signal stops all of them, with a checkpoint each, and raises
    KeyboardInterrupt. watch: the Watch that shows how far they are, on a terminal."""
    waiting, watch = list(runs), watch or Watch()
    slots = len(waiting) if executor else at_once
    # more threads than cores would wait for each other
    threads = 1 if at_once > 1 and not executor else None
    pool = executor or ThreadPoolExecutor(at_once)
    jobs, told = {}, set()
    try:
        while waiting or jobs:
            if time.monotonic() >= until:
                waiting.clear()
            for run in startable(waiting, slots - len(jobs), told, watch):
                waiting.remove(run)
                jobs[run] = submit(pool, run, threads, group)
            for run in [run for run, job in jobs.items() if job.done()]:
                error = result_of(jobs.pop(run))
                if error == IN_USE:
                    waiting.append(run)
                else:
                    watch.clear()
                    yield run, error
            if waiting or jobs:
                watch.show(list(jobs), len(waiting), slots)
                time.sleep(0.1 if jobs else 1)
    except BaseException:  # Ctrl-C, say
        stopping.set()
        if jobs:
            watch.say("stopping: what runs saves a checkpoint; the same command goes on")
        for job in jobs.values():
            job.cancel()
        raise
    finally:
        if not executor:
            pool.shutdown(cancel_futures=True)  # returns when the last one has saved


def startable(waiting, at_most, told, watch):
    """The first at_most of the waiting runs that no other process is at; of those that one is at,
    a line each, unless they are among `told`."""
    found = []
    for run in waiting:
        if len(found) == at_most:
            break
        if not is_in_use(run):
            found.append(run)
        elif run not in told:
            watch.say(f"{run.folder} is {IN_USE}: waiting for it, the others go first")
            told.add(run)
    return found


def submit(pool, run, threads, group):
    """The job of a run. BadInput if the cluster does not take it."""
    try:
        return pool.submit(train_and_score, run, threads, group)
    except Exception as error:  # of submitit
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"the cluster takes no job: {reason}; mend --cluster_options") from error


def result_of(job):
    try:
        return job.result()
    except Exception as error:  # of the cluster: out of time, cancelled, no such partition
        return printable(" ".join(str(error).split())[-300:]) or type(error).__name__


def end_like_ctrl_c():
    """SIGTERM raises KeyboardInterrupt from now on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
