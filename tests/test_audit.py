"""The audit and train.py's share of it: planted faults are found by the check they are for, our own
mixers pass."""
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, metrics, run
from honest import HONEST
from planted import PLANTED, Honest

from mixers import MIXERS, load_mixer_file
from model import GPT, GPTConfig
from tools import audit, audit_subject
from tools.audit_leaks import causality
from tools.audit_state import SPLITS, split, tensors
from tools.audit_subject import named, normal
from training.leaks import KINDS, cast, find_leak, leaks, limit, precision_within

PLANTED_FILE = ROOT / "tests" / "planted.py"
OURS = sorted(MIXERS)
every_mixer = pytest.mark.parametrize("mixer", OURS)


@pytest.fixture
def planted():
    """The faulty mixers and the honest ones are registered for the time of a test."""
    before = dict(MIXERS)
    MIXERS.update({name: mixer for name, (mixer, _) in (HONEST | PLANTED).items()})
    yield
    MIXERS.clear()
    MIXERS.update(before)


def shorter_causality(subject):
    return causality(subject, lengths=(66,), rough_lengths=(130,))


def shorter_split(subject):
    return split(subject, splits=SPLITS[:2])


CHECK_OF = dict.fromkeys(KINDS, shorter_causality) | {
    "forward": audit.forward,
    "before": audit.before,
    "split": shorter_split,
    "branch": audit.branch,
    "bytes": audit.state_size,
    "storage": audit.state_size,
    "bfloat16": audit.dtypes,
    "finite": audit.dtypes,
    "depth": audit.depth,
    "learns": audit.learns,
    "bits": audit.bits,
}
ALL = [*dict.fromkeys(CHECK_OF.values()), audit.cost]


def failed(mixer, checks):
    rows = audit.audit(named(mixer), checks)
    return {row.check: row.figures for row in rows if row.passed is False}


@every_mixer
def test_our_mixers_pass(mixer, monkeypatch):
    """The other checks, and more lengths and splits: test_all_of_ours_pass."""
    monkeypatch.setitem(audit_subject.SMALL, "block_size", 130)
    checks = [shorter_causality, shorter_split, audit.branch, audit.learns]
    assert not failed(mixer, checks)


def test_what_a_mixer_does_not_declare_is_not_held_against_it(planted):
    rows = list(audit.audit(named("plain"), ALL))
    assert {row.check for row in rows} == CHECK_OF.keys() | {"cost"}
    assert {row.check for row in rows if row.passed is None} == {"bytes", "cost"}
    assert all(row.passed for row in rows if row.check not in ("bytes", "cost"))


@pytest.mark.parametrize("mixer", HONEST)
def test_no_honest_mixer_fails_the_checks_that_are_likeliest_to_accuse_it(mixer, planted):
    likeliest = HONEST[mixer][1].split()
    assert not failed(mixer, list(dict.fromkeys(CHECK_OF[check] for check in likeliest)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", HONEST)
def test_no_honest_mixer_is_refused_by_training(mixer, dtype, planted):
    assert find_leak(make(mixer), dtype) is None


@pytest.mark.slow
@pytest.mark.parametrize("mixer", HONEST)
def test_no_honest_mixer_fails_the_whole_audit(mixer, planted):
    assert not failed(mixer, audit.CHECKS)


def test_a_fourier_transform_rounds_by_less_than_the_limit_at_every_length(planted):
    model = cast(named("convolution").bare(n_layer=1)[0], torch.float32)
    for T in (64, 520, 2048):
        x = normal(3, T, 32).float()
        sizes = leaks(model, x, [T // 2, T - 1], lengths=False, huge=False)
        assert 0 < sizes["suffix"] < limit("suffix", torch.float32) / 2, T


def test_what_computes_in_float32_is_held_to_that(planted):
    """... and a mask of float32 does not count as computing in it."""
    x = normal(2, 66, 32)
    inside = {}
    for mixer in ("plain", "float_mask", "tiny_beside_mask", "float_softmax", "float_convolution"):
        inside[mixer] = precision_within(named(mixer).bare()[0], x)
    coarse = {mixer for mixer, precision in inside.items() if precision == torch.float32}
    assert coarse == {"float_softmax", "float_convolution"}


def test_length_is_asked_in_training_where_random_numbers_stand_still(planted):
    x = normal(2, 66, 32)
    assert leaks(named("length").bare()[0].train(), x, [33])["length"] > 0.01
    for mixer in ("noisy", "own_dropout"):
        assert leaks(named(mixer).bare()[0].train(), x, [33])["length"] < 1e-9


@pytest.mark.parametrize("mixer", PLANTED)
def test_a_planted_fault_is_found_by_the_checks_it_is_for(mixer, planted):
    expected = set(PLANTED[mixer][1].split())
    found = failed(mixer, list(dict.fromkeys(CHECK_OF[check] for check in sorted(expected))))
    assert expected <= found.keys(), found


def test_every_check_has_a_planted_fault():
    found = set()
    for _, checks in PLANTED.values():
        found.update(checks.split())
    # forward's: test_a_mistake_in_a_mixer_is_told_first; before's are in planted_calls.py
    assert found == CHECK_OF.keys() - {"forward", "before"}


def test_a_leak_at_one_border_alone_needs_the_cut_there(planted):
    model = named("border_only").bare()[0]
    x = normal(2, 130, 32)
    assert leaks(model, x, [64])["suffix"] > 0.01
    assert leaks(model, x, [65])["suffix"] == leaks(model, x, [63])["suffix"] == 0


def test_the_example_to_copy_is_honest(planted):
    load_mixer_file(ROOT / "examples" / "delta_rule.py")
    assert find_leak(make("delta_rule", block_size=80)) is None
    checks = [audit.forward, shorter_split, audit.branch, audit.state_size, audit.learns]
    rows = list(audit.audit(named("delta_rule"), checks))
    assert len(rows) == 6
    assert all(row.passed for row in rows), rows


class Given(torch.nn.Module):
    """Gives the same whatever it gets."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_the_example_is_the_delta_rule(planted):
    """With beta = 1 a value replaces what its key had, and leaves alone what other keys have."""
    load_mixer_file(ROOT / "examples" / "delta_rule.py")
    mixer = make("delta_rule", n_embd=2, n_head=1).blocks[0].mixer
    with torch.no_grad():
        for p in mixer.parameters():
            p.zero_()
        mixer.beta.bias.fill_(100)
        mixer.c_proj.weight.copy_(torch.eye(2))
    queries, keys, values = [1, 0], [[2, 0], [0, 3], [4, 0]], [[1, 5], [7, 7], [3, 4]]
    rows = [[*queries, *key, *value] for key, value in zip(keys, values)]
    mixer.qkv = Given(torch.tensor([rows]).float())
    y, state = mixer(torch.zeros(1, 3, 2))
    torch.testing.assert_close(y[0], torch.tensor([[1.0, 5], [1, 5], [3, 4]]))
    torch.testing.assert_close(state[0, 0], torch.tensor([[3.0, 4], [7, 7]]))


# -- the command -----------------------------------------------------------------------------------

def command(home, *arguments):
    return run(home, "-m", "tools.audit", *arguments)


@pytest.mark.parametrize("mixer", [
    "chunk_max",
    pytest.param("batch_std", marks=pytest.mark.slow),
    pytest.param("forgetful", marks=pytest.mark.slow),
])
def test_a_users_faulty_mixer_ends_the_command_with_status_1(home, mixer, tmp_path):
    file = shutil.copy(PLANTED_FILE, tmp_path)  # the report goes beside it
    done = command(home, f"--mixer_file={file}", f"--mixer={mixer}", "--quick")
    assert done.returncode == 1 and done.stderr == "", done
    verdicts = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line}
    assert all(verdicts[check] == "FAIL" for check in PLANTED[mixer][1].split())
    assert f"\n{mixer}: FAIL (" in done.stdout


def test_a_run_is_audited_as_trained(home, trained):
    done = command(home, f"--out_dir={trained}", "--quick")
    assert done.returncode == 0 and done.stderr == "", done
    *rows, last = [line.split()[:2] for line in done.stdout.splitlines() if line]
    assert {check for check, _ in rows} == CHECK_OF.keys() - {"bfloat16", "finite", "depth"}
    assert last == [f"{trained}:", "pass,"]
    assert all(verdict == "pass" for _, verdict in rows)


@pytest.mark.slow
def test_all_of_ours_pass(home):
    done = run(home, "-m", "tools.audit", "--mixer=all", "--quick", timeout=900)
    assert done.returncode == 0 and done.stderr == "", done
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[-len(OURS):]}
    assert table.keys() == set(OURS)
    assert all(set(verdicts) == {"pass"} for verdicts in table.values())


@pytest.mark.parametrize("argv, naming", [
    ([], "--mixer"),
    (["--mixer=foo"], "foo"),
    (["--mixer=lln", "--out_dir=x"], "--out_dir"),
    (["--out_dir=nowhere"], "nowhere"),
    (["--mixers=lln"], "--mixer"),
    (["--mixer=lln", "--mixer_file=none.py"], "none.py"),
    (["--mixer=lln", "--mixer_file=" + 300 * "x"], "xxx"),
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
    assert found.keys() == {"shorter_split", "branch"}
    assert "NotImplementedError: no decoding yet (" in found["shorter_split"]
    assert f"{Path(__file__).name}, line " in found["shorter_split"]
    assert found["branch"] == "the same error as in shorter_split"


def test_what_fails_in_bfloat16_alone_does_not_hide_the_other_figures(planted):
    class Mixed(PLANTED["whole_mean"][0]):
        def mix(self, x, state):
            u, state = super().mix(x, state)
            return u * torch.ones(1, 1, 32), state  # float32 beside bfloat16

    MIXERS["mixed"] = Mixed
    found = failed("mixed", [shorter_causality])
    assert {"suffix", "gradient", "shorter_causality"} <= found.keys()
    assert re.search(r"BFloat16; in bfloat16 \(.*planted.py, line \d+", found["shorter_causality"])


MINE = """
import torch
from mixers import MIXERS, load_mixer_file

class Mine(torch.nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.proj = torch.nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, state=None):
        return self.proj(x), state

MIXERS["mine"] = Mine
"""
CONTRACT = "forward must return (y, state), y shaped like x; for x "
FORWARD = 10  # its line in MINE
RETURN = "return self.proj(x), state"


@dataclass
class Mistake:
    """In MINE, what stands instead of what; what is said of it, and the line that is named."""
    right: str
    wrong: str
    says: str
    line: int = FORWARD


MISTAKES = {
    "y_alone": Mistake(RETURN, "return self.proj(x)", CONTRACT),
    "none": Mistake(RETURN, "self.proj(x)", "it returned None"),
    "three": Mistake(RETURN, "return x, state, 1", "it returned 3 values"),
    "shape": Mistake(RETURN, "return x[..., :2], state", "y is a tensor (2, 5, 2)"),
    "without_state": Mistake(", state=None):", "):", "must be forward(self, x, state=None)"),
    "builder": Mistake("config, layer", "config", "its builder must take (config, layer)", 6),
    "misspelt": Mistake("self.proj(x)", "self.porj(x)", "has no attribute 'porj'", 11),
    "misspelt_option": Mistake("(config.n_embd", "(config.width", "no attribute 'width'", 8),
    "file": Mistake('MIXERS["mine"]', 'MIXER["mine"]', "NameError: name 'MIXER'", 13),
    "syntax": Mistake("(x), state", "(x)), state", "SyntaxError: unmatched ')'", 11),
}


def write_mistake(name):
    mistake = MISTAKES[name]
    assert mistake.right in MINE
    Path("mine.py").write_text(MINE.replace(mistake.right, mistake.wrong))
    return mistake


def audit_here(monkeypatch, capsys, *argv):
    """What the command printed on stdout and stderr, and its exit status."""
    monkeypatch.setattr(sys, "argv", ["audit", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        audit.main()
    return *capsys.readouterr(), int(exit.value.code)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_mixer_is_told_first(name, here, monkeypatch, capsys):
    mistake = write_mistake(name)
    mine = ("--mixer_file=mine.py", "--mixer=mine")
    out, err, status = audit_here(monkeypatch, capsys, *mine)
    if name in ("file", "syntax"):
        assert out == "" and status == 2
        line = err.strip()
    else:
        line, *_, last = out.strip().splitlines()
        assert line.startswith("forward    FAIL  ") and last.startswith("mine: FAIL (forward), ")
        assert err == "" and status == 1
    assert mistake.says in line and f"mine.py, line {mistake.line}" in line


@pytest.mark.parametrize("name", MISTAKES)
def test_training_tells_a_mistake_in_a_mixer_in_one_line(name, train):
    mistake = write_mistake(name)
    line = train.refuses(*TINY, "--mixer_file=mine.py", "--mixer=mine", "--max_iters=1")
    assert mistake.says in line and f"mine.py, line {mistake.line}" in line


def test_a_mistake_that_comes_late_in_training_is_one_line_too(train, capsys):
    Path("mine.py").write_text(MINE.replace(RETURN, "return x + x.new_zeros(1, 1, calls()), state")
                               + "calls = iter([1] * 100 + [7]).__next__\n")
    with pytest.raises(SystemExit) as exit:
        train.call([*TINY, "--mixer_file=mine.py", "--mixer=mine", "--max_iters=200"])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert "train.py: mixer_file mine.py, line 11, in forward: RuntimeError: " in err


def test_an_error_of_ours_is_still_a_traceback(train, monkeypatch):
    Path("mine.py").write_text(MINE)
    monkeypatch.setattr("train.describe", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.call([*TINY, "--mixer_file=mine.py", "--mixer=mine", "--max_iters=1"])


# -- the report ------------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch):
    """The command asks little."""
    monkeypatch.setattr(audit, "CHECKS", (audit.forward, shorter_causality))


def test_a_json_report_stands_beside_the_users_file(here, quick, monkeypatch, capsys):
    Path("mine.py").write_text(MINE + "MIXERS['../../up\\x1b[2J' + 300 * 'x'] = Mine\n")
    out, _, status = audit_here(monkeypatch, capsys, "--mixer_file=mine.py", "--mixer=mine")
    report = json.loads(Path("mine.mine.audit.json").read_text())
    assert status == 0 and "report in mine.mine.audit.json" in out
    assert report["audited"] == "mine" and report["passed"] is True
    first = dict(check="forward", passed=True, figures="(y, state), y shaped like x", place="",
                 smallest="", advice="")
    assert report["rows"][0] == first
    wild = "../../up\x1b[2J" + 300 * "x"
    out, _, status = audit_here(monkeypatch, capsys, "--mixer_file=mine.py", f"--mixer={wild}")
    assert status == 0 and "\x1b" not in out
    assert {path.name[:12] for path in Path().glob("*.json")} == {"mine.mine.au", "mine._up_2Jx"}


def test_a_report_of_a_fault_and_one_that_cannot_be_written(here, quick, monkeypatch, capsys):
    shutil.copy(PLANTED_FILE, "planted_copy.py")
    faulty = ("--mixer_file=planted_copy.py", "--mixer=whole_mean")
    _, err, status = audit_here(monkeypatch, capsys, *faulty)
    report = Path("planted_copy.whole_mean.audit.json")
    assert err == "" and status == 1 and json.loads(report.read_text())["passed"] is False
    report.unlink()
    report.mkdir()
    out, err, status = audit_here(monkeypatch, capsys, *faulty)
    assert status == 1 and "whole_mean: FAIL" in out
    assert err.count("\n") == 1 and "warning: no report" in err


def test_a_report_of_one_of_ours(here, quick, monkeypatch, capsys):
    assert audit_here(monkeypatch, capsys, "--mixer=softmax,causal_max")[2] == 0
    report = json.loads((here / "out" / "audit" / "softmax,causal_max.json").read_text())
    assert report["audited"] == "softmax,causal_max" and report["seconds"] > 0


# -- train.py --------------------------------------------------------------------------------------

LEAKS = {
    "whole_mean": "suffix",
    "batch_std": "rows",
    "off_by_one": "suffix",
    "chunk_end": "suffix",
    "chunk_max": "huge",
    "zero_gate": "suffix",
    "evaluation_gate": "suffix",
    "relu_gate": "suffix",
    "negative_gate": "suffix",
    "rezero_leak": "suffix",
    "single_gate": "suffix",
    "faint": "suffix",
    "faint_inside": "suffix",
    "tiny_beside_mask": "suffix",
    "noisy_leak": "suffix",
    "wraps_round": "suffix",
    "training_only": "suffix",
    "hidden": "gradient",
    "length": "length",
    "statistics": "repeat",
    "float32_only": "suffix",
    "late": "suffix",
}


@pytest.mark.parametrize("mixer", LEAKS)
def test_the_check_before_training_finds_a_leak(mixer, planted):
    what, _ = KINDS[LEAKS[mixer]]
    assert find_leak(make(mixer)) == f"mixer {mixer}: {what}"


@pytest.mark.parametrize("mixer", ["whole_mean", "statistics"])
def test_training_refuses_a_mixer_that_leaks(train, mixer):
    line = train.refuses(*TINY, f"--mixer_file={PLANTED_FILE}", f"--mixer={mixer}")
    assert f"mixer {mixer}: {KINDS[LEAKS[mixer]][0]}" in line and "--allow_leak" in line
    assert f"`python -m tools.audit --mixer_file={PLANTED_FILE} --mixer={mixer}`" in line


def test_one_leaking_layer_of_several_is_named(train):
    pattern = ("--n_layer=3", "--mixer=lln,softmax,whole_mean")
    assert "mixer whole_mean:" in train.refuses(*TINY, f"--mixer_file={PLANTED_FILE}", *pattern)


def test_a_leak_that_is_allowed_is_warned_of_and_recorded(train, here):
    leaky = [*TINY, f"--mixer_file={PLANTED_FILE}", "--mixer=whole_mean", "--out_dir=run"]
    out = train(*leaky, "--max_iters=4", "--allow_leak")
    [warning] = [line for line in out.splitlines()
                 if line.startswith("warning") and "whole_mean" in line]
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
    out = train(*TINY, "--mixer=single_only", "--max_iters=1", "--allow_leak", "--out_dir=run")
    assert "could not be checked" in out


def make(mixer, **options):
    torch.manual_seed(0)
    small = dict(vocab_size=31, block_size=100, n_layer=2, n_embd=32)
    return GPT(GPTConfig(**small | options, mixer=mixer))


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

    def tensors():
        every = (*model.parameters(), *model.buffers(), torch.get_rng_state())
        return [t.clone() for t in every]

    before = tensors()
    assert find_leak(model) is None
    assert all(map(torch.equal, tensors(), before))
    assert all(module.training for module in model.modules())
    for p in model.parameters():
        assert p.requires_grad and p.grad is None and p.dtype == torch.float32


@pytest.mark.slow
@every_mixer
def test_no_false_alarm_in_bfloat16_over_a_long_context(mixer):
    """Wide enough that linear attention's keys grow beyond what one reference per chunk can
    hold."""
    model = make(mixer, n_layer=1, n_embd=384, n_head=6, block_size=256)
    assert find_leak(model, torch.bfloat16) is None


def test_a_leak_of_the_runs_own_length_or_precision_is_found(planted):
    assert find_leak(make("long_only", block_size=100)) is None
    found = find_leak(make("long_only", block_size=128))
    assert "mixer long_only: an output depends on a later token" in found
    assert find_leak(make("autocast_only"), torch.float32) is None
    found = find_leak(make("autocast_only"), torch.bfloat16)
    assert "mixer autocast_only: an output's gradient" in found


def test_a_state_that_cannot_be_looked_into_fails():
    assert len(tensors(({"a": torch.ones(1)}, [None, 3, torch.ones(2)]))) == 2
    with pytest.raises(TypeError, match="list_iterator in a state"):
        tensors((1, iter([torch.ones(1)])))


def test_a_leak_in_the_ffn_is_named(monkeypatch):
    import model as model_module

    def leaky(x, op, context, state=None):
        return x.mean(1, keepdim=True).expand_as(x), state

    monkeypatch.setattr(model_module, "causal_reduce", leaky)
    found = find_leak(make("softmax", mlp_activation="causal_mean"))
    assert found == "mlp_activation causal_mean: an output depends on a later token"


def test_a_leak_in_the_model_around_its_parts_is_named():
    class Leaky(GPT):
        def hidden(self, idx, state=None):
            h, state = super().hidden(idx, state)
            return h + h.mean(1, keepdim=True), state

    found = find_leak(Leaky(make("softmax").config))
    assert found == "the model: an output depends on a later token"


@pytest.mark.parametrize("block_size", [1, 2, 3, 64])
def test_short_sequences(block_size, planted):
    assert find_leak(make("lln_diag", block_size=block_size)) is None
    assert (find_leak(make("whole_mean", block_size=block_size)) is None) == (block_size == 1)


@pytest.mark.slow
def test_all_processes_end_where_the_mixer_leaks(home, tmp_path):
    leaky = (f"--mixer_file={PLANTED_FILE}", "--mixer=whole_mean")
    done = run(home, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", *TINY,
               *leaky, f"--out_dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert "mixer whole_mean: an output depends on a later token" in done.stderr
    assert not (tmp_path / "run").exists()
