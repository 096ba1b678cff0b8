"""How a command ends: in one line, whatever the terminal, the output and the moment are like."""
import importlib
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_line, run

from base.errors import BadInput

SCRIPTS = [
    ["train.py"], ["sample.py"], ["bench.py"], ["data/cosmopedia/prepare.py"],
    ["data/shakespeare/prepare.py"], ["-m", "data.text"], ["-m", "tools.audit"],
    ["-m", "tools.compare"],
    ["-m", "tools.export_hf"], ["-m", "tools.inspect_attention"], ["-m", "tools.pelican_figure"],
    ["-m", "tools.score"], ["-m", "tools.sweep"],
]


def script(tmp_path, body):
    """A script of its own whose main() is guarded like ours."""
    path = tmp_path / "script.py"
    path.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from base.errors import BadInput, exit_on_bad_input\n"
        "@exit_on_bad_input('script.py')\n"
        "def main():\n"
        f"    {body}\n"
        "main()\n")
    return path


@pytest.mark.parametrize("error, words", [
    ("MemoryError()", "out of memory (MemoryError)"),
    ("MemoryError('cannot allocate 8 GiB\\nfor it')", "out of memory (cannot allocate 8 GiB)"),
    ("RuntimeError('DefaultCPUAllocator: not enough memory: you tried')", "out of memory (Def"),
    ("RuntimeError('Storage size calculation overflowed with sizes=[9]')", "overflowed"),
    ("BadInput('a\\nb\\x1b[2Jc')", "script.py: a b\\x1b[2Jc"),
    ("BadInput(chr(0xdcff))", "script.py: \\udcff"),
    ("BadInput('\\u202e')", "script.py: \\u202e"),
])
def test_an_error_is_one_line(error, words, tmp_path):
    line = one_line(run(tmp_path, script(tmp_path, f"raise {error}")))
    assert words.lower() in line.lower() and line.startswith("script.py: ")


def test_an_error_of_ours_keeps_its_traceback(tmp_path):
    for error in ("RuntimeError('shapes')", "OSError(5, 'x')", "ValueError('y')"):
        done = run(tmp_path, script(tmp_path, f"raise {error}"))
        assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_terminal_that_knows_ascii_only(tmp_path):
    done = run(tmp_path, script(tmp_path, "print('caf\\xe9 \\u65e5')"),
               env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\u65e5\n", "")
    line = one_line(run(tmp_path, script(tmp_path, "raise BadInput('caf\\xe9')"),
                        env={"PYTHONIOENCODING": "ascii"}))
    assert line == "script.py: caf\\xe9"


@pytest.mark.parametrize("buffering", ["", "1"])
@pytest.mark.parametrize("body", [
    "print('lost')",                               # when the process ends
    "print('x' * 100000)",                         # while it runs
    "try:\n        print(1, flush=True)\n"       # taken for another's
    "    except OSError as error:\n        raise BadInput('out/x: no space') from error",
])
def test_an_output_that_takes_no_more(body, buffering, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, script(tmp_path, body)], stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=60, check=False,
                              env={**os.environ, "PYTHONUNBUFFERED": buffering})
    assert done.stderr == ("script.py: cannot write to standard output: "
                           "No space left on device\n")
    assert done.returncode == 2


@pytest.mark.parametrize("body", [
    "[print('line', flush=True) for _ in range(100000)]",
    "print('once', flush=True); sys.stdin.read(); print('only written at the end')",
])
def test_a_reader_that_has_seen_enough(body, tmp_path):
    process = subprocess.Popen([sys.executable, script(tmp_path, body)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": ""})
    process.stdout.readline()
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def stubs(folder, *names):
    """Modules of these names that say that they are being imported, and never finish."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text(
            "import pathlib, time\n"
            f"pathlib.Path({str(folder / 'importing')!r}).touch()\n"
            "time.sleep(60)\n")


@pytest.mark.parametrize("command", SCRIPTS, ids=lambda command: command[-1])
def test_ctrl_c_during_the_imports_ends_quietly(command, tmp_path):
    folder = tmp_path / "stubs"
    stubs(folder, "numpy", "torch", "pydantic")
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(folder)})
    until = time.monotonic() + 60
    while not (folder / "importing").exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("", "")
    assert process.returncode == -signal.SIGINT  # a shell says 130


def test_ctrl_c_in_main_is_one_line(tmp_path):
    body = "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(60)"
    done = run(tmp_path, script(tmp_path, body))
    assert (done.returncode, done.stderr) == (130, "script.py: interrupted\n")


def test_what_is_no_utf_8_on_the_command_line(tmp_path, train):
    done = subprocess.run([sys.executable, ROOT / "train.py", b"--out_dir=\xff"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120, check=False)
    assert one_line(done).startswith("train.py: --out_dir holds bytes that are no UTF-8")
    for argument in (b"\xff.py", b"--\xff=1", b"--mixer_file=\xff"):
        assert "holds bytes that are no UTF-8" in train.refuses(os.fsdecode(argument))


LONG = "x" * 300  # no name of a file may be so long
TINY_RUN = ["--dataset=letters", "--device=cpu"]


@pytest.mark.parametrize("module, arguments", [
    ("train", [f"--out_dir={LONG}", *TINY_RUN]),
    ("train", [f"--mixer_file={LONG}", *TINY_RUN]),
    ("train", [LONG, *TINY_RUN]),
    ("train", ["--resume", f"--out_dir={LONG}", *TINY_RUN]),
    ("train", [f"--init_from={LONG}", *TINY_RUN]),
    ("sample", [f"--out_dir={LONG}"]),
    ("bench", [f"--mixer_file={LONG}"]),
    ("tools.audit", [f"--out_dir={LONG}"]),
    ("tools.compare", [LONG]),
    ("tools.export_hf", [f"--out_dir={LONG}", "--to=there"]),
    ("tools.export_hf", ["--out_dir=here", f"--to={LONG}"]),
    ("tools.inspect_attention", [f"--out_dir={LONG}"]),
    ("tools.score", [f"--out_dir={LONG}"]),
    ("tools.audit", [f"--mixer_file={LONG}", "--mixer=softmax"]),
    ("data.text", [f"--input={LONG}", "--name=mine"]),
])
def test_a_name_too_long_for_a_file(module, arguments, here, monkeypatch, capsys):
    main = importlib.import_module(module).main
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises((SystemExit, BadInput)) as error:  # the guard around data.text is outside
        main()
    if error.type is SystemExit:
        assert error.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("arguments", [["pipe.py"], ["--mixer_file=pipe.py"]])
def test_a_pipe_in_place_of_a_file_does_not_hang(arguments, train):
    os.mkfifo("pipe.py")
    assert "pipe.py does not exist, or is no file" in train.refuses(*arguments, *TINY_RUN)
