"""A trained model's attention replaced: what must be equal is, what is measured on text is that of
the text, and the command goes on where it stopped."""
import json
import shutil
from dataclasses import replace

import made_up_gguf
import pytest
import torch
from conftest import one_line, run

from base.errors import BadInput
from data.files import write_text_dataset
from data.named_tokenizer import pretrained_tokenizer
from mixers import MIXERS
from mixers.toptheta import TopTheta
from model import GPT
from tools import replace as command
from tools import replace_tune
from tools.calibrate import Kept, hooked
from tools.passkey import prompts, recall
from tools.replace_model import Replaced
from tools.replace_record import read_record
from tools.replace_table import table
from training import checkpoint, pretrained

ALL = [0, 1]  # the layers of the small file's model
TEXT = "The path that they took there is the other one, they say. 12 31!\n" * 60


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A GGUF with grouped heads, 4 and 2; not to be written to."""
    return made_up_gguf.write(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture(scope="module")
def trained_model(small):
    config = pretrained.read_config(str(small))
    model = GPT(config).eval()
    checkpoint.init_model(model, pretrained.read_weights(str(small), config), small)
    return model


@pytest.fixture
def model(trained_model):
    before = [(block.norm1, block.mixer) for block in trained_model.blocks]
    yield trained_model
    for block, (norm, mixer) in zip(trained_model.blocks, before):
        block.norm1, block.mixer = norm, mixer


def tokens(rows=2, n=32):
    return torch.randint(261, (rows, n), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, x=tokens()):
    return model(x)[0]


# -- the model -------------------------------------------------------------------------------------

def keeps_all(replaced):
    for mixer in replaced.substitutes:
        mixer.thresholds.theta.fill_(-torch.inf)


@pytest.mark.parametrize("options, prepare", [
    (dict(mixer="softmax"), None),
    (dict(mixer="swa", swa_window=32), None),
    (dict(mixer="swa", swa_window=4, swa_sinks=32), None),
    (dict(mixer="linformer", linformer_segment=32), None),
    (dict(mixer="toptheta", toptheta_k=1), keeps_all),
    (dict(mixer="toptheta", toptheta_k=32), None),
    (dict(mixer="ssa"), None),
])
def test_what_is_softmax_attention_leaves_the_logits_as_they_are(options, prepare, model):
    before = logits(model)
    replaced = Replaced(model, options, seed=1)
    replaced.put_in(ALL)
    if prepare:
        prepare(replaced)
    assert [type(mixer).__name__.lower() for mixer in model.mixers()] == [options["mixer"]] * 2
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4 * before.abs().max())
    replaced.put_in([])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("options", [
    dict(mixer="linear"), dict(mixer="linear", rotate_features=True), dict(mixer="lln"),
    dict(mixer="lln_diag"), dict(mixer="performer", performer_features=16),
    dict(mixer="linformer", linformer_segment=8),
    dict(mixer="swa", swa_window=3), dict(mixer="toptheta", toptheta_k=4), dict(mixer="pelican")])
@pytest.mark.parametrize("layers", [ALL, [1]])
def test_it_is_the_model_built_with_that_mixer_and_the_same_weights(options, layers, model):
    """From nothing, by the pattern, with all weights and buffers of the replaced one."""
    replaced = Replaced(model, options, seed=1)
    replaced.put_in(layers)
    replaced.fit(tokens(n=20))
    other = GPT(replace(replaced.config, mixer=replaced.pattern(layers))).eval()
    checkpoint.load_model(other, checkpoint.model_tensors(model), "here")
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-5)
    replaced.put_in([])
    assert not torch.allclose(logits(other), logits(model), rtol=0, atol=1e-3)


def test_llns_moments_are_those_of_the_text_layer_after_layer(model):
    """Of what each layer sees with the layers before it replaced, and of this text alone."""
    replaced = Replaced(model, dict(mixer="lln"), seed=1)
    replaced.put_in(ALL)
    replaced.fit(tokens(rows=1))
    x = tokens()
    replaced.fit(x)
    h = model.embed(x)
    for block in model.blocks:
        q, k, *_ = block.mixer.c_attn(block.norm1(h))
        for found, vectors in ((block.mixer.q_moments, q), (block.mixer.k_moments, k)):
            torch.testing.assert_close(found.mean, vectors.mean((0, 2, 3)))
            torch.testing.assert_close(found.square, vectors.square().mean((0, 2, 3)))
        h, _ = block(h)
    assert not model.training and all(not mixer.training for mixer in model.mixers())


def test_topthetas_thresholds_keep_about_k(model):
    replaced = Replaced(model, dict(mixer="toptheta", toptheta_k=4), seed=1)
    replaced.put_in(ALL)
    replaced.fit(tokens(rows=16))
    assert all(isinstance(mixer, TopTheta) for mixer in model.mixers())
    counters = [Kept(4, 2), Kept(4, 2)]
    with hooked(model.mixers(), counters):
        logits(model, tokens(rows=16))
    for counter in counters:
        means = counter.means()
        assert means["visible"] > 15 and 2.5 < means["kept"] < 4.5


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - {
    "softmax", "ssa", "swa", "linformer", "toptheta", "lln", "lln_diag", "linear", "performer",
    "pelican"}))
def test_a_mixer_without_the_same_projections_is_refused(mixer, model):
    try:
        Replaced(model, dict(mixer=mixer), seed=1)
    except BadInput as error:
        assert "no place for attention's projections" in str(error)
    else:  # with the same projections it has the same shapes
        assert MIXERS[mixer](model.config, 0).c_attn.sizes == model.blocks[0].mixer.c_attn.sizes


# -- pass keys -------------------------------------------------------------------------------------

def test_prompts_have_the_key_at_every_depth_and_the_answer_behind(small):
    tokenizer = pretrained_tokenizer(str(small))
    some = prompts(tokenizer, 600, 5)
    places = []
    for prompt in some:
        text = tokenizer.decode(prompt.tokens)
        answer = tokenizer.decode(prompt.tokens[-prompt.answer:])
        assert len(prompt.tokens) <= 600 and text.count(answer.strip()) == 3
        assert text.endswith(f"The pass key is{answer}")
        places.append(text.index(answer))
    assert places == sorted(places) and places[0] < 100 and places[-1] > 300
    assert some == prompts(tokenizer, 600, 5) != prompts(tokenizer, 600, 5, seed=2)
    with pytest.raises(BadInput, match="200 tokens leave no room"):
        prompts(tokenizer, 200, 1)


def test_recall_counts_what_greedy_sampling_would_write(small, model):
    """Against generation, token by token; of a model that always knows, all."""
    some = prompts(pretrained_tokenizer(str(small)), 500, 3)
    found = recall(model, some)
    written = []
    for prompt in some:
        idx = torch.tensor([prompt.tokens[:-prompt.answer]])
        out = model.generate(idx, prompt.answer, temperature=0.0)[0].tolist()
        written.append(out == prompt.tokens)
    assert found.right == sum(written) / 3 and found.loss > 1

    class Knows:
        """Whose hidden states are the tokens that follow."""
        norm = model.norm

        def hidden(self, idx):
            [whole] = [p.tokens for p in some if p.tokens[:-1] == idx[0].tolist()]
            return torch.nn.functional.one_hot(torch.tensor([whole[1:]]), 261).float(), None

        def head(self, h):
            return 100 * h

    assert recall(Knows(), some) == (1.0, 0.0)


# -- the command -----------------------------------------------------------------------------------

FEW = ["--dataset=tokenized", "--block_size=32", "--windows=3", "--select_windows=1", "--prompts=0",
       "--fit_windows=2", "--decode_tokens=40", "--device=cpu", "--dtype=float32",
       "--out_dir=record"]


@pytest.fixture
def tokenized(home, small, here):
    write_text_dataset(home / "data" / "tokenized", TEXT, pretrained_tokenizer(str(small)),
                       "0" * 64, "data.text")


@pytest.fixture
def call(small, tokenized, here, monkeypatch, capsys):
    """call(*arguments): what the command prints."""
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["replace", f"--init_from={small}", *FEW, *arguments])
        capsys.readouterr()
        command.main()
        return capsys.readouterr().out
    return call


def test_the_record_grows_and_says_what_was_measured(call, here, model):
    out = call("--arms=swa_64,toptheta_16")
    assert "swa_64, 2 layers" in out
    record = read_record("record")
    assert record["settings"]["n_layer"] == 2 and len(record["softmax"]["losses"]) == 3
    swa = record["arms"]["swa_64"]
    assert set(swa["together"]) == {"1", "2"} and swa["together"]["2"]["layers"] == ALL
    # a window beyond the length is softmax attention
    assert swa["together"]["2"]["losses"] == pytest.approx(record["softmax"]["losses"], rel=1e-5)
    assert swa["alone"] == pytest.approx([record["softmax"]["select"]] * 2, rel=1e-5)
    assert swa["decoding"]["state_bytes"] == swa["decoding"]["softmax_state_bytes"] == 81920
    least = record["arms"]["toptheta_16"]["alone"]
    assert record["arms"]["toptheta_16"]["together"]["1"]["layers"] == [least.index(min(least))]
    assert record["arms"]["toptheta_16"]["together"]["2"]["kept"]["visible"] > 16

    text = table(record)
    assert table(json.loads(json.dumps(record))) == call("--table").removesuffix("\n") == text
    assert "+0.000 +- 0.000" in text and "toptheta_16, 2 layers: of" in text
    call("--table", "--picture=a.png")
    assert (here / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_goes_on_and_other_settings_are_refused(call, here, monkeypatch):
    call("--arms=linear")
    path = here / "record" / "replace.json"
    whole = json.loads(path.read_text())
    cut = json.loads(path.read_text())
    del cut["arms"]["linear"]["together"]["2"]
    cut["arms"]["linear"]["decoding"] = None
    path.write_text(json.dumps(cut))

    def never(*args):
        raise AssertionError("measured once more")

    monkeypatch.setattr(command, "each_alone", never)
    call("--arms=linear")
    again = json.loads(path.read_text())
    assert again["arms"]["linear"]["together"] == whole["arms"]["linear"]["together"]
    for arguments, naming in (
            (["--windows=2"], "windows 3, not 2"),
            (["--arms=lnn"], "no arm 'lnn'; nearest: lln"),
            (["--block_size=33"], "was trained on 32"),
            (["--picture=a.png"], "--picture goes with --table"),
            (["--windows=99999"], "fewer than 99999 windows"),
            (["--dataset=letters"], "has another tokenizer than data set letters"),
            (["--table", "--out_dir=none"], "no none/replace.json")):
        with pytest.raises(SystemExit) as exit:
            call(*arguments)
        assert exit.value.code == 2
    assert json.loads(path.read_text()) == again


FOUND = {"layers": [0, 1], "losses": [4.0, 5.0], "keys": None, "kept": None}
RECORD = {
    "settings": dict(init_from="m", dataset="d", block_size=8, windows=2, prompts=0,
                     decode_tokens=0, bytes_per_token=2.0, n_layer=2),
    "softmax": {"losses": [3.0, 3.0], "keys": None, "select": 3.0},
    "arms": {"linear": {"options": {"mixer": "linear"}, "alone": [3.5, 3.25],
                        "together": {"2": FOUND}, "decoding": None}},
    "tuned": {}}


def test_the_tables_figures(tmp_path):
    """Bits per byte: 1 and 2 nats more in tokens of two bytes."""
    (tmp_path / "replace.json").write_text(json.dumps(RECORD))
    text = table(read_record(tmp_path))
    assert "2 layers 2.1640 bits per byte" in text
    assert "+1.082 +- 0.721" in text and "1 0" in text and "(+0.50 nats)" in text


@pytest.mark.parametrize("old, new", [
    ("[4.0, 5.0]", "[1e300]"), ("[0, 1]", "[-1]"), ("[3.0, 3.0]", "[]"), ("2.0", "0.0"),
    ('"linear": {', '"a\\u001b[2J": {'), ('"tuned": {}', '"tuned": 3'), ("{", "[")])
def test_damaged_records_end_in_one_line(old, new, tmp_path):
    path = tmp_path / "replace.json"
    whole = json.dumps(RECORD)
    assert old in whole
    path.write_text(whole.replace(old, new, 1))
    with pytest.raises(BadInput, match="replace.json is damaged"):
        read_record(tmp_path)


@pytest.mark.slow
def test_training_begins_where_the_replaced_model_is_and_goes_on(small, tokenized, home, here):
    """Softmax and an arm, in processes of their own; interrupted before its training, it goes
    on."""
    arguments = ["-m", "tools.replace", f"--init_from={small}", *FEW[:-1],
                 f"--out_dir={here / 'record'}", "--tune=lln", "--tune_tokens=256"]
    done = run(home, *arguments, timeout=600)
    assert done.returncode == 0, done.stderr
    record = read_record(here / "record")
    assert set(record["tuned"]) == {"softmax-0-256", "lln-1-256"}
    for found in record["tuned"].values():
        assert found["tokens"] == 256 and found["after"] < found["before"]
    lln = record["tuned"]["lln-1-256"]
    assert lln["layers"] == record["arms"]["lln"]["together"]["1"]["layers"]
    [path] = (home / "out/replace").glob("*lln-1-256/config.json")
    config = json.loads(path.read_text())
    assert config["mixer"].split(",").count("lln") == 1 and config["max_iters"] == 4
    assert not list((home / "out/replace").glob("*-start"))
    assert "after training" in table(record)
    line = one_line(run(home, *arguments[:-2], "--tune=lln", "--tune_layers=3", timeout=600))
    assert "--tune_layers=3: the model has 2" in line
    shutil.rmtree(home / "out/replace")


@pytest.mark.slow
def test_a_start_that_train_takes_is_the_replaced_model(call, here, train, small, monkeypatch):
    """The run's first validation loss, with no step made, is that of the record."""
    call("--arms=lln_rotated")
    started = []

    def train_here(run):
        arguments = [word for word in run.arguments if not word.startswith("--max_iters")]
        train(*arguments, "--max_iters=0", f"--out_dir={run.folder}")
        started.append(run)

    monkeypatch.setattr(replace_tune, "train_and_score", train_here)
    call("--tune=lln_rotated", "--tune_tokens=64")
    found = read_record("record")["tuned"]
    for name in ("softmax-0-64", "lln_rotated-1-64"):
        assert found[name]["after"] == pytest.approx(found[name]["before"], rel=1e-5)
    assert len(started) == 2
