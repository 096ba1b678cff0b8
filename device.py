"""Where and how to compute, chosen by what the machine has."""
import shutil

import torch

from config import BadInput


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
    return device


def choose_dtype(name, device, n_embd):
    """torch.dtype of the heavy operations. "auto" is bfloat16 on CUDA where supported; on a CPU only with instructions
    for it and with enough work in each product to pay for the casts; float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native and n_embd >= 128 else torch.float32


def lacks_compiler(device):
    """Whether torch.compile cannot work there."""
    return device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))


def compiled(model, data, options, device, autocast, world):
    """torch.compile(model.loss), or model.loss itself and one line that says why."""
    if options.parallel == "fsdp":
        print("compile: off, it does not go with --parallel=fsdp")
        return model.loss
    if lacks_compiler(device):
        print("compile: off, no C++ compiler found")
        return model.loss
    fast = torch.compile(model.loss)
    x, y = (world.rows(t).to(device) for t in data.batch(options.seed, 0, options.batch_size, options.block_size))
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
