"""Checkpoints: what is in one, which are kept, and that a damaged or hostile one is named and
never run."""
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, content
from safetensors.torch import load_file, save_file

from base.errors import BadInput
from model import GPT, GPTConfig
from training import checkpoint

FILES = ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.json",
         "tokenizer.json"]


def newest(out_dir):
    return out_dir / "checkpoints" / "00000020"


def rewrite(path, data):
    """Other content for a file of a checkpoint, with a manifest that agrees."""
    path.write_bytes(data)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest[path.name] = hashlib.sha256(data).hexdigest()
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def trainer(iteration, val_loss=None):
    return {"iter": iteration, "val_loss": val_loss, "best_val_loss": None, "tokens": 0,
            "seconds": 0.0, "wandb_id": None}


def save(out_dir, iteration, val_loss=1.0, keep_last=2, value=0.0):
    """A small checkpoint, through the real thing."""
    weights = {"w": torch.full((3,), value)}
    checkpoint.save(out_dir, weights, {}, trainer(iteration, val_loss), {"vocab_size": 2},
                    '{"tokenizer": "char", "alphabet": "ab"}', keep_last=keep_last)


def names(out_dir):
    return [folder.name for folder in checkpoint.checkpoints(out_dir)]


# -- what is saved -------------------------------------------------------------------------------

def test_a_checkpoint_holds_all_that_it_takes(trained):
    run = checkpoint.load(trained)
    assert run.folder == newest(trained)
    assert {p.name for p in run.folder.iterdir()} == {*FILES, "manifest.json"}
    assert run.trainer["iter"] == 20
    assert run.config["vocab_size"] == 28
    assert run.tokenizer.decode(run.tokenizer.encode("abc\n")) == "abc\n"
    model = checkpoint.build_model(run)
    assert not model.training
    # a tied head once
    assert sum(t.numel() for t in run.model.values()) == sum(p.numel() for p in model.parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, run.model[name])
    moments = {name for name in run.optimizer if name.startswith("exp_avg.")}
    assert moments == {f"exp_avg.{name}" for name, _ in model.named_parameters()}


def test_an_untied_head_and_an_untrained_one_come_back(tmp_path):
    config = {"vocab_size": 5, "block_size": 4, "n_layer": 2, "n_head": 1, "n_embd": 8,
              "tie_head": False, "mixer": "pelican,causal_mean", "arch": "llama"}
    model = GPT(GPTConfig(**config)).eval()
    checkpoint.save(tmp_path, checkpoint.model_tensors(model), {}, trainer(0), config,
                    '{"tokenizer": "char", "alphabet": "abcde"}', 1)
    again = checkpoint.build_model(checkpoint.load(tmp_path))
    idx = torch.tensor([[0, 3, 2]])
    assert torch.equal(model(idx)[0], again(idx)[0])
    assert "head.weight" in checkpoint.load(tmp_path).model


def test_the_newest_few_and_the_best_are_kept(tmp_path):
    for iteration in range(1, 7):
        save(tmp_path, iteration, val_loss={2: 0.5, 5: None}.get(iteration, 1.0), keep_last=3,
             value=float(iteration))
    assert names(tmp_path) == ["00000002", "00000004", "00000005", "00000006"]
    assert checkpoint.load(tmp_path).trainer["iter"] == 6
    assert checkpoint.load(tmp_path, "best").trainer["iter"] == 2
    assert checkpoint.load(tmp_path, "00000004").model["w"].tolist() == [4.0] * 3
    for name, folder in (("newest", "00000006"), ("best", "00000002")):
        assert json.loads((tmp_path / f"checkpoints/{name}.json").read_text()) == {"folder": folder}
    save(tmp_path, 7, val_loss=0.4, keep_last=1)
    assert names(tmp_path) == ["00000007"]


def test_a_checkpoint_just_written_is_never_the_one_to_go(tmp_path):
    """A run went back from a damaged checkpoint to an earlier one and saves between the two."""
    save(tmp_path, 10, val_loss=0.5)
    save(tmp_path, 20)
    (tmp_path / "checkpoints/00000020/model.safetensors").write_bytes(b"gone")
    save(tmp_path, 15, keep_last=1)
    assert "00000015" in names(tmp_path)
    assert json.loads((tmp_path / "checkpoints/newest.json").read_text()) == {"folder": "00000015"}
    assert checkpoint.load(tmp_path).trainer["iter"] == 15
    assert checkpoint.load(tmp_path, fall_back=True).trainer["iter"] == 15


def test_a_checkpoint_written_again_takes_the_place_of_the_damaged_one(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20, value=1.0)
    (tmp_path / "checkpoints/00000020/model.safetensors").write_bytes(b"gone")
    save(tmp_path, 20, value=2.0)
    assert names(tmp_path) == ["00000010", "00000020"]
    assert checkpoint.load(tmp_path).model["w"][0] == 2.0


def test_what_a_killed_process_left_is_not_read_and_is_cleared(tmp_path):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "checkpoints/00000010", tmp_path / "checkpoints/.00000020.new")
    (tmp_path / "checkpoints/.newest.json.77").write_text("{")
    assert names(tmp_path) == ["00000010"] and checkpoint.load(tmp_path).trainer["iter"] == 10
    save(tmp_path, 20)
    assert names(tmp_path) == ["00000010", "00000020"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_dot_files_of_others_stay(tmp_path):
    save(tmp_path, 10)
    root = tmp_path / "checkpoints"
    theirs = [".nfs0000000000a1b2c3", ".DS_Store", ".notes", ".00000020.bak", ".newest.json.swp"]
    for name in theirs:
        (root / name).write_text("theirs")
    (root / ".snapshot").mkdir()
    ours = [".00000020.new", ".00000010.old", f".best.json.{'0f' * 16}.tmp"]
    for name in ours:
        (root / name).write_text("")
    save(tmp_path, 20)
    assert {path.name for path in root.glob(".*")} == {*theirs, ".snapshot"}


def test_a_checkpoint_that_cannot_be_deleted_is_a_line_and_goes_later(tmp_path, monkeypatch,
                                                                      capsys):
    """As on NFS, where a file that somebody still reads keeps its folder from going."""
    save(tmp_path, 10, val_loss=2.0)
    save(tmp_path, 20)
    rmtree = shutil.rmtree

    def busy(path, *rest, **options):
        if ".00000010" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        return rmtree(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(tmp_path, 30)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "warning" in said and "00000010" in said
        save(tmp_path, 40)
    assert names(tmp_path)[-2:] == ["00000030", "00000040"] and "00000010" not in names(tmp_path)
    save(tmp_path, 50)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_nothing_of_a_loaded_checkpoint_stays_open_or_mapped(tmp_path):
    save(tmp_path, 10, value=3.0)
    run = checkpoint.load(tmp_path)
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [link for link in links if str(tmp_path) in str(link)]
    assert run.model["w"].tolist() == [3.0] * 3


@pytest.mark.parametrize("bad", ['"low"', "null, \"iter\": []", "[1.0]", "true", "1e999"])
def test_a_bad_loss_in_an_older_checkpoint_does_not_end_the_run(tmp_path, bad):
    save(tmp_path, 10)
    path = tmp_path / "checkpoints/00000010/trainer.json"
    path.write_text(path.read_text().replace('"val_loss": 1.0', f'"val_loss": {bad}', 1))
    save(tmp_path, 20, val_loss=2.0)
    save(tmp_path, 30, val_loss=3.0)
    best = json.loads((tmp_path / "checkpoints/best.json").read_text())
    assert best == {"folder": "00000020"} and names(tmp_path) == ["00000020", "00000030"]


def test_checkpoints_past_a_hundred_million_steps_are_found(tmp_path):
    for iteration in (99_999_998, 99_999_999, 100_000_000, 1_000_000_000):
        save(tmp_path, iteration, val_loss=1 / iteration)
    assert names(tmp_path) == ["100000000", "1000000000"]
    assert checkpoint.load(tmp_path).trainer["iter"] == 1_000_000_000
    assert checkpoint.load(tmp_path, "100000000").trainer["iter"] == 100_000_000


def test_a_reader_looks_again_when_its_checkpoint_was_pruned_meanwhile(tmp_path, monkeypatch):
    """Once before its sums are checked, once between that and its tensors."""
    save(tmp_path, 10, keep_last=1)
    damage, read_tensors = checkpoint.damage, checkpoint.read_tensors
    steps = [20, 30]

    def pruned_before(function):
        def call(path, *rest):
            if steps and function is (damage if steps[0] == 20 else read_tensors):
                save(tmp_path, steps.pop(0), val_loss=0.5 ** (3 - len(steps)), keep_last=1)
            return function(path, *rest)
        return call

    monkeypatch.setattr(checkpoint, "damage", pruned_before(damage))
    monkeypatch.setattr(checkpoint, "read_tensors", pruned_before(read_tensors))
    assert checkpoint.load(tmp_path).trainer["iter"] == 30
    assert steps == [] and names(tmp_path) == ["00000030"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(BadInput, match="cannot write checkpoint"):
        save(tmp_path, 10)


def test_a_file_of_another_model_is_listed_name_by_name():
    model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=8,
                          mixer="pelican"))
    tensors = dict(checkpoint.model_tensors(model))
    before = {name: t.clone() for name, t in tensors.items()}
    other = {name: t + 1 for name, t in tensors.items()}
    other["extra"] = torch.zeros(1)
    del other["norm.weight"]
    other["embed.weight"] = torch.zeros(7, 8)
    with pytest.raises(BadInput) as error:
        checkpoint.load_model(model, other, "here")
    assert all(part in str(error.value) for part in ("here", "+extra", "-norm.weight",
                                                     "embed.weight (7, 8)", "(5, 8)"))
    # nothing half copied
    assert all(torch.equal(before[name], t) for name, t in checkpoint.model_tensors(model).items())


# -- damage --------------------------------------------------------------------------------------

def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def be_a_folder(path):
    path.unlink()
    path.mkdir()


def be_of_another_checkpoint(path):
    shutil.copy(path.parents[1] / "00000010" / path.name, path)


def be_a_list(path):
    path.write_text("[]")


def be_an_empty_object(path):
    path.write_text("{}")


def be_no_text(path):
    path.write_bytes(b"\xff\xfe\x00")


# what is done -> (the file, how)
DAMAGE = {
    "manifest.json a list": ("manifest.json", be_a_list),
    "model.safetensors not in the manifest": ("manifest.json", be_an_empty_object),
    "manifest.json not text": ("manifest.json", be_no_text),
    "manifest.json a folder": ("manifest.json", be_a_folder),
    "manifest.json missing": ("manifest.json", Path.unlink),
    "manifest.json empty": ("manifest.json", empty),
    "model.safetensors of another checkpoint": ("model.safetensors", be_of_another_checkpoint),
    "model.safetensors a folder": ("model.safetensors", be_a_folder),
}
for file in FILES:
    DAMAGE[f"{file} cut"] = (file, cut)
    DAMAGE[f"{file} with a bit flipped"] = (file, flip)
    DAMAGE[f"{file} missing"] = (file, Path.unlink)
    DAMAGE[f"{file} empty"] = (file, empty)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_what_is_wrong_and_what_is_whole(kind, run_folder,
                                                                            capsys):
    name, damage = DAMAGE[kind]
    damage(newest(run_folder) / name)
    with pytest.raises(BadInput) as error:
        checkpoint.load(run_folder)
    message = str(error.value)
    assert str(newest(run_folder)) in message
    assert kind.split()[0] in message
    assert "00000010" in message
    assert checkpoint.load(run_folder, fall_back=True).trainer["iter"] == 10
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "00000020" in said and "00000010" in said
    assert checkpoint.load(run_folder, "00000010").trainer["iter"] == 10


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(name, run_folder):
    path = newest(run_folder) / name
    path.unlink()
    os.mkfifo(path)
    signal.alarm(20)  # ends the tests: nobody else could
    with pytest.raises(BadInput, match=name):
        checkpoint.load(run_folder)
    assert checkpoint.load(run_folder, fall_back=True).trainer["iter"] == 10
    signal.alarm(0)


def test_when_nothing_is_whole_there_is_no_way_back(run_folder):
    for folder in checkpoint.checkpoints(run_folder):
        flip(folder / "model.safetensors")
    for fall_back in (False, True):
        with pytest.raises(BadInput, match="none"):
            checkpoint.load(run_folder, fall_back=fall_back)


def test_a_checkpoint_that_is_not_there(run_folder, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(BadInput, match=f"no checkpoint in {re.escape(str(folder))};"):
            checkpoint.load(folder)
    for name in ("00000015", "10", "../checkpoints/00000010", "", "nonsense"):
        with pytest.raises(BadInput, match="00000010, 00000020"):
            checkpoint.load(run_folder, name)


@pytest.mark.parametrize("text", [
    "", "{}", "[]", None,
    '{"folder": "00000099"}', '{"folder": "../../elsewhere"}', '{"folder": 3}'])
def test_a_damaged_pointer_is_named(text, run_folder):
    path = run_folder / "checkpoints/best.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(BadInput):
        checkpoint.load(run_folder, "best")


def test_without_newest_json_the_newest_whole_checkpoint_is_found(run_folder):
    for text in ("", "{}", '{"folder": "00000099"}', '{"folder": null}'):
        (run_folder / "checkpoints/newest.json").write_text(text)
        try:
            assert checkpoint.load(run_folder).trainer["iter"] == 20
        except BadInput as error:
            # or it is named, with what is whole
            assert "newest.json" in str(error) and "00000020" in str(error)


# -- hostile files -------------------------------------------------------------------------------

class Hostile:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def forms(mark, tmp_path):
    """The same trap as a plain pickle and in torch's own format."""
    torch.save({"w": Hostile(mark)}, tmp_path / "trap.pt")
    return [pickle.dumps(Hostile(mark)), (tmp_path / "trap.pt").read_bytes()]


def test_the_trap_works(tmp_path):
    mark = tmp_path / "mark"
    plain, _ = forms(mark, tmp_path)
    pickle.loads(plain)
    assert mark.exists()
    mark.rmdir()
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("agreeing", [False, True],
                         ids=["found by the manifest", "with a manifest that agrees"])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_nothing_in_a_checkpoint_is_run(name, agreeing, run_folder, tmp_path, train, sample):
    mark = tmp_path / "mark"
    for data in forms(mark, tmp_path):
        path = newest(run_folder) / name
        if agreeing and name != "manifest.json":
            rewrite(path, data)
        else:
            path.write_bytes(data)
        assert "00000020" in sample.refuses(f"--out_dir={run_folder}", unchanged=run_folder)
        assert "00000020" in train.refuses(f"--out_dir={run_folder}", "--eval_only",
                                           unchanged=run_folder)
        (run_folder / "checkpoints/newest.json").write_bytes(data)  # not read as code either
        (run_folder / "checkpoints/best.json").write_bytes(data)
        sample.refuses(f"--out_dir={run_folder}", "--checkpoint=best", unchanged=run_folder)
        assert not mark.exists()


def test_the_rest_of_a_run_folder_is_not_run_either(run_folder, tmp_path, train):
    mark = tmp_path / "mark"
    for name in ("config.json", "metrics.jsonl"):
        (run_folder / name).write_bytes(pickle.dumps(Hostile(mark)))
    try:
        train.call([f"--out_dir={run_folder}", "--resume", "--max_iters=21"])
    except SystemExit as exit:
        assert exit.code == 2
    assert not mark.exists()


WRONG = [
    ("config.json", {}, "vocab_size"),
    ("config.json", {"n_layer": 2}, "blocks.1"),
    ("config.json", {"n_embd": "16"}, "n_embd"),
    ("config.json", {"vocab_size": 29}, "vocab_size"),
    ("config.json", {"mixer": "nope"}, "nope"),
    ("config.json", {"learning_rate": None}, "learning_rate"),
    ("config.json", {"learning_rate": "fast"}, "learning_rate"),
    ("config.json", {"learning_rate": 10**400}, "learning_rate"),
    ("config.json", {"max_iters": [3]}, "max_iters"),
    ("config.json", {"no_such_option": 3}, "no_such_option"),
    ("trainer.json", {}, "trainer.json"),
    ("trainer.json", {"iter": "20"}, "trainer.json"),
    ("trainer.json", {"iter": -20}, "iter"),
    ("trainer.json", {"best_val_loss": "1"}, "best_val_loss"),
    ("trainer.json", {"seconds": None}, "seconds"),
    ("trainer.json", {"trained": [3]}, "trained"),
    ("trainer.json", {"wandb_id": "../../elsewhere"}, "wandb_id"),
    ("tokenizer.json", {"alphabet": "ab"}, "tokenizer.json"),
]


@pytest.mark.parametrize("name, values, naming", WRONG, ids=str)
def test_a_file_of_the_wrong_content_is_one_line_although_the_manifest_agrees(name, values, naming,
                                                                              run_folder, train):
    path = newest(run_folder) / name
    old = json.loads(path.read_text())
    rewrite(path, json.dumps(old | values if values else {}).encode())
    line = train.refuses(f"--out_dir={run_folder}", "--resume", "--max_iters=21",
                         unchanged=run_folder / "checkpoints")
    assert naming in line


def test_json_nested_too_deeply_is_one_line(run_folder, train):
    rewrite(newest(run_folder) / "config.json", b'{"a": ' * 50000 + b"1" + b"}" * 50000)
    line = train.refuses(f"--out_dir={run_folder}", "--eval_only", unchanged=run_folder)
    assert "config.json" in line and "00000020" in line


def test_tensors_of_the_wrong_shape_are_one_line_although_the_manifest_agrees(run_folder, train,
                                                                              sample):
    for name in ("model.safetensors", "optimizer.safetensors"):
        path = newest(run_folder) / name
        tensors = load_file(path)
        wrong = {n: t[:-1].clone() if n.endswith("embed.weight") and t.dim() else t for n,
                 t in tensors.items()}
        save_file(wrong, run_folder / "wrong")
        rewrite(path, (run_folder / "wrong").read_bytes())
        (run_folder / "wrong").unlink()
        line = train.refuses(f"--out_dir={run_folder}", "--resume", "--max_iters=21",
                             unchanged=run_folder / "checkpoints")
        assert "embed.weight" in line
        save_file(tensors, path)
        rewrite(path, path.read_bytes())
    assert content(newest(run_folder))  # whole again
    assert sample(f"--out_dir={run_folder}", "--max_new_tokens=3")


def test_no_source_reads_anything_that_could_run_code():
    unsafe = r"\bimport pickle|\btorch\.load\(|allow_pickle=True|\beval\(|\bexec\("
    sources = list(ROOT.glob("*.py"))
    for name in ("base", "data", "tools", "training"):
        sources += ROOT.glob(f"{name}/*.py")
    for path in sources:
        assert not re.search(unsafe, path.read_text().replace(".eval()", "")), path
