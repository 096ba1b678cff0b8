"""What a run computes on: a device, a precision, the other processes; and whether its memory can
hold the run at all."""
import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from base.errors import BadInput
from training.parallel import World

CGROUPS = Path("/sys/fs/cgroup")
BYTES_PER_PARAMETER = 16    # a float32 each for the weight, its gradient and AdamW's two moments
BYTES_PER_BLOCK = 2**14     # of a block's Python objects, however small its matrices
BYTES_PER_BATCH_TOKEN = 32  # an int64 each for its position, the next one, the input, the target
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    device: torch.device
    autocast: torch.autocast  # enter it around the heavy operations
    world: World


def cgroup_limits():
    """Bytes that the control groups around this process allow it; none where there is no limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = CGROUPS / lines[-1].split(":", 2)[-1].lstrip("/")
    files = [folder / "memory.max" for folder in (own, *own.parents)]
    files.append(CGROUPS / "memory" / "memory.limit_in_bytes")  # version 1
    limits = []
    for file in files:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # not there, or the word max
            pass
    return limits


def main_memory():
    """Bytes of main memory, swap included, that this process can still have."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        kib = {}
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, value = line.split(":")
            kib[name] = int(value.split()[0])
        free = 1024 * (kib["MemAvailable"] + kib["SwapFree"])
    except (OSError, KeyError, ValueError):  # not Linux
        pass
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        free = min(free, address_space)
    return min([free, *cgroup_limits()])


def device_memory(device):
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return main_memory()


def parameters_at_least(config):
    """Number of parameters of a GPT, without those of its mixers, norms and biases."""
    C, F, V = config.n_embd, config.ffn_hidden, config.vocab_size
    ffn = C * F * (3 if config.arch == "llama" else 2)
    embedding = V * C
    if config.embed_rank:
        embedding = (V + C) * config.embed_rank
    positions = config.block_size * C if config.pos == "learned" else 0
    head = 0 if config.tie_head else V * C
    return config.n_layer * ffn + embedding + positions + head


def refuse_what_cannot_fit(options, config, row_length, machine):
    """BadInput, naming the sizes, if training needs more memory than there is.

    row_length: tokens in a row of a batch. The estimate is a lower bound, made without building
    anything: what passes it may still be too large, what it refuses cannot fit."""
    parameters = parameters_at_least(config)
    model_bytes = parameters * BYTES_PER_PARAMETER + config.n_layer * BYTES_PER_BLOCK
    if machine.world.size > 1 and options.parallel == "fsdp":
        model_bytes //= machine.world.size
    available = device_memory(machine.device)
    if model_bytes > available:
        raise BadInput(
            f"n_layer {config.n_layer}, n_embd {config.n_embd}, ffn_hidden {config.ffn_hidden} and "
            f"a vocabulary of {config.vocab_size} make over {parameters:,} parameters, which take "
            f"at least {model_bytes / GIB:,.1f} GiB to train, and {available / GIB:,.1f} GiB are "
            "available; choose a smaller model")
    rows = options.batch_size * options.gradient_accumulation_steps
    batch_bytes = rows * row_length * BYTES_PER_BATCH_TOKEN
    available = main_memory()
    if batch_bytes > available:
        raise BadInput(
            f"batch_size {options.batch_size}, times gradient_accumulation_steps "
            f"{options.gradient_accumulation_steps}, times {row_length} tokens: the batch of a "
            f"step alone takes {batch_bytes / GIB:,.1f} GiB, and {available / GIB:,.1f} GiB are "
            "available; lower batch_size or gradient_accumulation_steps")


def catch_signals():
    """A list that holds the signal's number once SIGTERM or Ctrl-C has come. A second one ends
    the process at once."""
    caught = []

    def handle(number, frame):
        caught.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return caught
