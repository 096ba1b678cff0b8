"""A command of ours that ends when the process which started it ends, however that ends.

    python tools/sweep_child.py train configs/shakespeare.py      with a pipe as standard input

Nobody writes to the pipe: it closes when the other end's process is gone, even by kill -9. Then
the command gets SIGTERM, upon which train.py saves a checkpoint. No system call of one operating
system alone is needed for it.
"""
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def end_with_the_pipe():
    os.read(0, 1)  # returns when the pipe is closed
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_pipe, daemon=True).start()
    sys.path[0] = str(ROOT)  # as for a script that lies there
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
