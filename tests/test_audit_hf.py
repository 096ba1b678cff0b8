"""tools.audit --hf: planted faults of a cache and of padding are found by the question that is
theirs; nothing of a folder runs and nothing is fetched; the docs' table is the record's."""
import json
import pickle
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import ROOT

from base.errors import BadInput
from tools import audit_hf, audit_hf_models
from tools.audit_hf_cache import apart, padding, with_cache
from tools.audit_tokens import Subject

V = 40
cache = with_cache("cache", ([1] * 8, [5, 1, 1]))
pieces = with_cache("pieces", ([3, 4, 2],))
QUESTIONS = {"cache": cache, "pieces": pieces, "apart": apart, "padding": padding}


class Mean(nn.Module):
    """The mean of the tokens so far, with a cache (sum, number of tokens): no fault."""
    config = SimpleNamespace(model_type="mean")
    config.get_text_config = lambda: SimpleNamespace(pad_token_id=0)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, 8)
        self.head = nn.Linear(8, V)

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=False):
        known = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        known = known[..., None].to(self.embed.weight.dtype)
        x = self.embed(input_ids) * known
        before, n = self.before(cache, x)
        total, n = before + x.cumsum(1), n + known.cumsum(1)
        logits = self.head(x + total / n.clamp(min=1))
        return SimpleNamespace(logits=logits, cache=self.after(total[:, -1:], n[:, -1:]))

    def before(self, cache, x):
        return (0, 0) if cache is None else cache

    def after(self, *state):
        return state


class Forgets(Mean):
    """Several tokens start from nothing, as where a state is read for single ones only."""
    def before(self, cache, x):
        return (0, 0) if cache is None or x.size(1) > 1 else cache


class KeptInTheModule(Mean):
    def before(self, cache, x):
        return (0, 0) if cache is None else self.kept

    def after(self, *state):
        self.kept = state
        return True


class NotCounted(Mean):
    """The number of tokens is not in the cache."""
    def before(self, cache, x):
        return (0, 0) if cache is None else (cache[0], 1)


class PaddingCounts(Mean):
    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=False):
        return super().forward(input_ids, None, cache)


FAULTS = {Forgets: "pieces", KeptInTheModule: "apart", NotCounted: "cache",
          PaddingCounts: "padding"}


def subject_of(model):
    model = model.double().eval().requires_grad_(False)
    return Subject("", lambda x: model(x).logits, range(V), (9,), module=model)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    answer = QUESTIONS[FAULTS[fault]](subject_of(fault()))
    assert answer.passed is False and answer.smallest and answer.meaning


def test_an_honest_cache_passes():
    for ask in QUESTIONS.values():
        assert ask(subject_of(Mean())).passed


def test_a_failing_piece_is_the_smallest():
    assert pieces(subject_of(Forgets())).smallest == {"pieces": "1+2", "moved": 1}


# Folders ------------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 500,
         "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 80,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's folder with a bomb as code and one as a pickle, where no network can be reached."""
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text("open('exploded', 'w')\n")
    yield folder
    assert not (tmp_path / "exploded").exists()


def write_config(folder, **values):
    (folder / "config.json").write_text(json.dumps(LLAMA | values))


def test_a_folders_own_code_does_not_run(folder):
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    write_config(folder, model_type="mine", auto_map=code)
    with pytest.raises(BadInput, match="its own code .auto_map. is not run"):
        audit_hf_models.build(str(folder), torch.float32)
    write_config(folder, auto_map=code)
    model = audit_hf_models.build(str(folder), torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM" and len(model.model.layers) == 2


def test_a_pickle_is_refused(folder):
    write_config(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BadInput, match="weights in a pickle"):
        audit_hf_models.build(str(folder), torch.float32)


def test_a_folders_weights_are_asked_as_they_are(folder):
    from safetensors.torch import save_file
    write_config(folder)
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    expected = LlamaForCausalLM(LlamaConfig.from_dict(LLAMA)).eval()
    save_file(expected.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    model = audit_hf_models.build(str(folder), torch.float32)
    idx = torch.arange(20)[None]
    assert torch.equal(model(input_ids=idx).logits, expected(input_ids=idx).logits)


@pytest.mark.parametrize("name, words", [
    ("no_such_model", "no causal language model of that type"), ("lama", "nearest: llama"),
    ("gemma4_assistant", "drafts for another model")])
def test_what_cannot_be_asked_is_refused_in_one_line(name, words):
    with pytest.raises(BadInput, match=words):
        audit_hf_models.build(name, torch.float32)


def test_a_configuration_becomes_small_and_keeps_its_kinds_of_layers():
    config = audit_hf_models.default_config("gemma3_text")
    small = audit_hf_models.shrunk(config)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert (small.hidden_size, small.sliding_window, small.num_hidden_layers) == (32, 8, 2)
    assert audit_hf_models.thresholds(small)["sliding_window"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_an_architecture_passes(name):
    assert all(answer.passed for answer in audit_hf.audit(name))


@pytest.mark.slow
def test_a_mask_that_is_taken_away_is_found(monkeypatch):
    build = audit_hf_models.build

    def without_mask(name, dtype):
        model = build(name, dtype)
        for layer in model.model.layers:
            forward = layer.self_attn.forward
            layer.self_attn.forward = lambda *args, f=forward, **kwargs: f(
                *args, **kwargs | {"attention_mask": torch.zeros(1, 1, 1, 1).to(dtype)})
        return model

    monkeypatch.setattr(audit_hf_models, "build", without_mask)
    answers = {answer.question: answer for answer in audit_hf.audit("llama")}
    assert {"suffix", "gradient", "length", "cache"} <= {
        question for question, answer in answers.items() if answer.passed is False}
    assert "self_attn (LlamaAttention.forward" in answers["suffix"].where


def test_the_docs_table_is_the_records():
    record = audit_hf.read_record(ROOT / "results" / "audit_hf.json")
    assert audit_hf.table(record) in (ROOT / "docs" / "audit.md").read_text()
