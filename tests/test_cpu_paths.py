"""What a CPU does in its own way to be fast, against the plain way."""
import copy
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from mixers import MIXERS
from mixers.parts.cpu_attention import BLOCK, KEPT, LONG, MANY, BlockedAttention
from mixers.parts.heads import causal_attention
from mixers.parts.products import (
    always_fast_products, exact_product, fast_products, onednn_is_exact)
from mixers.swa import windowed_attention
from model import GPT, Dropout, GPTConfig
from training.device import CPU_TOKENS_AT_ONCE, PackedLinear, ready_to_decode, rows_per_pass

needs_mkldnn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build has no oneDNN")


@contextmanager
def setting_of(precision):
    """What float32 products may be rounded to, for a while."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = precision
        yield
    finally:
        setting.fp32_precision = before


def relative(rough, exact):
    return ((rough.double() - exact).norm() / exact.norm()).item()


def fused(q, k, v):
    """PyTorch's own kernel, of the last queries over all keys."""
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def errors(attention, inputs, dy, dtype=torch.bfloat16):
    """Of y and the gradients of inputs, in this dtype, relative to float64's."""
    def results(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]
    rough = results(attention, dtype)
    exact = results(attention, torch.float64)
    assert all(t.dtype == dtype for t in rough)
    return [relative(a, b) for a, b in zip(rough, exact)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_gradient_of_the_gradient_is_right_or_refused(mixer):
    torch.manual_seed(0)
    block = GPT(GPTConfig(vocab_size=65, block_size=80, n_layer=1, n_head=2, n_embd=32,
                          mixer=mixer, pos="rope")).blocks[0].double()
    x, dy, direction = torch.randn(3, 1, 80, 32, dtype=torch.float64)

    def gradient(x, create_graph=False):
        [found] = torch.autograd.grad(block(x)[0], x, dy, create_graph=create_graph)
        return found

    try:
        at = x.clone().requires_grad_()
        [ours] = torch.autograd.grad(gradient(at, create_graph=True), at, direction)
    except RuntimeError as error:  # ours, or of PyTorch's fused kernel
        assert "no create_graph" in str(error) or "is not implemented" in str(error)
        return
    near = [(x + step * direction).requires_grad_() for step in (1e-5, -1e-5)]
    expected = (gradient(near[0]) - gradient(near[1])) / 2e-5
    assert relative(ours, expected) < 1e-4


def drawn(T, D, std, new=None):
    """q, k, v and dy (2, 4, T, D) in bfloat16, whose scores have this standard deviation."""
    g = torch.Generator().manual_seed(T + std)
    q, k, v, dy = (torch.randn(2, 4, T, D, generator=g) for _ in range(4))
    q, k = q * std ** 0.5, k * std ** 0.5
    last = slice(T - (new or T), T)
    return [t.bfloat16() for t in (q[:, :, last], k, v)], dy[:, :, last].bfloat16()


@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("std", [1, 9, 25])
@pytest.mark.parametrize("T, new", [
    (17, 17), (64, 64), (BLOCK - 1, BLOCK - 1), (BLOCK, BLOCK), (BLOCK + 1, BLOCK + 1), (300, 300),
    (64, 1), (BLOCK, 1), (300, 1), (300, 5),
])
def test_attention_is_as_exact_as_the_fused_kernel(T, new, std, D):
    inputs, dy = drawn(T, D, std, new)
    ours, theirs = errors(causal_attention, inputs, dy), errors(fused, inputs, dy)
    assert all(a < 1.5 * b for a, b in zip(ours, theirs)), (ours, theirs)
    # and alike for every length, in training and in decoding
    assert all(a < 0.0035 for a in ours), ours


@pytest.mark.parametrize("T", [17, 64, BLOCK + 1, 300, KEPT + 1, LONG])
def test_attention_in_float32_keeps_its_digits(T):
    inputs, dy = drawn(T, 32, 9)
    found = errors(causal_attention, inputs, dy, torch.float32)
    assert all(error < 5e-6 for error in found), found
    with setting_of("bf16" if onednn_is_exact() else "ieee"):  # as training has it
        found = errors(causal_attention, inputs, dy, torch.float32)
    assert all(error < 5e-6 for error in found), found


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.0035), (torch.float32, 1e-6),
                                          (torch.float64, 1e-14)])
@pytest.mark.parametrize("std", [1, 25])
@pytest.mark.parametrize("new", [MANY, 299])
def test_many_tokens_behind_others_are_as_in_the_whole(new, std, dtype, limit, monkeypatch):
    """Without a gradient; with one, and where the kernel is missing, masked."""
    inputs, _ = drawn(300, 32, std, new)
    exact = fused(*(t.double() for t in inputs))
    q, k, v = (t.to(dtype) for t in inputs)
    with torch.no_grad():
        y = causal_attention(q, k, v)
        monkeypatch.setattr("mixers.parts.heads.FLASH", None)
        masked = causal_attention(q, k, v)
    assert y.dtype == dtype and relative(y, exact) < limit and relative(masked, exact) < limit
    assert not torch.equal(y, masked)  # two ways


@pytest.mark.parametrize("W", [2, 16, BLOCK - 1, BLOCK, BLOCK + 1, 290, 400])
@pytest.mark.parametrize("T", [17, BLOCK + 1, 300, 700])
def test_attention_in_a_window_is_as_exact_as_the_fused_kernel(T, W):
    inputs, dy = drawn(T, 32, 9)

    def ours(q, k, v):
        return windowed_attention(q, (k[:, :, :0], v[:, :, :0]), (k, v), 0, W)

    def theirs(q, k, v):
        mask = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - W)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    ours, theirs = errors(ours, inputs, dy), errors(theirs, inputs, dy)
    assert all(a < 1.5 * b for a, b in zip(ours, theirs)), (ours, theirs)
    assert all(a < 0.0035 for a in ours), ours


@pytest.mark.parametrize("std", [1, 9, 25])
@pytest.mark.parametrize("T", [16, 64, 65, 200])
def test_linformer_is_as_exact_as_the_fused_kernel(T, std):
    """On slots that are given, which in a model are rounded to bfloat16 as keys and values are."""
    D, L, r = 32, 64, 4
    config = GPTConfig(vocab_size=3, n_embd=4 * D, linformer_segment=L, mixer="linformer")
    linformer = GPT(config).blocks[0].mixer
    inputs, dy = drawn(T, D, std)
    slots = [t.unflatten(2, (-1, L // r)).mean(3) for t in
             (u[:, :, :T // L * L] for u in inputs[1:])]

    def attention(q, k, v):
        return linformer.attend(q, k, v, *(t.to(q.dtype) for t in slots), 0, 0)

    ours, theirs = errors(attention, inputs, dy), errors(fused, inputs, dy)
    assert all(a < 1.5 * b for a, b in zip(ours, theirs)), (ours, theirs)


def test_the_exact_product_loses_nothing_and_leaves_the_setting():
    torch.manual_seed(0)
    a, b = torch.randn(6, 70, 40).bfloat16(), torch.randn(6, 40, 90).bfloat16()
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        product = exact_product(a.float(), b.float(), 0.5)
    assert product.dtype == torch.float32 and setting.fp32_precision == before
    assert relative(product, 0.5 * (a.double() @ b.double())) < 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_fast_products_round_nothing_and_leave_the_setting(exact, monkeypatch):
    if not exact:  # as on a processor that would round: MKL then
        monkeypatch.setattr("mixers.parts.products.onednn_is_exact", lambda: False)
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    a, b = torch.randn(48, 64, 64), torch.randn(48, 64, 32)
    with fast_products():
        product = a @ b
        assert exact or setting.fp32_precision == before
    assert relative(product, a.double() @ b.double()) < 1e-6
    assert setting.fp32_precision == before


@pytest.mark.parametrize("exact", [True, False])
def test_all_float32_products_are_fast_where_that_loses_nothing(exact, monkeypatch):
    setting = torch.backends.mkldnn.matmul
    monkeypatch.setattr("mixers.parts.products.onednn_is_exact", lambda: exact)
    with setting_of("ieee"):
        always_fast_products()
        assert setting.fp32_precision == ("bf16" if exact else "ieee")


@pytest.mark.skipif(not onednn_is_exact(), reason="rounds here, so it is never asked for")
@pytest.mark.parametrize("M, K, N", [
    (8192, 64, 192), (7, 1000, 33), (1, 384, 1536), (64, 8192, 64)])
def test_linear_layers_in_float32_keep_their_digits(M, K, N):
    torch.manual_seed(0)
    x, w, b, dy = (torch.randn(shape, dtype=torch.float64)
                   for shape in ((M, K), (N, K), (N,), (M, N)))

    def results(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        y = F.linear(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    exact = results(torch.float64)
    with fast_products():
        assert all(relative(a, e) < 2e-6 for a, e in zip(results(torch.float32), exact))


def test_a_processor_that_rounds_is_noticed(monkeypatch):
    plain = torch.Tensor.__matmul__

    def rounding(a, b):
        a = a.bfloat16().float() if a.dtype == torch.float32 else a
        return plain(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not onednn_is_exact.__wrapped__()


@pytest.mark.parametrize("missing", ["setting", "softmax_backward"])
def test_attention_in_blocks_without_what_pytorch_may_drop(missing, monkeypatch):
    if missing == "setting":
        monkeypatch.setattr(torch.backends.mkldnn, "matmul", None)
    else:
        monkeypatch.delattr(torch, "_softmax_backward_data")
    inputs, dy = drawn(200, 32, 9)
    assert all(error < 0.004 for error in errors(causal_attention, inputs, dy))


def test_attention_in_blocks_sees_nothing_later():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 16).bfloat16().requires_grad_() for _ in range(3))
    for t in (2, BLOCK - 1, BLOCK, 290):  # a first token alone has no weights to learn
        y = BlockedAttention.apply(q, k, v)
        for gradient in torch.autograd.grad(y[:, :, :t].float().square().sum(), (q, k, v)):
            assert gradient[:, :, t:].abs().max() == 0 and gradient[:, :, :t].abs().max() > 0
        later = torch.arange(300)[:, None] >= t
        changed = BlockedAttention.apply(q, k.masked_fill(later, 50.0), v.masked_fill(later, -50.0))
        assert torch.equal(changed[:, :, :t], y[:, :, :t])


@pytest.mark.parametrize("shape", [(5,), (3, 1001), (2, 7, 128)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p, shape):
    torch.manual_seed(0)
    drop, x = Dropout(p), torch.ones(200, *shape, requires_grad=True)
    y = drop(x)
    kept = y != 0
    n = x.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)), rtol=1e-3)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # what is dropped forward is dropped backward
    assert not torch.equal(drop(x) != 0, kept) or n < 20
    torch.manual_seed(0)
    assert torch.equal(drop(x), y)
    assert torch.equal(drop.eval()(x), x) and torch.equal(Dropout(0.0)(x), x)


def test_dropout_close_to_everything_stays_finite():
    assert Dropout(1 - 1e-9)(torch.ones(1000)).isfinite().all()


@needs_mkldnn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_a_packed_layer_is_the_layer_in_bfloat16(rows, bias):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(48, 80, bias=bias), torch.randn(rows, 3, 48)
    y = PackedLinear(linear)(x)
    assert y.dtype == torch.bfloat16 and relative(y, linear.double()(x.double()).detach()) < 0.01


PACKED = [dict(mixer=mixer) for mixer in sorted(MIXERS)] + [
    dict(arch="llama", n_kv_head=2),
    dict(embed_rank=4, tie_head=False),
    dict(mlp_activation="causal_max_context"),
]


def number_of(kind, model):
    """Modules of that class itself: a subclass of nn.Linear may not want to be rounded."""
    return sum(type(module) is kind for module in model.modules())


@needs_mkldnn
@pytest.mark.parametrize("options", PACKED)
def test_decoding_with_packed_weights_is_autocast(options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, block_size=32, n_layer=2, n_head=4, n_embd=32)
    model = GPT(GPTConfig(**sizes | options)).eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    idx = torch.randint(31, (2, 20))
    packed = ready_to_decode(copy.deepcopy(model), torch.bfloat16)
    assert number_of(PackedLinear, packed) == number_of(torch.nn.Linear, model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, state, logits = model(idx)[0], None, []
        for piece in idx.split([9, 1, 1, 6, 1, 1, 1], dim=1):
            new, state = packed.step(piece, state)
            logits.append(new)
    assert relative(torch.cat(logits, dim=1), expected.double()) < 0.02
    assert packed.state_bytes(20, torch.bfloat16) == model.state_bytes(20, torch.bfloat16)
    assert packed.flops_per_token(20) == model.flops_per_token(20)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_nothing_is_packed_in_float32():
    model = GPT(GPTConfig(vocab_size=31, n_layer=1, n_embd=16))
    assert ready_to_decode(model, torch.float32) is model
    assert number_of(PackedLinear, model) == 0


PASSES = [(12, 64, 1), (64, 256, 1), (64, 256, 4), (61, 256, 1), (6, 1000, 2), (2, 9000, 1)]


@pytest.mark.parametrize("batch_size, block_size, processes", PASSES)
def test_a_pass_divides_the_batch_and_fits_the_cache(batch_size, block_size, processes):
    rows = rows_per_pass(batch_size, block_size, torch.device("cpu"), processes)
    own = rows // processes
    assert rows % processes == 0 and batch_size % rows == 0
    assert own == 1 or own * block_size <= CPU_TOKENS_AT_ONCE
    whole = batch_size // processes
    larger = [n for n in range(own + 1, whole + 1) if whole % n == 0]
    assert all(n * block_size > CPU_TOKENS_AT_ONCE for n in larger)
    assert rows_per_pass(batch_size, block_size, torch.device("cuda"), processes) == batch_size
