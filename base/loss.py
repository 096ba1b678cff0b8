"""The cross-entropy of a model's head, also over vocabularies whose logits would not fit into
memory all at once."""
import torch
import torch.nn.functional as F

from base.gradients import differentiable_once

ALL_AT_ONCE = 2**22  # logits up to which nothing is won by pieces
LOGITS_AT_ONCE = 2**18  # of a piece: 1 MB in float32 stays in a core's own cache
# a GPU spends longest on adding each piece's share to the weight's gradient: few large pieces
ON_A_GPU = 2**8  # times as many


def cross_entropy(logits, targets):
    """Mean over targets (B, T) != -1 of -log softmax(logits (B T, V)), in nats, in at least
    float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten(), ignore_index=-1)


def head_loss(h, head, targets):
    """cross_entropy(head(h), targets) of h (B, T, C) and an nn.Linear without bias. Many logits are
    formed in pieces."""
    h, targets = h.flatten(0, 1), targets.flatten()
    V, C = head.weight.shape
    on_cpu = h.device.type == "cpu"
    at_once = max(1, LOGITS_AT_ONCE * (1 if on_cpu else ON_A_GPU) // V)
    if torch.compiler.is_compiling():  # it writes every piece out, and fuses a softmax by itself
        at_once = max(at_once, 2 * C)
    if len(h) * V <= ALL_AT_ONCE or len(h) <= 2 * at_once:
        return cross_entropy(head(h), targets)
    # 2 C rows of logits in bfloat16 are as large as the weight in float32; with fewer, adding to
    # its gradient would take longer than the products do
    rows = max(at_once, 2 * C) if on_cpu else at_once
    total = InPieces.apply(h, head.weight, targets, rows, at_once, torch.is_grad_enabled())
    return total / (targets != -1).sum()


class InPieces(torch.autograd.Function):
    """Sum over targets (N) != -1 of -log softmax(h (N, C) weight (V, C)^T).

    The gradient of a piece, softmax(logits) - onehot(target) through the two products, is formed
    with its loss, so that the logits are neither kept nor formed again: three products of that
    size, where torch.utils.checkpoint takes four. `rows` rows go through a product, and `at_once`
    of their logits through the softmax, whose gradient takes their place."""

    @staticmethod
    def forward(ctx, h, weight, targets, rows, at_once, with_gradients):
        device = h.device.type
        dtype = h.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which it leaves alone
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):  # it would cast the weight for each piece anew
            x, w = h.to(dtype), weight.to(dtype)
            total, dh, dw = 0.0, None, None
            if with_gradients:
                dh = torch.empty_like(x)
            if with_gradients and ctx.needs_input_grad[1]:
                dw = torch.zeros_like(weight)
            for i in range(0, len(x), rows):
                logits = F.linear(x[i:i + rows], w)
                for part, y in zip(logits.split(at_once), targets[i:i + rows].split(at_once)):
                    total = total + loss_of_piece(part, y[:, None], with_gradients)
                if not with_gradients:
                    continue
                d = logits
                dh[i:i + rows] = d @ w
                if dw is not None:
                    dw += d.T @ x[i:i + rows]
        if with_gradients:
            ctx.save_for_backward(dh.to(h.dtype), dw)
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx, gradient):
        dh, dw = ctx.saved_tensors
        if dw is not None:
            dw = gradient * dw
        return gradient * dh, dw, None, None, None, None


def loss_of_piece(logits, y, with_gradients):
    """The summed loss of logits (n, V) for targets y (n, 1), which its gradient replaces."""
    known = y != -1
    y = y.clamp(min=0)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = wide.softmax(-1)
    # -log p[y], to the digits of a log_softmax: the largest p is at least 1 / V
    loss = wide.amax(-1, keepdim=True) - wide.gather(1, y) - p.amax(-1, keepdim=True).log()
    if with_gradients:
        p.scatter_add_(1, y, -torch.ones_like(y, dtype=p.dtype))
        logits.copy_(p.mul_(known))
    return (loss * known).sum()
