"""Float32 products on a CPU by oneDNN instead of MKL, where that is faster and loses nothing.

PyTorch hands float32 products to MKL, unless it may round their factors to bfloat16; then to
oneDNN, which rounds them only where the processor has no other fast way (Intel's AMX). An AMD EPYC
with AVX512 is twice as fast by oneDNN as by MKL, to the same digits.

Training asks for it once and for all; the engines, which are also used without it, each time. Of
single tokens it makes a product slower.
"""
import functools
from contextlib import contextmanager

import torch


def exact_product(a, b, scale=1.0):
    """scale a b in float32, for a (X, n, d) and b (X, d, m), float32 tensors of bfloat16 values.

    The product of two bfloat16 values is a float32 value, so rounding to bfloat16 loses nothing."""
    with rounding_allowed():
        return scaled_product(a, b, scale)


def scaled_product(a, b, scale):
    """The same of any float32 tensors."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scale)


def to_dtype(x, dtype):
    """x.to(dtype), x as it is where it has that: a call that does nothing takes as long as a small
    product. None stays None."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


# what switches autocast off at a fifth of the time that torch.autocast takes; private: it may go
NO_AUTOCAST = getattr(torch._C, "_DisableAutocast", None)


def without_autocast(device):
    """A context within which autocast rounds nothing."""
    if NO_AUTOCAST is None or torch.compiler.is_compiling():
        return torch.autocast(device.type, enabled=False)
    return NO_AUTOCAST()


@contextmanager
def fast_products():
    """Float32 products on a CPU may go to oneDNN, if it rounds nothing here."""
    if torch.compiler.is_compiling() or not onednn_is_exact():
        yield
        return
    with rounding_allowed():
        yield


def always_fast_products():
    """From now on the same for all float32 products on a CPU: those of linear layers, forward and
    backward, among them."""
    setting = matmul_setting()
    if setting is not None and onednn_is_exact():
        setting.fp32_precision = "bf16"


@functools.cache
def onednn_is_exact():
    """Whether float32 products keep their digits where they may be rounded to bfloat16: tried once,
    as a processor's name says too little."""
    a = torch.linspace(1, 2, 16 * 64 * 64, dtype=torch.float64, device="cpu").view(16, 64, 64)
    flat = a.flatten(0, 1)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        with rounding_allowed():
            of_many = a.float() @ a.float().mT
            of_one = flat.float() @ flat[:64].float()
        return (torch.allclose(of_many.double(), a @ a.mT, rtol=1e-5)
                and torch.allclose(of_one.double(), flat @ flat[:64], rtol=1e-5))


@contextmanager
def rounding_allowed():
    """Float32 products on a CPU may round their factors to bfloat16, where PyTorch has that
    setting.

    It is the process's, not the thread's: nothing else may multiply meanwhile."""
    setting = matmul_setting()
    if setting is None or torch.compiler.is_compiling():
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def matmul_setting():
    """Where PyTorch keeps what float32 products on a CPU may be rounded to; None where it has no
    such setting."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return setting if hasattr(setting, "fp32_precision") else None
