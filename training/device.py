"""Where and how to compute, chosen by what the machine has."""
import copy
import ctypes
import resource
import shutil
import sys

import torch
import torch.nn as nn

from base.errors import BadInput

CPU_TOKENS_AT_ONCE = 4096  # tokens in a pass of training on a CPU: the activations of more leave its cache


def choose_device(name):
    """torch.device of "cpu", "cuda", "cuda:1", "mps", or the best there is for "auto". BadInput if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"--device={name} cannot be used here: {str(error).splitlines()[0]}; try --device=cpu") from error
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in what is float32
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Lets malloc, if it is glibc's, keep large freed blocks for the next tensors. It would give them back to the system,
    which clears every page that it hands out again: steps over long sequences then take up to 1.25 times as long."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(device):
    """Bytes: on CUDA the most that tensors have held, elsewhere the most resident memory this process has had, code included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def choose_dtype(name, device, n_embd):
    """torch.dtype of the heavy operations. "auto" is bfloat16 on CUDA where supported; on a CPU only with instructions
    for it and with enough work in each product to pay for the casts; float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native and n_embd >= 128 else torch.float32


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 for decoding on a CPU, its weight laid out as oneDNN reads it: F.linear lays it out anew
    in each call, which takes longer than the product with a single token."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16())
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, self.bias, "none", [], "")


def ready_to_decode(model, dtype):
    """The model with the weights of its products held in dtype, which autocast would cast for every token anew. It can no
    longer be trained or saved; embeddings, norms and statistics stay as they are."""
    pack = dtype == torch.bfloat16 and model.head.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and dtype != torch.float32:
                setattr(module, name, PackedLinear(child) if pack else copy.deepcopy(child).to(dtype))
    return model


def rows_per_pass(batch_size, block_size, device, processes=1):
    """Rows of all processes in one forward and backward pass: batch_size, or on a CPU a fraction of it that is as fast as
    can be. The gradients of a step add up all the same."""
    rows = batch_size // processes
    if device.type == "cpu":
        rows = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * block_size <= CPU_TOKENS_AT_ONCE))
    return rows * processes


def lacks_compiler(device):
    """Whether torch.compile cannot work there."""
    return device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))


def compiled(model, data, options, rows, device, autocast, world):
    """torch.compile(model.loss), or model.loss itself and one line that says why."""
    if options.parallel == "fsdp":
        print("compile: off, it does not go with --parallel=fsdp")
        return model.loss
    if lacks_compiler(device):
        print("compile: off, no C++ compiler found")
        return model.loss
    fast = torch.compile(model.loss)
    x, y = (world.rows(t).to(device) for t in data.batch(options.seed, 0, rows, options.block_size))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with autocast:
            fast(x, y).backward()  # compiles both passes here, where a failure can still be mended
    except Exception as error:  # the compiler's own; training must go on without it
        print(f"compile: off, it failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        fast = model.loss
    model.zero_grad()
    for name, buffer in model.named_buffers():  # the trial run counts for nothing
        buffer.copy_(buffers[name])
    return fast
