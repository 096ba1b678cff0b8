"""The optimiser: how it is made, and its state as tensors by name."""
import torch

from base.errors import BadInput
from training.parallel import share_like, whole


def make_optimizer(model, options, device):
    """AdamW with weight decay on matrices only: decaying norms and biases towards zero makes no sense."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=options.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2),
                             fused=device.type in ("cpu", "cuda"))


def optimizer_tensors(model, optimizer):
    """AdamW's state as name -> tensor, for example exp_avg.embed.weight; empty before the first step."""
    return {f"{key}.{name}": whole(value) for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}


def load_optimizer(model, optimizer, tensors, source):
    """Gives AdamW its moments back. BadInput if they are of another model."""
    own = {f"{key}.{name}": (p, key) for name, p in model.named_parameters() if p.requires_grad
           for key in ("step", "exp_avg", "exp_avg_sq")}
    odd = [f"+{name}" for name in tensors if name not in own]
    odd += [f"-{name}" for name in own if tensors and name not in tensors]  # none at all before the first step
    odd += [name for name, (p, key) in own.items() if name in tensors and key != "step" and tensors[name].shape != p.shape]
    if odd:
        raise BadInput(f"{source}: optimizer.safetensors is of another model: {', '.join(odd)}")
    for name, tensor in tensors.items():
        p, key = own[name]
        # the fused kernels want the count of steps beside the parameter
        count = tensor.to(p.device) if optimizer.defaults["fused"] else tensor
        optimizer.state[p][key] = count if key == "step" else share_like(tensor, p)
