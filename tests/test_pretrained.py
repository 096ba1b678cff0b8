"""Pretrained models: what transformers saves is read with its logits, what we export is read by it,
fine-tuning starts there, and hostile folders end in one line."""
import json
import os
import shutil
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import content, metrics, one_line, run
from safetensors.torch import load_file, save_file
from test_model import redraw
from test_train import equal, weights

from base.errors import BadInput
from data.tokenizer import char_tokenizer_of, gpt2_tokenizer
from model import GPT, GPTConfig
from tools import export_hf
from training import checkpoint, pretrained
from training.optimizer import load_optimizer

LETTERS = "abcdefghijklmnopqrstuvwxyz \n"
SHORT = ["--dataset=letters", "--batch_size=2", "--device=cpu", "--eval_tokens=500",
         "--warmup_iters=0", "--learning_rate=0.01"]
GPT2 = dict(vocab_size=28, n_positions=24, n_embd=16, n_layer=2, n_head=2)
LLAMA = dict(vocab_size=28, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=24)


def theirs(arch, **fields):
    """A small model of transformers with large random weights, norms around 1: then the two forms
    of GELU differ in the logits."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    if arch == "gpt2":
        model = redraw(GPT2LMHeadModel(GPT2Config(**GPT2 | fields)))
    else:
        model = redraw(LlamaForCausalLM(LlamaConfig(**LLAMA | fields)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 and name.endswith("weight"):
                p += 1
    return model


@torch.no_grad()
def assert_same_logits(ours, theirs, idx):
    expected = theirs(idx).logits
    assert (ours(idx)[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def either(request, tmp_path_factory):
    """A Hugging Face folder of each kind; not to be written to."""
    folder = tmp_path_factory.mktemp("pretrained") / request.param
    theirs(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "small"
    theirs("gpt2").save_pretrained(folder)
    return folder


def rewrite(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def read(folder, **changes):
    """Our model of a Hugging Face folder, through the code that train.py uses."""
    config = replace(pretrained.read_config(folder), **changes)
    model = GPT(config).eval()
    checkpoint.init_model(model, pretrained.read_weights(folder, config), folder)
    return model


# -- reading ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, fields", [
    ("gpt2", {}),
    ("gpt2", dict(tie_word_embeddings=False, n_inner=40, activation_function="gelu",
                  layer_norm_epsilon=1e-3)),
    ("llama", {}),
    ("llama", dict(tie_word_embeddings=True, num_key_value_heads=4, rms_norm_eps=1e-2,
                   hidden_act="gelu_pytorch_tanh")),
    ("llama", dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True,
                   rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
])
def test_the_logits_are_transformers(arch, fields, tmp_path):
    model = theirs(arch, **fields)
    model.save_pretrained(tmp_path, max_shard_size="6KB" if arch == "llama" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (arch == "llama")
    assert_same_logits(read(str(tmp_path)), model, torch.randint(28, (2, 24)))


def test_older_folders_are_read_too(either, tmp_path):
    """Without the prefix of the head's class, with masks and wavelengths among the weights, in half
    precision, rope_theta for itself."""
    from transformers import AutoModelForCausalLM
    expected = AutoModelForCausalLM.from_pretrained(either, dtype=torch.bfloat16).float().eval()
    folder = shutil.copytree(either, tmp_path / "old")
    old = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old[name.removeprefix("transformer.").removeprefix("model.")] = tensor.bfloat16()
    if either.name == "gpt2":
        old["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    else:
        old["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        rewrite(folder, rope_theta=10000.0)
    save_file(old, folder / "model.safetensors")
    rewrite(folder, rope_parameters=None, rope_scaling=None, torch_dtype="bfloat16")
    assert_same_logits(read(folder), expected, torch.randint(28, (2, 24)))


def test_a_shorter_context_keeps_the_first_positions(either):
    idx = torch.randint(28, (1, 10))
    assert torch.equal(read(either, block_size=10)(idx)[0], read(either)(idx)[0])


@pytest.mark.parametrize("fields, naming", [
    (dict(model_type="mistral"), 'model_type "mistral"'),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
     "partial_rotary_factor"),
    (dict(head_dim=16), "head_dim 16"),
    (dict(hidden_act="relu"), 'hidden_act "relu"'),
    (dict(sliding_window=8), "sliding_window 8"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(attention_bias=True), "-blocks.0.mixer.c_attn.proj.bias"),
    (dict(hidden_size=None), "lacks hidden_size"),
    (dict(num_attention_heads=5), "n_embd 32 is not divisible by n_head 5"),
    (dict(num_hidden_layers=1), "layers.1"),
    (dict(vocab_size=30), "vocabulary of 30, the data set one of 28"),
])
def test_what_a_llama_folder_asks_for_in_vain_is_named(fields, naming, train, tmp_path):
    theirs("llama").save_pretrained(tmp_path / "hf")
    rewrite(tmp_path / "hf", **fields)
    assert naming in train.refuses(*SHORT, f"--init_from={tmp_path / 'hf'}")


@pytest.mark.parametrize("fields, naming", [
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    (dict(scale_attn_weights=False), "scale_attn_weights"),
    (dict(activation_function=["gelu"]), "activation_function"),
    (dict(tie_word_embeddings=False), "-head.weight"),
    (dict(n_positions=48), "pos_embed.weight"),
    (dict(n_layer="2"), "n_layer"),
])
def test_what_a_gpt2_folder_asks_for_in_vain_is_named(fields, naming, train, gpt2, tmp_path):
    folder = shutil.copytree(gpt2, tmp_path / "hf")
    rewrite(folder, **fields)
    assert naming in train.refuses(*SHORT, f"--init_from={folder}")


def test_damaged_weights_are_named(train, gpt2, tmp_path):
    folder = shutil.copytree(gpt2, tmp_path / "hf")
    path = folder / "model.safetensors"

    def refuses():
        return train.refuses(*SHORT, f"--init_from={folder}")

    tensors = load_file(path)
    save_file(tensors | {"transformer.h.0.attn.c_proj.scale": torch.ones(1)}, path)
    assert "no place for its tensors h.0.attn.c_proj.scale" in refuses()
    save_file(tensors | {"transformer.wte.weight": torch.ones(28, 16).to(torch.int8)}, path)
    assert "wte.weight: int8 (28, 16): quantised weights" in refuses()
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors is damaged" in refuses()
    path.write_bytes(path.read_bytes()[:1000])
    assert "config.json describes a model of 4,544 parameters or more" in refuses()
    path.rename(folder / "pytorch_model.bin")
    assert "save_pretrained" in refuses()
    for shard in ("../small/model.safetensors", "/etc/passwd", "..", "", 1, None, "a\0b"):
        index = {"weight_map": {"wte.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        line = refuses()
        assert "weight_map" in line or "is no regular file" in line
    for text in ("{", "[" * 1000 + "]" * 1000, '{"model_type": NaN}', "[]", "\xff"):
        (folder / "config.json").write_text(text, encoding="latin-1")
        assert "config.json is damaged" in refuses()
    (folder / "config.json").write_text('{"model_type": ' + "[" * 1000 + "]" * 1000 + "}")
    assert "config.json is damaged" in refuses()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors",
                                  "model.safetensors.index.json"])
def test_a_pipe_or_a_folder_in_place_of_a_file(name, train, gpt2, tmp_path):
    for make in (os.mkfifo, os.mkdir):
        folder = shutil.copytree(gpt2, tmp_path / make.__name__)
        if name.startswith("model."):
            (folder / "model.safetensors").unlink()
        else:
            (folder / name).unlink()
        make(folder / name)
        line = train.refuses(*SHORT, f"--init_from={folder}")
        assert name in line and ("is no regular file" in line or "cannot read" in line)


@pytest.mark.parametrize("fields, naming", [
    (dict(num_hidden_layers=9999), "parameters or more"),
    (dict(num_hidden_layers=10**9), "n_layer"),
    (dict(hidden_size=2**30, head_dim=2**28), "parameters or more"),
    (dict(hidden_size=2**62), "n_embd"),
    (dict(intermediate_size=10**30), "ffn_hidden"),
    (dict(max_position_embeddings=10**30), "block_size"),
    (dict(hidden_size="32"), "hidden_size"),
    (dict(hidden_size=[32]), "hidden_size"),
    (dict(num_hidden_layers=True), "num_hidden_layers"),
    (dict(num_attention_heads=0), "n_head"),
    (dict(head_dim="8"), "head_dim"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
    (dict(rms_norm_eps=10**400), "rms_norm_eps"),
    (dict(rope_theta=[1]), "rope_theta"),
    (dict(rope_scaling=3), "rope_scaling"),
    (dict(rope_parameters={"rope_type": ["default"]}), "rope_parameters"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": "x"}), "rope_base"),
    (dict(model_type=["llama"]), "model_type"),
    (dict(another=["x" * 10**6]), "another"),
])
def test_hostile_values_in_config_json(fields, naming, train, tmp_path):
    theirs("llama").save_pretrained(tmp_path / "hf")
    rewrite(tmp_path / "hf", **fields)
    line = train.refuses(*SHORT, f"--init_from={tmp_path / 'hf'}")
    assert naming in line and len(line) < 500


@pytest.mark.parametrize("arch, embedding", [("gpt2", "wte"), ("llama", "embed_tokens")])
def test_a_head_of_its_own_beside_tied_embeddings(arch, embedding, train, tmp_path):
    """One of the two would be lost; the same one stored twice is fine."""
    theirs(arch, tie_word_embeddings=False).save_pretrained(tmp_path / "hf")
    rewrite(tmp_path / "hf", tie_word_embeddings=True)
    line = train.refuses(*SHORT, f"--init_from={tmp_path / 'hf'}")
    assert f"lm_head.weight is not {embedding}.weight" in line and "tie_word_embeddings" in line

    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    [name] = [name for name in tensors if name.endswith(f"{embedding}.weight")]
    save_file(tensors | {"lm_head.weight": tensors[name].clone()}, path)
    model = read(tmp_path / "hf")
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, tensors[name])


@pytest.mark.parametrize("option", ["n_layer=3", "n_head=1", "bias=False", "pos=rope",
                                    "mlp_activation=gelu", "block_size=25", "arch=llama",
                                    "embed_rank=4"])
def test_an_option_that_contradicts_the_folder_is_named(option, train, gpt2, here):
    name, value = option.split("=")
    line = train.refuses(*SHORT, f"--init_from={gpt2}", f"--{option}")
    assert f"with {name} {value}, which is" in line
    is_code = value[0].isdigit() or value == "False"
    (here / "own.py").write_text(f"{name} = {value if is_code else repr(value)}\n")
    line = train.refuses("own.py", *SHORT, f"--init_from={gpt2}")
    assert f"with {name} {value}, which is" in line


def test_what_no_weights_depend_on_may_be_chosen(train, gpt2, here):
    """A temperature, and that there is no convolution."""
    start = [*SHORT, f"--init_from={gpt2}", "--max_iters=0"]
    train(*start, "--conv=0", "--out_dir=plain")
    train(*start, "--attn_temperature=0.01", "--out_dir=cool")
    assert equal(weights(here / "plain", 0), weights(here / "cool", 0))
    losses = [metrics(name)[-1]["val_loss"] for name in ("plain", "cool")]
    assert losses[0] != losses[1]
    out = train("--eval_only", "--out_dir=plain", "--attn_temperature=0.01")
    assert f"val loss {losses[1]:.4f}" in out
    line = train.refuses(*start, "--conv=4", "--out_dir=other")
    assert "conv 4, which is None there" in line


def test_the_published_sizes_come_from_the_hub(train, gpt2, here, monkeypatch):
    import huggingface_hub
    asked = set()

    def download(repo, name):
        asked.add((repo, name))
        return str(gpt2 / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    train(*SHORT, "--init_from=gpt2-medium", "--max_iters=0", "--out_dir=tuned")
    repo = "openai-community/gpt2-medium"
    assert asked == {(repo, "config.json"), (repo, "model.safetensors")}
    assert equal(weights(here / "tuned", 0), checkpoint.model_tensors(read(gpt2)))


def test_without_the_hub_it_is_one_line(home, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = run(home, "train.py", *SHORT, "--init_from=gpt2", f"--out_dir={tmp_path / 'run'}",
               env=offline)
    assert "cannot fetch config.json from the Hugging Face hub" in one_line(done)
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_hub_without_words(train, here, monkeypatch):
    import huggingface_hub

    def fail(repo, name):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert "hub: TimeoutError; connect" in train.refuses(*SHORT, "--init_from=gpt2")


# -- writing ---------------------------------------------------------------------------------------

def save_run(folder, config, tokenizer=None):
    """A run folder with an untrained model, through the real thing."""
    model = redraw(GPT(config))
    trainer = {"iter": 0, "val_loss": None, "best_val_loss": None, "tokens": 0, "seconds": 0.0,
               "wandb_id": None}
    tokenizer = tokenizer or char_tokenizer_of(LETTERS)
    checkpoint.save(folder, checkpoint.model_tensors(model), {}, trainer, asdict(config),
                    tokenizer.to_json(), 1)
    return model


SMALL = dict(vocab_size=28, block_size=24, n_layer=2, n_head=4, n_embd=32)


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """export(run folder) -> the new folder; or the line with which it is refused, with nothing
    written."""
    def export(out_dir, to=tmp_path / "hf"):
        monkeypatch.setattr(sys, "argv", ["export_hf", f"--out_dir={out_dir}", f"--to={to}"])
        before = content(tmp_path)
        try:
            export_hf.main()
        except SystemExit as exit:
            assert exit.code == 2 and content(tmp_path) == before
            line = capsys.readouterr().err
            assert line.startswith("export_hf.py: ") and line.count("\n") == 1
            return line
        return to
    return export


@pytest.mark.parametrize("options", [
    dict(mlp_activation="gelu_tanh"),
    dict(bias=False, head_temperature=0.5, norm_eps=1e-3, ffn_hidden=24),
    dict(tie_head=False, embed_rank=5, ffn_bias=False),
    dict(arch="llama", n_kv_head=2, rope_base=100.0, head_temperature=2.0),
    dict(arch="llama", n_kv_head=1, bias=True, ffn_bias=False, tie_head=True,
         mlp_activation="gelu"),
])
def test_an_exported_run_is_the_same_in_transformers(options, export, tmp_path):
    from transformers import AutoModelForCausalLM
    ours = save_run(tmp_path / "run", GPTConfig(**SMALL, **options))
    folder = export(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    idx = torch.randint(28, (2, 12))
    assert_same_logits(ours, model, idx)
    generated = model.generate(idx, max_new_tokens=10, do_sample=False, pad_token_id=0,
                               attention_mask=torch.ones_like(idx))
    assert torch.equal(generated, ours.generate(idx, 10, temperature=0))
    assert_same_logits(read(folder), model, idx)


def test_gpt2s_tokenizer_goes_with_the_model(export, tmp_path):
    from transformers import AutoTokenizer
    letters = ["l o", "lo w", "e r", "n e", "ne w", "Ġ low", "Ġ t", "Ġt h", "Ġth e", "Ã ©"]
    tokenizer = gpt2_tokenizer("#version: 0.2\n" + "\n".join(letters) + "\n")
    config = GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=8)
    save_run(tmp_path / "run", config, tokenizer)
    folder = export(tmp_path / "run")
    assert (folder / "merges.txt").read_text().splitlines()[1:] == letters
    text = "the low newer\n\nélan, lower  12's <|endoftext"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 266


@pytest.mark.parametrize("options, naming", [
    (dict(mixer="ssa"), "mixer 'ssa'"),
    (dict(mixer="softmax,lln"), "mixer 'softmax,lln'"),
    (dict(mixer="pelican"), "mixer 'pelican'"),
    (dict(pos="rope"), "pos 'rope'"),
    (dict(arch="llama", pos="none"), "pos 'none'"),
    (dict(n_kv_head=2), "n_kv_head 2"),
    (dict(mlp_activation="causal_max"), "mlp_activation 'causal_max'"),
    (dict(mlp_activation="relu"), "mlp_activation 'relu'"),
    (dict(norm="rms"), "norm 'rms'"),
    (dict(arch="llama", norm="none"), "norm 'none'"),
    (dict(conv=4), "conv 4"),
    (dict(attn_temperature=0.5), "attn_temperature 0.5"),
])
def test_what_transformers_cannot_say_is_named(options, naming, export, tmp_path):
    save_run(tmp_path / "run", GPTConfig(**SMALL, **options))
    assert naming in export(tmp_path / "run")


def test_export_writes_over_nothing(export, tmp_path):
    run = tmp_path / "run"
    save_run(run, GPTConfig(**SMALL))
    assert "already exists" in export(run, to=run)
    assert "already exists" in export(run, to="/")
    assert "no checkpoint in" in export(tmp_path / "nowhere")
    assert "cannot write" in export(run, to=run / "checkpoints" / "newest.json" / "hf")
    assert "cannot write" in export(run, to=tmp_path / ("x" * 300))


@pytest.mark.parametrize("target", ["empty", "nowhere"])
def test_export_follows_no_link(target, export, tmp_path):
    save_run(tmp_path / "run", GPTConfig(**SMALL))
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").symlink_to(tmp_path / target)
    assert "is a link" in export(tmp_path / "run")
    assert list((tmp_path / "empty").iterdir()) == []


def test_export_into_an_empty_folder_even_this_one(export, tmp_path, monkeypatch):
    save_run(tmp_path / "run", GPTConfig(**SMALL))
    (tmp_path / "hf").mkdir()
    monkeypatch.chdir(tmp_path / "hf")
    export(tmp_path / "run", to=".")
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == {"run", "hf"}


@pytest.mark.parametrize("call", range(5))
def test_a_half_written_export_never_has_the_name(call, export, tmp_path, monkeypatch):
    """The disk is full, or Ctrl-C comes, while it writes or syncs."""
    save_run(tmp_path / "run", GPTConfig(**SMALL))
    names = ["save_file", "sync", "sync", "sync", "os.replace"]
    target = names[call] if "." in names[call] else f"tools.export_hf.{names[call]}"
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        count = iter(range(5))

        def fail(*arguments, real=export_hf.sync, **keywords):
            if names[call] != "sync" or next(count) == call - 1:
                raise error
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            if isinstance(error, OSError):
                assert "No space left" in export(tmp_path / "run")
            else:
                patch.setattr(sys, "argv", ["export_hf", f"--out_dir={tmp_path / 'run'}",
                                            f"--to={tmp_path / 'hf'}"])
                with pytest.raises(SystemExit) as exit:
                    export_hf.main()
                assert exit.value.code == 130
        assert {p.name for p in tmp_path.iterdir()} == {"run"}
    export(tmp_path / "run")


# -- fine-tuning -----------------------------------------------------------------------------------

def test_ssa_starts_where_the_pretrained_model_is(either, home, here, tmp_path, train):
    """The same loss at step 0, in a process that has the folder alone; sampling needs the run."""
    out = train(*SHORT, f"--init_from={either}", "--max_iters=0", "--out_dir=softmax")
    assert " 0 parameters    0.000 %" in out
    tuned = tmp_path / "ssa"
    done = run(home, "train.py", *SHORT, f"--init_from={either}", "--mixer=ssa", "--max_iters=0",
               f"--out_dir={tuned}")
    assert done.returncode == 0, done.stderr
    # layers x (w_q, w_v, a)
    new = 2 * (16 + 16 + 1) if either.name == "gpt2" else 2 * (32 + 16 + 1)
    total = 0
    for name, tensor in weights(tuned, 0).items():
        if not name.endswith("c_offset"):
            total += tensor.numel()
    assert f" {new} parameters {100 * new / total:8.3f} %" in done.stdout
    assert "only these" not in done.stdout
    difference = metrics(tuned)[-1]["val_loss"] - metrics("softmax")[-1]["val_loss"]
    assert abs(difference) < 1e-5
    done = run(home, "sample.py", f"--out_dir={tuned}", "--start=a", "--max_new_tokens=5",
               "--num_samples=1")
    assert done.returncode == 0


def test_only_the_new_parameters_are_trained_and_resumed_bit_for_bit(gpt2, here, train):
    tuned = [*SHORT, f"--init_from={gpt2}", "--mixer=ssa", "--train_only=mixer_new",
             "--eval_interval=3", "--decay_lr=False"]
    out = train(*tuned, "--max_iters=6", "--out_dir=straight")
    assert "66 parameters" in out and "only these are trained" in out
    source = read(gpt2).state_dict()
    trained = weights(here / "straight", 6)
    start = GPT(replace(pretrained.read_config(gpt2), mixer="ssa")).state_dict()
    new = {name for name in trained if name not in source}
    new_parameters = {name for name in new if not name.endswith("c_offset")}
    assert len(new) == 2 * (3 + 1)
    assert all(torch.equal(trained[name], source[name]) for name in trained.keys() - new)
    assert all(not torch.equal(trained[name], start[name]) for name in new_parameters)

    shutil.copytree("straight", "resumed")
    shutil.rmtree("resumed/checkpoints/00000006")
    train("--resume", "--out_dir=resumed")
    assert equal(weights(here / "resumed", 6), trained)
    moments = load_file("resumed/checkpoints/00000006/optimizer.safetensors")
    assert equal(moments, load_file("straight/checkpoints/00000006/optimizer.safetensors"))
    assert {name.partition(".")[2] for name in moments} == new_parameters
    line = train.refuses("--resume", "--train_only=all", "--max_iters=9", "--out_dir=resumed")
    assert "train_only 'mixer_new'" in line


def test_a_run_from_the_first_step_on_resumes_with_the_same_parameters(gpt2, here, train):
    """Before the first step AdamW has no moments that would tell."""
    tuned = [*SHORT, f"--init_from={gpt2}", "--mixer=ssa", "--train_only=mixer_new",
             "--block_size=12"]
    train(*tuned, "--max_iters=0", "--out_dir=run")
    train("--resume", "--max_iters=2", "--out_dir=run")
    train(*tuned, "--max_iters=2", "--out_dir=straight")
    assert equal(weights(here / "run", 2), weights(here / "straight", 2))
    shutil.rmtree("run/checkpoints")  # as if it had died before its first checkpoint
    train("--resume", "--out_dir=run")
    assert equal(weights(here / "run", 2), weights(here / "straight", 2))


def test_train_only_the_new_ones_of_a_runs_weights(trained, train, here):
    tuned = ["--dataset=letters", "--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16",
             "--block_size=16", "--train_only=mixer_new"]
    train(*tuned, f"--init_from={trained}", "--mixer=ssa", "--max_iters=2", "--out_dir=tuned")
    before = weights(trained, 20)["embed.weight"]
    assert torch.equal(weights(here / "tuned", 2)["embed.weight"], before)
    assert "adds no parameters" in train.refuses(*tuned, f"--init_from={trained}", "--out_dir=none")
    assert "adds no parameters" in train.refuses(*tuned, f"--init_from={here / 'tuned'}",
                                                 "--mixer=ssa", "--out_dir=none")
    assert "--init_from" in train.refuses(*tuned, "--mixer=ssa", "--out_dir=none")


def test_damaged_names_of_trained_parameters(gpt2, here, train):
    train(*SHORT, f"--init_from={gpt2}", "--mixer=ssa", "--train_only=mixer_new", "--max_iters=1",
          "--out_dir=run")
    run = checkpoint.load("run")
    model = checkpoint.build_model(run)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("w"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with pytest.raises(BadInput, match=r"\+exp_avg.blocks.0.mixer.tau.q.w"):
        load_optimizer(model, optimizer, run.optimizer, run.folder)
