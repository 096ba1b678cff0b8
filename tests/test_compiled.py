"""training/compiled.py: a compiled step gives the model's logits or is refused by name; what is
loaded is what this user has compiled, and nothing else."""
import os
from dataclasses import asdict

import pytest
import torch

from base.errors import BadInput
from mixers import MIXERS, load_mixer_file
from mixers.parts.heads import MANY_ROWS, attention_in_loops, causal_attention
from model import GPT, GPTConfig
from tools import bench_measure
from training import checkpoint, compiled
from training.device import ready_to_decode

# a complete block or segment is dropped from their states
REFUSED = {"lln_diag": "sizes of its state", "linformer": "another way"}
CASES = [(name, "rope") for name in MIXERS] + [("softmax", "learned"), ("causal_max", "learned")]


def make(mixer, pos="rope", n_layer=1):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=65, block_size=48, n_layer=n_layer, n_head=2, n_embd=32,
                         mixer=mixer, pos=pos)).eval()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nanomix"


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.export's program runs as it is, which takes no compiler."""
    def program_itself(program):
        programs.append(program.module())
        return b"a package"

    programs = []
    monkeypatch.setattr(compiled, "lacks_compiler", lambda device: False)
    monkeypatch.setattr(compiled, "compile_package", program_itself)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda file: programs[-1])


def agree(model, dtype, rtol, batch=2):
    """Holds the logits of all tokens, from the second on, against those of the model by itself."""
    one_token = compiled.compiled_step(model, dtype, batch)
    ready_to_decode(model, dtype)
    tokens = torch.randint(65, (batch, 48))
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        _, state = model.step(tokens[:, :1])
        own, kinds = state, set()
        for i in range(1, 48):
            logits, state = model.step(tokens[:, i:i + 1], state)
            ours, own = one_token(tokens[:, i:i + 1], own)
            kinds.add(type(own))
            assert (ours - logits).abs().max() <= rtol * logits.abs().max(), i
    assert compiled.Flat in kinds  # or only the model itself was asked
    if model.config.pos == "learned":
        with pytest.raises(ValueError, match="48 only"):
            one_token(tokens[:, :1], own)


@pytest.mark.slow
@pytest.mark.parametrize("mixer, pos", CASES)
@torch.no_grad()
def test_an_exported_step_gives_the_models_logits_or_is_refused(cache, uncompiled, mixer, pos):
    model = make(mixer, pos)
    if mixer in REFUSED:
        with pytest.raises(BadInput, match=f"step of {mixer} cannot.*{REFUSED[mixer]}"):
            compiled.compiled_step(model, torch.float32, 2)
    else:
        agree(model, torch.float32, 1e-5)


class Seen(torch.nn.Module):
    """Of a state with the number of tokens, up to 24, which is where a step of these models is
    exported."""

    def forward(self, x, state=None):
        n = state or 0
        seen = torch.arange(n, n + x.size(1)).clamp(max=24)
        return x * seen[:, None], min(n + x.size(1), 24)


@torch.no_grad()
def test_a_number_that_stays_is_not_taken_for_that_of_the_tokens(cache, uncompiled, monkeypatch):
    monkeypatch.setitem(MIXERS, "seen", lambda config, layer: Seen())
    agree(make("seen"), torch.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mixer, pos, dtype, rtol, batch", [
    ("softmax,causal_max_context,lln,gated_deltanet,linear", "learned", torch.float32, 1e-5, 2),
    ("softmax,gla,mamba2,deltanet,ssa", "rope", torch.bfloat16, 2e-2, 2),
    ("softmax,swa,ssa", "rope", torch.bfloat16, 2e-2, MANY_ROWS)])
def test_a_compiled_step_gives_the_models_logits(cache, capsys, mixer, pos, dtype, rtol, batch):
    model = make(mixer, pos, n_layer=5)
    agree(model, dtype, rtol, batch)
    agree(make(mixer, pos, n_layer=5), dtype, rtol, batch)  # from the cache
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("compiling a step")]) == 1
    [package] = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700 and package.suffix == ".pt2"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_in_loops_is_that_of_products(dtype):
    torch.manual_seed(0)
    q = torch.randn(3, 4, 1, 16, dtype=dtype)
    k, v = torch.randn(2, 3, 4, 37, 16, dtype=dtype)
    found = [f(q, k, v) for f in (attention_in_loops, causal_attention)]
    assert found[0].dtype == dtype
    torch.testing.assert_close(*found, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


# -- what is refused, and what is never loaded -----------------------------------------------------

@pytest.fixture
def loaded(monkeypatch):
    """The packages that were loaded, none of which runs."""
    packages = []
    monkeypatch.setattr(torch._inductor, "aoti_load_package",
                        lambda file: packages.append(file.read()))
    return packages


def plant(folder, model):
    """A package where compiled_step looks for that of a model; its path."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{compiled.checksum(model, torch.float32, 1)}.pt2"
    path.write_bytes(b"planted")
    path.chmod(0o600)
    return path


def test_a_package_is_loaded_from_the_users_own_cache_alone(cache, loaded, monkeypatch):
    monkeypatch.setenv("PATH", "")  # nothing can be compiled
    model = make("causal_max")
    path = plant(cache, model)
    compiled.compiled_step(model, torch.float32, 1)
    assert loaded == [b"planted"]
    other = make("causal_max")
    other.head.weight.data += 1
    with pytest.raises(BadInput, match="no C.. compiler"):  # other weights have none
        compiled.compiled_step(other, torch.float32, 1)
    path.rename(cache / "moved")
    path.symlink_to(cache / "moved")
    with pytest.raises(BadInput, match="no C.. compiler"):
        compiled.compiled_step(model, torch.float32, 1)
    cache.chmod(0o777)
    with pytest.raises(BadInput, match="folder of your own"):
        compiled.compiled_step(model, torch.float32, 1)
    cache.rename(cache.with_name("elsewhere"))
    cache.symlink_to(cache.with_name("elsewhere"))
    with pytest.raises(BadInput, match="folder of your own"):
        compiled.compiled_step(model, torch.float32, 1)
    assert len(loaded) == 1


def test_sampling_loads_no_package_of_a_runs_folder(sample, run_folder, cache, loaded, monkeypatch):
    model = checkpoint.build_model(checkpoint.load(run_folder))
    for folder in ("", "compiled", "nanomix", ".cache/nanomix"):
        plant(run_folder / folder, model)
    monkeypatch.setenv("PATH", "")
    line = sample.refuses(f"--out_dir={run_folder}", "--compile", "--dtype=float32")
    assert "no C++ compiler" in line and not loaded


def test_the_cache_keeps_the_newest(tmp_path):
    for age in range(compiled.KEPT + 3):
        path = tmp_path / f"{age:02}.pt2"
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    names = ["other", ".a.pt2.0123.tmp", ".b.pt2.0123.tmp"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[-1], (1e9, 1e9))  # a killed process's
    compiled.remove_oldest(tmp_path)
    newest = [f"{age:02}.pt2" for age in range(compiled.KEPT)]
    assert {path.name for path in tmp_path.iterdir()} == {*newest, *names[:2]}


def test_what_another_process_removes_meanwhile_is_no_matter(tmp_path):
    (tmp_path / "a.pt2").touch()
    assert list(compiled.made_at([tmp_path / "a.pt2", tmp_path / "gone.pt2"])) == [
        tmp_path / "a.pt2"]


def test_a_damaged_package_is_compiled_anew(cache, monkeypatch, capsys):
    model = make("causal_max")
    plant(cache, model)
    monkeypatch.setattr(compiled, "lacks_compiler", lambda device: True)
    with pytest.raises(BadInput, match="no C.. compiler"):
        compiled.compiled_step(model, torch.float32, 1)
    assert "is damaged" in capsys.readouterr().err


def test_a_package_is_of_what_a_mixer_file_imports_too(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    (here / "mine_parts.py").write_text("WIDTH = 1\n")
    (here / "mine.py").write_text(
        "import mine_parts\nfrom mixers import MIXERS\nfrom mixers.linear import Linear\n"
        "class Mine(Linear): pass\nMIXERS['mine'] = Mine\n")
    load_mixer_file(str(here / "mine.py"))
    before = compiled.checksum(make("mine"), torch.float32, 1)
    (here / "mine_parts.py").write_text("WIDTH = 2\n")
    assert compiled.checksum(make("mine"), torch.float32, 1) != before


def test_another_device_is_refused():
    with pytest.raises(BadInput, match="for the CPU only"):
        compiled.compiled_step(make("causal_max").to("meta"), torch.float32, 1)


# -- who uses it -----------------------------------------------------------------------------------

def counted(model, calls):
    """model.step, which notes the shape of each idx."""
    return lambda idx, state: calls.append(tuple(idx.shape)) or model.step(idx, state)


@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_sampling_asks_it_for_every_token_but_the_first(pos):
    model, start, calls = make("softmax", pos), torch.zeros(1, 3, dtype=torch.int64), []
    alone = list(model.stream(start, 60, temperature=0))
    together = list(model.stream(start, 60, temperature=0, one_token=counted(model, calls)))
    assert torch.equal(torch.cat(alone), torch.cat(together))
    assert set(calls) == {(1, 1)} and len(calls) == (59 if pos == "rope" else 58)


@pytest.mark.parametrize("asked", [True, False])
def test_bench_decodes_with_it_if_asked(monkeypatch, asked):
    calls = []
    monkeypatch.setattr(bench_measure, "held", lambda device: None)  # sets malloc for good
    monkeypatch.setattr(bench_measure, "compiled_step",
                        lambda model, dtype, batch: counted(model, calls))
    cell = {"mode": "decode", "batch": 2, "length": 8, "model": asdict(make("causal_max").config),
            "device": "cpu", "dtype": "float32", "compile": asked}
    assert bench_measure.figures(cell, 0.01)["ms"] > 0
    assert set(calls) == ({(2, 1)} if asked else set())
