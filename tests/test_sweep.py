"""tools/sweep.py on real runs: what is finished, goes on, is refused; sizes that are matched."""
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import TINY, metrics, run

from base.errors import BadInput
from config import Options
from mixers import MIXERS, has_effect
from model import model_config
from tools import numerics, records
from tools import sweep as sweeping
from tools import sweep_runs as runs
from tools.sweep_matching import TOLERANCE, matched, size
from training import checkpoint
from training.run_folder import read_options

SHORT = [word for word in TINY if not word.startswith("--learning_rate")]
SHORT += ["--max_iters=4", "--eval_interval=2", "--log_interval=1"]
RATE = "--learning_rate=3e-2"


def command(*more):
    return ["-m", "tools.sweep", "configs/shakespeare.py", *SHORT, "--keep_last=1", *more]


def sweep(home, *more):
    done = run(home, *command(*more), timeout=300)
    assert done.returncode == 0, done
    return done.stdout


def scores(folder):
    return json.loads((folder / "scores.json").read_text())


def sweep_file(folder):
    return json.loads((folder / "sweep.json").read_text())


@pytest.fixture(scope="module")
def swept(home, tmp_path_factory):
    """A sweep of two mixers and one seed; what it printed is in swept.log beside it."""
    folder = tmp_path_factory.mktemp("sweeps") / "swept"
    out = sweep(home, "--mixers=softmax,pelican", RATE, "--seeds=1", f"--out_dir={folder}")
    folder.with_suffix(".log").write_text(out)
    return folder


@pytest.fixture
def here_sweep(here, monkeypatch, capsys):
    """here_sweep(*arguments): what tools.sweep prints in this process, where it trains nothing."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tools.sweep", *SHORT, "--keep_last=1", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            sweeping.main()
            sys.exit(0)  # a dry run returns
        assert exit.value.code == 0
        return capsys.readouterr().out
    return call


@pytest.fixture
def refuses(here, refusal):
    """refuses(*arguments): the one line of a tools.sweep that ended with status 2, and wrote
    nothing."""
    def call(*arguments):
        line = refusal(sweeping, *arguments)
        assert not list(here.iterdir())
        return line
    return call


def wait_for(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


# A whole sweep -------------------------------------------------------------------------------

def test_a_sweep_runs_every_mixer_and_says_how_long_it_will_take(swept):
    """And keeps no checkpoint of what is scored."""
    record = sweep_file(swept)
    assert sorted(record["runs"]) == ["pelican-lr0.03-seed1", "softmax-lr0.03-seed1"]
    assert record["failed"] == {} and record["missing"] == []
    for name in record["runs"]:
        assert metrics(swept / name)[-1]["iter"] == 4 and scores(swept / name)["report"]
        assert len(scores(swept / name)["first_losses"]) == numerics.STEPS
        assert not (swept / name / "checkpoints").exists()
    out = swept.with_suffix(".log").read_text()
    assert out.count(" left") == 1  # after the first of two
    assert out.startswith("2 runs, about 1 minute\n")


@pytest.mark.slow
def test_a_mixer_gets_the_rate_of_the_lowest_select_loss_and_its_seeds_run_at_it(home, tmp_path):
    """The lowest rate learns nothing. The runs that a rate is chosen by are not compared."""
    folder = tmp_path / "new" / "s"
    # a head that starts at zero would begin at an even guess, which is hard to beat in few steps
    same = ["--mixers=pelican", f"--out_dir={folder}", "--tie_head", "--zero_init_head=False"]
    tuned = [*same, "--tune=learning_rate=1e-9,3e-2"]
    out = sweep(home, *tuned, "--seeds=1", "--keep_checkpoints")
    assert "learning_rate 0.03 did best, at the edge of what was tried; 900000 is next" in out
    assert "diverged" in out
    losses = {}
    for path in folder.glob("pelican-lr*-seed0"):
        config = json.loads((path / "config.json").read_text())
        assert config["holdout"] == 0.1 and scores(path)["report"] is None
        if not scores(path).get("diverged"):
            losses[config["learning_rate"]] = scores(path)["select"]["loss"]
    best = min(losses, key=losses.get)
    assert best != 1e-9 and sweep_file(folder)["chosen"] == {"pelican": {"learning_rate": best}}
    compared = f"pelican-lr{best:g}-seed1"
    assert sweep_file(folder)["runs"] == [compared]
    assert checkpoint.checkpoints(folder / compared)
    assert not (folder / "pelican-lr1e-09-seed1").exists()
    out = sweep(home, *tuned, "--seeds=2", "--dry_run")  # the first stage has chosen
    assert out.count("would run") == 1 and out.count("finished   ") == 4
    out = sweep(home, *same, "--seeds=1", "--learning_rate=2e-2", "--dry_run")
    assert out.count("would run") == 1


def test_a_sweep_goes_on_where_it_was(home, swept, here_sweep, tmp_path):
    """Finished runs are left alone, and what sweep.json says of other mixers stays."""
    folder = shutil.copytree(swept, tmp_path / "swept")
    damaged = folder / "pelican-lr0.03-seed1"
    (damaged / "scores.json").write_text("{}")  # it has no checkpoints: it is trained again
    record = sweep_file(folder)
    record["chosen"]["lln"] = 0.03  # as earlier versions wrote it
    record["missing"] = ["lln-lr0.03-seed1", "pelican-lr0.03-seed9"]
    record["failed"] = {"lln-lr0.03-seed2": "loss nan", "pelican-lr0.03-seed3": "loss nan"}
    (folder / "sweep.json").write_text(json.dumps(record))
    same = ["configs/shakespeare.py", RATE, "--seeds=2", f"--out_dir={folder}"]
    same[0] = str(home / same[0])
    out = here_sweep(*same, "--mixers=softmax,pelican", "--dry_run")
    assert out.count("finished") == 1 and out.count("would run") == 3
    untouched = folder / "softmax-lr0.03-seed1" / "metrics.jsonl"
    before = untouched.stat().st_mtime_ns
    sweep(home, "--mixers=pelican", *same[1:])
    assert untouched.stat().st_mtime_ns == before
    assert metrics(damaged)[-1]["iter"] == 4 and "report" in scores(damaged)
    assert metrics(folder / "pelican-lr0.03-seed2")[-1]["iter"] == 4
    record = sweep_file(folder)
    assert sorted(record["runs"]) == [
        "pelican-lr0.03-seed1", "pelican-lr0.03-seed2", "softmax-lr0.03-seed1"]
    assert record["missing"] == ["lln-lr0.03-seed1"]
    assert record["failed"] == {"lln-lr0.03-seed2": "loss nan"}
    assert record["chosen"] == {"softmax": {}, "pelican": {}, "lln": 0.03}


def test_the_mixer_file_may_stand_in_the_config_and_register_an_imported_class(
        home, here_sweep, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from mixers import MIXERS\nfrom mixers.softmax import Softmax\nMIXERS['mine'] = Softmax\n")
    config = tmp_path / "config.py"
    config.write_text(f"mixer_file = {str(tmp_path / 'mine.py')!r}\n")
    same = ["--keep_last=1", "--mixers=mine", "--seeds=1", f"--out_dir={tmp_path}/s"]
    done = run(home, "-m", "tools.sweep", config, *SHORT, *same, timeout=300)
    assert done.returncode == 0, done
    assert here_sweep(str(config), *same, "--dry_run").startswith("finished")


MINE = """
import torch.nn as nn
from mixers import MIXERS

def broken(config, layer):
    raise ValueError('no such thing')

class Exploding(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.factor = 1.0

    def forward(self, x, state=None):
        return x * self.factor, state

    def apply_statistics(self):
        self.factor *= 1e30

MIXERS['broken'] = broken
MIXERS['exploding'] = Exploding
"""


def test_failed_and_diverged_runs_are_said_so_and_the_others_run(home, tmp_path):
    """A diverged one is there to compare, as an even guess; a failed one is not."""
    (tmp_path / "mine.py").write_text(MINE)
    arguments = ["--mixers=broken,exploding,pelican", f"--mixer_file={tmp_path}/mine.py",
                 "--learning_rate=1e-3", "--seeds=1", "--at_once=2", f"--out_dir={tmp_path}/s"]
    done = run(home, *command(*arguments), env={"OMP_NUM_THREADS": "2"}, timeout=300)
    assert done.returncode == 1, done
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed")]
    assert "broken-lr0.001-seed1" in line and "no such thing" in line
    record = sweep_file(tmp_path / "s")
    assert record["runs"] == ["exploding-lr0.001-seed1", "pelican-lr0.001-seed1"]
    assert list(record["failed"]) == record["missing"] == ["broken-lr0.001-seed1"]
    config = json.loads((tmp_path / "s/pelican-lr0.001-seed1/config.json").read_text())
    assert config["threads"] == 1  # two at once, one thread each
    assert "exploding-lr0.001-seed1: diverged" in done.stdout
    diverged, other = (scores(tmp_path / "s" / name) for name in record["runs"])
    guess = math.log(diverged["vocab_size"])
    assert diverged["diverged"] and diverged["iter"] == 4 and not other.get("diverged")
    assert diverged["report"]["loss"] == pytest.approx(guess)
    for name in ("by_block", "by_position"):
        assert diverged[name] == pytest.approx([guess] * len(other[name]))
    assert not (tmp_path / "s/exploding-lr0.001-seed1/checkpoints").exists()


@pytest.mark.slow
def test_the_rehearsal_of_a_cluster_runs_the_same(home, swept, tmp_path):
    sweep(home, "--mixers=softmax", RATE, "--seeds=1", "--cluster=local",
          "--cluster_options=timeout_min=5", f"--out_dir={tmp_path}/s")
    there = scores(tmp_path / "s" / "softmax-lr0.03-seed1")
    assert there["report"] == scores(swept / "softmax-lr0.03-seed1")["report"]


# Interrupted, killed, in use -----------------------------------------------------------------

def start(home, folder, *more):
    """A sweep that trains for long, and the folder of its only run."""
    long = command("--max_iters=100000", RATE, "--seeds=1", f"--out_dir={folder}", *more)
    process = subprocess.Popen([sys.executable, *long], cwd=home, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return process


def shorten(folder):
    """Lets a run end four steps after where it is. Returns that step."""
    last = int(checkpoint.checkpoints(folder)[-1].name) + 4
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_iters": last, "lr_decay_iters": last}
    (folder / "config.json").write_text(json.dumps(config))
    return last


@pytest.mark.slow
def test_an_interrupted_sweep_saves_its_runs_and_goes_on(home, tmp_path):
    of_both = ["--mixers=softmax,pelican", "--at_once=2"]
    process = start(home, tmp_path / "s", *of_both)
    folders = [tmp_path / "s" / f"{mixer}-lr0.03-seed1" for mixer in ("softmax", "pelican")]
    wait_for(lambda: all(checkpoint.checkpoints(folder) for folder in folders), process)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 130
    for folder in folders:
        assert "stopped by a signal" in Path(f"{folder}.log").read_text()
    last = max(shorten(folder) for folder in folders)
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        config |= {"max_iters": last, "lr_decay_iters": last}
        (folder / "config.json").write_text(json.dumps(config))
    sweep(home, f"--max_iters={last}", RATE, "--seeds=1", f"--out_dir={tmp_path / 's'}", *of_both)
    for folder in folders:
        assert scores(folder)["iter"] == last


def test_the_trainings_of_a_killed_sweep_save_and_end_and_it_goes_on_at_once(home, tmp_path):
    process = start(home, tmp_path / "s", "--mixers=pelican")
    folder = tmp_path / "s" / "pelican-lr0.03-seed1"
    wait_for(lambda: checkpoint.checkpoints(folder), process)
    process.kill()
    process.communicate()
    again = start(home, tmp_path / "s", "--mixers=pelican")
    log = Path(f"{folder}.log")
    wait_for(lambda: "val loss" in log.read_text().partition("going on from")[2], again)
    assert log.read_text().count("stopped by a signal") == 1
    assert "in use by the training" not in log.read_text()
    again.terminate()
    again.communicate(timeout=60)
    assert log.read_text().count("stopped by a signal") == 2
    assert not runs.is_locked(log) and not runs.is_locked(folder / "lock")
    assert sweep_file(tmp_path / "s")["failed"] == {}


@pytest.mark.parametrize("held", ["a.log", "a/lock"])
def test_a_run_in_use_is_waited_for_after_the_others(tmp_path, monkeypatch, capsys, held):
    """By another sweep, which holds the log, or by a train.py by hand."""
    first, second = (runs.Run(str(tmp_path / name), ()) for name in "ab")
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(runs, "run_child", lambda *arguments: 0)
    with open(tmp_path / held, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ended = runs.carry_out([first, second])
        assert next(ended) == (second, None)
    assert list(ended) == [(first, None)]
    [line] = capsys.readouterr().out.splitlines()
    assert f"{first.folder} is in use" in line


def test_a_run_that_somebody_else_takes_in_between_is_not_a_failed_one(tmp_path, monkeypatch):
    run = runs.Run(str(tmp_path / "a"), ())
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(runs, "run_child", lambda *arguments: 2)
    with runs.locked_log(run):
        assert runs.train_and_score(run) == runs.IN_USE
    with open(tmp_path / "a" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runs.train_and_score(run) == runs.IN_USE
    assert runs.train_and_score(run) == "exit status 2"


@pytest.mark.parametrize("given, expected", [((), ["--threads=1"]),
                                             (("--threads=3",), ["--threads=3"])])
def test_a_run_that_goes_on_beside_others_takes_as_many_threads(
        tmp_path, monkeypatch, given, expected):
    """And not as many as it began with, when it was alone."""
    commands = []
    monkeypatch.setattr(runs, "run_child", lambda command, *more: commands.append(command) or 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"threads": 2}')
    run = runs.Run(str(tmp_path / "a"), ("a.py", *given))
    assert runs.train_and_score(run, threads=1) is None
    [command] = commands
    training = command[:command.index("--then")]
    assert "--resume" in training
    assert [word for word in training if word.startswith("--threads")] == expected


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_log_that_is_no_file_of_ours_is_not_written_to(tmp_path, kind):
    log, other = tmp_path / "a.log", tmp_path / "mine.txt"
    if kind == "pipe":
        os.mkfifo(log)
    elif kind == "link":
        other.write_text("mine")
        log.symlink_to(other)
    else:
        log.mkdir()
    words = {"pipe": "no regular file", "link": "is a link", "folder": "cannot write"}
    with pytest.raises(BadInput, match=f"a.log.*{words[kind]}|{words[kind]}.*a.log"):
        runs.train_and_score(runs.Run(str(tmp_path / "a"), ()))
    assert kind != "link" or other.read_text() == "mine"


def test_the_number_of_threads_is_recorded_as_used(here, monkeypatch):
    import train
    before = torch.get_num_threads()
    try:
        for asked, used in ((None, before), (2, min(2, os.cpu_count())), (9999, os.cpu_count())):
            words = [f"--threads={asked}", *TINY, "--max_iters=1", f"--out_dir=run{asked}"]
            monkeypatch.setattr(sys, "argv", ["train.py", *words])
            train.main()
            assert json.loads(Path(f"run{asked}/config.json").read_text())["threads"] == used
    finally:
        torch.set_num_threads(before)


# What is finished ----------------------------------------------------------------------------

def arguments(*more):
    return (*SHORT, "--mixer=softmax", "--learning_rate=0.01", *more)


def config_of(*more):
    """config.json of a run of these arguments."""
    options, _ = read_options(list(arguments(*more)), "")
    config = vars(options) | {"out_dir": "there"}
    return config | asdict(model_config(config | {"vocab_size": 1}, "test"))


@pytest.mark.parametrize("ran, wanted, words", [
    ([], ["--n_head=1"], "n_head 2, not 1"),
    (["--ffn_hidden=8"], [], "ffn_hidden 8, not 64"),
    (["--min_lr=1e-4"], [], "min_lr 0.0001, not 0.001"),
    (["--max_iters=3"], [], "max_iters 3, not 4"),
    (["--wandb_log", "--keep_last=3", "--threads=7"], [], None),
    (["--lr_decay_iters=9"], ["--lr_decay_iters=9", "--max_iters=3"], None)])
def test_only_a_run_of_the_same_options_is_finished(swept, here, tmp_path, ran, wanted, words):
    """Also where an option is left out and train.py chooses it."""
    folder = shutil.copytree(swept / "softmax-lr0.03-seed1", tmp_path / "run")
    (folder / "config.json").write_text(json.dumps(config_of(*ran)))
    run = runs.Run(str(folder), arguments(*wanted))
    if words:
        with pytest.raises(BadInput, match=words):
            run.finished()
    else:
        assert run.finished()


def test_a_run_from_before_an_option_counts_as_one_with_its_default(here):
    config = config_of()
    wanted = runs.Run("x", arguments()).options()
    assert runs.difference(wanted, config | {"data_sha256": "a"}, "a") is None
    assert runs.difference(wanted, config | {"data_sha256": "a"}, "b").name == "data_sha256"
    for lacking in ("weight_decay", "ffn_hidden"):  # ffn_hidden's default follows from n_embd
        older = {name: value for name, value in config.items() if name != lacking}
        assert runs.difference(wanted, older) is None
        other = runs.Run("x", arguments(f"--{lacking}=1")).options()
        assert runs.difference(other, older).name == lacking


@pytest.fixture
def records_of_swept(swept, tmp_path, monkeypatch):
    """results/swept as a fresh clone has it."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    kept = records.read_records(swept)
    records.write_records(tmp_path / "results" / "swept", kept)
    return kept


def test_what_is_recorded_is_not_trained_again(
        home, swept, records_of_swept, here_sweep, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "run_child", None)  # nothing is trained
    folder = tmp_path / "clone" / "swept"
    same = [str(home / "configs/shakespeare.py"), "--mixers=softmax,pelican", RATE]
    same.append(f"--out_dir={folder}")
    out = here_sweep(*same, "--seeds=1")
    assert out.startswith("nothing is left to run") and out.count("finished before") == 2
    assert sorted(sweep_file(folder)["runs"]) == sorted(sweep_file(swept)["runs"])
    out = here_sweep(*same, "--seeds=2", "--dry_run")
    assert out.count("finished   ") == 2 and out.count("would run") == 2
    for other in (["--n_head=1"], ["--max_iters=5"], ["--dataset=digits"]):
        assert here_sweep(*same, "--seeds=1", "--dry_run", *other).count("would run") == 2


def swept_config(folder):
    return str(Path(sweeping.__file__).parents[1] / sweep_file(folder)["config"])


# What is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("words, naming", [
    (["--learning_rates=1"], "nearest: --learning_rate"),
    (["--seed=3"], "--seeds"),
    (["--holdout=0.2"], "--tune"),
    (["--max_hours=0"], "max_hours"),
    (["--resume"], "goes on by itself"),
    (["--mixers=softmax,nope"], "have"),
    (["--tune=fast"], "'fast' is not option=value,value"),
    (["--tune=rate=1,2"], "no option 'rate'"),
    (["--tune=lr=1,2"], "nearest: learning_rate"),
    (["--tune=learning_rate=fast,2"], "learning_rate: "),
    (["--tune=learning_rate=-1,2"], "greater than or equal to 0"),
    (["--tune=learning_rate=1e400,1"], "learning_rate: "),
    (["--tune=learning_rate=1e-3"], "at least two values"),
    (["--tune=learning_rate=1e-3,1.0000001e-3"], "six digits"),
    (["--tune=dropout=0,0.1 dropout=0,0.2"], "twice"),
    (["--tune=seed=1,2"], "seed is not to be tuned"),
    (["--tune=init_from=out/a,out/b"], "cannot stand in the name"),
    (["--tune=n_head=2,4"], "n_head is both set and tuned"),
    (["--tune=n_kv_head=2,3"], "n_kv_head 3"),
    (["--seeds=0"], "seeds"),
    (["--seeds=2000000000"], "seeds"),
    (["--at_once=1000000"], "at_once"),
    (["--match=size"], "match"),
    (["--ssa_share=False"], "--ssa_share has no effect"),
    (["--mixers="], "mixers"),
    (["--baseline=lln"], "--baseline is for --match"),
    (["--match=params", "--baseline=foo"], "--baseline=foo: mixer 'foo'"),
    (["--n_head=3"], "n_embd"),
    (["--min_lr=1"], "min_lr 1.0 is above learning_rate"),
    (["--device=tpu"], "tpu"),
    (["--cluster_options=timeout_min=5"], "--cluster_options is for --cluster"),
    (["--cluster=local", "--at_once=2"], "--at_once"),
    (["--cluster=local", "--cluster_options=nonsense=1"], "nonsense"),
    (["--cluster=local", "--cluster_options=timeout_min"], "'timeout_min' is not name=value"),
    (["--cluster=local", "--cluster_options==5"], "'=5' is not name=value"),
    (["--cluster=local", "--cluster_options=timeout_min=soon"], "timeout_min=soon"),
    (["--cluster=slurm"], "slurm")])
def test_bad_options_are_one_line(refuses, tmp_path, words, naming):
    assert naming in refuses(*SHORT, f"--out_dir={tmp_path}/s", *words)
    assert not list(tmp_path.glob("s/*.json"))
    assert not list(tmp_path.glob("s/*seed*"))


@pytest.mark.parametrize("out_dir", ["a" * 300, "/proc/x", "there/file/s"])
def test_a_folder_that_cannot_be_is_one_line(refuses, tmp_path, monkeypatch, out_dir):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    assert "cannot write" in refuses(*SHORT, f"--out_dir={tmp_path / out_dir}")


@pytest.mark.parametrize("content, naming", [
    ("[]", "no JSON object"), ('{"runs": null, "failed": {}}', "runs"),
    ('{"runs": ["../x"], "failed": {}}', "runs"), ('{"runs": ["a/b"], "failed": {}}', "runs"),
    ('{"runs": [], "failed": [1]}', "failed"),
    ('{"runs": [], "failed": {}, "chosen": 3}', "chosen"),
    ("[" * 100_000, "no valid JSON"), ('{"runs": [], "failed": {"a": NaN}}', "no valid JSON"),
    (None, "no regular file")])
def test_a_damaged_sweep_file_is_one_line_before_anything_runs(refuses, tmp_path, content, naming):
    folder = tmp_path / "s"
    folder.mkdir()
    if content is None:
        os.mkfifo(folder / "sweep.json")
    else:
        (folder / "sweep.json").write_text(content)
    line = refuses(*SHORT, f"--out_dir={folder}")
    assert "sweep.json" in line and naming in line
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("content, naming", [
    ('{"block_size": "' + "x" * 5000 + '"}', "block_size xxx"),
    ('{"mixer": "\\u001b[31m"}', r"\x1b"),
    ("{}x", "no valid JSON"), (None, "no regular file")])
def test_a_damaged_config_of_a_run_is_one_short_line(refuses, tmp_path, content, naming):
    folder = tmp_path / "s" / "softmax-lr0.001-seed1"
    folder.mkdir(parents=True)
    if content is None:
        os.mkfifo(folder / "config.json")
    else:
        (folder / "config.json").write_text(content)
    line = refuses(*SHORT, f"--out_dir={tmp_path}/s")
    assert naming in line and len(line) < 500


# Equal sizes ---------------------------------------------------------------------------------

@pytest.mark.parametrize("what, baseline", [
    ("params", "softmax"), ("flops", "softmax"), ("flops", "performer")])
def test_matching_brings_every_mixer_to_the_baselines_size(what, baseline):
    """With options of two mechanisms set, which must count for these and not for the others."""
    options = asdict(Options(n_layer=1, n_head=4, n_embd=64, block_size=64,
                             performer_features=256, linformer_segment=16))

    def model_of(mixer, changed={}):
        own = {name: value for name, value in options.items() if has_effect(name, mixer, 1)}
        return model_config(own | {"mixer": mixer, "vocab_size": 65} | changed, "test")

    target = size(model_of(baseline), what)
    for mixer in MIXERS:
        found = matched(options, mixer, baseline, what, 65)
        changed = {change.name: change.value for change in found.changes}
        assert found.target == target
        assert abs(found.reached / target - 1) <= TOLERANCE, (mixer, found)
        assert size(model_of(mixer, changed), what) == found.reached
        assert set(changed) <= {"n_embd", "ffn_hidden"}
        assert changed or mixer not in ("pelican", "causal_max")
        for change in found.changes:
            assert change.before == getattr(model_of(mixer), change.name)


def test_sizes_that_cannot_be_matched_are_said_so():
    """One channel a head already, and attention over 4,096 tokens costs more than pelican."""
    options = asdict(Options(n_layer=1, n_head=16, n_embd=16, ffn_hidden=8, block_size=4096))
    with pytest.raises(BadInput, match="cannot be brought"):
        matched(options, "softmax", "pelican", "flops", 65)
