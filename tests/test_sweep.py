"""tools/sweep.py on real runs: what is finished, what goes on, what is refused; sizes that are matched."""
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import TINY, metrics, run

from base.errors import BadInput
from config import Options
from mixers import MIXERS, has_effect
from model import model_config
from tools import sweep as sweeping
from tools import sweep_runs as runs
from tools.sweep_matching import TOLERANCE, matched, size
from training import checkpoint
from training.run_folder import read_options

SHORT = [a for a in TINY if not a.startswith("--learning_rate")] + ["--max_iters=4", "--eval_interval=2", "--log_interval=1"]
ALONE = {"WANDB_MODE": "offline"}


def sweep(home, *more, **options):
    return run(home, "-m", "tools.sweep", "configs/shakespeare.py", *SHORT, "--keep_last=1", *more, timeout=300, **options)


@pytest.fixture(scope="module")
def swept(home, tmp_path_factory):
    """A sweep of two mixers and two seeds, with wandb; what it printed is in swept.log beside it."""
    folder = tmp_path_factory.mktemp("sweeps") / "swept"
    done = sweep(home, "--mixers=softmax,pelican", "--learning_rates=3e-2", "--seeds=2", "--wandb_log", f"--out_dir={folder}", env=ALONE)
    assert done.returncode == 0, done
    folder.with_suffix(".log").write_text(done.stdout)
    return folder


def scores(folder):
    return json.loads((folder / "scores.json").read_text())


def test_a_sweep_runs_every_mixer_with_every_seed(swept):
    record = json.loads((swept / "sweep.json").read_text())
    assert sorted(record["runs"]) == sorted(f"{mixer}-lr0.03-seed{seed}" for mixer in ("softmax", "pelican") for seed in (1, 2))
    assert record["failed"] == {} and all(metrics(swept / run)[-1]["iter"] == 4 for run in record["runs"])
    assert swept.with_suffix(".log").read_text().count("min left") >= 2


@pytest.mark.slow
def test_each_mixer_gets_the_rate_of_the_lower_select_loss_and_its_seeds_run_at_it(home, tmp_path):
    """Of two rates the lower learns nothing, and the run that a rate is chosen by is not among those that are compared."""
    folder = tmp_path / "new" / "s"
    done = sweep(home, "--mixers=softmax,pelican", "--learning_rates=1e-9,3e-2", "--seeds=1", f"--out_dir={folder}")
    assert done.returncode == 0 and "the edge of what was tried" in done.stdout, done
    record = json.loads((folder / "sweep.json").read_text())
    for mixer in ("softmax", "pelican"):
        low, high = (scores(folder / f"{mixer}-lr{rate}-seed0")["select"]["loss"] for rate in ("1e-09", "0.03"))
        assert high < low and record["chosen"][mixer] == 0.03
    assert sorted(record["runs"]) == ["pelican-lr0.03-seed1", "softmax-lr0.03-seed1"]
    assert not (folder / "softmax-lr1e-09-seed1").exists()
    done = sweep(home, "--mixers=pelican", "--learning_rates=3e-2", "--seeds=1", f"--out_dir={folder}")  # a later one leaves the others in
    assert sorted(json.loads((folder / "sweep.json").read_text())["runs"]) == ["pelican-lr0.03-seed1", "softmax-lr0.03-seed1"], done
    done = sweep(home, "--mixers=pelican", "--learning_rates=2e-2", "--seeds=1", f"--out_dir={folder}", "--dry_run")
    assert done.stdout.count("would run") == 1, done
    done = sweep(home, "--mixers=softmax,pelican", "--learning_rates=1e-9,3e-2", "--seeds=2", f"--out_dir={folder}", "--dry_run")
    assert done.stdout.count("would run") == 2 and done.stdout.count("finished   ") == 6, done  # the second stage, as the first has chosen


def test_the_mixer_file_may_stand_in_the_config_and_register_an_imported_class(home, tmp_path):
    (tmp_path / "mine.py").write_text("from mixers import MIXERS\nfrom mixers.softmax import Softmax\nMIXERS['mine'] = Softmax\n")
    (tmp_path / "config.py").write_text(f"mixer_file = {str(tmp_path / 'mine.py')!r}\n")
    same = ["-m", "tools.sweep", tmp_path / "config.py", *SHORT, "--keep_last=1", "--mixers=mine", "--seeds=1", f"--out_dir={tmp_path}/s"]
    assert (done := run(home, *same, timeout=300)).returncode == 0, done
    assert (done := run(home, *same, "--dry_run")).returncode == 0 and done.stdout.startswith("finished"), done


def test_a_sweep_goes_on_where_it_was(home, swept, tmp_path):
    """Finished runs are left alone, and --dry_run names what is missing."""
    folder = shutil.copytree(swept, tmp_path / "swept")
    shutil.rmtree(folder / "pelican-lr0.03-seed2")
    (folder / "pelican-lr0.03-seed1/scores.json").write_text("{}")  # damaged: it is made again
    same = "--mixers=softmax,pelican", "--learning_rates=3e-2", "--seeds=2", f"--out_dir={folder}"
    done = sweep(home, *same, "--dry_run")
    assert done.returncode == 0 and done.stdout.count("finished") == 2 and done.stdout.count("would run") == 2, done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl") if path.parent.name != "pelican-lr0.03-seed1"}
    done = sweep(home, *same)
    assert done.returncode == 0 and done.stdout.count("finished before") == 2, done
    assert len(json.loads((folder / "sweep.json").read_text())["runs"]) == 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert metrics(folder / "pelican-lr0.03-seed2")[-1]["iter"] == 4 and "report" in scores(folder / "pelican-lr0.03-seed1")


@pytest.mark.parametrize("ran, wanted, words", [
    ([], ["--n_head=1"], "n_head 2, not 1"), (["--ffn_hidden=8"], [], "ffn_hidden 8, not 64"), (["--min_lr=1e-4"], [], "min_lr 0.0001, not 0.001"),
    (["--max_iters=3"], [], "max_iters 3, not 4"), (["--wandb_log", "--keep_last=3"], [], None), (["--lr_decay_iters=9"], ["--lr_decay_iters=9", "--max_iters=3"], None)])
def test_only_a_run_of_the_same_options_is_finished(home, swept, here, tmp_path, ran, wanted, words):
    """Also where an option is left out and train.py chooses it."""
    def arguments(more):
        return tuple(SHORT + ["--mixer=softmax", "--learning_rate=0.01"] + more)
    config = vars(read_options(list(arguments(ran)), "")[0]) | {"out_dir": "there"}
    config |= asdict(model_config(config | {"vocab_size": 1}, "test"))
    folder = shutil.copytree(swept / "softmax-lr0.03-seed1", tmp_path / "run")
    (folder / "config.json").write_text(json.dumps(config))
    run = runs.Run(str(folder), arguments(wanted))
    if words:
        with pytest.raises(BadInput, match=words):
            run.finished()
    else:
        assert run.finished()


def test_a_failed_run_is_listed_with_its_error_and_the_others_run(home, tmp_path):
    (tmp_path / "mine.py").write_text("from mixers import MIXERS\ndef broken(config, layer): raise ValueError('no such thing')\nMIXERS['broken'] = broken\n")
    done = sweep(home, "--mixers=broken,pelican", f"--mixer_file={tmp_path}/mine.py", "--seeds=1", "--at_once=2", f"--out_dir={tmp_path}/s")
    assert done.returncode == 1, done
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed")]
    assert "broken-lr0.001-seed1" in line and "no such thing" in line
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["runs"] == ["pelican-lr0.001-seed1"]


@pytest.mark.slow
def test_an_interrupted_sweep_saves_its_runs_and_goes_on(home, tmp_path):
    same = ["-m", "tools.sweep", "configs/shakespeare.py", *SHORT, "--max_iters=100000", "--mixers=softmax,pelican", "--seeds=1", "--at_once=2", f"--out_dir={tmp_path}/s"]
    process = subprocess.Popen([sys.executable, *same], cwd=home, stderr=subprocess.PIPE, text=True)
    folders = [tmp_path / "s" / f"{mixer}-lr0.001-seed1" for mixer in ("softmax", "pelican")]
    deadline = time.monotonic() + 90
    while not all(checkpoint.checkpoints(folder) for folder in folders):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 130
    reached = [int(checkpoint.checkpoints(folder)[-1].name) for folder in folders]
    assert all("stopped by a signal" in Path(f"{folder}.log").read_text() for folder in folders)
    longest = max(reached) + 4
    for folder in folders:  # what max_iters says may change, so that this test ends
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_iters": longest, "lr_decay_iters": longest}))
    done = run(home, *same, f"--max_iters={longest}")
    assert done.returncode == 0, done
    assert all(int(checkpoint.checkpoints(folder)[-1].name) == longest for folder in folders)


@pytest.mark.slow
def test_the_rehearsal_of_a_cluster_runs_the_same(home, swept, tmp_path):
    done = sweep(home, "--mixers=softmax", "--learning_rates=3e-2", "--seeds=1", "--cluster=local", "--cluster_options=timeout_min=5", f"--out_dir={tmp_path}/s")
    assert done.returncode == 0, done
    assert scores(tmp_path / "s" / "softmax-lr0.03-seed1")["report"] == scores(swept / "softmax-lr0.03-seed1")["report"]


@pytest.fixture
def refuses(here, monkeypatch, capsys):
    """refuses(tool, *arguments): the one line of a command that ended with status 2, and wrote nothing but a log."""
    def call(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            tool.main()
        line = capsys.readouterr().err
        assert exit.value.code == 2 and line.count("\n") == 1, line
        assert not list(here.iterdir())
        return line
    return call


@pytest.mark.parametrize("arguments, words", [
    (["--learning_rate=1"], "--learning_rates"), (["--seed=3"], "--seeds"), (["--resume"], "goes on by itself"), (["--mixers=softmax,nope"], "have"),
    (["--learning_rates=fast"], "--learning_rates=fast"), (["--learning_rates=-1"], "above 0"), (["--seeds=0"], "seeds"), (["--match=size"], "match"),
    (["--ssa_share=False"], "--ssa_share has no effect"), (["--mixers="], "mixers"), (["--baseline=lln"], "--baseline is for --match"), (["--match=params", "--baseline=foo"], "--baseline=foo: mixer 'foo'"), (["--n_head=3"], "n_embd"),
    (["--min_lr=1"], "min_lr 1.0 is above learning_rate"), (["--cluster=local", "--cluster_options=nonsense=1"], "nonsense")])
def test_bad_options_are_one_line(refuses, tmp_path, arguments, words):
    assert words in refuses(sweeping, *SHORT, f"--out_dir={tmp_path}/s", *arguments)
    assert not list(tmp_path.glob("s/*seed*"))


# -- equal sizes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what, baseline", [("params", "softmax"), ("flops", "softmax"), ("flops", "performer")])
def test_matching_brings_every_mixer_to_the_baselines_size(what, baseline):
    """With options of two mechanisms set, which must count for these and not for the others."""
    options = asdict(Options(n_layer=1, n_head=4, n_embd=64, block_size=64, performer_features=256, linformer_segment=16))
    own = lambda mixer: {name: value for name, value in options.items() if has_effect(name, mixer, 1)} | {"mixer": mixer, "vocab_size": 65}
    for mixer in MIXERS:
        found, reached, target = matched(options, mixer, baseline, what, 65)
        changed = {name: value for name, (_, value) in found.items()}
        assert target == size(model_config(own(baseline), "test"), what)
        assert abs(reached / target - 1) <= TOLERANCE, (mixer, reached, target)
        config = model_config(own(mixer) | changed, "test")
        assert size(config, what) == reached
        assert set(changed) <= {"n_embd", "ffn_hidden"} and (changed or mixer not in ("pelican", "causal_max"))
        assert all(before == getattr(model_config(own(mixer), "test"), name) for name, (before, _) in found.items())


def test_sizes_that_cannot_be_matched_are_said_so():
    """One channel a head already, and attention over 4,096 tokens costs more than the whole of pelican."""
    options = asdict(Options(n_layer=1, n_head=16, n_embd=16, ffn_hidden=8, block_size=4096))
    with pytest.raises(BadInput, match="cannot be brought"):
        matched(options, "softmax", "pelican", "flops", 65)
