"""sample.py: the same seed the same text, through the state; prompts; what it refuses; characters
of several bytes; where the text goes."""
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TINY, one_line, run

from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig
from training import checkpoint

END = "\n---------------\n"


@pytest.fixture(scope="session")
def model(trained):
    """The model and the tokenizer of the shared run."""
    run = checkpoint.load(trained)
    return checkpoint.build_model(run), run.tokenizer


def texts(out):
    """The samples in what was printed."""
    assert out.endswith(END)
    return out.split(END)[:-1]


def likeliest(model, tokens, n, half):
    """n tokens behind `tokens`, each by a pass over everything so far; at block_size only the last
    half is kept."""
    context, new = list(tokens), []
    for _ in range(n):
        if len(context) > model.config.block_size:
            context = context[-half:]
        with torch.no_grad():
            new.append(model(torch.tensor([context]))[0][0, -1].argmax().item())
        context.append(new[-1])
    return new


# -- what comes out --------------------------------------------------------------------------------

def test_a_seed_gives_the_same_samples_and_another_seed_others(sample, trained, home):
    first = sample(f"--out_dir={trained}", "--max_new_tokens=40", "--num_samples=2")
    done = run(home, "sample.py", "--out_dir", trained, "--max_new_tokens=40", "--num_samples=2")
    assert done.returncode == 0 and done.stdout == first
    a, b = texts(first)
    assert a != b and len(a) == len(b) == 1 + 40  # a line break comes first
    other = sample(f"--out_dir={trained}", "--max_new_tokens=40", "--num_samples=2", "--seed=5")
    assert other != first


def test_the_speed_goes_to_standard_error_and_the_text_alone_to_standard_output(sample, trained):
    out = sample(f"--out_dir={trained}", "--max_new_tokens=7", "--num_samples=3", "--start=abc")
    assert re.fullmatch(r"21 tokens in [\d.]+ s: [\d,]+ tokens/s\n", sample.err)
    assert len(texts(out)) == 3 and "tokens" not in out
    assert all(text.startswith("abc") and len(text) == 10 for text in texts(out))


def test_temperature_0_takes_the_likeliest_and_so_does_top_1(sample, trained, model):
    model, tokenizer = model
    expected = "ab " + tokenizer.decode(likeliest(model, tokenizer.encode("ab "), 13, 8))
    for argument in ("--temperature=0", "--top_k=1"):
        out = sample(f"--out_dir={trained}", "--start=ab ", argument, "--max_new_tokens=13")
        assert texts(out) == [expected] * 3


def test_past_block_size_the_last_half_block_is_read_again(sample, trained, model):
    model, tokenizer = model
    expected = tokenizer.decode(likeliest(model, tokenizer.encode("abc"), 60, 8))
    out = sample(f"--out_dir={trained}", "--start=abc", "--temperature=0", "--max_new_tokens=60",
                 "--num_samples=1")
    assert texts(out) == ["abc" + expected]


def test_a_prompt_longer_than_the_block(sample, trained, here):
    prompt = "a quick brown fox jumps over the lazy dog\n" * 3
    (here / "prompt.txt").write_text(prompt)
    [text] = texts(sample(f"--out_dir={trained}", "--start=FILE:prompt.txt", "--max_new_tokens=20",
                          "--num_samples=1"))
    assert text.startswith(prompt) and len(text) == len(prompt) + 20


@pytest.mark.parametrize("k", [2, 5])
def test_top_k_draws_among_the_k_likeliest_only(sample, trained, model, k):
    model, tokenizer = model
    ranks = set()
    out = sample(f"--out_dir={trained}", "--start=ab", f"--top_k={k}", "--temperature=5",
                 "--max_new_tokens=14", "--num_samples=8")
    for text in texts(out):
        tokens = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            order = model(tokens)[0][0].argsort(-1, descending=True)
        ranks |= {order[t - 1].tolist().index(tokens[0, t]) for t in range(2, 16)}
    assert ranks == set(range(k))
    all_of_them = sample(f"--out_dir={trained}", "--top_k=1000", "--max_new_tokens=20")
    assert all_of_them == sample(f"--out_dir={trained}", "--max_new_tokens=20")


def test_a_high_temperature_flattens_and_a_low_one_sharpens(sample, trained):
    def draw(temperature):
        out = sample(f"--out_dir={trained}", f"--temperature={temperature}", "--max_new_tokens=100")
        return "".join(texts(out))

    assert len(set(draw(1e6))) > 20 > len(set(draw(0.02)))


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-300, 1e30])
def test_an_extreme_temperature_is_no_error(sample, trained, temperature):
    arguments = [f"--out_dir={trained}", "--start=ab", "--max_new_tokens=10"]
    out = sample(*arguments, f"--temperature={temperature}")
    if temperature < 1:
        assert out == sample(*arguments, "--temperature=0")


def test_a_prompt_may_come_from_a_file(sample, trained, here):
    (here / "prompt.txt").write_text("abc def\n")
    arguments = [f"--out_dir={trained}", "--max_new_tokens=10"]
    from_file = sample(*arguments, "--start=FILE:prompt.txt")
    assert from_file == sample(*arguments, "--start", "abc def\n")


def test_the_best_and_a_named_checkpoint(sample, trained):
    def draw(*more):
        return sample(f"--out_dir={trained}", "--max_new_tokens=30", *more)

    newest = draw()
    assert newest == draw("--checkpoint=best") == draw("--checkpoint=00000020")
    assert newest != draw("--checkpoint=00000010")


def test_a_run_needs_neither_its_data_nor_its_place(trained, tmp_path, clone):
    """In a clone without any data set, from a copy of one checkpoint folder alone."""
    for path in (clone / "data").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    shutil.copytree(trained / "checkpoints/00000020", tmp_path / "elsewhere/checkpoints/00000020")
    done = run(clone, "sample.py", "--out_dir", tmp_path / "elsewhere", "--max_new_tokens=30",
               "--num_samples=1")
    assert done.returncode == 0 and len(texts(done.stdout)[0]) == 31, done


def test_llama_goes_on_past_its_block_size(train, sample, here):
    train(*TINY, "--arch=llama", "--max_iters=5", "--out_dir=run")
    loaded = checkpoint.load(here / "run")
    model = checkpoint.build_model(loaded)
    tokenizer = loaded.tokenizer
    tokens = tokenizer.encode("ab")
    for _ in range(40):
        with torch.no_grad():
            logits, _ = model.step(torch.tensor([tokens]))
        tokens.append(logits[0, -1].argmax().item())
    out = sample("--out_dir=run", "--start=ab", "--temperature=0", "--max_new_tokens=40",
                 "--num_samples=1")
    assert texts(out) == [tokenizer.decode(tokens)]


def test_characters_of_several_bytes_stream_whole(train, sample, here, home, tmp_path, monkeypatch):
    """A byte-level tokenizer of GPT-2's kind without merges: each of these characters is two to
    four tokens."""
    import data.dataset
    from data.files import write_text_dataset
    from data.tokenizer import gpt2_tokenizer
    monkeypatch.setattr(data.dataset, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    write_text_dataset(tmp_path / "data/bytes", "é€😀" * 500, gpt2_tokenizer("#version: 0.2\n"),
                       "0" * 64, "data.text")
    train(*TINY, "--dataset=bytes", "--n_embd=32", "--max_iters=150", "--out_dir=run")
    arguments = ["sample.py", f"--out_dir={here / 'run'}", "--start=é", "--temperature=0",
                 "--num_samples=1"]
    done = run(home, *arguments, "--max_new_tokens=34")
    assert done.stdout.startswith("é€😀é€😀é€😀é") and "\ufffd" not in done.stdout, done
    wire = subprocess.Popen([sys.executable, *arguments, "--max_new_tokens=4000"], cwd=home,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # what is there before the end: it streams, and in whole characters
    first = os.read(wire.stdout.fileno(), 100)
    assert first.decode().startswith("é") and wire.poll() is None
    wire.stdout.close()  # like head, which has seen enough
    assert b"Traceback" not in wire.communicate()[1]


# -- bad input -------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, naming", [
    (["--start=Abc!"], ["'A'", "'!'"]),
    (["--start=é\n"], ["'é'"]),
    (["--start="], ["--start", "empty"]),
    (["--start=FILE:nowhere.txt"], ["nowhere.txt"]),
    (["--start=FILE:."], ["FILE:."]),
    (["--start=FILE:empty.txt"], ["empty"]),
    (["--start=FILE:binary"], ["binary", "UTF-8"]),
    (["--checkpoint=00000015"], ["00000015", "00000010", "00000020"]),
    (["--num_samples=0"], ["num_samples"]),
    (["--max_new_tokens=-1"], ["max_new_tokens"]),
    (["--temperature=-1"], ["temperature"]),
    (["--top_k=0"], ["top_k"]),
    (["--temperatur=1"], ["--temperatur", "--temperature"]),
    (["--device=nope"], ["nope"]),
    (["--seed=x"], ["seed"]),
    (["stray"], ["stray"]),
])
def test_bad_input_is_named_in_one_line(sample, trained, here, argv, naming):
    (here / "empty.txt").write_text("")
    (here / "binary").write_bytes(b"\xff\xfe\x00")
    line = sample.refuses(f"--out_dir={trained}", *argv)
    assert all(name in line for name in naming), line


def test_a_run_that_is_not_there(sample, here):
    assert "--out_dir" in sample.refuses()
    assert "out/nowhere" in sample.refuses("--out_dir=out/nowhere")
    (here / "empty").mkdir()
    assert "empty" in sample.refuses("--out_dir=empty")


def test_a_damaged_newest_checkpoint_names_the_whole_ones(home, run_folder, sample):
    (run_folder / "checkpoints/00000020/model.safetensors").write_bytes(b"gone")
    line = one_line(run(home, "sample.py", "--out_dir", run_folder))
    assert "00000020" in line and "model.safetensors" in line and "whole: 00000010" in line
    assert sample("--out_dir", run_folder, "--checkpoint=00000010", "--max_new_tokens=5")


def test_weights_that_are_not_finite_are_named(sample, trained, tmp_path):
    name = "blocks.0.mlp.c_fc.weight"
    for value, naming in [(float("nan"), f"{name} have values that are not finite"),
                          (3e38, "logits are not finite")]:
        run = checkpoint.load(trained)
        run.model[name].fill_(value)
        folder = tmp_path / str(value)
        save(folder, run.model, run.config, run.tokenizer)
        for temperature in (0, 1):
            line = sample.refuses(f"--out_dir={folder}", f"--temperature={temperature}")
            assert naming in line and str(folder) in line


@pytest.mark.parametrize("changed, naming", [
    ({"n_layer": 9999}, "parameters or more"),
    ({"n_embd": 2**20}, "parameters or more"),
    ({"n_embd": 2**62}, "n_embd"),
    ({"ffn_hidden": 10**30}, "ffn_hidden"),
    ({"n_layer": "1"}, "n_layer"),
    ({"n_layer": None}, "n_layer"),
    ({"block_size": [16]}, "block_size"),
    ({"block_size": 15}, "pos_embed.weight"),
    ({"norm_eps": 1e400}, "config.json"),
    ({"mixer": "\x1b[31m"}, "\\x1b[31m"),
    ({"mixer": {}}, "mixer"),
    ({"vocab_size": 10**30}, "vocab_size"),
    ({"dropout": "x" * 10**5}, "dropout"),
])
def test_a_config_with_hostile_values(sample, trained, tmp_path, changed, naming):
    """With the checksums that belong to it."""
    run = checkpoint.load(trained)
    save(tmp_path / "run", run.model, run.config | changed, run.tokenizer)
    line = sample.refuses(f"--out_dir={tmp_path / 'run'}")
    assert naming in line and len(line) < 1000


@pytest.mark.parametrize("name", ["config.json", "trainer.json", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 10**5, b'{"a": NaN}', b"{}"])
def test_a_damaged_file_of_a_checkpoint(sample, run_folder, name, content):
    shutil.rmtree(run_folder / "checkpoints/00000010")
    folder = run_folder / "checkpoints/00000020"
    (folder / name).write_bytes(content)
    if name != "manifest.json":
        sums = {file: checkpoint.sha256(folder / file) for file in checkpoint.FILES}
        (folder / "manifest.json").write_text(json.dumps(sums))
    line = sample.refuses(f"--out_dir={run_folder}")
    assert name in line or (name == "manifest.json" and "is not the file that was saved" in line)


# -- where the text goes ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose alphabet has control characters and others that ASCII lacks; untrained."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    tokenizer = CharTokenizer("a\x1b[1\n\té\x07\u202e")
    config = {"vocab_size": tokenizer.vocab_size, "n_layer": 1, "n_head": 1, "n_embd": 8}
    model = GPT(GPTConfig(**config))
    save(folder, checkpoint.model_tensors(model), config, tokenizer)
    return folder


def save(folder, tensors, config, tokenizer):
    trainer = {"iter": 0, "val_loss": None, "best_val_loss": None, "tokens": 0, "seconds": 0.0,
               "wandb_id": None, "trained": None}
    checkpoint.save(folder, tensors, {}, trainer, config, tokenizer.to_json(), 1)


PROMPT = "a\x1b[1\n\té\x07\u202e"


def sample_hostile(home, folder, **options):
    """sample.py on that run, as a process."""
    command = [sys.executable, "sample.py", f"--out_dir={folder}", f"--start={PROMPT}",
               "--max_new_tokens=1", "--num_samples=1"]
    return subprocess.run(command, cwd=home, timeout=60, check=False, stderr=subprocess.PIPE,
                          **options)


def test_a_terminal_is_shown_control_characters(home, hostile):
    ours, theirs = pty.openpty()
    try:
        done = sample_hostile(home, hostile, stdout=theirs)
        shown = os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0
    assert shown.startswith("a\\x1b[1\r\n\té\\x07\\u202e".encode())  # \r: the terminal's own


def test_a_pipe_and_a_file_have_the_text_as_it_is(home, hostile, tmp_path):
    done = sample_hostile(home, hostile, stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout.startswith(PROMPT.encode())
    with open(tmp_path / "text", "wb") as file:
        sample_hostile(home, hostile, stdout=file)
    assert (tmp_path / "text").read_bytes() == done.stdout


def test_what_the_output_cannot_encode_is_replaced(home, hostile):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = sample_hostile(home, hostile, stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert done.stdout.startswith(b"a\x1b[1\n\t\\xe9\x07\\u202e")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_is_one_line(home, hostile):
    with open("/dev/full", "wb") as full:
        done = sample_hostile(home, hostile, stdout=full)
    assert done.returncode == 2
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("sample.py: cannot write to standard output: No space left")


def test_more_tokens_than_anyone_waits_for(home, hostile):
    command = [sys.executable, "sample.py", f"--out_dir={hostile}", "--max_new_tokens=2147483647"]
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(process.stdout.read(2000)) == 2000
    process.stdout.close()
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == 1
