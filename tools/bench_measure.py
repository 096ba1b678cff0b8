"""The measuring of bench.py: one cell (mixer, mode, batch, length), in a process of its own.

    figures = run_cell(cell, mixer_file=None, seconds=1.0, cell_seconds=120.0)

cell: {"mode": "train", "prefill", "decode" or "ceiling", "batch", "length", "model": a GPTConfig's
options, "device", "dtype", "compile"}. figures: {"status": "ok", "ms": ..., ...}, or what came
instead: {"status": "oom"}, {"status": "timeout"}, {"status": "error", "error": in one line}.

B batch, T length.
"""
import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn as nn

from base.errors import is_out_of_memory
from config import Options
from mixers import load_mixer_file
from mixers.parts.products import always_fast_products
from model import GPT, GPTConfig
from train import backward
from training.compiled import compiled_step
from training.device import PackedLinear, choose_device, ready_to_decode, rows_per_pass
from training.machine import Machine
from training.optimizer import make_optimizer
from training.parallel import World

PIECE = 2048         # tokens of a prefix fed at once, over all sequences
DECODED = 32         # tokens after a prefix, at most: so few that the length stays what it is
CEILING_ROWS = 8192  # more rows make a matrix product no faster
READ_BYTES = 2**22   # fewer are read so fast that the call itself would be measured


def run_cell(cell, mixer_file, seconds, cell_seconds):
    """The figures of a cell, measured for about `seconds` by a new process that may live for
    cell_seconds."""
    context = multiprocessing.get_context("forkserver")  # it has only imported: forks start at once
    # dynamo: what an optimiser's first step imports
    context.set_forkserver_preload(["torch", "torch._dynamo", "pydantic"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send_figures, args=(cell, mixer_file, seconds, theirs))
    # inherited: Ctrl-C is for us, who then end the other; where another of our threads is sent it,
    # it waits until the server of forks knows all that it must
    interrupted = []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process.start()
    signal.signal(signal.SIGINT, handler)
    theirs.close()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if interrupted:
            raise KeyboardInterrupt
        if not ours.poll(cell_seconds):
            return {"status": "timeout"}
        figures = ours.recv()
        process.join(5)
        return figures
    except EOFError:  # it ended without a word
        process.join()
        if process.exitcode == -signal.SIGKILL:  # for want of memory
            return {"status": "oom"}
        return {"status": "error", "error": f"its process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def send_figures(cell, mixer_file, seconds, connection):
    """What the new process does. A mixer that fails, a user's own say, is a cell that failed."""
    limit_memory(cell["device"])
    try:
        if mixer_file:
            load_mixer_file(mixer_file)
        found = {"status": "ok", **figures(cell, seconds)}
    except Exception as error:
        if is_out_of_memory(error) or "size calculation overflowed" in str(error):
            found = {"status": "oom"}
        else:
            found = {"status": "error", "error": in_one_line(error)}
    connection.send(found)


def in_one_line(error):
    """What happened, and the last place that is not in a library."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    places = [frame for frame in traceback.extract_tb(error.__traceback__)
              if "site-packages" not in frame.filename]
    return f"{words} ({places[-1].filename}:{places[-1].lineno})"


def figures(cell, seconds):
    """The figures of a cell, measured in this process for about `seconds` (dict)."""
    mode, batch, length = cell["mode"], cell["batch"], cell["length"]
    training = mode == "train"
    device = choose_device(cell["device"])
    if training and device.type == "cpu":
        always_fast_products()  # as train.py
    dtype = getattr(torch, cell["dtype"])
    config = GPTConfig(**cell["model"])
    torch.manual_seed(0)
    model = GPT(config).to(device).train(training)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    if mode == "ceiling":
        ceiling = matmul_ceiling(model, CEILING_ROWS, dtype, device, True, seconds)
        return {"ceiling_flops_per_s": ceiling}
    tokens = torch.randint(config.vocab_size, (batch, length + 1), device=device)
    first = flops = ceiling = read = read_rate = None
    if mode == "decode":
        one_token = compiled_step(model, dtype, batch) if cell["compile"] else model.step
        ready_to_decode(model, dtype)
        read = bytes_read(model, batch, length, dtype)
        read_rate = read and reading_ceiling(read, device, seconds / 4)
        with torch.inference_mode(), autocast():
            times, first, memory = decode(
                model, one_token, tokens[:, :length], seconds, device)
    else:
        rows = min(batch * length, CEILING_ROWS)
        ceiling = matmul_ceiling(model, rows, dtype, device, training, seconds / 4)
        flops = model.flops_per_token(length)
        make_step = training_step if training else prefill_step
        step = make_step(model, tokens, autocast, cell["compile"], device)
        timed(step, device, seconds / 4, at_least=1)
        times = timed(step, device, seconds)
        memory = memory_of(step, device, held(device))
    ms = [1e3 * t for t in times]
    return {
        "ms": median(ms),
        "ms_quantiles": quantiles(ms, n=20, method="inclusive"),  # of 5, 10, ..., 95 %
        "repeats": len(times),
        "first_token_ms": first and 1e3 * first,
        **memory,
        "state_bytes": model.state_bytes(length, dtype),
        "flops_per_token": flops and flops * (3 if training else 1),
        "ceiling_flops_per_s": ceiling,
        "read_bytes_per_token": read and read / batch,
        "ceiling_bytes_per_s": read_rate,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


# Time ---------------------------------------------------------------------------------------------

def timed(function, device, seconds, at_least=3, at_most=1000):
    """Seconds of each of several calls, which go on for about `seconds`."""
    times = []
    end = time.perf_counter() + seconds
    while len(times) < at_least or (len(times) < at_most and time.perf_counter() < end):
        started = time.perf_counter()
        function()
        torch.get_device_module(device).synchronize()
        times.append(time.perf_counter() - started)
    return times


def matmul_ceiling(model, rows, dtype, device, training, seconds):
    """FLOP/s of the products that the model's linear layers make of `rows` tokens, forward and in
    training both backward ones, in `dtype` and with nothing around them."""
    shapes = Counter(tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))
    flops = total = 0
    for (n_out, n_in), count in shapes.items():
        products = products_of(rows, n_in, n_out, dtype, device, training)
        timed(products, device, 0, at_least=2)
        flops += count * 2 * rows * n_in * n_out * (3 if training else 1)
        total += count * median(timed(products, device, seconds / len(shapes)))
    return flops / total


def bytes_read(model, batch, length, dtype):
    """Bytes that a step of decoding reads at least, a token for each of `batch` sequences: the
    weights, of embeddings a row a token at most, and the states. None if a mixer does not say."""
    state = model.state_bytes(length, dtype)
    if state is None:
        return None
    tensors = []
    for module in model.modules():
        if isinstance(module, PackedLinear):
            tensors += [module.weight, module.bias]
        elif not isinstance(module, nn.Embedding):
            tensors += module.parameters(recurse=False)
    weights = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return weights + batch * state


def reading_ceiling(n_bytes, device, seconds):
    """Bytes/s at which so many are read over and over, as the weights are: from the cache if they
    fit into it. A matrix times a vector does nothing else."""
    rows = max(n_bytes, READ_BYTES) // 4096
    matrix, vector = torch.zeros(rows, 1024, device=device), torch.zeros(1024, device=device)
    timed(lambda: matrix @ vector, device, 0)
    return 4096 * rows / median(timed(lambda: matrix @ vector, device, seconds))


def products_of(rows, n_in, n_out, dtype, device, training):
    """A function that makes the products of a linear layer without bias."""
    x = torch.randn(rows, n_in, device=device, dtype=dtype)
    w = torch.randn(n_out, n_in, device=device, dtype=dtype)
    dy = torch.randn(rows, n_out, device=device, dtype=dtype)

    def products():
        x @ w.T
        if training:
            dy @ w
            dy.T @ x
    return products


def training_step(model, tokens, autocast, compiled, device):
    """A step of train.py, on tokens (B, T + 1)."""
    loss_fn = torch.compile(model.loss) if compiled else model.loss
    # at a rate of 0 the weights stay as they are: every repeat is the same work
    optimizer = make_optimizer(model, Options(learning_rate=0.0), device)
    x, y = tokens[:, :-1].cpu(), tokens[:, 1:].cpu()  # from where train.py takes its batches
    rows, machine = rows_per_pass(*x.shape, device), Machine(device, autocast(), World())

    def step():
        backward(model, loss_fn, x, y, rows, machine)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        model.apply_statistics()
    return step


def prefill_step(model, tokens, autocast, compiled, device):
    """A forward pass over tokens (B, T + 1) but the last, with logits and state."""
    feed = torch.compile(model.step) if compiled else model.step

    def step():
        with torch.no_grad(), autocast():
            feed(tokens[:, :-1])
    return step


def decode(model, one_token, prefix, seconds, device):
    """Seconds per token after the prefix (B, T), one after the other, each a call of one_token as
    of model.step; seconds to the first (median); and the memory."""
    pieces = prefix.split(max(1, PIECE // len(prefix)), dim=1)
    token = state = None

    def first_token(pieces=pieces):
        nonlocal token, state
        state = None
        for piece in pieces:
            logits, state = model.step(piece, state)
        token = logits[:, -1:].argmax(-1)

    def next_token():
        nonlocal token, state
        logits, state = one_token(token, state)
        token = logits.argmax(-1)

    for _ in range(2):  # warm-up
        first_token(pieces[:1])
        next_token()
    token = state = None
    before = held(device)
    first = median(timed(first_token, device, seconds, at_least=1))
    timed(next_token, device, 0, at_least=4)
    times = timed(next_token, device, seconds, at_most=DECODED)
    return times, first, memory_of(next_token, device, before)


# Memory -------------------------------------------------------------------------------------------

def limit_memory(device):
    """On Linux, what does not fit into the memory fails here, instead of being swapped or taking
    another process down."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # should the kernel have to kill something, then this
            Path("/proc/self/oom_score_adj").write_text("1000")
    if device == "cpu" and sys.platform == "linux":
        available = proc("meminfo", "MemAvailable")
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = available if soft == resource.RLIM_INFINITY else min(soft, available)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def held(device):
    """Bytes that live now: on CUDA in tensors, on Linux resident and of no file, after malloc has
    returned what is free; None elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's
        libc.malloc_trim(0)
    return proc("self/status", "RssAnon")


def memory_of(step, device, before):
    """The peak of the bytes that live during step(), and its rise over `before`; None where nobody
    counts them."""
    if before is None:
        return {"peak_bytes": None, "rise_bytes": None}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak = torch.cuda.max_memory_allocated(device)
        return {"peak_bytes": peak, "rise_bytes": peak - before}
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not before: it makes allocating slower
        M_MMAP_THRESHOLD = -3
        libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    held(device)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    step()
    peak = proc("self/status", "VmHWM")
    return {"peak_bytes": peak, "rise_bytes": peak - proc("self/status", "RssFile") - before}


def proc(file, field):
    """Bytes of a field of /proc/file, which holds lines such as `VmRSS:   1234 kB`."""
    with open(f"/proc/{file}") as lines:
        for line in lines:
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    raise KeyError(field)
