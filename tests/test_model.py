"""The skeleton: Hugging Face's GPT-2 and LLaMA reproduced, options of the head and the embedding,
generation."""
import math
import re

import pytest
import torch

from mixers import MIXERS
from model import GPT, GPTConfig, sample


def redraw(model):
    """Every parameter from N(0, 0.2^2): large enough that activations, biases and norms show in the
    logits."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def assert_same_logits(ours, theirs, idx):
    with torch.no_grad():
        expected = theirs(idx).logits
        got = ours(idx)[0]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def copy(pairs):
    with torch.no_grad():
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape
            ours.copy_(theirs)


def test_gpt2_is_hugging_faces():
    from transformers import GPT2Config, GPT2LMHeadModel
    theirs = redraw(GPT2LMHeadModel(GPT2Config(
        vocab_size=97, n_positions=48, n_embd=64, n_layer=3, n_head=4)))
    ours = GPT(GPTConfig(
        vocab_size=97, block_size=48, n_embd=64, n_layer=3, n_head=4, arch="gpt2")).eval()
    body = theirs.transformer
    pairs = [(ours.embed.weight, body.wte.weight), (ours.pos_embed.weight, body.wpe.weight),
             (ours.norm.weight, body.ln_f.weight), (ours.norm.bias, body.ln_f.bias)]
    for block, h in zip(ours.blocks, body.h):
        for linear, conv in (
            (block.mixer.c_attn.proj, h.attn.c_attn), (block.mixer.c_proj, h.attn.c_proj),
            (block.mlp.c_fc, h.mlp.c_fc), (block.mlp.c_proj, h.mlp.c_proj),
        ):
            pairs += [(linear.weight, conv.weight.T), (linear.bias, conv.bias)]
        for norm, ln in ((block.norm1, h.ln_1), (block.norm2, h.ln_2)):
            pairs += [(norm.weight, ln.weight), (norm.bias, ln.bias)]
    assert len(pairs) == len(list(ours.parameters()))
    copy(pairs)
    assert_same_logits(ours, theirs, torch.randint(97, (2, 48)))


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_llama_is_hugging_faces(n_kv_head):
    from transformers import LlamaConfig, LlamaForCausalLM
    theirs = redraw(LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=n_kv_head, max_position_embeddings=48,
        rms_norm_eps=1e-6, tie_word_embeddings=False)))
    ours = GPT(GPTConfig(
        vocab_size=97, block_size=48, n_embd=64, n_layer=3, n_head=4, n_kv_head=n_kv_head,
        arch="llama")).eval()
    body = theirs.model
    pairs = [
        (ours.embed.weight, body.embed_tokens.weight), (ours.norm.weight, body.norm.weight),
        (ours.head.weight, theirs.lm_head.weight),
    ]
    for block, layer in zip(ours.blocks, body.layers):
        a, f = layer.self_attn, layer.mlp
        qkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight])
        gate_up = torch.cat([f.gate_proj.weight, f.up_proj.weight])
        pairs += [
            (block.mixer.c_attn.proj.weight, qkv),
            (block.mixer.c_proj.weight, a.o_proj.weight),
            (block.mlp.c_fc.weight, gate_up),
            (block.mlp.c_proj.weight, f.down_proj.weight),
            (block.norm1.weight, layer.input_layernorm.weight),
            (block.norm2.weight, layer.post_attention_layernorm.weight),
        ]
    assert len(pairs) == len(list(ours.parameters()))
    copy(pairs)
    assert_same_logits(ours, theirs, torch.randint(97, (2, 48)))


def make(**options):
    sizes = dict(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=16)
    return redraw(GPT(GPTConfig(**sizes | options)))


def test_loss_is_the_mean_over_targets_and_ignores_minus_one():
    model, idx = make(), torch.randint(31, (3, 8))
    targets = torch.randint(31, (3, 8))
    targets[0, :5] = -1
    logits, loss = model(idx, targets)
    kept = targets != -1
    by_hand = -logits.double().log_softmax(-1)[kept].gather(1, targets[kept][:, None]).mean()
    torch.testing.assert_close(loss.double(), by_hand)
    assert torch.equal(model.loss(idx, targets), loss)
    alone, none = model(idx)
    assert none is None and torch.equal(alone, logits)


def training_pass(mixer, checkpointed):
    """The loss, gradients and buffers of a pass with dropout, as training runs it; and the bytes
    kept for its second half."""
    model = make(mixer=mixer, n_layer=3, dropout=0.1).train()
    model.checkpoint_activations = checkpointed
    idx, kept = torch.randint(31, (2, 17)), []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    watch = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with watch, torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(idx[:, :-1], idx[:, 1:])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss, **gradients, **dict(model.named_buffers())}, sum(kept)


@pytest.mark.parametrize("mixer", [*MIXERS, "softmax,lln,pelican"])
def test_checkpointed_activations_change_nothing_and_are_not_kept(mixer):
    whole, kept = training_pass(mixer, checkpointed=False)
    again, still_kept = training_pass(mixer, checkpointed=True)
    for name in whole:
        if name.endswith("collected"):  # twice, so that their mean is the same
            again[name] /= 2
        assert torch.equal(again[name], whole[name]), name
    assert 0 < still_kept < kept / 2


def test_head_temperature_divides_the_logits():
    idx = torch.randint(31, (1, 8))
    torch.testing.assert_close(make(head_temperature=0.1)(idx)[0], make()(idx)[0] / 0.1)
    assert GPTConfig(vocab_size=3, mixer="pelican").head_temperature == 0.1
    assert GPTConfig(vocab_size=3, mixer="pelican,softmax").head_temperature == 1.0
    assert GPTConfig(vocab_size=3, mixer="pelican", head_temperature=1).head_temperature == 1.0


def test_a_zero_head_starts_at_the_uniform_distribution():
    model = GPT(GPTConfig(vocab_size=31, block_size=16, zero_init_head=True, tie_head=False))
    idx = torch.randint(31, (2, 16))
    assert model.loss(idx, idx).item() == pytest.approx(math.log(31), abs=1e-6)


def test_a_low_rank_embedding_has_its_parameters_and_its_scale():
    model = GPT(GPTConfig(vocab_size=3000, n_embd=128, embed_rank=10, tie_head=False,
                          init_std=0.02))
    assert model.embed[0].weight.shape == (3000, 10)
    assert model.embed[1].weight.shape == (128, 10) and model.embed[1].bias is None
    assert model.parameter_groups()["embedding"] == 3000 * 10 + 128 * 10 + 64 * 128
    assert model.embed(torch.arange(3000)).std().item() == pytest.approx(0.02, rel=0.1)


def test_behind_a_low_rank_embedding_hidden_states_are_float32_as_behind_a_whole_one():
    for options in (dict(), dict(embed_rank=4, tie_head=False)):
        seen = []

        def note(block, args, seen=seen):
            seen.append(args[0].dtype)

        model = GPT(GPTConfig(vocab_size=31, block_size=16, n_embd=32, arch="llama", **options))
        model.blocks[1].register_forward_pre_hook(note)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randint(31, (2, 16)))
        assert seen == [torch.float32]


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=500, n_embd=256, n_head=4, n_layer=8, init_std=0.02))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (p == (1 if "norm" in name and "weight" in name else 0)).all(), name


def test_sizes_follow_the_architecture():
    gpt2 = GPTConfig(vocab_size=3, n_embd=96)
    llama = GPTConfig(vocab_size=3, n_embd=96, arch="llama")
    assert (gpt2.ffn_hidden, llama.ffn_hidden) == (384, 256)
    assert GPTConfig(vocab_size=3, n_embd=768, n_head=12, arch="llama").ffn_hidden == 2048
    assert (gpt2.bias, gpt2.pos, gpt2.tie_head) == (True, "learned", True)
    assert (gpt2.norm_eps, gpt2.mlp_activation) == (1e-5, "gelu")
    assert (llama.bias, llama.pos, llama.tie_head) == (False, "rope", False)
    assert (llama.norm_eps, llama.mlp_activation) == (1e-6, "silu")
    biased = GPT(GPTConfig(vocab_size=3, n_embd=96, arch="llama", ffn_bias=True))
    names = [name for name, _ in biased.named_parameters() if name.endswith("bias")]
    assert len(names) == 8 and all(".mlp." in name for name in names)


def test_a_tied_head_is_one_tensor():
    model = GPT(GPTConfig(vocab_size=31))
    assert model.head.weight is model.embed.weight
    assert GPT(GPTConfig(vocab_size=31, tie_head=False)).head.weight.shape == (31, 128)


@pytest.mark.parametrize("options, words", [
    (dict(n_embd=10, n_head=3), "n_embd 10.*n_head 3"),
    (dict(n_head=4, n_kv_head=3), "n_head 4.*n_kv_head 3"),
    (dict(pos="rope", n_embd=12, n_head=4), "rope.*12.*4.*3"),
    (dict(zero_init_head=True), "zero_init_head.*tie_head"),
    (dict(embed_rank=4), "embed_rank.*tie_head"),
    (dict(mixer="foo"), "'foo'.*have.*softmax"),
    (dict(vocab_size=0), "vocab_size"), (dict(n_layer=0), "n_layer"),
    (dict(dropout=1.0), "dropout"), (dict(arch="bert"), "arch"),
    (dict(head_temperature=0), "head_temperature"), (dict(n_layer="4"), "n_layer"),
    (dict(bias=1), "bias"), (dict(nlayer=4), "nlayer"),
    (dict(vocab_size=10**30), "vocab_size"), (dict(n_embd=2**30, n_head=1), "ffn_hidden"),
    (dict(norm_eps=float("nan")), "norm_eps"), (dict(mixer=None), "mixer"),
    (dict(mixer="softmax", ssa_position="paper"), "ssa_position.*no layer"),
])
def test_bad_values_are_named(options, words):
    with pytest.raises(ValueError) as error:
        GPTConfig(**dict(vocab_size=31) | options)
    assert re.search(words, str(error.value), re.DOTALL)


@pytest.mark.parametrize("pos", ["rope", "none"])
def test_step_goes_on_past_block_size_without_learned_positions(pos):
    model, idx = make(pos=pos), torch.randint(31, (1, 40))
    _, state = model.step(idx[:, :16])
    logits, state = model.step(idx[:, 16:], state)
    torch.testing.assert_close(logits, model(idx)[0][:, 16:])
    assert state.n == 40


def test_learned_positions_end_at_block_size():
    model, idx = make(), torch.randint(31, (1, 17))
    with pytest.raises(ValueError, match="17 tokens.*block_size 16"):
        model(idx)
    _, state = model.step(idx[:, :16])
    with pytest.raises(ValueError, match="17 tokens"):
        model.step(idx[:, 16:], state)
    with pytest.raises(ValueError, match="T >= 1"):
        model.step(idx[:, :0])


def slow_generate(model, idx, n, context):
    """Greedy decoding that computes everything anew for each token; context(tokens so far) is what
    the model reads."""
    for _ in range(n):
        logits, _ = model(context(idx))
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize("mixer", ["softmax", "causal_max_context", "pelican"])
def test_generate_is_greedy_decoding_without_a_state(mixer):
    idx = torch.randint(31, (2, 5))
    model = make(pos="rope", mixer=mixer)
    slow = slow_generate(model, idx, 30, lambda seen: seen)
    assert torch.equal(model.generate(idx, 30, temperature=0), slow)


def test_generate_past_block_size_reads_the_last_half_block_again():
    model, idx = make(), torch.randint(31, (1, 5))

    def context(seen):  # up to 16 tokens, then 8, 9, .. 16, 8, ..
        n = seen.size(1)
        return seen if n <= 16 else seen[:, -(8 + (n - 17) % 9):]

    slow = slow_generate(model, idx, 40, context)
    assert torch.equal(model.generate(idx, 40, temperature=0), slow)
    long = torch.randint(31, (1, 50))
    first = model(long[:, -16:])[0][:, -1].argmax(-1)
    assert model.generate(long, 1, temperature=0)[0, -1] == first


def test_generate_depends_on_its_generator_alone():
    model, idx = make(), torch.randint(31, (2, 3))
    def draw(seed):
        return model.generate(idx, 12, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1)[:, :3], idx) and draw(1).shape == (2, 15)


def test_sampling_follows_temperature_and_top_k():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, -1)
    def draw(temperature, top_k):
        g = torch.Generator().manual_seed(0)
        drawn = sample(logits, temperature, top_k, g).flatten()
        return torch.bincount(drawn, minlength=4) / 20000
    torch.testing.assert_close(draw(1.0, None), logits[0].softmax(-1), atol=0.015, rtol=0)
    torch.testing.assert_close(draw(0.5, None), (2 * logits[0]).softmax(-1), atol=0.015, rtol=0)
    top2 = draw(1.0, 2)
    torch.testing.assert_close(top2[:2], logits[0, :2].softmax(-1), atol=0.015, rtol=0)
    assert top2[2:].sum() == 0 and draw(1.0, 1)[0] == 1 and draw(0, None)[0] == 1
    torch.testing.assert_close(draw(1.0, 99), draw(1.0, None))
