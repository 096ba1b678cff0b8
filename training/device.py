"""Where and how to compute, chosen by what the machine has."""
import copy
import ctypes
import re
import resource
import shutil
import sys
from pathlib import Path

import torch
import torch.nn as nn

from base.errors import BadInput

# tokens in a pass of training on a CPU: the activations of more leave its cache
CPU_TOKENS_AT_ONCE = 4096
DEVICES = re.compile(r"(cpu|cuda|mps)(:[0-9]{1,3})?")


def choose_device(name):
    """torch.device of "cpu", "cuda", "cuda:1", "mps", or "auto": the best there is. BadInput if it
    cannot be used."""
    if name == "auto":
        name = best_device()
    if not DEVICES.fullmatch(name):
        raise BadInput(f"--device={name} is not one of cpu, cuda, cuda:1, mps, auto")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except Exception as error:  # each device has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"--device={name} does not work here: {reason}; try --device=cpu") from error
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in what is float32
    if device.type == "cpu":
        keep_freed_memory()
    return device


def seed_generators(seed, device):
    """torch.manual_seed for one device: with no other to take note of it, a CPU's takes a
    microsecond instead of 0.3 ms, which each step of training would pay."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def best_device():
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def keep_freed_memory():
    """Lets malloc, if it is glibc's, keep large freed blocks for the next tensors. It would give
    them back to the system, which clears every page that it hands out again: steps over long
    sequences then take up to 1.25 times as long."""
    M_TRIM_THRESHOLD = -1
    M_MMAP_THRESHOLD = -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(device):
    """Bytes: on CUDA the most that tensors have held, elsewhere the most resident memory this
    process has had, code included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux. There, getrusage also counts the process that started this one
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def choose_dtype(name, device, n_embd):
    """torch.dtype of the heavy operations. "auto" is bfloat16 on CUDA where supported; on a CPU
    only with instructions for it and with enough work in each product to pay for the casts; float32
    elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    elif device.type == "cpu":
        fast = n_embd >= 128 and cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def cpu_has_bfloat16():
    """Whether the CPU has instructions for it, as far as this version of torch can tell: the
    function is a private one."""
    ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return ask is not None and ask()


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 for decoding on a CPU, its weight laid out as oneDNN reads it:
    F.linear lays it out anew in each call, which takes longer than the product with one token."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16())
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.product = torch.ops.mkldnn._linear_pointwise.default  # once, not for every token

    def forward(self, x):
        return self.product(x.bfloat16(), self.weight, self.bias, "none", [], "")


def can_pack(linear):
    """Whether PackedLinear works here: its two operations are private ones of torch."""
    try:
        PackedLinear(linear)(torch.zeros(1, linear.in_features))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True


@torch.no_grad()
def ready_to_decode(model, dtype, pack=True):
    """The model with what it would form anew for every token held ready: the weights of its
    products in dtype, to which autocast would cast them, and what a mixer has of its own. It can no
    longer be trained or saved; embeddings, norms and statistics stay. pack: by PackedLinear, which
    cannot be compiled."""
    for mixer in model.mixers():
        if hasattr(mixer, "ready_to_decode"):
            mixer.ready_to_decode()
    if dtype == torch.float32:
        return model
    pack = pack and dtype == torch.bfloat16 and model.head.weight.device.type == "cpu"
    pack = pack and can_pack(model.blocks[0].mlp.c_fc)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:  # a subclass may not want to be rounded
                fast = PackedLinear(child) if pack else copy.deepcopy(child).to(dtype)
                setattr(module, name, fast)
    return model


def rows_per_pass(batch_size, block_size, device, processes=1):
    """Rows of all processes in one forward and backward pass: batch_size, or on a CPU the largest
    divisor of it that is fast. The gradients of a step add up all the same."""
    rows = batch_size // processes
    if device.type == "cpu":
        most = max(1, min(rows, CPU_TOKENS_AT_ONCE // block_size))
        rows = max(n for n in range(1, most + 1) if rows % n == 0)
    return rows * processes


def lacks_compiler(device):
    """Whether torch.compile cannot work there."""
    compilers = ("c++", "g++", "clang++", "cl")
    return device.type == "cpu" and not any(shutil.which(name) for name in compilers)


def compiled(model, data, options, rows, device, autocast, world):
    """torch.compile(model.loss), or model.loss itself and one line that says why."""
    if options.parallel == "fsdp":
        print("compile: off, it does not go with --parallel=fsdp")
        return model.loss
    if lacks_compiler(device):
        print("compile: off, no C++ compiler found")
        return model.loss
    fast = torch.compile(model.loss)
    x, y = data.batch(options.seed, 0, rows, options.block_size)
    x = world.rows(x).to(device)
    y = world.rows(y).to(device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with autocast:
            fast(x, y).backward()  # compiles both passes here, where a failure can still be mended
    except Exception as error:  # the compiler's own; training must go on without it
        reason = " ".join(str(error).split())[:200]
        print(f"compile: off, it failed with {type(error).__name__}: {reason}")
        fast = model.loss
    model.zero_grad()
    for name, buffer in model.named_buffers():  # the trial run counts for nothing
        buffer.copy_(buffers[name])
    return fast
