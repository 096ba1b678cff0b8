"""Top-Theta against its formulas, row after row; the run that tools.calibrate makes of a softmax
one."""
import json
import math
import re
import shutil
import sys
from itertools import product

import pytest
import torch
from conftest import TINY, content
from test_mixers import make, tokens

from mixers import MIXERS, mixer_names, toptheta
from mixers.parts.heads import repeat_heads, rotate
from tools import calibrate
from tools.calibrate import ExactTopK
from training import checkpoint
from training.leaks import find_leak

VARIANTS = [*product(["pre"], ["none", "exact", "threshold", "offline"], [False, True]),
            ("post", "none", False), ("post", "none", True)]
every_variant = pytest.mark.parametrize("placement, sdc, vmc", VARIANTS)


def with_thresholds(placement="pre", sdc="none", vmc=False, skeleton="llama", k=4):
    """A model whose thresholds drop most scores of rows of more than k; head 0's are above every
    score."""
    model = make("toptheta", skeleton, toptheta_k=k, toptheta_placement=placement,
                 toptheta_sdc=sdc, toptheta_vmc=vmc)
    low, high = (0.3, 0.9) if placement == "pre" else (0.02, 0.05)
    for mixer in model.mixers():
        table = mixer.thresholds
        table.theta.uniform_(low, high)
        table.theta[0] = 1e3
        table.missing.uniform_(0, 2)
    return model


def slow(mixer, x, placement, sdc, vmc):
    """The formulas, row by row."""
    q, k, v, _ = mixer.c_attn(x)
    if mixer.rope_base:
        q, k = rotate(q, 0, mixer.rope_base), rotate(k, 0, mixer.rope_base)
    B, H, T, D = q.shape
    k, v = repeat_heads(k, H), repeat_heads(v, H)
    y = torch.zeros_like(q)
    for b, h, t in product(range(B), range(H), range(T)):
        n = t + 1
        column = min(n, mixer.thresholds.theta.size(1)) - 1
        theta, missing = mixer.thresholds.theta[h, column], mixer.thresholds.missing[h, column]
        scores = (k[b, h, :n] @ q[b, h, t]) / math.sqrt(D)
        compared = scores if placement == "pre" else scores.softmax(0)
        kept = [j for j in range(n)
                if n <= mixer.thresholds.k or compared[j] > theta or j == compared.argmax()]
        dropped = [j for j in range(n) if j not in kept]
        of_kept = scores.exp()[kept]
        denominator = of_kept.sum()
        if sdc == "exact" or placement == "post":
            denominator = scores.exp().sum()
        if sdc == "threshold":
            denominator += len(dropped) * torch.minimum(theta, scores.max()).exp()
        if sdc == "offline":
            denominator += missing * scores.max().exp()
        weights = of_kept / denominator
        y[b, h, t] = weights @ v[b, h, kept]
        if vmc:
            y[b, h, t] += (1 - weights.sum()) * v[b, h, :n].mean(0)
    return mixer.c_proj(y.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("placement, sdc, vmc, skeleton", [
    *((*variant, "llama") for variant in VARIANTS), ("pre", "threshold", True, "gpt2")])
def test_rows_are_those_of_the_formulas(placement, sdc, vmc, skeleton, monkeypatch):
    monkeypatch.setattr(toptheta, "BLOCK", 16)  # of the 40 tokens: two and a half
    mixer = with_thresholds(placement, sdc, vmc, skeleton).blocks[0].mixer
    mixer.thresholds.theta = mixer.thresholds.theta[:, :30]  # longer rows take the last
    mixer.thresholds.missing = mixer.thresholds.missing[:, :30]
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], slow(mixer, x, placement, sdc, vmc),
                               rtol=0, atol=1e-12)


@every_variant
def test_pieces_are_the_whole(placement, sdc, vmc):
    """In prefill and decoding alike: nothing depends on how the tokens came."""
    model, idx = with_thresholds(placement, sdc, vmc), tokens(n=90)
    whole, loss = model(idx, idx.roll(-1, 1))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    state, pieces = None, []
    for piece in idx.split([64, 1, 1, 7, 17], dim=1):
        logits, state = model.step(piece, state)
        pieces.append(logits)
    pieces = torch.cat(pieces, 1)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-11)
    loss = torch.nn.functional.cross_entropy(pieces.flatten(0, 1), idx.roll(-1, 1).flatten())
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert max((a - b).abs().max() for a, b in zip(found, expected)) < 1e-10
    with torch.no_grad():
        _, early = model.step(idx[:, :50])
        first, _ = model.step(idx[:, 50:60], early)
        model.step(idx[:, 70:73], early)
        assert torch.equal(model.step(idx[:, 50:60], early)[0], first)


@pytest.mark.parametrize("placement, sdc, vmc", [
    ("pre", "none", False), ("pre", "threshold", True), ("pre", "offline", False),
    ("post", "none", True)])
def test_no_variant_leaks(placement, sdc, vmc):
    """Rows without a score above the threshold see no later token either."""
    assert find_leak(with_thresholds(placement, sdc, vmc), torch.float32) is None


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@every_variant
def test_what_keeps_everything_is_softmax(placement, sdc, vmc, dtype, tolerance):
    """Before calibration, and where k is as long as the rows, whatever the thresholds are."""
    x = torch.randn(2, 60, 32, dtype=dtype)
    softmax = make("softmax", "llama").to(dtype).blocks[0].mixer
    expected, _ = softmax(x)
    fresh = make("toptheta", "llama", toptheta_placement=placement, toptheta_sdc=sdc,
                 toptheta_vmc=vmc)
    wide = with_thresholds(placement, sdc, vmc, k=60)
    for mixer in (fresh.to(dtype).blocks[0].mixer, wide.to(dtype).blocks[0].mixer):
        mixer.load_state_dict(softmax.state_dict(), strict=False)
        if sdc == "offline":  # calibrated, nothing is missing there
            mixer.thresholds.missing.zero_()
        assert (mixer(x)[0] - expected).abs().max() < tolerance * expected.abs().max()


@torch.no_grad()
def test_an_exact_denominator_before_the_softmax_is_thresholds_after_it():
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    found = []
    for placement, sdc in (("pre", "exact"), ("post", "none")):
        mixer = make("toptheta", toptheta_k=7, toptheta_placement=placement,
                     toptheta_sdc=sdc).blocks[0].mixer
        with calibrate.hooked([mixer], [ExactTopK(mixer.thresholds)]):  # both keep the same
            found.append(mixer(x)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-14)
    assert (found[0] - make("softmax").blocks[0].mixer(x)[0]).abs().max() > 1e-3


def test_thresholds_after_the_softmax_have_no_denominator():
    with pytest.raises(ValueError, match="toptheta_sdc 'exact' is for toptheta_placement 'pre'"):
        make("toptheta", toptheta_placement="post", toptheta_sdc="exact")


def test_it_is_not_among_all_mixers():
    assert mixer_names("all") == [name for name in MIXERS if name != "toptheta"]
    assert mixer_names("toptheta") == ["toptheta"]


# Calibration --------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_thresholds_are_the_mean_of_the_next_largest_score(placement, monkeypatch):
    """And 0.1 standard deviations; of the second layer, behind a first that keeps exactly k."""
    monkeypatch.setattr(toptheta, "BLOCK", 16)
    model = make("toptheta", toptheta_k=5, toptheta_placement=placement)
    layers, seen = model.mixers(), {}
    collectors = [ExactTopK(mixer.thresholds) for mixer in layers]
    for layer, mixer in enumerate(layers):
        mixer.thresholds.register_forward_pre_hook(
            lambda module, args, layer=layer: seen.setdefault(layer, []).append(args[0]))
    idx = tokens(rows=6, n=40)
    with calibrate.hooked(layers, collectors):
        model(idx[:3, :25])
        model(idx[3:])
    for layer, mixer in enumerate(layers):
        collectors[layer].set(mixer.thresholds)
        rows = {}  # n -> those of all sequences (B, H, n)
        for block in (seen[layer][:2], seen[layer][2:]):
            n = 0
            for values in block:
                for t in range(values.size(2)):
                    n += 1
                    rows.setdefault(n, []).append(values[:, :, t, :n])
        for n in (1, 5, 6, 7, 16, 17, 25, 26, 40):
            values = torch.cat(rows[n])
            if n <= 5:
                assert (mixer.thresholds.theta[:, n - 1] < -1e38).all()
                continue
            ordered = values.sort(2, descending=True).values
            border = ordered[:, :, 5]
            theta = border.mean(0) + 0.1 * border.std(0, correction=0)
            torch.testing.assert_close(mixer.thresholds.theta[:, n - 1], theta)
            if placement == "pre":
                missing = (ordered - ordered[:, :, :1]).exp()[:, :, 5:].sum(2).mean(0)
                torch.testing.assert_close(mixer.thresholds.missing[:, n - 1], missing)
        assert (mixer.thresholds.theta[:, 40:] == mixer.thresholds.theta[:, 39:40]).all()
    # the first layer did drop the others
    dense = make("softmax")(idx[3:])[0]
    with calibrate.hooked(layers, collectors):
        assert (model(idx[3:])[0] - dense).abs().max() > 1e-3


@torch.no_grad()
def test_exactly_k_are_kept():
    model, idx = make("toptheta", toptheta_k=5), tokens(rows=2, n=30)
    kept = []

    def keep(module, args, out):
        kept.append(out)

    layers = model.mixers()
    with calibrate.hooked(layers, [ExactTopK(mixer.thresholds) for mixer in layers]), \
         calibrate.hooked(layers, [keep, keep]):
        model(idx)
    count = torch.arange(1, 31).clamp(max=5)
    for mask in kept:
        assert (mask.sum(3) == count).all() and not mask.triu(1).any()


# The command --------------------------------------------------------------------------------------

@pytest.fixture
def command(here, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, arguments)])
        capsys.readouterr()
        calibrate.main()
        return capsys.readouterr().out
    return call


@pytest.fixture
def softmax_run(run_folder, here):
    return shutil.move(run_folder, here / "run")


@pytest.mark.parametrize("variant", [
    [], ["--placement=post", "--vmc"], ["--sdc=threshold", "--vmc"], ["--sdc=offline"]])
def test_a_calibrated_run_is_a_run(variant, softmax_run, command, train, sample):
    before = content(softmax_run)
    out = command("--out_dir=run", "--k=5", *variant)
    assert content(softmax_run) == before
    report = json.loads((train.here / "run_toptheta" / "calibration.json").read_text())
    [layer] = report["layers"]
    assert layer["kept"] == pytest.approx(5, rel=0.1) and layer["read"] == layer["kept"]
    # the last window is shorter
    assert layer["visible"] == pytest.approx((6 + 16) / 2, rel=0.01)
    source = checkpoint.load("run")
    assert report["loss_softmax"] == pytest.approx(source.trainer["val_loss"])
    assert report["loss"] != report["loss_softmax"]
    assert abs(report["loss"] - report["loss_softmax"]) < 0.1
    assert f"thresholds {report['loss']:.4f}" in out
    made = checkpoint.load("run_toptheta", "best")
    assert made.config["mixer"] == "toptheta" and made.config["toptheta_k"] == 5
    for name, tensor in source.model.items():
        assert torch.equal(made.model[name], tensor)
    assert set(made.model) - set(source.model) == {
        "blocks.0.mixer.thresholds.theta", "blocks.0.mixer.thresholds.missing"}
    evaluated = train("--eval_only", "--out_dir=run_toptheta")
    assert f"val loss {report['loss']:.4f} nats" in evaluated
    assert len(sample("--out_dir=run_toptheta", "--max_new_tokens=40", "--num_samples=1")) > 40
    assert "nothing left to do" in train("--resume", "--out_dir=run_toptheta")
    train("--resume", "--out_dir=run_toptheta", "--max_iters=21")  # with the optimiser's state


@pytest.mark.slow
def test_a_calibrated_run_passes_the_audit(softmax_run, command, monkeypatch):
    from tools import audit
    for name, variant in (("a", []), ("b", ["--placement=post", "--vmc"])):
        command("--out_dir=run", "--k=5", f"--out={name}", *variant)
        monkeypatch.setattr(sys, "argv", ["audit", f"--out_dir={name}", "--quick"])
        with pytest.raises(SystemExit) as exit:
            audit.main()
        assert not exit.value.code


def test_other_layers_stay_and_rows_of_v_are_shared_by_heads(train, command):
    train(*TINY, "--mixer=softmax,lln,softmax,softmax", "--n_layer=4", "--n_head=4",
          "--n_kv_head=2", "--max_iters=2", "--out_dir=run")
    command("--out_dir=run", "--k=3", "--dense_layers=1", "--out=sparse")
    config = json.loads((train.here / "sparse" / "config.json").read_text())
    assert config["mixer"] == "softmax,lln,toptheta,toptheta" and config["out_dir"] == "sparse"
    layers = json.loads((train.here / "sparse" / "calibration.json").read_text())["layers"]
    assert [row["layer"] for row in layers] == [2, 3]
    for row in layers:
        assert row["kept"] == pytest.approx(3, rel=0.3)
        assert row["kept"] < row["read"] < 2 * row["kept"]


def test_a_recall_run_is_calibrated_on_its_rows(train, command):
    recall = [argument for argument in TINY if not argument.startswith("--dataset")]
    train(*recall, "--dataset=recall", "--mixer=softmax", "--max_iters=2", "--out_dir=run")
    command("--out_dir=run", "--k=4")  # rows of 12 tokens, block_size 16
    theta = checkpoint.load("run_toptheta").model["blocks.0.mixer.thresholds.theta"]
    assert (theta[:, 4:] > -100).all() and (theta[:, 12:] == theta[:, 11:12]).all()


@pytest.mark.parametrize("arguments, message", [
    ("", "which run[?] name its folder: "),
    ("--out_dir=gone", "no checkpoint in gone; train one"),
    ("--out_dir=run --k=16", "--k=16: rows have at most block_size 16 tokens"),
    ("--out_dir=run --k=0", "--k=0: input should be greater than or equal to 1"),
    ("--out_dir=run --k=5 --dense_layers=1", "no layer of mixer 'softmax' is softmax from layer 1"),
    ("--out_dir=run --k=5 --out=run", "run already exists; choose another folder with --out"),
    ("--out_dir=run --k=5 --out=link", "--out=.*link is a link; name the folder itself"),
    ("--out_dir=run --k=5 --out=full/new", "cannot write .*new: Not a directory"),
    ("--out_dir=run --k=5 --placement=post --sdc=exact", "toptheta_sdc 'exact' is for"),
    ("--out_dir=run --k=5 --sdc=some", "--sdc=some: "),
    ("--out_dir=other --k=5", "mixer 'pelican' is softmax; name a run with softmax attention"),
    ("--out_dir=nan --k=5", "validation loss is nan; there is nothing to calibrate"),
])
def test_bad_input_is_one_line(arguments, message, softmax_run, command, train, capsys):
    here = train.here
    (here / "link").symlink_to(here / "nowhere")
    (here / "full").write_text("a file")
    if "other" in arguments:
        train(*TINY, "--mixer=pelican", "--max_iters=1", "--out_dir=other")
    if "nan" in arguments:
        saved = checkpoint.load("run")
        saved.model["norm.weight"][0] = math.nan
        checkpoint.save("nan", saved.model, {}, saved.trainer, saved.config,
                        saved.tokenizer.to_json(), 1)
    before = content(here)
    with pytest.raises(SystemExit) as exit:
        command(*arguments.split())
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1
    assert line.startswith("tools.calibrate: ") and re.search(message, line), line
    assert content(here) == before
    assert not [path for path in here.iterdir() if path.name.startswith(".")]
