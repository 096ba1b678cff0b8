"""More mixers with one fault each: those that hide from a few short sequences of normal numbers.

    python -m tools.audit --mixer_file=tests/planted_wide.py --mixer=late_gate     # FAIL

As in planted.py all are y = W u; here u = x, or the mean of the tokens so far, but for the fault.
"""
import collections

import torch
import torch.nn as nn
from planted import Honest

from mixers import MIXERS


def leak(x, size=1.0):
    """Every token sees the mean of all."""
    return x + size * x.mean(1, keepdim=True)


class Leaking(Honest):
    """Leaks where `when` says so."""

    def mix(self, x, state):
        return (leak(x) if self.when(x, state) else x), state


class Numbered(Leaking):
    """The same, with the layer and the model's options at hand."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.layer, self.config, self.calls = layer, config, 0


# Lengths ------------------------------------------------------------------------------------------

class Beyond600(Leaking):
    def when(self, x, state):
        return x.size(1) > 600


class Beyond1000InTraining(Leaking):
    def when(self, x, state):
        return x.size(1) > 1000 and self.training


class Every96(Leaking):
    def when(self, x, state):
        return x.size(1) % 96 == 0


class Chunks80(Honest):
    """The last token of a chunk of 80 sees the next one's first."""

    def mix(self, x, state):
        after = torch.cat([x[:, 1:], x[:, -1:]], dim=1)
        last = (torch.arange(x.size(1)) % 80 == 79)[:, None]
        return torch.where(last, x + after, x), state


class OnePosition(Honest):
    """Token 217 sees token 218."""

    def mix(self, x, state):
        u = x.clone()
        if x.size(1) > 218:
            u[:, 217] += x[:, 218]
        return u, state


class WholeBlock(Numbered):
    """Leaks where a sequence is as long as block_size."""

    def when(self, x, state):
        return x.size(1) == self.config.block_size


class ScaledPositions(Numbered):
    """Positions are scaled down beyond 512 tokens by how many there are."""

    def mix(self, x, state):
        n = 0 if state is None else state
        position = torch.arange(n, n + x.size(1), dtype=x.dtype)[:, None]
        return x * (position / 512 / max(1, x.size(1) / 512)).cos(), n + x.size(1)


class Tiny(Honest):
    """A weight of 1e-10."""

    def mix(self, x, state):
        return leak(x, 1e-10), state


class HiddenLate(Honest):
    """Gradients alone, beyond 600 tokens."""

    def mix(self, x, state):
        mean = x.mean(1, keepdim=True)
        return (x + mean - mean.detach() if x.size(1) > 600 else x), state


# Inputs -------------------------------------------------------------------------------------------

class LargeOnly(Leaking):
    def when(self, x, state):
        return x.abs().amax() > 60


class Repeats(Honest):
    """Every token sees whether it comes again."""

    def mix(self, x, state):
        same = (x[:, :, None] == x[:, None]).all(-1).to(x.dtype)
        return x * same.sum(-1, keepdim=True), state


class Padding(Honest):
    """Zeros count as padding, whose number scales all."""

    def mix(self, x, state):
        real = (x != 0).any(-1, keepdim=True).to(x.dtype)
        return x / real.mean(1, keepdim=True).clamp(min=0.1), state


class ZeroRows(Honest):
    """No floor below a norm."""

    def mix(self, x, state):
        return x / x.norm(dim=-1, keepdim=True), state


class EqualTokens(Honest):
    """No floor below a deviation from the token before."""

    def mix(self, x, state):
        before = torch.zeros_like(x[:, :1]) if state is None else state
        gap = (x - torch.cat([before, x[:, :-1]], 1)).norm(dim=-1, keepdim=True)
        return x + (x - x) / gap, x[:, -1:].clone()


class Positive(Leaking):
    """Leaks where no number is negative."""

    def when(self, x, state):
        return bool((x >= 0).all())


# Batches ------------------------------------------------------------------------------------------

class TwelveRows(Honest):
    """A row sees the one before it, in batches of 12 and more."""

    def mix(self, x, state):
        return (x + x.roll(1, 0) if x.size(0) >= 12 else x), state


class LaterRows(Honest):
    """Row 2 sees row 3."""

    def mix(self, x, state):
        u = x.clone()
        if x.size(0) > 3:
            u[2] += x[3]
        return u, state


class RowNumber(Honest):
    """Later rows count less."""

    def mix(self, x, state):
        return x * (1 + torch.arange(x.size(0), dtype=x.dtype)[:, None, None] / 100), state


# Sizes of the model -------------------------------------------------------------------------------

class FourthLayer(Numbered):
    def when(self, x, state):
        return self.layer == 3


class LastOfMany(Numbered):
    def when(self, x, state):
        return self.layer > 6


class WideHeads(Numbered):
    def when(self, x, state):
        return self.config.n_embd // self.config.n_head == 64


class LearnedPositions(Numbered):
    def when(self, x, state):
        return self.config.pos == "learned"


# Modes --------------------------------------------------------------------------------------------

class WithoutGradients(Leaking):
    def when(self, x, state):
        return not torch.is_grad_enabled()


class WithGradients(Leaking):
    def when(self, x, state):
        return self.proj.weight.requires_grad and torch.is_grad_enabled()


class InferenceMode(Leaking):
    def when(self, x, state):
        return torch.is_inference_mode_enabled()


class CompiledOnly(Leaking):
    def when(self, x, state):
        return torch.compiler.is_compiling()


# Use ----------------------------------------------------------------------------------------------

class After300Calls(Numbered):
    def when(self, x, state):
        self.calls += 1
        return self.calls > 300


class After100Steps(Numbered):
    def apply_statistics(self):
        self.calls += 1

    def when(self, x, state):
        return self.calls >= 100


class After100TrainingCalls(Numbered):
    """Another kind of counter, a buffer."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("seen", torch.zeros(()))

    def when(self, x, state):
        if self.training:
            self.seen += 1
        return self.seen > 100


# The state ----------------------------------------------------------------------------------------

class Running(Honest):
    """The mean of the tokens so far: no fault. State: their sum and number."""

    def mix(self, x, state):
        total, n = (0, 0) if state is None else state
        sums = x.cumsum(1) + total
        count = torch.arange(n + 1, n + 1 + x.size(1), dtype=x.dtype)[:, None]
        return sums / count, (sums[:, -1:].clone(), n + x.size(1))


class InTheModule(Honest):
    """The sum is kept in the module; the state is a number."""
    total = 0

    def mix(self, x, state):
        n = 0 if state is None else state
        self.total = (0 if state is None else self.total) + x.cumsum(1)
        count = torch.arange(n + 1, n + 1 + x.size(1), dtype=x.dtype)[:, None]
        u = self.total / count
        self.total = self.total[:, -1:]
        return u, n + x.size(1)

    def state_bytes(self, T, dtype):
        return 0


GLOBAL = {}


class ByHandle(Honest):
    """The sums are kept in a global table; the state is a key into it."""

    def mix(self, x, state):
        n, total = (0, 0) if state is None else GLOBAL[state]
        sums = x.cumsum(1) + total
        count = torch.arange(n + 1, n + 1 + x.size(1), dtype=x.dtype)[:, None]
        GLOBAL[len(GLOBAL)] = n + x.size(1), sums[:, -1:].detach()
        return sums / count, len(GLOBAL) - 1

    def state_bytes(self, T, dtype):
        return 0


class HalfInTheModule(Running):
    """Half of the channels' sums are in the state."""

    def mix(self, x, state):
        C = x.size(2)
        if state is not None:
            state = torch.cat([state[0], self.rest], -1), state[1]
        u, (total, n) = super().mix(x, state)
        self.rest = total[..., C // 2:]
        return u, (total[..., :C // 2].clone(), n)


class Ring(Honest):
    """A mean over the last tokens, which in single steps forgets too early beyond 192 tokens."""

    def mix(self, x, state):
        last = x if state is None else torch.cat([state, x], 1)
        S, T = last.size(1), x.size(1)
        window = 256 if T > 1 or S < 192 else 128
        sums = torch.cat([torch.zeros_like(last[:, :1]), last.cumsum(1)], 1)
        end = torch.arange(S - T + 1, S + 1)
        start = (end - window).clamp(min=0)
        return (sums[:, end] - sums[:, start]) / (end - start)[:, None], last[:, -256:].clone()


class LowDecode(Honest):
    """Single tokens in lower precision."""

    def mix(self, x, state):
        single = state is not None and x.size(1) == 1
        return (x.bfloat16().to(x.dtype) if single else x), torch.zeros(1)


class FloatDecode(LowDecode):
    """The same, in float32 where the whole is in float64."""

    def mix(self, x, state):
        single = state is not None and x.size(1) == 1
        return (x.float().to(x.dtype) if single else x), torch.zeros(1)


class LowDecodeOfFloats(LowDecode):
    """The same of float32 alone."""

    def mix(self, x, state):
        return super().mix(x, state) if x.dtype == torch.float32 else (x, torch.zeros(1))


class Declares200(Honest):
    """All tokens in the state; declares no more than 200 of them."""

    def mix(self, x, state):
        return x, x.clone() if state is None else torch.cat([state, x], 1)

    def state_bytes(self, T, dtype):
        return min(T, 200) * self.proj.in_features * dtype.itemsize


class DecodeOfManyRows(Running):
    """Rows beyond the twelfth go on from the first's sums."""

    def mix(self, x, state):
        if state is not None and x.size(0) > 12:
            total = state[0].clone()
            total[12:] = total[:1]
            state = total, state[1]
        return super().mix(x, state)


class InPlaceLate(Running):
    """Adds to its sum in place beyond 64 tokens, in inference mode."""

    def mix(self, x, state):
        u, (total, n) = super().mix(x, state)
        if state is not None and state[1] > 64 and torch.is_inference_mode_enabled():
            state[0].copy_(total)
            total = state[0]
        return u, (total, n)


# Gradients ----------------------------------------------------------------------------------------

class Scale(torch.autograd.Function):
    """x (B, T, C) times w (C)."""

    @staticmethod
    def forward(ctx, x, w, fault):
        ctx.save_for_backward(x.clone(), w)
        ctx.fault, ctx.runs = fault, 0
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        ctx.runs += 1
        of_x, of_w = g * w, (g * x).sum((0, 1))
        if ctx.fault == "sign":
            of_w = -of_w
        if ctx.fault == "input":
            of_x = of_x * 1.01
        if ctx.fault == "twice" and ctx.runs > 1:
            of_w = of_w * 2
        return of_x, of_w, None


class Scaled(Honest):
    fault = ""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.scale = nn.Parameter(torch.ones(config.n_embd))

    def mix(self, x, state):
        return Scale.apply(x, self.scale.to(x.dtype), self.fault), state


class SignFlipped(Scaled):
    fault = "sign"


class InputGradient(Scaled):
    fault = "input"


class TwiceWrong(Scaled):
    fault = "twice"


class FlippedByDetach(Scaled):
    def mix(self, x, state):
        return x * (2 * self.scale.detach() - self.scale), state


class FlippedInFloats(Scaled):
    """The sign of the gradient is wrong in float32 alone."""

    def mix(self, x, state):
        fault = "sign" if x.dtype == torch.float32 else ""
        return Scale.apply(x, self.scale.to(x.dtype), fault), state


class KeptForBackward(Scaled):
    """What backward needs is kept in the module: the last call's."""

    def mix(self, x, state):
        module = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, w):
                module.kept = x.clone()
                ctx.save_for_backward(w)
                return x * w

            @staticmethod
            def backward(ctx, g):
                return g * ctx.saved_tensors[0], (g * module.kept).sum((0, 1))

        return Function.apply(x, self.scale.to(x.dtype)), state


# Around a mixer -----------------------------------------------------------------------------------

class NotSaved(Honest):
    """Random features that no checkpoint has."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("features", torch.randn(config.n_embd), persistent=False)

    def mix(self, x, state):
        return x * self.features.to(x.dtype), state


class NotSavedList(Honest):
    """The same in a list."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.features = torch.randn(config.n_embd).tolist()

    def mix(self, x, state):
        return x * torch.tensor(self.features, dtype=x.dtype), state


class CounterNotSaved(Numbered):
    """A schedule by steps that begins anew after a resume."""

    def apply_statistics(self):
        self.calls += 1

    def mix(self, x, state):
        return x * (1 + self.calls / 1000), state


class Hashed(Honest):
    """A constant from the hash of a string."""

    def mix(self, x, state):
        return x * (1 + hash("hashed") % 1000 / 1000), state


class OrderOfASet(Honest):
    """Channels in the order of a set of strings."""

    def mix(self, x, state):
        order = [int(name) for name in {str(i) for i in range(x.size(2))}]
        return x[..., order], state


class FewFlops(Honest):
    """Declares a product less than it has."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.first = nn.Linear(config.n_embd, config.n_embd)

    def mix(self, x, state):
        return self.first(x), state

    def flops_per_token(self, T):
        return 2 * self.proj.weight.numel()


class NoAttentionFlops(Honest):
    """Declares no product of T x T."""

    def mix(self, x, state):
        later = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
        return (x @ x.mT / 8).masked_fill(later, -torch.inf).softmax(-1) @ x, state

    def flops_per_token(self, T):
        return 2 * self.proj.weight.numel()


class Reseeds(Honest):
    """Seeds torch's generator in every call."""

    def mix(self, x, state):
        torch.manual_seed(0)
        return x, state


class Overwritten(Honest):
    """Gives its outputs in the same tensor every time, where no gradients are recorded."""

    def forward(self, x, state=None):
        y = self.proj(x)
        if torch.is_grad_enabled():
            return y, state
        if getattr(self, "room", y[:0]).shape != y.shape or self.room.dtype != y.dtype:
            self.room = torch.empty_like(y)
        return self.room.copy_(y), state


class SeesEvaluation(Honest):
    """Collects its statistics from validation too."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("collected", torch.zeros(()))

    def mix(self, x, state):
        self.collected.copy_(x.detach().square().mean())
        return x + self.mean, state

    def apply_statistics(self):
        self.mean.lerp_(self.collected, 0.1)


class Stale(Honest):
    """What a shape gave once it gives again."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.scales = collections.OrderedDict()

    def mix(self, x, state):
        scale = self.scales.setdefault(tuple(x.shape), x.detach().abs().amax())
        return x / scale.to(x.dtype).clamp(min=1), state


# name -> the mixer and the check that must find it
PLANTED_WIDE = {
    "beyond_600": (Beyond600, "lengths"),
    "beyond_1000_in_training": (Beyond1000InTraining, "lengths"),
    "every_96": (Every96, "lengths"),
    "chunks_80": (Chunks80, "lengths"),
    "one_position": (OnePosition, "lengths"),
    "whole_block": (WholeBlock, "lengths"),
    "scaled_positions": (ScaledPositions, "lengths"),
    "hidden_late": (HiddenLate, "lengths"),
    "tiny": (Tiny, "suffix gradient"),
    "large_only": (LargeOnly, "inputs"),
    "repeats": (Repeats, "inputs"),
    "padding": (Padding, "inputs"),
    "zero_rows": (ZeroRows, "inputs"),
    "equal_tokens": (EqualTokens, "inputs"),
    "positive": (Positive, "inputs"),
    "twelve_rows": (TwelveRows, "batches"),
    "later_rows": (LaterRows, "batches"),
    "row_number": (RowNumber, "batches"),
    "fourth_layer": (FourthLayer, "sizes"),
    "last_of_many": (LastOfMany, "sizes"),
    "wide_heads": (WideHeads, "sizes"),
    "learned_positions": (LearnedPositions, "sizes"),
    "without_gradients": (WithoutGradients, "modes"),
    "with_gradients": (WithGradients, "modes"),
    "inference_mode": (InferenceMode, "modes"),
    "compiled_only": (CompiledOnly, "compiled"),
    "after_300_calls": (After300Calls, "used"),
    "after_100_steps": (After100Steps, "used"),
    "after_100_training_calls": (After100TrainingCalls, "used"),
    "in_the_module": (InTheModule, "carried"),
    "by_handle": (ByHandle, "carried"),
    "half_in_the_module": (HalfInTheModule, "carried"),
    "ring": (Ring, "decode"),
    "low_decode": (LowDecode, "decode"),
    "float_decode": (FloatDecode, "decode"),
    "low_decode_of_floats": (LowDecodeOfFloats, "decode"),
    "declares_200": (Declares200, "declared"),
    "decode_of_many_rows": (DecodeOfManyRows, "decode"),
    "sign_flipped": (SignFlipped, "derivative"),
    "input_gradient": (InputGradient, "derivative"),
    "flipped_by_detach": (FlippedByDetach, "derivative"),
    "twice_wrong": (TwiceWrong, "backward"),
    "kept_for_backward": (KeptForBackward, "backward"),
    "flipped_in_floats": (FlippedInFloats, "slopes"),
    "overwritten": (Overwritten, "aside"),
    "in_place_late": (InPlaceLate, "branch"),
    "not_saved": (NotSaved, "saved"),
    "not_saved_list": (NotSavedList, "saved"),
    "counter_not_saved": (CounterNotSaved, "saved"),
    "hashed": (Hashed, "process"),
    "order_of_a_set": (OrderOfASet, "process"),
    "few_flops": (FewFlops, "flops"),
    "no_attention_flops": (NoAttentionFlops, "flops"),
    "reseeds": (Reseeds, "aside"),
    "sees_evaluation": (SeesEvaluation, "aside"),
    "stale": (Stale, "length"),
}

if __name__ == "<run_path>":
    MIXERS.update({name: mixer for name, (mixer, _) in PLANTED_WIDE.items()})
    MIXERS["running"] = Running
