"""The optimiser: how it is made, and its state as tensors by name, whichever of torch's it is.

    adamw   AdamW for all parameters
    muon    Muon for the weights of the blocks' linear layers, AdamW for the rest

A state's name is its key and its parameter's name: exp_avg.embed.weight. A plain number is kept as
a tensor of no dimensions. What there must be, of which shape and type, the optimiser itself shows:
first_state.
"""
import copy
from collections import defaultdict

import torch
import torch.nn as nn

from base.errors import BadInput, first_few
from training.parallel import share_like, whole


class Together:
    """Several of torch's optimisers, each with parameters of its own, as one."""

    def __init__(self, parts):
        self.parts = parts
        self.param_groups = []
        for part in parts:
            self.param_groups += part.param_groups

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


def make_optimizer(model, options, device):
    """The optimiser that options.optimizer names. Weight decay is on matrices only: decaying norms
    and biases towards zero makes no sense."""
    if options.optimizer == "adamw":
        return make_adamw(model.parameters(), options, device)
    hidden = hidden_matrices(model)
    taken = set(hidden)
    rest = [p for p in model.parameters() if p not in taken]
    # match_rms_adamw: an update as large as AdamW's, so that one learning rate serves both
    muon = torch.optim.Muon([{"params": hidden}], lr=options.learning_rate,
                            weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw")
    return Together([muon, make_adamw(rest, options, device)])


def make_adamw(parameters, options, device):
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate,
                             betas=(options.beta1, options.beta2),
                             fused=device.type in ("cpu", "cuda"))


def step_if_finite(optimizer, norm):
    """One step of the optimiser; none where `norm`, a tensor of one number, the norm that gradients
    were clipped by, is not finite."""
    if norm.device.type != "cpu":
        step_without_asking(optimizer, norm)
    elif norm.isfinite():
        optimizer.step()


def step_without_asking(optimizer, norm):
    """The same on a device that would stand still while a number is read back from it.

    Fused AdamW finds out by itself, as it does for torch's GradScaler, and changes nothing. Muon
    cannot: its gradients, which clipping by such a norm has made NaN or 0, become 0, and its
    weights move by their momentum alone."""
    for part in parts_of(optimizer):
        if part.defaults.get("fused"):
            part.found_inf = (~norm.isfinite()).float()
        else:
            for group in part.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.nan_to_num_(nan=0.0)
        part.step()


def parts_of(optimizer):
    return optimizer.parts if isinstance(optimizer, Together) else [optimizer]


def hidden_matrices(model):
    """The weights (out, in) of the blocks' linear layers: no convolutions, embeddings or head."""
    return [module.weight for module in model.blocks.modules() if isinstance(module, nn.Linear)]


# The state ---------------------------------------------------------------------------------------

def optimizer_tensors(model, optimizer):
    """The optimiser's state as name -> tensor; empty before the first step. Every process of a run
    must call it."""
    tensors = {}
    for part, p, name in trained_parameters(model, optimizer):
        for key, value in part.state.get(p, {}).items():
            tensors[f"{key}.{name}"] = whole(as_tensor(value))
    return tensors


def load_optimizer(model, optimizer, tensors, source):
    """Gives the optimiser the state that optimizer_tensors has made. A parameter that has none
    there had no gradient yet. BadInput, naming `source`, if it is of another model or optimiser."""
    unknown = dict(tensors)
    wrong = []
    for part, p, name in trained_parameters(model, optimizer):
        first = first_state(part, p)
        if not any(f"{key}.{name}" in tensors for key in first):
            continue
        for key, like in first.items():
            tensor = unknown.pop(f"{key}.{name}", None)
            if tensor is None:
                wrong.append(f"-{key}.{name}")
            elif kind(tensor) != kind(like):
                wrong.append(f"{key}.{name} {kind(tensor)} in the file, {kind(like)} here")
            elif torch.is_tensor(like):
                part.state[p][key] = share_like(tensor, like)
            else:
                part.state[p][key] = tensor.item()
    wrong = [f"+{name}" for name in unknown] + wrong
    if wrong:
        raise BadInput(f"{source}: optimizer.safetensors is of another model or optimizer "
                       f"(+ only in the file, - only here): {first_few(wrong)}; "
                       "go on with the run's own options, or use another checkpoint")


def trained_parameters(model, optimizer):
    """(which of torch's optimisers it belongs to, parameter, its name) of all that are trained."""
    name_of = {p: name for name, p in model.named_parameters()}
    for part in parts_of(optimizer):
        for group in part.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield part, p, name_of[p]


@torch.no_grad()
def first_state(optimizer, p):
    """key -> value of what one of torch's optimisers keeps of its parameter p after a first step:
    a twin of it makes one, with a gradient of zero, on a twin of p."""
    if optimizer.state.get(p):  # some make theirs from the start
        return optimizer.state[p]
    [group] = [group for group in optimizer.param_groups if any(p is q for q in group["params"])]
    zero = torch.zeros_like(p)
    zero.grad = torch.zeros_like(p)
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [group | {"params": [zero]}]
    twin.step()
    return twin.state[zero]


def as_tensor(value):
    """A tensor as it is; a plain number as one of no dimensions, exactly."""
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return torch.as_tensor(value)


def kind(value):
    """Data type and shape in words."""
    tensor = as_tensor(value)
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
