"""The chunkwise engine against its oracle, and what linear, lln, lln_diag and performer build on
it."""
import math

import pytest
import torch
from test_mixers import make, tokens

from mixers.linear import log_elu_plus_one
from mixers.lln import DECAY, PUBLISHED_A, PUBLISHED_B, Matching, matching_table
from mixers.parts.chunkwise import CHUNK, by_decays, linear_attention
from mixers.performer import log_features, orthogonal_gaussian
from model import GPT, GPTConfig

LENGTHS = [1, 2, 63, 64, 65, 128, 130, 200]


def oracle(a, b, v):
    """The definition, in float64: a T x T matrix of log weights, one softmax over its visible half.
    Shapes as linear_attention's."""
    a, b, v = a.double(), b.double(), v.double()
    log_w = torch.logsumexp(a[:, :, :, None] + b[:, :, None], dim=-1)  # (B, H, T, T)
    later = torch.ones(log_w.shape[-2:], dtype=torch.bool).triu(1)
    return log_w.masked_fill(later, -math.inf).softmax(-1) @ v


def features(kind, T, dtype, size=60.0, D=16, E=8):
    g = torch.Generator().manual_seed(T)
    a, b = (torch.randn(2, 3, T, D, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 3, T, E, generator=g, dtype=torch.float64)
    if kind == "uniform":
        a, b = a.erf() * size, b.erf() * size
    elif kind == "opposed":  # q = -k
        a, b = torch.full_like(a, size), torch.full_like(b, -size)
    elif kind == "growing":
        b = b * 0.1 + torch.linspace(-size, size, T, dtype=torch.float64)[:, None]
    elif kind == "shrinking":
        b = b * 0.1 + torch.linspace(size, -size, T, dtype=torch.float64)[:, None]
    return a.to(dtype), b.to(dtype), v.to(dtype)


def assert_matches_oracle(a, b, v, tolerance):
    inputs = [t.requires_grad_() for t in (a, b, v)]
    y, _ = linear_attention(*inputs)
    expected = oracle(*inputs)
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(y.shape, generator=g, dtype=torch.float64)
    grads = torch.autograd.grad((y.double() * direction).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * direction).sum(), inputs)
    for got, exact in zip((y, *grads), (expected, *expected_grads)):
        error = (got - exact).abs().max().item()
        assert error <= tolerance * max(1, exact.abs().max().item()), f"error {error:.1e}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["normal", "uniform", "opposed", "growing", "shrinking"])
@pytest.mark.parametrize("T", LENGTHS)
def test_engine_is_the_quadratic_form(kind, T, dtype, tolerance):
    assert_matches_oracle(*features(kind, T, dtype), tolerance)


@pytest.mark.parametrize("place", [0, 1, 17, 62, 63, 64, 65, 100, 127, 129])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_one_huge_key_at_each_place_of_a_chunk(place, dtype, tolerance):
    a, b, v = features("normal", 130, dtype)
    b = b - 60
    b[:, :, place] = 60
    assert_matches_oracle(a, b, v, tolerance)
    # and no token before it feels it
    without = b.detach().clone()
    without[:, :, place] = -60
    y, _ = linear_attention(a, b, v)
    z, _ = linear_attention(a, without, v)
    moved = (y - z).abs().amax((0, 1, 3))
    assert (moved[:place] <= tolerance).all()
    assert moved.max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["uniform", "opposed", "growing", "shrinking"])
def test_no_overflow_and_no_empty_row_in_any_dtype(kind, dtype):
    a, b, v = (t.requires_grad_() for t in features(kind, 200, dtype))
    y, state = linear_attention(a, b, v)
    y.float().square().sum().backward()
    assert y.dtype == dtype and all(t.isfinite().all() for t in (y, a.grad, b.grad, v.grad, *state))
    assert state.S.dtype == torch.promote_types(dtype, torch.float32)
    # every row is a mean of the values: within their range
    low, high = v.double().amin(2, keepdim=True), v.double().amax(2, keepdim=True)
    assert (y.double() <= high + 0.02).all() and (y.double() >= low - 0.02).all()


def test_bfloat16_inputs_are_accumulated_in_float32():
    """The inputs' own rounding aside, the result is as good as float32's, also where autocast would
    have products in bfloat16."""
    a, b, v = features("normal", 300, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = linear_attention(a, b, v.float())
    assert y.dtype == torch.float32
    assert (y - oracle(a, b, v)).abs().max() < 1e-5


SPLITS = [[1] * 70, [64, 64, 2], [50, 1, 79], [129, 1]]


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "+".join(map(str, split[:4])))
@pytest.mark.parametrize("kind", ["normal", "uniform", "growing"])
def test_state_carries_the_sequence(kind, split):
    inputs = [t.requires_grad_() for t in features(kind, sum(split), torch.float64)]
    whole, end = linear_attention(*inputs)
    state, parts = None, []
    for a, b, v in zip(*(t.split(split, dim=2) for t in inputs)):
        y, state = linear_attention(a, b, v, state)
        parts.append(y)
    stepped = torch.cat(parts, dim=2)
    torch.testing.assert_close(stepped, whole, rtol=0, atol=1e-10)
    for got, exact in zip(state, end):
        torch.testing.assert_close(got, exact)
    direction = torch.randn_like(whole)
    of_steps = torch.autograd.grad((stepped * direction).sum(), inputs)
    of_whole = torch.autograd.grad((whole * direction).sum(), inputs)
    for got, exact in zip(of_steps, of_whole):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)


@pytest.fixture
def elsewhere(monkeypatch):
    """The CPU computes as other devices do, which must not look at the numbers."""
    monkeypatch.setattr("mixers.parts.chunkwise.chunkwise",
                        lambda a, b, v, state, *_: by_decays(a, b, v, state))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["normal", "uniform", "opposed", "growing", "shrinking"])
@pytest.mark.parametrize("T", [2, 65, 130])
def test_elsewhere_the_engine_is_the_same(elsewhere, kind, T, dtype, tolerance):
    assert_matches_oracle(*features(kind, T, dtype), tolerance)


@pytest.mark.parametrize("place", [0, 17, 63, 64, 129])
def test_elsewhere_one_huge_key_is_as_harmless(elsewhere, place):
    test_one_huge_key_at_each_place_of_a_chunk(place, torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["uniform", "opposed", "growing"])
def test_elsewhere_nothing_overflows(elsewhere, kind, dtype):
    test_no_overflow_and_no_empty_row_in_any_dtype(kind, dtype)
    test_bfloat16_inputs_are_accumulated_in_float32()


@pytest.mark.parametrize("kind", ["normal", "growing"])
def test_elsewhere_the_state_is_the_same_too(elsewhere, kind, monkeypatch):
    test_state_carries_the_sequence(kind, [50, 1, 79])
    a, b, v = features(kind, 130, torch.float64)
    _, elsewhere_state = linear_attention(a, b, v)
    monkeypatch.undo()
    for got, exact in zip(elsewhere_state, linear_attention(a, b, v)[1]):
        torch.testing.assert_close(got, exact)


def test_keys_may_grow_without_end():
    T = 40 * CHUNK
    a, v = torch.randn(1, 1, T, 4), torch.randn(1, 1, T, 4)
    growth = torch.arange(T)[:, None] * 0.5  # up to 1,280: exp of it is no float of any kind
    b = torch.randn(1, 1, T, 4) + growth
    y, state = linear_attention(a, b, v)
    assert y.isfinite().all() and all(t.isfinite().all() for t in state)
    last = slice(T - 200, T)
    assert (y - oracle(a, b, v))[:, :, last].abs().max() < 1e-4


def test_training_memory_grows_linearly_with_length():
    """What autograd keeps: twice the tokens, about twice the bytes; a T x T matrix would take four
    times."""
    def kept(T):
        total = {}
        a, b, v = (torch.randn(1, 1, T, 16, requires_grad=True) for _ in range(3))
        def pack(t):
            total[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = linear_attention(a, b, v)
        assert total and y is not None
        return sum(total.values())
    assert kept(4096) / kept(2048) < 2.2


# The mixers on top ---------------------------------------------------------------------------

def heads_of(mixer, x):
    q, k, v, _ = mixer.c_attn(x)
    G = q.size(1) // k.size(1)
    return q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)


def project(mixer, y):
    return mixer.c_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("skeleton", ["gpt2", "llama"])
def test_linear_is_elu_plus_one(skeleton):
    mixer, x = make("linear", skeleton).blocks[0].mixer, torch.randn(2, 70, 32, dtype=torch.float64)
    q, k, v = heads_of(mixer, x)
    phi_q = torch.nn.functional.elu(q) + 1
    phi_k = torch.nn.functional.elu(k) + 1
    w = (phi_q @ phi_k.mT).tril()
    expected = project(mixer, w @ v / w.sum(-1, keepdim=True))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-11)
    u = torch.tensor([-60.0, -3.0, 0.0, 2.0, 60.0])
    phi = torch.where(u > 0, u.double() + 1, u.double().exp()).float()
    torch.testing.assert_close(log_elu_plus_one(u).exp(), phi, rtol=1e-6, atol=0)


@pytest.mark.parametrize("skeleton", ["gpt2", "llama"])
def test_lln_is_the_papers(skeleton):
    mixer, x = make("lln", skeleton).blocks[0].mixer, torch.randn(2, 70, 32, dtype=torch.float64)
    mixer.q_moments.square.uniform_(1, 3)  # heads that differ
    mixer.k_moments.square.uniform_(1, 3)
    q, k, v = heads_of(mixer, x)
    alpha, beta = mixer.alpha_beta()
    w = ((alpha[:, None, None] * q).exp() @ (beta[:, None, None] * k).exp().mT).tril()
    expected = project(mixer, w @ v / w.sum(-1, keepdim=True))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-11)


def log_weight_variance(s, D):
    """Of log(phi_q(q) . phi_k(k)) for Gaussian q, k and alpha sigma_q = beta sigma_k = s, from
    fresh samples."""
    g = torch.Generator().manual_seed(99)
    a, b = (s * torch.randn(40000, D, generator=g, dtype=torch.float64) for _ in range(2))
    return torch.logsumexp(a + b, dim=1).var().item()


@pytest.mark.parametrize("D", [16, 32, 64, 128])
@pytest.mark.parametrize("product", [1.0, 1.5, 2.0, 2.5, 3.0])
def test_moment_matching_reaches_its_target(D, product):
    s = Matching(D)(torch.tensor(product)).item()
    assert log_weight_variance(s, D) == pytest.approx(product ** 2, rel=0.1)
    sigma_q, sigma_k = product / 0.8, 0.8
    q, k = torch.randn(40000, D) * sigma_q, torch.randn(40000, D) * sigma_k
    plain = torch.logsumexp(q + k, dim=1).var().item()
    assert plain < 0.7 * product ** 2  # alpha = beta = 1


def test_moment_matching_at_the_start_of_training_and_far_out():
    for D in (16, 64):
        match, table = Matching(D), matching_table(D)
        s = match(torch.tensor(0.05)).item()
        assert log_weight_variance(s, D) == pytest.approx(0.0025, rel=0.1)
        assert match(torch.tensor(0.0)) == 0 and match(torch.tensor(1e9)).isfinite()
        assert (table.diff() >= 0).all() and torch.equal(table, matching_table.__wrapped__(D))


def test_published_matching_is_the_papers_fit():
    mixer = make("lln", lln_matching="published").blocks[0].mixer
    mixer.q_moments.square.fill_(4.0)
    alpha, beta = mixer.alpha_beta()
    s = math.sqrt((4.0 - PUBLISHED_B) / (2 * PUBLISHED_A))
    torch.testing.assert_close(alpha, torch.full_like(alpha, s / 2))
    torch.testing.assert_close(beta, torch.full_like(beta, s))
    # what these constants reach for a target of 4
    assert log_weight_variance(s, 64) == pytest.approx(4.8, rel=0.1)


@pytest.mark.parametrize("mixer", ["lln", "lln_diag"])
@pytest.mark.parametrize("skeleton", ["gpt2", "llama"])
def test_lln_statistics_are_collected_in_training_and_applied_once(mixer, skeleton):
    def after(parts, applications=1):
        model = make(mixer, skeleton).train()
        for _ in range(applications):
            for part in tokens(12, 64).split(12 // parts):
                model(part)
            model.apply_statistics()
        return model
    one, two, start = after(1), after(2), make(mixer, skeleton)
    for (name, a), b, s in zip(one.named_buffers(), two.buffers(), start.buffers()):
        if "moments" in name and "collected" not in name:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
            assert not torch.equal(a, s)
    # the values: a moving average of the moments over rows, tokens and the head's channels
    first = start.blocks[0]
    h = start.embed(tokens(12, 64))
    if start.pos_embed:
        h = h + start.pos_embed.weight[:64]
    q, k, *_ = first.mixer.c_attn(first.norm1(h))
    for x, moments in ((q, one.blocks[0].mixer.q_moments), (k, one.blocks[0].mixer.k_moments)):
        torch.testing.assert_close(moments.mean, (1 - DECAY) * x.mean((0, 2, 3)))
        torch.testing.assert_close(moments.square, DECAY + (1 - DECAY) * x.square().mean((0, 2, 3)))
    # never at evaluation, and the first batch sees the start values
    start.eval()(tokens())
    before = [b.clone() for b in start.buffers()]
    start.apply_statistics()
    assert all(torch.equal(a, b) for a, b in zip(before, start.buffers()))
    torch.testing.assert_close(start.train()(tokens())[0], start.eval()(tokens())[0])


@pytest.mark.parametrize("mode", ["mean", "sum", "convex"])
@pytest.mark.parametrize("skeleton", ["gpt2", "llama"])
def test_lln_diag_is_lln_and_softmax_within_blocks(mode, skeleton):
    model = make("lln_diag", skeleton, lln_diag_mode=mode)
    mixer, x = model.blocks[0].mixer, torch.randn(2, 45, 32, dtype=torch.float64)
    q, k, v = heads_of(mixer, x)
    alpha, beta = mixer.alpha_beta()
    w = ((alpha[:, None, None] * q).exp() @ (beta[:, None, None] * k).exp().mT).tril()
    lln = w @ v / w.sum(-1, keepdim=True)
    if skeleton == "llama":
        from mixers.parts.heads import rotate
        q, k = rotate(q, 0, 10000.0), rotate(k, 0, 10000.0)
    position = torch.arange(45)
    visible = (position[:, None] // 8 == position // 8) & (position[:, None] >= position)  # D = 8
    diag = (q @ k.mT / math.sqrt(8)).masked_fill(~visible, -math.inf).softmax(-1) @ v
    if mode == "mean":
        r, p = 0.5, 0.5
    elif mode == "sum":
        r, p = mixer.r.view(4, 1, 8), mixer.p.view(4, 1, 8)
    else:
        r = mixer.r.view(4, 1, 8)
        p = 1 - r
    torch.testing.assert_close(mixer(x)[0], project(mixer, r * lln + p * diag), rtol=0, atol=1e-11)


def test_lln_diag_weights_start_at_one_half():
    from model import GPT, GPTConfig
    def new(mode):
        config = GPTConfig(vocab_size=31, mixer="lln_diag", lln_diag_mode=mode)
        return GPT(config).blocks[0].mixer

    assert (new("sum").r == 0.5).all() and (new("sum").p == 0.5).all()
    assert (new("convex").r == 0.5).all()
    assert new("convex").p is None and new("mean").r is None and new("sum").r.shape == (128,)


def softmax_attention(q, k, v):
    later = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
    return (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(later, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("D", [16, 32, 64])
def test_performers_kernel_has_no_bias(D):
    """E[phi(q).phi(k)] = exp(q.k / sqrt(D)), also along (1, .., 1), which LAPACK's signs favour."""
    omega = orthogonal_gaussian(2**17, D, torch.Generator().manual_seed(D)).double()
    along = torch.ones(D, dtype=torch.float64) / math.sqrt(D)
    for direction in (along, -along, torch.eye(D, dtype=torch.float64)[0]):
        x = direction * 0.75 * D ** 0.25  # |u_q + u_k| = 1.5
        log_phi = log_features(x.view(1, 1, 1, D), omega)
        estimate = (2 * log_phi).exp().sum().item()
        exact = math.exp(0.75 ** 2)
        # its standard deviation with independent directions; orthogonal ones have less
        deviation = math.sqrt((math.exp(1.5 ** 2) - 1) / 2**17)
        assert abs(estimate / exact - 1) < 4 * deviation < 0.04


def test_performer_converges_to_softmax_attention():
    """The mean square error over draws falls about as 1 / m, and goes on falling."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 16, generator=g, dtype=torch.float64) for _ in range(3))
    q, k = q / 2, k / 2  # of ordinary size: the estimate's variance is exponential in it
    exact = softmax_attention(q, k, v)

    def relative_error(m, draws):
        total = 0.0
        for _ in range(draws):
            omega = orthogonal_gaussian(m, 16, g).double()
            y, _ = linear_attention(log_features(q, omega), log_features(k, omega), v)
            total += ((y - exact).norm() / exact.norm()).square().item()
        return math.sqrt(total / draws)

    errors = [relative_error(m, draws=8) for m in (16, 64, 256, 1024, 4096)]
    errors += [relative_error(m, draws=2) for m in (2**14, 2**16)]
    print(errors)
    # four times the features: half the error; a bias would hold it at some level
    assert all(later < 0.7 * earlier for earlier, later in zip(errors, errors[1:])), errors
    assert errors[-1] < 0.008


def test_performer_features_are_orthogonal_seeded_and_saved():
    omega = orthogonal_gaussian(40, 16, torch.Generator().manual_seed(0))
    gram = omega[:16] @ omega[:16].T
    assert (gram - gram.diag().diag()).abs().max() < 1e-4 * gram.max()
    lengths = orthogonal_gaussian(4096, 16, torch.Generator().manual_seed(1)).square().sum(1)
    assert lengths.mean().item() == pytest.approx(16, rel=0.05)  # as Gaussian vectors have them
    model, twin = make("performer"), make("performer")
    assert torch.equal(model.blocks[0].mixer.features.omega, twin.blocks[0].mixer.features.omega)
    first, second = (block.mixer.features.omega for block in model.blocks)
    assert not torch.equal(first, second)
    assert "blocks.0.mixer.features.omega" in model.state_dict()
    from model import GPT, GPTConfig
    mixer = GPT(GPTConfig(vocab_size=31, mixer="performer")).blocks[0].mixer
    assert mixer.features.omega.shape == (112, 32)  # 32 log 32 = 110.9


def test_performer_redraws_on_schedule():
    model = make("performer", performer_redraw=3)
    omegas = []
    for _ in range(7):
        model.apply_statistics()
        omegas.append(model.blocks[0].mixer.features.omega.clone())
    same = [torch.equal(a, b) for a, b in zip(omegas, omegas[1:])]
    assert same == [True, False, True, True, False, True]
    features = model.to("meta").blocks[0].mixer.features  # what is read at each step stays
    assert (features.steps.item(), features.omega.device.type) == (7, "meta")


@pytest.mark.parametrize("skeleton", ["gpt2", "llama"])
def test_linformer_is_one_softmax_over_slots_and_own_segment(skeleton):
    model = make("linformer", skeleton, linformer_segment=16, linformer_slots=3)
    mixer, x = model.blocks[0].mixer, torch.randn(1, 45, 32, dtype=torch.float64)
    q, k, v = heads_of(mixer, x)
    if skeleton == "llama":
        from mixers.parts.heads import rotate
        q, k = rotate(q, 0, 10000.0), rotate(k, 0, 10000.0)
    expected = torch.empty_like(q)
    for t in range(45):
        start = t // 16 * 16
        completed = range(0, start, 16)
        slots_k = [mixer.E @ k[:, :, s:s + 16] for s in completed]
        slots_v = [mixer.F @ v[:, :, s:s + 16] for s in completed]
        keys = torch.cat([*slots_k, k[:, :, start:t + 1]], dim=2)
        values = torch.cat([*slots_v, v[:, :, start:t + 1]], dim=2)
        weights = (q[:, :, t:t + 1] @ keys.mT / math.sqrt(8)).softmax(-1)
        expected[:, :, t:t + 1] = weights @ values
    torch.testing.assert_close(mixer(x)[0], project(mixer, expected), rtol=0, atol=1e-11)


def test_statistics_stay_in_float32_in_a_bfloat16_model():
    for mixer in ("lln", "lln_diag", "performer"):
        model = make(mixer).bfloat16().train()
        own = [b for name, b in model.named_buffers() if b.is_floating_point()]
        assert own and all(b.dtype == torch.float32 for b in own)
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        for _ in range(300):
            model(tokens(2, 32))
            model.apply_statistics()
        # 300 steps of one batch: the averages are 95 % there, where bfloat16 ones had stalled
        if mixer == "lln":
            moments = model.blocks[0].mixer.q_moments
            model(tokens(2, 32))
            seen = moments.collected[1] / moments.collected[2]
            expected = (seen + (1 - seen) * DECAY ** 300).to(moments.square.dtype)
            torch.testing.assert_close(moments.square, expected, rtol=0.02, atol=0)


def test_the_matching_table_is_real_whatever_device_a_model_is_built_on():
    """It is kept for all later models: one counted on the meta device must not leave it there."""
    matching_table.cache_clear()
    with torch.device("meta"):
        GPT(GPTConfig(vocab_size=5, n_layer=1, n_head=1, n_embd=8, mixer="lln"))
    assert matching_table(8).device.type == "cpu"
