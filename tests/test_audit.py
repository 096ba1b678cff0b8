"""The audit and train.py's share of it: planted faults are found by the check they are for, our own mixers pass."""
import json
import sys

import pytest
import torch
from conftest import ROOT, TINY, metrics, run
from planted import PLANTED, Honest

from mixers import MIXERS
from model import GPT, GPTConfig
from tools import audit
from training.leaks import KINDS, find_leak, leaks

PLANTED_FILE = ROOT / "tests" / "planted.py"
OURS = sorted(MIXERS)
every_mixer = pytest.mark.parametrize("mixer", OURS)


@pytest.fixture
def planted():
    """The faulty mixers are registered for the time of a test."""
    before = dict(MIXERS)
    MIXERS.update({name: mixer for name, (mixer, _) in PLANTED.items()} | {"honest": Honest})
    yield
    MIXERS.clear()
    MIXERS.update(before)


def shorter_causality(subject):
    return audit.causality(subject, lengths=(66,), rough_lengths=(130,))


def shorter_split(subject):
    return audit.split(subject, splits=audit.SPLITS[:2])


CHECK_OF = dict.fromkeys(KINDS, shorter_causality) | {"split": shorter_split, "bytes": audit.state_size, "storage": audit.state_size,
                                                         "bfloat16": audit.dtypes, "finite": audit.dtypes} | {
    check.__name__: check for check in (audit.branch, audit.depth, audit.learns, audit.bits)}
ALL = [*dict.fromkeys(CHECK_OF.values()), audit.cost]


def failed(mixer, checks):
    return {row.check: row.figures for row in audit.audit(audit.named(mixer), checks) if row.passed is False}


@every_mixer
def test_our_mixers_pass(mixer):  # the other checks, and more lengths and splits: test_all_of_ours_pass
    assert not failed(mixer, [shorter_causality, shorter_split, audit.branch, audit.state_size, audit.learns])


def test_an_honest_mixer_passes_and_what_it_does_not_declare_is_not_held_against_it(planted):
    rows = list(audit.audit(audit.named("honest"), ALL))
    assert {row.check for row in rows} == CHECK_OF.keys() | {"cost"}
    assert {row.check for row in rows if row.passed is None} == {"bytes", "cost"}
    assert all(row.passed for row in rows if row.check not in ("bytes", "cost"))


@pytest.mark.parametrize("mixer", PLANTED)
def test_a_planted_fault_is_found_by_the_checks_it_is_for(mixer, planted):
    expected = set(PLANTED[mixer][1].split())
    found = failed(mixer, list(dict.fromkeys(CHECK_OF[check] for check in sorted(expected))))
    assert expected <= found.keys(), found


def test_every_check_has_a_planted_fault():
    assert {check for _, checks in PLANTED.values() for check in checks.split()} == CHECK_OF.keys()


def test_a_leak_at_one_border_alone_needs_the_cut_there(planted):
    model = audit.named("border_only").bare()[0]
    x = audit.normal(2, 130, 32)
    assert leaks(model, x, [64])["suffix"] > 0.01
    assert leaks(model, x, [65])["suffix"] == leaks(model, x, [63])["suffix"] == 0


# -- the command ------------------------------------------------------------------------------------------------------

def command(home, *arguments):
    return run(home, "-m", "tools.audit", *arguments)


@pytest.mark.parametrize("mixer", ["chunk_max", *(pytest.param(name, marks=pytest.mark.slow) for name in ("batch_std", "forgetful"))])
def test_a_users_faulty_mixer_ends_the_command_with_status_1(home, mixer):
    done = command(home, f"--mixer_file={PLANTED_FILE}", f"--mixer={mixer}")
    assert done.returncode == 1 and done.stderr == "", done
    verdicts = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line}
    assert all(verdicts[check] == "FAIL" for check in PLANTED[mixer][1].split())
    assert f"\n{mixer}: FAIL (" in done.stdout


def test_a_run_is_audited_as_trained(home, trained):
    done = command(home, f"--out_dir={trained}")
    assert done.returncode == 0 and done.stderr == "", done
    *rows, last = [line.split()[:2] for line in done.stdout.splitlines() if line]
    assert {check for check, _ in rows} == CHECK_OF.keys() | {"cost"} and last == [f"{trained}:", "pass,"]
    assert all(verdict == ("n/a" if check == "cost" else "pass") for check, verdict in rows)


@pytest.mark.slow
def test_all_of_ours_pass(home):
    done = run(home, "-m", "tools.audit", "--mixer=all", timeout=240)
    assert done.returncode == 0 and done.stderr == "", done
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[-len(OURS):]}
    assert table.keys() == set(OURS) and all(set(verdicts) == {"pass"} for verdicts in table.values())


@pytest.mark.parametrize("argv, naming", [
    ([], "--mixer"), (["--mixer=foo"], "foo"), (["--mixer=lln", "--out_dir=x"], "--out_dir"), (["--out_dir=nowhere"], "nowhere"),
    (["--mixers=lln"], "--mixer"), (["--mixer=lln", "--mixer_file=none.py"], "none.py"),
])
def test_bad_input_is_one_line(monkeypatch, capsys, argv, naming):
    monkeypatch.setattr(sys, "argv", ["audit", *argv])
    with pytest.raises(SystemExit) as exit:
        audit.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1 and naming in err


def test_what_a_mixer_raises_fails_the_check_and_the_others_go_on(planted):
    class NoState(Honest):
        def mix(self, x, state):
            if state is not None:
                raise NotImplementedError("no decoding yet")
            return x, x[:, -1:].clone()

    MIXERS["no_state"] = NoState
    found = failed("no_state", ALL)
    assert found.keys() == {"shorter_split", "branch"} and "no decoding yet" in found["branch"]


# -- train.py ---------------------------------------------------------------------------------------------------------

LEAKS = {"whole_mean": "suffix", "batch_std": "rows", "off_by_one": "suffix", "chunk_end": "suffix", "chunk_max": "huge", "zero_gate": "suffix",
         "training_only": "suffix", "hidden": "gradient", "length": "length", "statistics": "repeat", "float32_only": "suffix", "late": "suffix"}


@pytest.mark.parametrize("mixer", LEAKS)
def test_training_refuses_a_mixer_that_leaks(train, mixer):
    line = train.refuses(*TINY, f"--mixer_file={PLANTED_FILE}", f"--mixer={mixer}")
    assert f"mixer {mixer}: {KINDS[LEAKS[mixer]][0]}" in line and "--allow_leak" in line


def test_one_leaking_layer_of_several_is_named(train):
    assert "mixer whole_mean:" in train.refuses(*TINY, f"--mixer_file={PLANTED_FILE}", "--n_layer=3", "--mixer=lln,softmax,whole_mean")


def test_a_leak_that_is_allowed_is_warned_of_and_recorded(train, here):
    leaky = [*TINY, f"--mixer_file={PLANTED_FILE}", "--mixer=whole_mean", "--out_dir=run"]
    out = train(*leaky, "--max_iters=4", "--allow_leak")
    [warning] = [line for line in out.splitlines() if line.startswith("warning")]
    assert "mixer whole_mean: " + KINDS["suffix"][0] in warning
    assert json.loads((here / "run" / "config.json").read_text())["allow_leak"] is True
    # the run's own option holds for what goes on with it, and only for that
    mine = f"--mixer_file={PLANTED_FILE}"
    for action in (["--resume", "--max_iters=6"], ["--eval_only"]):
        assert "warning    mixer whole_mean" in train(*action, "--out_dir=run", mine)
        assert "whole_mean" in train.refuses(*action, "--out_dir=run", mine, "--no-allow_leak")
    assert "whole_mean" in train.refuses(*leaky[:-1], "--out_dir=other", "--init_from=run")
    assert metrics("run")[-1]["iter"] == 6


def test_a_mixer_that_cannot_be_checked_trains_only_if_allowed(train, planted):
    class SingleOnly(Honest):
        def forward(self, x, state=None):
            if x.dtype == torch.float64:
                raise TypeError("no kernel for float64")
            return super().forward(x, state)

    MIXERS["single_only"] = SingleOnly
    with pytest.raises(TypeError, match="float64") as raised:
        train.call([*TINY, "--mixer=single_only", "--max_iters=1"])
    assert "--allow_leak" in raised.value.__notes__[0]
    assert "could not be checked" in train(*TINY, "--mixer=single_only", "--max_iters=1", "--allow_leak", "--out_dir=run")


def make(mixer, **options):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(vocab_size=31, block_size=100, n_layer=2, n_embd=32, mixer=mixer) | options))


@every_mixer
def test_no_false_alarm_where_weights_have_grown(mixer):
    model = make(mixer, arch="llama", mlp_activation="causal_max_context", n_kv_head=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p)).mul_(30)
    assert find_leak(model) is None


@every_mixer
def test_the_check_leaves_the_model_and_the_random_numbers_alone(mixer):
    model = make(mixer, dropout=0.2)
    tensors = lambda: [t.clone() for t in (*model.parameters(), *model.buffers(), torch.get_rng_state())]
    before = tensors()
    assert find_leak(model) is None
    assert all(map(torch.equal, tensors(), before)) and all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in model.parameters())


@every_mixer
def test_no_false_alarm_in_bfloat16_over_a_long_context(mixer):
    """Wide enough that linear attention's keys grow beyond what one reference per chunk can hold."""
    assert find_leak(make(mixer, n_layer=1, n_embd=384, n_head=6, block_size=256), torch.bfloat16) is None


def test_a_leak_of_the_runs_own_length_or_precision_is_found(planted):
    assert find_leak(make("long_only", block_size=100)) is None
    assert "mixer long_only: an output depends on a later token" in find_leak(make("long_only", block_size=128))
    assert find_leak(make("autocast_only"), torch.float32) is None
    assert "mixer autocast_only: an output's gradient" in find_leak(make("autocast_only"), torch.bfloat16)


def test_a_state_that_cannot_be_looked_into_fails():
    assert len(audit.tensors(({"a": torch.ones(1)}, [None, 3, torch.ones(2)]))) == 2
    with pytest.raises(TypeError, match="list_iterator in a state"):
        audit.tensors((1, iter([torch.ones(1)])))


def test_a_leak_in_the_ffn_is_named(monkeypatch):
    import model as model_module
    monkeypatch.setattr(model_module, "causal_reduce", lambda x, op, context, state=None: (x.mean(1, keepdim=True).expand_as(x), state))
    assert find_leak(make("softmax", mlp_activation="causal_mean")).startswith("mlp_activation causal_mean: an output depends on a later token")


def test_a_leak_in_the_model_around_its_parts_is_named():
    class Leaky(GPT):
        def hidden(self, idx, state=None):
            h, state = super().hidden(idx, state)
            return h + h.mean(1, keepdim=True), state

    assert find_leak(Leaky(make("softmax").config)).startswith("the model: an output depends on a later token")


@pytest.mark.parametrize("block_size", [1, 2, 3, 64])
def test_short_sequences(block_size, planted):
    assert find_leak(make("lln_diag", block_size=block_size)) is None
    assert (find_leak(make("whole_mean", block_size=block_size)) is None) == (block_size == 1)


@pytest.mark.slow
def test_all_processes_end_where_the_mixer_leaks(home, tmp_path):
    done = run(home, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", *TINY, f"--mixer_file={PLANTED_FILE}",
               "--mixer=whole_mean", f"--out_dir={tmp_path / 'run'}")
    assert done.returncode != 0 and "mixer whole_mean: an output depends on a later token" in done.stderr
    assert not (tmp_path / "run").exists()
