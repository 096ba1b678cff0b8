"""Tokenizers: bytes, BPE made from a text, a tokenizer.json of Hugging Face's, received ones that
never end or lose text, and one command that prepares a text with each."""
import json
import random
import sys

import numpy as np
import pytest
from conftest import metrics

from base.errors import BadInput
from data import files, text, tokenizer
from data.named_tokenizer import pretrained_tokenizer, tokenizer_named
from data.tokenizer import (ByteTokenizer, bpe_of_file, load_tokenizer, received_tokenizer,
                            same_tokens, train_bpe)

PIECES = ["the other", " other", "née", " 漢字", "\n\n", "  ", "\t", "don't", "12", "🙂", "<|",
          "end", "<|endoftext|>", "é", "ﬁ", "\r\n"]


def some_text(n, seed=1):
    draw = random.Random(seed)
    return "".join(draw.choices(PIECES, k=n))


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([some_text(3000)], 300)


def encode_slowly(tokens, merges, word):
    """The ids of a word: again and again the earliest merge, wherever it applies."""
    parts = [bytes([b]) for b in word.encode()]
    for left, right in merges:
        i = 0
        while i + 1 < len(parts):
            if (parts[i], parts[i + 1]) == (left, right):
                parts[i:i + 2] = [left + right]
            i += 1
    return [tokens.index(part) for part in parts]


# -- encoding --------------------------------------------------------------------------------------

def test_bpe_against_a_slow_one(bpe):
    byte_of = {character: byte for byte, character in tokenizer.printable_bytes().items()}
    merges = []
    for merge in bpe.file["model"]["merges"]:
        merges.append(tuple(bytes(byte_of[c] for c in part) for part in merge))
    assert bpe.vocab_size == 300 and len(merges) == 300 - 257
    words = [" other", "the", " don", "née", "漢字", "🙂", "other"]
    documents = bpe.encode_documents(words)
    assert len(documents[0]) == 1
    for word, ids in zip(words, documents):
        assert ids.tolist() == encode_slowly(bpe.tokens, merges, word), word


def test_every_text_comes_back(bpe):
    texts = [some_text(50, seed) for seed in range(20)] + ["", "\ufeff", "<|endoftext|>"]
    for name, ids in zip(texts, bpe.encode_documents(texts)):
        assert bpe.decode(ids.tolist()) == name
        assert ids.dtype == np.uint32 and bpe.special_tokens["<|endoftext|>"] not in ids
    assert bpe.encode(texts[0]) == bpe.encode_documents(texts[:1])[0].tolist()
    by_byte = ByteTokenizer()
    assert by_byte.encode("né") == by_byte.encode_to_numpy("né").tolist() == [110, 195, 169]
    assert by_byte.decode([110, 195, 169]) == "né" and by_byte.decode([195]) == "\ufffd"


def test_the_same_text_makes_the_same_bpe(bpe):
    assert train_bpe([some_text(3000)], 300).to_json() == bpe.to_json()


def test_they_are_read_back(bpe, tmp_path):
    for one in (bpe, ByteTokenizer()):
        (tmp_path / "tokenizer.json").write_text(one.to_json())
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert again.to_json() == one.to_json() and again.name == one.name
        assert same_tokens(again, one)
        assert again.encode("the other née") == one.encode("the other née")
    assert not same_tokens(bpe, ByteTokenizer())


# -- received ones ---------------------------------------------------------------------------------

def changed(bpe, **parts):
    return json.loads(json.dumps(bpe.file)) | parts


def split_by(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": False}


@pytest.mark.parametrize("n, seconds, naming", [
    (17, 0, "is not done with 36,001 bytes of text after 2 s; its pattern may never end"),
    (60, 60, "fails: .*retry-limit"),  # the library's own limit, of a single match
])
def test_a_pattern_that_never_ends_is_stopped(n, seconds, naming, bpe, monkeypatch):
    """2^n ways to read n a's, all tried in vain before each d."""
    monkeypatch.setattr(tokenizer, "ENCODE_SECONDS", seconds)
    content = ("a" * n + "d") * 2000 + "b"
    endless = bpe_of_file(changed(bpe, pre_tokenizer=split_by("(a|a)*[bc]")), "x", "y")
    with pytest.raises(BadInput, match=naming):
        endless.encode(content)


def test_a_process_that_does_not_end_is_ended(bpe, monkeypatch, tmp_path):
    sleeper = tmp_path / "encode.py"
    sleeper.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(tokenizer, "ENCODE", sleeper)
    monkeypatch.setattr(tokenizer, "ENCODE_SECONDS", 0.2)
    with pytest.raises(BadInput, match="is not done with 1 bytes of text after 0 s"):
        bpe.encode("a")


def test_a_tokenizer_that_wants_too_much_memory(bpe):
    """A character becomes 10^10 of them."""
    step = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 100}
    grown = changed(bpe, normalizer={"type": "Sequence", "normalizers": [step] * 5})
    with pytest.raises(BadInput, match="the tokenizer fails"):
        bpe_of_file(grown, "x", "y").encode("x")


@pytest.mark.parametrize("parts, naming", [
    (dict(normalizer={"type": "Lowercase"}), "does not give its text back"),
    (dict(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 9}),
     "does not give its text back"),
    (dict(pre_tokenizer=None), "does not give its text back"),
    (dict(pre_tokenizer={"type": "Unheard of"}), "the tokenizer fails"),
    (dict(pre_tokenizer=split_by("(")), "the tokenizer fails"),
])
def test_tokenizers_that_lose_text_or_fail(parts, naming, bpe):
    with pytest.raises(BadInput, match=naming):
        bpe_of_file(changed(bpe, **parts), "x", "y").encode("The  Other née")


MODEL = dict(type="BPE", vocab={"a": 0, "b": 1}, merges=[])
BYTE_LEVEL = {"type": "ByteLevel"}


@pytest.mark.parametrize("content, naming", [
    ([], "no JSON object"),
    ({}, "model: Field required"),
    (dict(model=MODEL), "decoder: Field required"),
    (dict(model=MODEL, decoder={"type": "Metaspace"}), "decoder.type: Input should be 'ByteLevel'"),
    (dict(model=MODEL | dict(type="WordPiece"), decoder=BYTE_LEVEL), "model.type: Input should"),
    (dict(model=MODEL | dict(vocab={"a": 0, "b": 2}), decoder=BYTE_LEVEL), "are not 0 to 1"),
    (dict(model=MODEL | dict(vocab={"a": -1}), decoder=BYTE_LEVEL), "greater than or equal to 0"),
    (dict(model=MODEL | dict(vocab={"a": 10**30}), decoder=BYTE_LEVEL), "model.vocab.a"),
    (dict(model=MODEL | dict(vocab={"漢": 0}), decoder=BYTE_LEVEL), "'漢' is no bytes"),
    (dict(model=MODEL | dict(vocab={"": 0}), decoder=BYTE_LEVEL), "'' is no bytes"),
    (dict(model=MODEL, decoder=BYTE_LEVEL, added_tokens=[dict(id=1, content="")]), "at least 1"),
    (dict(model=MODEL, decoder=BYTE_LEVEL, added_tokens=[dict(id=0, content="c")]), "are not 0"),
    (dict(model=MODEL | dict(merges=[["a", "c"]]), decoder=BYTE_LEVEL), "the tokenizer fails"),
    (dict(model=MODEL | dict(merges=3), decoder=BYTE_LEVEL), "the tokenizer fails"),
])
def test_files_that_are_no_byte_level_bpe(content, naming, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="tokenizer.json") as error:
        received_tokenizer(path)
    assert naming in str(error.value) and "\n" not in str(error.value)


# -- one command -----------------------------------------------------------------------------------

@pytest.fixture
def prepare(here, monkeypatch):
    """prepare(text, *options) writes data/mine; its meta.json."""
    folder = here / "data"
    folder.mkdir()
    for module in (files, text):
        monkeypatch.setattr(module, "DATA", folder)
    monkeypatch.setattr("data.dataset.DATA", folder)

    def prepare(content, *options):
        (here / "my.txt").write_text(content, newline="")
        monkeypatch.setattr(sys, "argv", ["text", "--input=my.txt", "--name=mine", *options])
        text.main()
        return json.loads((folder / "mine" / "meta.json").read_text())
    return prepare


@pytest.mark.parametrize("name, size", [("bytes", 256), ("bpe", 280), ("file", 300)])
def test_a_text_in_each(name, size, prepare, bpe, here, train, sample):
    whole = some_text(1500)
    options = {"bpe": ["--tokenizer=bpe", "--vocab_size=280"], "bytes": ["--tokenizer=bytes"],
               "file": ["--tokenizer=tokenizer.json"]}
    (here / "tokenizer.json").write_text(json.dumps(bpe.file))
    meta = prepare(whole, *options[name])
    assert meta["vocab_size"] == size and meta["tokenizer"] == ("bytes" if name == "bytes"
                                                                else "bpe")
    assert meta["train_bytes"] + meta["val_bytes"] == len(whole.encode())
    again = load_tokenizer(here / "data" / "mine" / "tokenizer.json")
    ids = np.fromfile(here / "data" / "mine" / "val.bin", "<u2")
    assert again.decode(ids.tolist()) == whole[int(len(whole) * 0.9):]
    train("--dataset=mine", "--n_layer=1", "--n_embd=8", "--n_head=1", "--block_size=8",
          "--max_iters=1", "--device=cpu", "--out_dir=run")
    nats, bpb = metrics("run")[-1]["val_loss"], metrics("run")[-1]["val_bpb"]
    per_byte = meta["val_tokens"] / meta["val_bytes"]
    assert bpb == pytest.approx(nats / np.log(2) * per_byte)
    assert sample("--out_dir=run", "--num_samples=1", "--max_new_tokens=2", "--start=née")


def test_bpe_is_made_from_the_training_part_alone(prepare, here):
    """What only the validation part has is no token."""
    whole = "abcdefgh " * 900 + "zyxwvuts " * 100
    prepare(whole, "--tokenizer=bpe", "--vocab_size=300")
    made = load_tokenizer(here / "data" / "mine" / "tokenizer.json")
    assert b" abcdefgh" in made.tokens and not any(b"zy" in token for token in made.tokens)


@pytest.mark.parametrize("name, size, naming", [
    ("bpe", 256, "--vocab_size=256: give a number from 257"),
    ("bpe", 2**30, "to 1,048,576"),
    ("char", 300, "goes with --tokenizer=bpe"),
    ("bytes", 300, "goes with --tokenizer=bpe"),
    ("bpee", None, "--tokenizer=bpee: no such tokenizer and no file with one"),
    ("", None, "no such tokenizer"),
    ("x" * 5000, None, "no such tokenizer"),
])
def test_options_that_cannot_be(name, size, naming, prepare, here):
    options = [f"--tokenizer={name}"] + ([f"--vocab_size={size}"] if size else [])
    with pytest.raises(BadInput, match=naming):
        prepare("text", *options)
    assert not (here / "data" / "mine").exists()


def test_a_folder_with_a_tokenizer(bpe, tmp_path):
    assert pretrained_tokenizer(str(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe.file))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert tokenizer_named(str(name), None, []).to_json() == bpe.to_json()
