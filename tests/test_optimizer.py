"""The optimiser: its state is saved and given back whichever it is; Muon has the right matrices."""
import copy
import shutil

import pytest
import torch
from conftest import TINY, metrics, one_line, run, untimed
from safetensors.torch import load_file, save_file

from base.errors import BadInput
from config import Options
from model import GPT, GPTConfig
from training.optimizer import (
    Together, load_optimizer, make_optimizer, optimizer_tensors, step_if_finite,
    step_without_asking)

CPU = torch.device("cpu")


class Counting(torch.optim.Optimizer):
    """An optimiser whose state holds an int and a float."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["sum"] = state.get("sum", 0.0) + p.grad.sum().item() / 3
                p -= group["lr"] * (p.grad + state["sum"] / state["count"])


def together(params):
    matrices = [p for p in params if p.dim() == 2]
    vectors = [p for p in params if p.dim() != 2]
    return Together([torch.optim.Muon(matrices), torch.optim.SGD(vectors, momentum=0.9)])


def adamw_fused(params):
    return torch.optim.AdamW(params, fused=True)


def adam_amsgrad(params):
    return torch.optim.Adam(params, amsgrad=True)


def sgd_with_momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


ALL = [adamw_fused, adam_amsgrad, sgd_with_momentum, together, Counting,
       torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad,
       torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
       torch.optim.ASGD, torch.optim.Rprop, torch.optim.Adafactor]


def a_model(**options):
    torch.manual_seed(0)
    small = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return GPT(GPTConfig(**small | options))


def steps(model, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        text = torch.randint(11, (2, 9))
        model.loss(text[:, :-1], text[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_any_optimizer_goes_on_bit_for_bit(make, tmp_path):
    straight = a_model()
    straight_optimizer = make(list(straight.parameters()))
    steps(straight, straight_optimizer, range(3))
    resumed = copy.deepcopy(straight)
    saved = optimizer_tensors(straight, straight_optimizer)
    save_file({name: t.contiguous() for name, t in saved.items()}, tmp_path / "state")

    resumed_optimizer = make(list(resumed.parameters()))
    load_optimizer(resumed, resumed_optimizer, load_file(tmp_path / "state"), "here")
    assert equal(optimizer_tensors(resumed, resumed_optimizer), saved)
    steps(straight, straight_optimizer, range(3, 6))
    steps(resumed, resumed_optimizer, range(3, 6))
    assert equal(straight.state_dict(), resumed.state_dict())
    assert equal(optimizer_tensors(resumed, resumed_optimizer),
                 optimizer_tensors(straight, straight_optimizer))


def test_a_parameter_without_a_gradient_has_no_state_to_come_back():
    model = a_model()
    model.unused = torch.nn.Parameter(torch.zeros(3))
    optimizer = make_optimizer(model, Options(), CPU)
    steps(model, optimizer, range(2))
    saved = optimizer_tensors(model, optimizer)
    assert not any("unused" in name for name in saved)
    again = make_optimizer(model, Options(), CPU)
    load_optimizer(model, again, saved, "here")
    assert equal(optimizer_tensors(model, again), saved)


# -- what does not fit ----------------------------------------------------------------------------

def refusal(tensors, optimizer="adamw"):
    model = a_model()
    fresh = make_optimizer(model, Options(optimizer=optimizer), CPU)
    with pytest.raises(BadInput) as error:
        load_optimizer(model, fresh, tensors, "here")
    line = str(error.value)
    assert line.startswith("here: optimizer.safetensors is of another model or optimizer")
    assert len(line) < 600 and "\n" not in line
    return line


@pytest.fixture
def adamw_state():
    model = a_model()
    optimizer = make_optimizer(model, Options(), CPU)
    steps(model, optimizer, range(1))
    return optimizer_tensors(model, optimizer)


def test_moments_of_another_shape_or_type_are_named(adamw_state):
    name = "exp_avg.blocks.1.mlp.c_proj.weight"
    state = adamw_state | {name: torch.zeros(16, 63)}
    assert f"{name} float32 (16, 63) in the file, float32 (16, 64) here" in refusal(state)
    state = adamw_state | {name: adamw_state[name].double()}
    assert f"{name} float64 (16, 64) in the file, float32 (16, 64) here" in refusal(state)
    state = adamw_state | {"step.norm.bias": torch.zeros(2)}
    assert "step.norm.bias float32 (2,) in the file, float32 () here" in refusal(state)


def test_names_too_many_or_too_few_are_listed_shortened(adamw_state):
    del adamw_state["exp_avg_sq.norm.bias"]
    assert ": -exp_avg_sq.norm.bias; " in refusal(adamw_state)
    more = {f"exp_avg.more.{i}": torch.zeros(1) for i in range(40)}
    assert "+exp_avg.more.0, " in refusal(adamw_state | more)
    assert "+exp_avg.more.4 and 36 more; " in refusal(adamw_state | more)


def test_the_state_of_another_optimizer(adamw_state):
    assert "+step.blocks.0" in refusal(adamw_state, optimizer="muon")


# -- Muon -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"mixer": "ssa,linformer", "arch": "llama"}])
def test_muon_has_the_hidden_matrices_and_adamw_the_rest(options):
    model = a_model(**options)
    optimizer = make_optimizer(model, Options(optimizer="muon"), CPU)
    steps(model, optimizer, range(1))
    state = optimizer_tensors(model, optimizer)
    muon = {name.partition(".")[2] for name in state if name.startswith("momentum_buffer.")}
    adamw = {name.partition(".")[2] for name in state if name.startswith("exp_avg.")}
    linear = {name for name, p in model.named_parameters() if name.startswith("blocks.")
              and name.endswith(("c_attn.proj.weight", "c_proj.weight", "c_fc.weight"))}
    assert muon == linear and len(muon) == 8
    assert adamw == {name for name, _ in model.named_parameters()} - muon


def test_one_rate_serves_both():
    """An update of Muon is as large as AdamW's usually are: root mean square 0.2 learning rates."""
    model = a_model(n_embd=64)
    weight = model.blocks[0].mlp.c_fc.weight
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    make_optimizer(model, Options(optimizer="muon", learning_rate=0.01, weight_decay=0), CPU).step()
    size = (weight - before).square().mean().sqrt().item() / 0.01
    assert size == pytest.approx(0.2, rel=0.2)


def test_muon_trains_and_resumes_bit_for_bit(home, tmp_path):
    """In processes of its own: interrupted at step 10 and resumed, against straight on."""
    options = [*TINY, "--optimizer=muon", "--dropout=0.1", "--eval_interval=10", "--max_iters=20",
               "--log_interval=5"]
    straight = tmp_path / "straight"
    done = run(home, "train.py", *options, f"--out_dir={straight}")
    assert done.returncode == 0, done.stderr
    assert metrics(straight)[-1]["val_loss"] < metrics(straight)[0]["train_loss"] - 0.05

    resumed = tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints/00000020")
    done = run(home, "train.py", "--resume", f"--out_dir={resumed}")
    assert done.returncode == 0, done.stderr
    for name in ("model", "optimizer"):
        file = f"checkpoints/00000020/{name}.safetensors"
        assert equal(load_file(resumed / file), load_file(straight / file))
    assert untimed(metrics(resumed)) == untimed(metrics(straight))

    line = one_line(run(home, "train.py", "--resume", f"--out_dir={resumed}", "--max_iters=30",
                        "--optimizer=adamw"))
    assert "optimizer 'muon', not 'adamw'" in line


# Steps that are none ------------------------------------------------------------------------------

def trained_a_little(name):
    """A model and its optimiser after two steps."""
    model = a_model()
    optimizer = make_optimizer(model, Options(optimizer=name, learning_rate=1e-2), CPU)
    for _ in range(2):
        backward(model)
        step_if_finite(optimizer, torch.ones(()))
        optimizer.zero_grad()
    return model, optimizer


def backward(model, factor=1.0):
    """The norm that the gradient was clipped by."""
    idx = torch.arange(8)[None] % 11
    (model.loss(idx, idx.roll(-1, 1)) * factor).backward()
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def everything(model, optimizer):
    tensors = {**model.state_dict(), **optimizer_tensors(model, optimizer)}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("step", [step_if_finite, step_without_asking])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_finite_step_is_the_optimisers_own(name, step):
    model, optimizer = trained_a_little(name)
    twin, other = trained_a_little(name)
    for _ in range(2):
        step(optimizer, backward(model))
        optimizer.zero_grad()
        backward(twin)
        other.step()
        other.zero_grad()
    ours, theirs = everything(model, optimizer), everything(twin, other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [step_if_finite, step_without_asking])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_skipped(name, step, factor):
    """Bit for bit, with AdamW's moments and count of steps; where nobody may ask, Muon's weights
    move by what its momentum holds, as if the gradient were zero."""
    model, optimizer = trained_a_little(name)
    before = everything(model, optimizer)
    norm = backward(model, factor)
    assert not norm.isfinite()
    step(optimizer, norm)
    after = everything(model, optimizer)
    by_momentum = set()
    if name == "muon" and step is step_without_asking:
        by_momentum = {key for key in after if "c_fc" in key or "c_proj" in key or "c_attn" in key}
        by_momentum = {key for key in by_momentum if key.endswith("weight")}
    for key, tensor in after.items():
        assert tensor.isfinite().all(), key
        assert torch.equal(tensor, before[key]) == (key not in by_momentum), key


BREAKS = """
import torch
from mixers import MIXERS

class Breaks(torch.nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_proj = torch.nn.Linear(config.n_embd, config.n_embd)
        self.steps = 0

    def forward(self, x, state=None):
        y = self.c_proj(x)
        return (y * float("nan") if self.training and self.steps == 3 else y), state

    def apply_statistics(self):
        self.steps += 1

MIXERS["breaks"] = Breaks
"""


def test_a_run_whose_loss_is_no_number_ends_at_its_last_good_checkpoint(train, here, capsys):
    (here / "breaks.py").write_text(BREAKS)
    with pytest.raises(SystemExit) as exit:
        train.call([*TINY, "--mixer_file=breaks.py", "--mixer=breaks", "--max_iters=9",
                    "--eval_interval=2", "--log_interval=1", "--out_dir=run"])
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1
    assert "step 3: loss nan, gradient norm nan is not finite" in line
    assert "the last good checkpoint is run/checkpoints/00000002" in line
    assert sorted(path.name for path in (here / "run/checkpoints").glob("0*")) == ["00000002"]
    saved = load_file(here / "run/checkpoints/00000002/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert [row["iter"] for row in metrics("run")][-1] == 3  # the last step that was one
