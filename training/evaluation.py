"""The validation loss of a model, over the fixed windows or rows of a split."""
import math
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch

from base.errors import BadInput

TOKENS_AT_ONCE = 8192  # in a forward pass; more is no faster and needs memory


@dataclass
class Evaluation:
    loss: float                # mean over the targets, in nats
    bpb: Optional[float]       # bits per byte; None for a recall task
    accuracy: Optional[float]  # share of right answers; None for a text
    # {difficulty: accuracy}, which is None for rows longer than learned positions reach
    by_cell: Optional[dict]

    def words(self):
        if self.bpb is not None:
            return f"{self.loss:.4f} nats per token | {self.bpb:.4f} bits per byte"
        return f"{self.loss:.4f} nats per answer | accuracy {shown(self.accuracy)}"

    def cells(self):
        """The accuracy of every difficulty, in a line."""
        return " | ".join(f"{cell}: {shown(value)}" for cell, value in self.by_cell.items())


def shown(accuracy):
    return "n/a" if accuracy is None else f"{accuracy:.4f}"


def print_evaluation(options, model, data, machine, saved):
    """What --eval_only is for."""
    split = options.eval_split
    if split not in data.cells:
        raise BadInput(f"data/{data.name} has no {split} split; leave --eval_split out")
    result = evaluate(model, data, options, machine, split)
    print(f"{saved.folder}: {split} loss {result.words()}")
    for cell, accuracy in (result.by_cell or {}).items():
        print(f"{cell:40} {shown(accuracy)}")


@torch.no_grad()
def evaluate(model, data, options, machine, split="val"):
    """The Evaluation on a split. BadInput if no target is due in it."""
    world = machine.world
    is_text = data.bytes_per_token is not None
    batches = readable_batches(data, options, split)
    own = batches[world.rank::world.size]
    model.eval()
    sums = np.zeros((len(data.cells[split]), 3))  # of each cell: losses, targets, right answers
    for i in range(math.ceil(len(batches) / world.size)):
        # under FSDP all processes take part in every forward pass: one that has no batch left
        # repeats the last
        x, y, cell = own[i] if i < len(own) else batches[-1]
        x, y = x.to(machine.device), y.to(machine.device)
        right = 0
        with machine.autocast:
            if is_text:
                loss = model.loss(x, y)
            else:
                logits, loss = model(x, y)
                right = (logits.argmax(-1) == y).sum().item()
        targets = (y != -1).sum().item()
        if i < len(own) and targets:
            sums[cell] += [loss.item() * targets, targets, right]
    model.train()
    sums = np.reshape(world.total(sums.flatten().tolist(), machine.device), (-1, 3))
    loss, targets, right = sums.sum(0).tolist()
    if not targets:
        raise BadInput(f"data/{data.name}: no answer is due in the {split} split, "
                       "so there is no loss; prepare it again")
    loss /= targets
    if is_text:
        a_token = data.test_bytes_per_token if split == "test" else data.bytes_per_token
        return Evaluation(loss, loss / math.log(2) / a_token, None, None)
    by_cell = {}
    for name, (_, cell_targets, cell_right) in zip(data.cells[split], sums.tolist()):
        by_cell[name] = cell_right / cell_targets if cell_targets else None
    return Evaluation(loss, None, right / targets, by_cell)


def readable_batches(data, options, split):
    """[(x, y, cell)] of a split, without rows that are longer than learned positions reach."""
    T = options.block_size
    longest = T if options.pos == "learned" else math.inf
    rows = max(1, TOKENS_AT_ONCE // T)
    batches = data.eval_batches(split, T, rows, options.eval_tokens)
    return [batch for batch in batches if batch[0].size(1) <= longest]
