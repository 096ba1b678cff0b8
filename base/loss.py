"""The cross-entropy of a model's head, also over vocabularies whose logits would not fit into memory all at once."""
import torch
import torch.nn.functional as F

LOGITS_AT_ONCE = 2**23  # 32 MB in float32: more leave a CPU's cache
ON_A_GPU = 8            # times as many there, where adding each piece's share to the weight's gradient would take longest


def cross_entropy(logits, targets):
    """Mean over targets (B, T) != -1 of -log softmax(logits (B T, V)), in nats, in at least float32."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten(), ignore_index=-1)


def head_loss(h, head, targets):
    """cross_entropy(head(h), targets) of h (B, T, C) and an nn.Linear without bias. Many logits are formed in pieces."""
    h, targets = h.flatten(0, 1), targets.flatten()
    rows = max(1, LOGITS_AT_ONCE * (1 if h.device.type == "cpu" else ON_A_GPU) // head.out_features)
    if len(h) <= 2 * rows:
        return cross_entropy(head(h), targets)
    return InPieces.apply(h, head.weight, targets, rows, torch.is_grad_enabled()) / (targets != -1).sum()


class InPieces(torch.autograd.Function):
    """Sum over targets (N) != -1 of -log softmax(h (N, C) weight (V, C)^T), `rows` rows at a time.

    The gradient of a piece, softmax(logits) - onehot(target) through the two products, is formed with its loss, so that the
    logits are neither kept nor formed again: three products of that size, where torch.utils.checkpoint takes four."""

    @staticmethod
    def forward(ctx, h, weight, targets, rows, with_gradients):
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        with torch.autocast(device, enabled=False):  # the weight would be cast for each piece anew
            x, w = h.to(dtype), weight.to(dtype)
            total, dh, dw = 0.0, None, None
            if with_gradients:
                dh, dw = torch.empty_like(x), torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            for i in range(0, len(x), rows):
                y = targets[i:i + rows, None]
                known, y = y != -1, y.clamp(min=0)
                logits = F.linear(x[i:i + rows], w)
                log_p = logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
                total = total - (log_p.gather(1, y) * known).sum()
                if with_gradients:
                    d = log_p.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=log_p.dtype)).mul_(known).to(dtype)
                    dh[i:i + rows] = d @ w
                    if dw is not None:
                        dw += d.T @ x[i:i + rows]
        if with_gradients:
            ctx.save_for_backward(dh.to(h.dtype), dw)
        return total

    @staticmethod
    def backward(ctx, gradient):
        dh, dw = ctx.saved_tensors
        return gradient * dh, None if dw is None else gradient * dw, None, None, None
