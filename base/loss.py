"""The cross-entropy of a model's head, also over vocabularies whose logits would not fit into
memory all at once."""
import torch
import torch.nn.functional as F

LOGITS_AT_ONCE = 2**23  # 32 MB in float32: more leave a CPU's cache
# times as many on a GPU, where adding each piece's share to the weight's gradient takes longest
ON_A_GPU = 8


def cross_entropy(logits, targets):
    """Mean over targets (B, T) != -1 of -log softmax(logits (B T, V)), in nats, in at least
    float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten(), ignore_index=-1)


def head_loss(h, head, targets):
    """cross_entropy(head(h), targets) of h (B, T, C) and an nn.Linear without bias. Many logits are
    formed in pieces."""
    h, targets = h.flatten(0, 1), targets.flatten()
    at_once = LOGITS_AT_ONCE if h.device.type == "cpu" else LOGITS_AT_ONCE * ON_A_GPU
    rows = max(1, at_once // head.out_features)
    if len(h) <= 2 * rows:
        return cross_entropy(head(h), targets)
    total = InPieces.apply(h, head.weight, targets, rows, torch.is_grad_enabled())
    return total / (targets != -1).sum()


class InPieces(torch.autograd.Function):
    """Sum over targets (N) != -1 of -log softmax(h (N, C) weight (V, C)^T), `rows` rows at a time.

    The gradient of a piece, softmax(logits) - onehot(target) through the two products, is formed
    with its loss, so that the logits are neither kept nor formed again: three products of that
    size, where torch.utils.checkpoint takes four."""

    @staticmethod
    def forward(ctx, h, weight, targets, rows, with_gradients):
        device = h.device.type
        dtype = h.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(device, enabled=False):  # it would cast the weight for each piece anew
            x, w = h.to(dtype), weight.to(dtype)
            total, dh, dw = 0.0, None, None
            if with_gradients:
                dh = torch.empty_like(x)
            if with_gradients and ctx.needs_input_grad[1]:
                dw = torch.zeros_like(weight)
            for i in range(0, len(x), rows):
                y = targets[i:i + rows, None]
                known = y != -1
                y = y.clamp(min=0)
                logits = F.linear(x[i:i + rows], w)
                log_p = logits.to(wide).log_softmax(-1)
                total = total - (log_p.gather(1, y) * known).sum()
                if not with_gradients:
                    continue
                d = log_p.exp_()
                d.scatter_add_(1, y, -torch.ones_like(y, dtype=wide))
                d = d.mul_(known).to(dtype)
                dh[i:i + rows] = d @ w
                if dw is not None:
                    dw += d.T @ x[i:i + rows]
        if with_gradients:
            ctx.save_for_backward(dh.to(h.dtype), dw)
        return total

    @staticmethod
    def backward(ctx, gradient):
        dh, dw = ctx.saved_tensors
        if dw is not None:
            dw = gradient * dw
        return gradient * dh, dw, None, None, None
