"""tools/experiment.py, with a stand-in for training: what is tuned, shared, refused, estimated."""
import json
import math
import random
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
from conftest import TINY
from safetensors.torch import load_file, save_file

from base.errors import BadInput
from mixers import MIXERS
from mixers.softmax import Softmax
from tools import numerics, records
from tools.experiment import Experiment
from tools.sweep_cost import Cost, seconds_of_run
from tools.sweep_finished import losses_of
from tools.sweep_runs import start_of
from tools.sweep_tuning import MOST_EXTENSIONS, Search, checked_grids, grids_in, next_value
from training import checkpoint
from training.run_folder import read_options, weights_sha256

ARMS = {"softmax": {"mixer": "softmax"}, "mine": {"mixer": "pelican", "n_embd": 8}}
COMMON = {"dataset": "letters", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16,
          "batch_size": 4, "device": "cpu", "max_iters": 4}
RATES = {"learning_rate": [0.01, 0.02, 0.04]}


class Trainer:
    """In a cluster's place: leaves at once what a run leaves behind, with the loss that a function
    of its options gives; None: the run fails; "diverged"."""

    def __init__(self, loss):
        self.loss = loss
        self.trained = []  # names

    def submit(self, train_and_score, run, threads, group):
        job = Future()
        loss = self.loss(run.options())
        self.trained.append(Path(run.folder).name)
        job.set_result("no such thing" if loss is None else leave_behind(run, loss))
        return job


def leave_behind(run, loss):
    options, _ = read_options(run.command()[1:], "")
    folder = Path(run.folder)
    folder.mkdir(parents=True)
    start = weights_sha256(options.init_from) if options.init_from else None
    own = {"dtype": "float32", "init_sha256": start}
    (folder / "config.json").write_text(json.dumps(vars(options) | own))
    row = {"iter": options.max_iters, "seconds": 36.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    part = {"loss": loss, "bpb": None, "accuracy": None}
    scores = {"vocab_size": 28, "iter": options.max_iters, "by_position": None, "by_cell": None,
              "select": part if options.holdout else None,
              "report": None if options.holdout else part,
              "first_losses": numerics.first_losses(options)}
    if loss == "diverged":
        for part in filter(None, (scores["select"], scores["report"])):
            part["loss"] = math.log(28)
        scores["diverged"] = True
    (folder / "scores.json").write_text(json.dumps(scores))


def distance(best):
    """A loss that is lowest where an arm's rate is best[mixer]."""
    return lambda options: abs(math.log(options["learning_rate"] / best[options["mixer"]]))


def constant(options):
    return 1.0


@pytest.fixture
def experiment(here, tmp_path, monkeypatch):
    """experiment(loss, name, ...): an Experiment in out/sweeps/<name> whose runs have that loss."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    losses_of.cache_clear()

    def make(loss=constant, name="one", arms=ARMS, tune=None, **more):
        common = COMMON | more.pop("common", {})
        return Experiment(f"out/sweeps/{name}", None, common, arms, tune,
                          executor=Trainer(loss), **more)
    return make


def names_of(experiment):
    return sorted(experiment.executor.trained)


# Tuning --------------------------------------------------------------------------------------

def test_each_arm_is_tuned_until_its_best_rate_is_inside(experiment, capsys):
    """From the same grid; the runs to tune by have seed 0 and a slice held out."""
    some = experiment(distance({"softmax": 0.021, "pelican": 0.15}), tune=RATES)
    assert some.cost([1, 2]).runs == 2 * (3 + 2)
    assert some.tune() == {"softmax": {"learning_rate": 0.02}, "mine": {"learning_rate": 0.16}}
    rates = [0.01, 0.02, 0.04]
    assert names_of(some) == sorted(
        [f"softmax-lr{rate}-seed0" for rate in rates]
        + [f"mine-lr{rate}-seed0" for rate in [*rates, 0.08, 0.16, 0.32]])
    for record in records.read_records("out/sweeps/one"):
        assert record.config["holdout"] == 0.1 and record.config["seed"] == 0
    out = capsys.readouterr().out
    assert "mine: learning_rate 0.08 did best, at the edge of what was tried; 0.16 is next" in out
    assert out.count("is next") == 3 and "-> learning_rate 0.16\n" in out
    before = names_of(some)
    assert some.tune() and names_of(some) == before
    assert some.cost([1, 2]).runs == 4


def test_further_seeds_decide_between_the_best_two_values(experiment, capsys):
    """At 0.02 both do best with seed 0, and fail to learn with others."""
    def loss(options):
        unlucky = options["learning_rate"] == 0.02 and options["seed"] != 0
        return 5.0 if unlucky else distance({"softmax": 0.019, "pelican": 0.019})(options)

    some = experiment(loss, tune=RATES, tune_seeds=3)
    assert some.cost([1, 2]).runs == 2 * (3 + 2 * 2 + 2)
    assert some.tune(to_come=4) == dict.fromkeys(["softmax", "mine"], {"learning_rate": 0.01})
    # 0.01 is then the best, so what is below is tried, and what is second best has its seeds too
    of_softmax = {0.005: [0], 0.01: [0, 1, 2], 0.02: [0, 1, 2], 0.04: [0, 1, 2]}
    seeds = [0, 1000000, 1000001]
    assert [name for name in names_of(some) if name.startswith("softmax")] == sorted(
        f"softmax-lr{rate}-seed{seeds[number]}" for rate, of_rate in of_softmax.items()
        for number in of_rate)
    assert all(record.config["holdout"] == 0.1 for record in records.read_records("out/sweeps/one"))
    out = capsys.readouterr().out
    words = "mean of 3 seeds 0.01: 0.6419, 0.02: 3.3504, 0.04: 0.7444 -> learning_rate 0.01"
    assert words in " ".join(out.split()), out
    before = names_of(some)
    assert some.tune() and names_of(some) == before and some.cost([1, 2]).runs == 4
    with pytest.raises(BadInput, match="seed 1000001 is one to tune by"):
        some.run({"mine": {}}, [1, 1000001])


def test_with_one_value_that_ended_there_is_nothing_to_decide(experiment):
    some = experiment(lambda options: 1.0 if options["learning_rate"] == 0.02 else None, tune=RATES,
                      tune_seeds=3)
    assert some.tune()["mine"] == {"learning_rate": 0.02}
    assert {name.rpartition("seed")[2] for name in names_of(some)} == {"0"}


def test_the_runs_to_compare_are_returned_and_named_in_sweep_json(experiment):
    some = experiment(tune=RATES)
    chosen = {"softmax": {"learning_rate": 0.02}, "mine": {"learning_rate": 0.16}}
    found = some.run(chosen, [1, 2])
    names = ["softmax-lr0.02-seed1", "mine-lr0.16-seed1", "softmax-lr0.02-seed2",
             "mine-lr0.16-seed2"]
    assert [record.name for record in found] == some.executor.trained == names
    assert all(record.scores["report"] for record in found)
    assert found[1].config["n_embd"] == 8 and found[0].config["n_embd"] == 16
    content = json.loads(Path("out/sweeps/one/sweep.json").read_text())
    assert content["runs"] == names and content["chosen"] == chosen and content["tune"] == RATES
    found = some.run({"mine": chosen["mine"]}, [1, 2, 3])  # a later look, at one arm
    assert len(found) == 3 and len(names_of(some)) == 5
    content = json.loads(Path("out/sweeps/one/sweep.json").read_text())
    assert len(content["runs"]) == 3 and set(content["chosen"]) == {"softmax", "mine"}


def test_without_a_grid_nothing_is_tuned(experiment):
    some = experiment()
    assert some.tune() == {"softmax": {}, "mine": {}} and names_of(some) == []
    assert [record.name for record in some.run({"mine": {}}, [3])] == ["mine-lr0.001-seed3"]
    with pytest.raises(BadInput, match="seed 0 is one to tune by"):
        some.run({"mine": {}}, [0, 1])


def test_a_grid_of_a_mechanisms_option_is_for_its_arms_alone(experiment):
    some = experiment(tune={"performer_features": [8, 16, 32]},
                      arms={"softmax": {"mixer": "softmax"}, "performer": {"mixer": "performer"}},
                      loss=lambda options: abs(options["performer_features"] - 17))
    assert some.tune() == {"softmax": {}, "performer": {"performer_features": 16}}
    assert len(names_of(some)) == 3


def test_a_failed_run_is_the_worst_and_an_arm_of_failed_runs_is_left_out(experiment, capsys):
    def loss(options):
        return None if options["mixer"] == "softmax" or options["learning_rate"] > 0.03 else (
            -options["learning_rate"])
    some = experiment(loss, tune=RATES)
    assert some.tune() == {"mine": {"learning_rate": 0.02}}
    assert some.failed["mine-lr0.04-seed0"] == "no such thing"
    out = capsys.readouterr().out
    assert "softmax: no run to tune by has ended well" in out and "0.04: failed" in out


def test_a_diverged_run_is_worse_than_any_other(experiment, capsys):
    """Also than one whose loss is above that of an even guess."""
    def loss(options):
        return "diverged" if options["learning_rate"] > 0.02 else 20 - options["learning_rate"]
    assert experiment(loss, arms={"mine": {"mixer": "pelican"}}, tune=RATES).tune() == {
        "mine": {"learning_rate": 0.02}}
    assert "0.04: diverged" in capsys.readouterr().out


def search(grids, loss):
    """The Search over these grids of a function of the point, to its end."""
    found = Search(checked_grids(grids))
    while found.wanted():
        for point, number in found.wanted():
            assert number == 0
            found.losses[point] = [loss(*point)]
    return found


def test_extensions_end_at_a_bound_and_at_the_options_limits():
    found = search(RATES, lambda rate: rate)
    assert min(found.losses) == (0.01 / 2 ** MOST_EXTENSIONS,) == found.best()
    assert "the edge of what was tried" in found.choice()
    found = search({"dropout": [0.1, 0.3]}, lambda share: -share)
    assert found.best() == (0.9,) and len(found.losses) == 3  # 2.7 is no share
    found = search({"dropout": [0.0, 0.1]}, lambda share: share)
    assert found.best() == (0.0,) and len(found.losses) == 2  # nothing grows out of 0
    found = search({"optimizer": ["muon", "adamw"]}, lambda name: len(name))
    assert found.best() == ("muon",) and len(found.losses) == 2
    assert search({"warmup_iters": [10, 30]}, lambda n: abs(n - 100)).best() == (90,)


def test_a_search_ends_where_all_neighbours_are_worse():
    """In two options at once, with a random lowest point; against all points that there are."""
    draw = random.Random(1)
    grids = {"learning_rate": [1e-3, 2e-3, 4e-3], "weight_decay": [0.01, 0.1]}
    for _ in range(50):
        a, b = draw.uniform(-3.4, 5), draw.uniform(-3.4, 4)

        def loss(rate, decay):
            x, y = math.log2(rate / 1e-3), math.log10(decay / 0.01)
            return (x - a) ** 2 + (y - b) ** 2

        every = [(float(f"{1e-3 * 2**i:.6g}"), float(f"{0.01 * 10**j:.6g}"))
                 for i in range(-4, 7) for j in range(-4, 6)]
        found = search(grids, loss)
        assert found.best() == min(every, key=lambda point: loss(*point))
        assert not found.edges()


def test_grids_are_read_from_text_and_next_values_follow_their_growth():
    assert grids_in("learning_rate=1e-3,2e-3 warmup_iters=10,20") == {
        "learning_rate": [1e-3, 2e-3], "warmup_iters": [10, 20]}
    assert checked_grids({"learning_rate": [4e-3, 1e-3]}) == {"learning_rate": [1e-3, 4e-3]}
    assert next_value([1e-3, 2e-3, 6e-3], 6e-3, above=True) == 0.018
    assert next_value([1e-3, 2e-3, 6e-3], 5e-4, above=False) == 0.00025
    assert next_value([10, 30], 90, above=True) == 270


# What is shared ------------------------------------------------------------------------------

def test_a_run_of_one_sweep_serves_another(experiment, capsys):
    """Under another name, of another recipe's arm; also of a record. Its record is then in the
    other's folder."""
    first = experiment()
    first.run({"softmax": {}}, [1, 2])
    arms = {"attention": {"mixer": "softmax"}}
    second = experiment(name="two", arms=arms)
    assert second.cost([1, 2, 3]).runs == 1
    found = second.run({"attention": {}}, [1, 2, 3])
    assert names_of(second) == ["attention-lr0.001-seed3"]
    assert [record.name for record in found] == [f"attention-lr0.001-seed{k}" for k in (1, 2, 3)]
    names = [path.name for path in Path("out/sweeps/two").glob("*.gz")]
    assert names == ["attention.jsonl.gz"]
    assert "out/sweeps/one/softmax-lr0.001-seed1: finished before" in capsys.readouterr().out
    records.write_records(records.RESULTS / "claims" / "some", found)
    Path("out").rename("moved")
    third = experiment(name="three", arms=arms)
    assert third.cost([1, 2, 3]).runs == 0
    assert len(third.run({"attention": {}}, [1, 2, 3])) == 3 and not names_of(third)


@pytest.mark.parametrize("other", [
    {"weight_decay": 0.2}, {"dataset": "digits"}, {"max_iters": 5}, {"learning_rate": 2e-3}])
def test_a_run_of_other_options_or_data_serves_none(experiment, other):
    experiment().run({"softmax": {}}, [1])
    assert experiment(name="two", common=other).cost([1]).runs == 2


def test_a_longer_run_is_not_taken_for_a_shorter_one(experiment):
    """Though its rate fell alike: what is scored is its end."""
    decay = {"lr_decay_iters": 9}
    chosen = dict.fromkeys(ARMS, {})
    experiment(common=decay).run(chosen, [1])
    shorter = experiment(common=decay | {"max_iters": 3})
    with pytest.raises(BadInput, match="was trained for 4 steps, not 3"):
        shorter.run(chosen, [1])


def test_a_run_of_other_data_of_the_same_name_serves_none(experiment):
    experiment().run({"softmax": {}}, [1])
    path = Path("out/sweeps/one/softmax-lr0.001-seed1/config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"data_sha256": "0" * 64}))
    assert experiment(name="two").cost([1]).runs == 2


class Wider(Softmax):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return 1.5 * y, state


def test_a_run_of_other_code_serves_none_and_is_refused_in_its_own_folder(experiment, monkeypatch):
    experiment().run({"softmax": {}}, [1])
    experiment(name="two").run({"softmax": {}}, [1])
    monkeypatch.setitem(MIXERS, "softmax", Wider)
    losses_of.cache_clear()
    assert experiment(name="three").cost([1]).runs == 2
    with pytest.raises(BadInput, match="softmax-lr0.001-seed1 was run with other code"):
        experiment().cost([1])
    [record] = experiment(name="two").run({"softmax": {}}, [1])  # there a record, not a run
    assert record.source == Path("out/sweeps/two/softmax-lr0.001-seed1")


def test_records_without_first_losses_are_found_by_their_sweep_and_name_alone(experiment):
    [record] = experiment().run({"softmax": {}}, [1])
    del record.scores["first_losses"]
    records.write_records(records.RESULTS / "one", [record])
    Path("out").rename("moved")
    assert experiment(name="two").cost([1]).runs == 2
    again = experiment()
    assert again.cost([1]).runs == 1
    assert again.run({"softmax": {}}, [1])[0].source.parent == records.RESULTS / "one"
    assert not list(Path("out/sweeps/one").glob("*.gz"))  # it is at hand without a copy


@pytest.mark.parametrize("content", ["", "[" * 10**5, '{"kind": "config"', '{"kind": "config"}',
                                     '{"kind": "config", "run": 3, "value": [1]}'])
def test_damaged_files_of_other_sweeps_are_passed_over(experiment, content):
    import gzip
    experiment().run({"softmax": {}}, [1])
    other = Path("out/sweeps/other")
    (other / "run").mkdir(parents=True)
    (other / "a.jsonl.gz").write_bytes(gzip.compress(content.encode() + b"\n"))
    for name in ("config.json", "scores.json"):
        (other / "run" / name).write_text(content)
    assert experiment(name="two").cost([1]).runs == 1


def test_first_losses_tell_what_is_learned_and_how(here, trained):
    def losses(*more):
        options, _ = read_options([*TINY, "--out_dir=x", *more], "")
        return numerics.first_losses(options)

    base = losses()
    assert len(base) == numerics.STEPS and numerics.agree(base, losses("--learning_rate=0.5"))
    for other in ("--seed=2", "--optimizer=muon", "--mixer=lln", "--holdout=0.4",
                  "--dataset=digits"):
        assert not numerics.agree(base, losses(other)), other
    assert losses("--init_from=gone", "--init_std=0.02") is None
    started = losses(f"--init_from={trained}", "--init_std=0.02")
    assert started[0] < base[0] - 0.1 and not numerics.agree(base, started)
    assert numerics.agree(started, losses(f"--init_from={trained}", "--mixer=ssa"))
    assert not numerics.agree(None, None) and not numerics.agree(base, base[:2])


def test_a_run_that_starts_from_weights_is_known_by_them(experiment, trained, here):
    """Taken from another sweep while they are the same, and never once they are others, even if the
    first losses could not tell, or the weights are gone."""
    shutil.copytree(trained, "start")
    from_it = {"common": {"init_from": "start", "bias": True},
               "arms": {"softmax": {"mixer": "softmax"}, "ssa": {"mixer": "ssa"}}}
    one = experiment(**from_it)
    assert len(one.run({"softmax": {}, "ssa": {}}, [1])) == 2
    two = experiment(name="two", **from_it)
    assert two.cost([1]).runs == 0 and len(two.run({"softmax": {}, "ssa": {}}, [1])) == 2
    assert not two.executor.trained

    newest = Path("start/checkpoints/00000020")
    tensors = load_file(newest / "model.safetensors")
    tensors["norm.weight"] += 1e-6
    save_file(tensors, newest / "model.safetensors")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["model.safetensors"] = checkpoint.sha256(newest / "model.safetensors")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    start_of.cache_clear()
    assert experiment(name="three", **from_it).cost([1]).runs == 2
    with pytest.raises(BadInput, match="was run with init_sha256"):
        experiment(**from_it).cost([1])

    shutil.rmtree("start/checkpoints/00000020")
    shutil.rmtree("start/checkpoints/00000010")
    start_of.cache_clear()
    losses_of.cache_clear()
    assert experiment(name="four", **from_it).cost([1]).runs == 2  # no code can be checked


# What it takes -------------------------------------------------------------------------------

def test_the_cost_is_that_of_runs_that_have_ended_or_of_a_few_steps(experiment):
    some = experiment()
    some.run({"softmax": {}, "mine": {}}, [1])
    some.executor = None
    some.at_once = 2
    cost = some.cost([1, 2, 3])
    assert cost.runs == 4 and cost.hours == pytest.approx(4 * 36 / 2 / 3600)
    some.found.clear()
    some.max_hours = 1e-9
    with pytest.raises(BadInput, match="4 runs, about 1 minute; raise it"):
        some.check_hours(cost)
    options, _ = read_options([*TINY, "--out_dir=x", "--dtype=float32"], "")
    short = seconds_of_run(options, threads=1)
    options.max_iters *= 100
    assert seconds_of_run(options, threads=1) > 5 * short > 0
    options.mixer = "gone"
    assert seconds_of_run(options, threads=1) is None


@pytest.mark.parametrize("cost, words", [
    (Cost(0, 0.0), "nothing is left to run"), (Cost(1, None), "1 run; how long"),
    (Cost(3, 0.5), "3 runs, about 30 minutes"), (Cost(3, 12.34), "3 runs, about 12.3 hours")])
def test_a_cost_in_words(cost, words):
    assert str(cost).startswith(words)


def test_no_run_starts_once_the_hours_are_over(experiment):
    some = experiment(max_hours=1)
    some.until = 0.0
    with pytest.raises(BadInput, match="are over, 2 of 2 runs are left; the same command goes on"):
        some.run({"softmax": {}}, [1, 2])
    content = json.loads(Path("out/sweeps/one/sweep.json").read_text())
    assert len(content["missing"]) == 2 and not names_of(some)


@pytest.mark.parametrize("device, cores, threads, expected", [
    ("cpu", 8, None, 8), ("cpu", 1, None, 1), ("cpu", 8, 3, 2), ("cpu", 2, 4, 1),
    ("cuda", 8, None, 1)])
def test_a_cpu_has_as_many_runs_at_once_as_cores(here, monkeypatch, device, cores, threads,
                                                 expected):
    import torch
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    common = {"device": device} | ({"threads": threads} if threads else {})
    assert Experiment("x", None, common, {}).at_once == expected
    assert Experiment("x", None, common, {}, at_once=5).at_once == 5


@pytest.mark.parametrize("arms, tune, naming", [
    ({"a/b": {"mixer": "softmax"}}, None, "arm a/b"),
    ({"a": {"mixer": "softmax", "n_head": 3}}, None, "n_head 3"),
    ({"a": {"mixer": "softmaxx"}}, {"lln_matching": ["table", "published"]}, "nearest: softmax"),
    ({"a": {"n_head": 2}}, None, "arm a has no mixer"),
    ({"a": {"mixer": "softmax", "width": 3}}, None, "width"),
    ({"a": {"mixer": "softmax", "mixer_file": "gone.py"}}, None, "gone.py"),
    (ARMS, {"learning_rate": [1e-3]}, "at least two"),
    (ARMS, {"learning_rate": ["fast", "slow"]}, "learning_rate"),
    (ARMS, {"learnig_rate": [1, 2]}, "nearest: learning_rate"),
    (ARMS, {"seed": [1, 2]}, "not to be tuned"),
    (ARMS, {"ffn_hidden": [8, 2**31]}, "ffn_hidden"),
    (ARMS, {"n_head": [2, 4]}, "both set and tuned"),
    (ARMS, {"learning_rate": list(range(1, 1100))}, "more than 1000")])
def test_what_train_py_would_refuse_is_refused_at_once(experiment, arms, tune, naming):
    with pytest.raises(BadInput, match=naming):
        experiment(arms=arms, tune=tune)
    assert not Path("out").exists()
