"""Commands of ours, one after the other, that end when the process which started them ends, however
that ends.

    python tools/sweep_child.py train configs/shakespeare.py --then tools.score --out_dir=out/x

with a pipe as standard input. Nobody writes to it: it closes when the other end closes it or is
gone, even by kill -9. Then the command gets SIGTERM, upon which train.py saves a checkpoint, and
the next one does not begin. No system call of one operating system alone is needed for it. In one
process, since to start Python and PyTorch takes as long as hundreds of steps of a small model.
"""
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
closed = threading.Event()


def end_with_the_pipe():
    os.read(0, 1)  # returns when the pipe is closed
    closed.set()
    os.kill(os.getpid(), signal.SIGTERM)


def carry_out(words):
    if "--then" in words:
        end = words.index("--then")
        carry_out(words[:end])
        carry_out(words[end + 1:])
    elif not closed.is_set():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the command before may have changed it
        sys.argv[:] = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_pipe, daemon=True).start()
    sys.path[0] = str(ROOT)  # as for a script that lies there
    carry_out(sys.argv[1:])
