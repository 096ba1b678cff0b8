"""Nothing in a training step waits for a GPU but the one read-back at its end: `bool(tensor)` or
`.item()` in a forward pass would let it stand still in every layer.

No GPU is needed to see that: on torch's meta device tensors have no values, and whatever reads one
raises. So Training.update must come as far as its own read-back, world.total, and raise there.

Not seen: what meta tensors can do without values and a GPU cannot without waiting (`t[mask] = 0`,
`torch.tensor(list, device=...)`), branches for cuda alone, fused AdamW (which refuses meta; the
plain one stands in) and what autocast does (which does not know meta; left out).
"""
import contextlib
import json
import sys
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

from mixers import MIXERS

OPTIONS = {  # beyond every mixer by itself
    "softmax": dict(conv=4, attn_temperature=0.5, norm="none", optimizer="muon"),
    "lln": dict(conv=4, lln_matching="published", arch="llama", n_kv_head=1),
    "lln_diag": dict(lln_diag_mode="convex"),
    "performer": dict(performer_redraw=1),
    "pelican": dict(vocab_size=10**6, mlp_activation="causal_max_context"),  # logits in pieces
}
AT_THE_END = ["train.py update", "training/parallel.py total"]


class Planted(torch.nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_proj = torch.nn.Linear(config.n_embd, config.n_embd)


class ReadsForward(Planted):
    def forward(self, x, state=None):
        return self.c_proj(x if bool((x > 0).any()) else -x), state


class ReadsBackward(Planted):
    def forward(self, x, state=None):
        y = self.c_proj(x)
        y.register_hook(lambda gradient: gradient / gradient.abs().max().item())
        return y, state


class ReadsStatistics(Planted):
    def forward(self, x, state=None):
        return self.c_proj(x), state

    def apply_statistics(self):
        self.scale = self.c_proj.weight.norm().item()


class ReadsUnseen(Planted):
    """What this test does not see: a GPU waits for all three."""

    def forward(self, x, state=None):
        y = self.c_proj(x) * torch.tensor([1.0], device=x.device)
        if x.device.type == "cuda":
            y = y * y.max().item()
        scale = torch.ones_like(y)
        scale[y > 0] = 2
        return y * scale, state


PLANTED = [ReadsForward, ReadsBackward, ReadsStatistics, ReadsUnseen]


def update_on_meta(mixer, vocab_size=11, **options):
    """Where Training.update stops on the meta device: the innermost two of our functions."""
    from config import Options, filled_in
    from model import GPT, model_config
    from train import Training
    from training.machine import Machine
    from training.optimizer import make_optimizer
    from training.parallel import World

    class Data:
        name = "made up"

        def batch(self, seed, step, rows, block_size):
            x = torch.zeros(rows, block_size, dtype=torch.int64)
            return x, x

    sizes = dict(block_size=150, n_layer=1, n_head=2, n_embd=32, batch_size=4, dropout=0.1)
    options = filled_in(Options(mixer=mixer, **sizes | options))
    meta = torch.device("meta")
    model = GPT(model_config(vars(options) | dict(vocab_size=vocab_size), "options")).to(meta)
    run = Training.__new__(Training)
    run.options, run.model, run.data, run.step = options, model.train(), Data(), 0
    run.machine = Machine(meta, contextlib.nullcontext(), World())
    run.rows_at_once, run.loss_fn = 2, model.loss
    run.optimizer = make_optimizer(model, options, meta)
    run.options.min_lr, run.options.lr_decay_iters = 0.0, 100
    try:
        run.update([])
    except RuntimeError as error:
        ours = []
        for frame in traceback.extract_tb(error.__traceback__):
            is_ours = "site-packages" not in frame.filename  # an environment may lie in the clone
            if is_ours and Path(frame.filename).is_relative_to(ROOT):
                place = Path(frame.filename).relative_to(ROOT)
                ours.append(f"{place} {frame.name}")
        return ours[-2:]
    return []


def report():
    """case -> where it stops, of all cases; the process is not fit for anything else after it."""
    torch.autocast = lambda *args, **options: contextlib.nullcontext()
    torch.is_autocast_enabled = lambda *args: False
    stops = {mixer: update_on_meta(mixer) for mixer in MIXERS}
    for mixer, options in OPTIONS.items():
        stops[f"{mixer} with options"] = update_on_meta(mixer, **options)
    for builder in PLANTED:
        MIXERS["planted"] = builder
        stops[builder.__name__] = update_on_meta("planted")
    print(json.dumps(stops))


@pytest.fixture(scope="module")
def stops():
    done = run(ROOT, "-m", "tests.test_synchronisation", timeout=300,
               env={"PYTHONPATH": str(ROOT / "tests")})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [*MIXERS, *(f"{mixer} with options" for mixer in OPTIONS)])
def test_a_training_step_reads_back_once_at_its_end(stops, case):
    assert stops[case] == AT_THE_END


def test_what_reads_back_before_is_seen(stops):
    assert stops["ReadsForward"][-1].endswith("test_synchronisation.py forward")
    assert stops["ReadsBackward"][-1].endswith("test_synchronisation.py <lambda>")
    assert stops["ReadsStatistics"][-1].endswith("test_synchronisation.py apply_statistics")
    assert stops["ReadsUnseen"] == AT_THE_END  # see the top of this file


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    report()
