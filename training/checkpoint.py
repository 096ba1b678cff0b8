"""Checkpoints: out_dir/checkpoints/<iter, 8 digits>/, each a folder that needs nothing else to go on or to sample.

    model.safetensors       weights and buffers (a tied head once)
    optimizer.safetensors   AdamW's moments by parameter name
    trainer.json            iter, its validation loss and the best so far (nats), tokens, seconds, wandb's run id
    config.json             every option as used, and the vocabulary's size
    tokenizer.json
    manifest.json           sha256 of the files above; written last

A checkpoint is written aside, synced to disk and then renamed, so a folder with eight digits is always whole when it
appears; whether it still is, the manifest tells. JSON and safetensors only: nothing read back can run code. There is no
random state in it: what a step draws depends on (seed, step), so the position is enough to go on bit for bit.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from base.errors import BadInput
from base.files import read_json
from data.tokenizer import load_tokenizer
from model import GPT, model_config
from training.parallel import whole

FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.json", "tokenizer.json")
REMEDY = "use another checkpoint of the run"
TRAINER = {"iter": (int,), "val_loss": (float, type(None)), "best_val_loss": (float, type(None)), "tokens": (int,),
           "seconds": (float,), "wandb_id": (str, type(None)),  # what trainer.json holds
           "trained": (list, type(None))}  # names of the parameters that are trained; null: all


# Writing -------------------------------------------------------------------------------------------------------------

def model_tensors(model):
    """name -> tensor: parameters, each once however many names it has, and the buffers that are saved. Every process of a
    run must call it, and the next one too."""
    saved = model.state_dict().keys()
    return {name: whole(t.detach()) for name, t in (*model.named_parameters(), *model.named_buffers()) if name in saved}


def sync(path):
    """Returns when a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    """Replaces a JSON file in one go: a reader sees the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    sync(aside)
    aside.replace(path)


def save(out_dir, tensors, optimizer, trainer, config, tokenizer, keep_last):
    """Writes the checkpoint of trainer["iter"]: `tensors` and `optimizer` by name, trainer and config as JSON, tokenizer as
    the text it is. Points newest.json at it and best.json at the one with the lowest val_loss, then deletes what is
    neither among the newest keep_last nor the best, and what is of a later iter: damaged ones that the run went back from.

    BadInput if it cannot be written; the earlier checkpoints are then as they were."""
    root = Path(out_dir) / "checkpoints"
    folder = root / f"{trainer['iter']:08d}"
    aside, replaced = root / f".{folder.name}.new", root / f".{folder.name}.old"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left_over in root.glob(".*"):  # of a process that was killed while it wrote
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        aside.mkdir()
        for name, group in (("model", tensors), ("optimizer", optimizer)):
            save_file({n: t.cpu().contiguous() for n, t in group.items()}, aside / f"{name}.safetensors")
        (aside / "trainer.json").write_text(json.dumps(trainer, indent=1) + "\n")
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (aside / "tokenizer.json").write_text(tokenizer)
        write_json(aside / "manifest.json", {name: sha256(aside / name) for name in FILES})
        for path in (*aside.iterdir(), aside):
            sync(path)
        if folder.exists():  # it was damaged, and the run went back to an earlier one
            folder.rename(replaced)
        aside.rename(folder)
        sync(root)
        shutil.rmtree(replaced, ignore_errors=True)
        # for other programs: we go by the folders' names, which say the same and cannot be torn apart from them
        write_json(root / "newest.json", {"folder": folder.name})
        kept = [old for old in checkpoints(out_dir) if old.name <= folder.name]
        best = min((old for old in kept if val_loss(old) is not None), key=val_loss, default=None)
        if best:
            write_json(root / "best.json", {"folder": best.name})
        for old in checkpoints(out_dir):
            if old not in kept[-keep_last:] and old != best:
                shutil.rmtree(old.rename(root / f".{old.name}.old"))  # a folder with a checkpoint's name is a whole one
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise BadInput(f"cannot write checkpoint {folder}: {error}; earlier checkpoints are as they were") from error


# Reading -------------------------------------------------------------------------------------------------------------

def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(out_dir):
    """The checkpoint folders of a run, oldest first."""
    return sorted(p for p in (Path(out_dir) / "checkpoints").glob("[0-9]" * 8) if p.is_dir())


def val_loss(folder):
    """The validation loss of a checkpoint in nats, or None if it was not evaluated or cannot be read."""
    try:
        return read_json(folder / "trainer.json", REMEDY)["val_loss"]
    except (BadInput, KeyError):
        return None


def damage(folder):
    """What is wrong with a checkpoint folder, in words, or None if every file is the one that was saved."""
    try:
        manifest = read_json(folder / "manifest.json", REMEDY)
        for name in FILES:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256(folder / name) != manifest.get(name):
                return f"{name} is not the file that was saved"
    except (BadInput, OSError) as error:
        return str(error)


class Checkpoint:
    """A checkpoint in memory: .folder, .model and .optimizer (name -> tensor), .trainer and .config (dicts), .tokenizer."""

    def __init__(self, folder):
        self.folder = folder
        self.model, self.optimizer = (read_tensors(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
        self.trainer, self.config = read_json(folder / "trainer.json", REMEDY), read_json(folder / "config.json", REMEDY)
        self.tokenizer = load_tokenizer(folder / "tokenizer.json")
        for name, kinds in TRAINER.items():
            if type(self.trainer.get(name)) not in kinds:
                raise BadInput(f"{folder / 'trainer.json'} is damaged: {name} is {self.trainer.get(name)!r}; {REMEDY}")
        if self.tokenizer.vocab_size != self.config.get("vocab_size"):
            raise BadInput(f"{folder} is damaged: its tokenizer.json has {self.tokenizer.vocab_size} symbols, its config.json says "
                           f"vocab_size {self.config.get('vocab_size')!r}; {REMEDY}")


def read_tensors(path, remedy=REMEDY):
    """name -> tensor of a safetensors file; BadInput if it is none."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} is damaged: {error}; {remedy}") from error


def load(out_dir, which="newest", fall_back=False):
    """A checkpoint of a run: "newest", "best" or the name of its folder. BadInput, naming those that are whole, if it is
    not there or damaged; with fall_back the newest whole one is taken instead, and a line says so."""
    folders = checkpoints(out_dir)
    if not folders:
        raise BadInput(f"no checkpoint in {out_dir}; train one with: python train.py configs/<name>.py --out_dir={out_dir}")
    if which == "best":
        which = read_json(Path(out_dir) / "checkpoints" / "best.json", REMEDY).get("folder")
    folder = folders[-1] if which == "newest" else Path(out_dir) / "checkpoints" / str(which)
    wrong = damage(folder) if folder in folders else "no such folder"
    if wrong is None:
        return Checkpoint(folder)
    sound = [f for f in folders if damage(f) is None]
    message = f"checkpoint {folder} is {'damaged' if folder in folders else 'missing'}: {wrong}"
    if fall_back and sound:
        print(f"{message}; going back to {sound[-1]}", flush=True)
        return Checkpoint(sound[-1])
    raise BadInput(f"{message}; whole: {', '.join(f.name for f in sound) or 'none'}")


def load_model(model, tensors, source):
    """Copies name -> tensor into the model. BadInput listing names only in the file (+), only in the model (-) and
    other shapes."""
    own = model_tensors(model)
    odd = [f"+{n}" for n in tensors if n not in own] + [f"-{n}" for n in own if n not in tensors]
    odd += [f"{n} {tuple(tensors[n].shape)} in the file, {tuple(t.shape)} in the model"
            for n, t in own.items() if n in tensors and tensors[n].shape != t.shape]
    if odd:
        raise BadInput(f"{source} does not fit the model (+ only in the file, - only in the model): {', '.join(odd)}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def init_model(model, tensors, source):
    """Starts from another model's weights, name -> tensor. They may lack what a mixer adds to that model without changing
    what it computes (SSA's temperatures, on a softmax model). Returns the names of the parameters that they lack. BadInput as
    for load_model."""
    own, tensors, lacking = model_tensors(model), dict(tensors), set()
    for i, block in enumerate(model.blocks):
        if hasattr(block.mixer, "be_neutral"):
            added = {f"blocks.{i}.mixer.{name}" for name in block.mixer.be_neutral()}
            if not added & tensors.keys():
                tensors |= {name: own[name] for name in added}
                lacking |= added
    load_model(model, tensors, source)
    return [name for name, _ in model.named_parameters() if name in lacking]


def build_model(checkpoint):
    """The model of a checkpoint, with its weights, in evaluation mode, on the CPU."""
    model = GPT(model_config(checkpoint.config, checkpoint.folder / "config.json"))
    load_model(model, checkpoint.model, checkpoint.folder)
    return model.eval()
