"""Training on several processes with PyTorch's own engine.

torchrun starts them, DDP or FSDP2 keeps them in step:

    torchrun --nproc_per_node=2 train.py configs/shakespeare.py
        DDP: each process holds the model
    torchrun --nproc_per_node=2 train.py configs/shakespeare.py --parallel=fsdp
        FSDP2: each holds a share of it

Every process draws the whole batch of a step and takes its rows of it, so the same options are the
same run on any number of processes.
"""
import os
import re
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from base.errors import BadInput


# what to do where the variables of the environment that torchrun sets are not as it sets them
TORCHRUN = ("start several processes with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK to "
            "train in one")


def number_from_environment(name, default):
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise BadInput(f"the environment's {name} is {text!r}, no number; {TORCHRUN}")
    return int(text)


class World:
    """The processes of this run: .rank of .size, .local_rank on this machine. Without torchrun
    there is one."""

    def __init__(self):
        self.rank = number_from_environment("RANK", 0)
        self.size = number_from_environment("WORLD_SIZE", 1)
        self.local_rank = number_from_environment("LOCAL_RANK", 0)
        if self.rank >= self.size:
            raise BadInput(f"the environment has RANK {self.rank} and WORLD_SIZE {self.size}: "
                           f"ranks go from 0 to below the size; {TORCHRUN}")

    def start(self, device, options):
        """Joins the others and returns this process's device. Only rank 0 prints from here on."""
        if self.size == 1:
            return device
        if options.batch_size % self.size:
            raise BadInput(f"batch_size {options.batch_size} is not divisible by the {self.size} "
                           "processes; choose a multiple")
        try:
            if device.type == "cuda":
                device = torch.device("cuda", self.local_rank)
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInput(f"cannot join the {self.size} processes that the environment's "
                           f"WORLD_SIZE asks for: {reason}; {TORCHRUN}") from error
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")
        return device

    def first_alone(self, function):
        """function() on every process; on each machine the first one runs it before the others."""
        if self.size == 1:
            return function()
        if self.local_rank == 0:
            result = function()
        dist.barrier()
        return result if self.local_rank == 0 else function()

    def total(self, values, device):
        """The sums over all processes of a list of numbers, or of those of a tensor (n) on the
        device, which are read back at once."""
        if self.size > 1:
            values = torch.as_tensor(values, dtype=torch.float64, device=device)
            dist.all_reduce(values)
        return values.tolist() if torch.is_tensor(values) else values

    def rows(self, batch):
        """This process's share of the rows of a batch (B, T)."""
        n = len(batch) // self.size
        return batch[self.rank * n:(self.rank + 1) * n]

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def end(self):
        """Of several processes, ends this one with status 0, at once: while Python takes itself
        down, a thread of gloo's that still holds a Python object now and then aborts the process,
        and a finished run counts as failed."""
        if self.size > 1:
            dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


class Loss(nn.Module):
    """DDP averages the gradients of what a module's forward returns: here the loss."""

    def __init__(self, model, loss_fn):
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, idx, targets):
        return self.loss_fn(idx, targets)


def join(model, loss_fn, options, world):
    """loss_fn(idx, targets) whose backward pass averages the gradients over all processes. FSDP
    shards the model in place."""
    if world.size == 1:
        return loss_fn
    if options.parallel == "ddp":
        # buffers hold statistics, which are averaged once per step by those who collect them
        return DistributedDataParallel(Loss(model, loss_fn), broadcast_buffers=False)
    # takes a second: only for those who ask
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    for part in (*model.blocks, model):
        fully_shard(part)
    register_fsdp_forward_method(model, "loss")
    return model.loss


def synchronise_gradients(loss_fn, model, on):
    """Whether the next backward pass averages gradients: only a step's last micro-step needs to."""
    if isinstance(loss_fn, DistributedDataParallel):
        loss_fn.require_backward_grad_sync = on
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(on)


def whole(tensor):
    """A tensor that FSDP shards, put together again; every process must ask. Others stay."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_like(tensor, other):
    """`tensor` (whole) where and as `other` lies: its device, and its shards if FSDP shards it."""
    tensor = tensor.to(other.device)
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements)
