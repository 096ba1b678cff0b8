"""Checkpoints: out_dir/checkpoints/<iter, 8 digits>/, each a folder that needs nothing else to go
on or to sample.

    model.safetensors       weights and buffers (a tied head once)
    optimizer.safetensors   the optimiser's state by parameter name
    trainer.json            iter, its validation loss and the best so far (nats), tokens, seconds,
                            wandb's run id
    config.json             every option as used, the vocabulary's size, the data set's checksum
    tokenizer.json
    manifest.json           sha256 of the files above; written last

A checkpoint is written under another name, synced to disk and then renamed, so a folder with
eight digits is always whole when it appears; whether it still is, the manifest tells. (Past 10^8
steps the digits are more.) JSON and safetensors only: nothing read back can run code. There is no
random state in it: what a step draws depends on (seed, step), so the position is enough to go on
bit for bit. """
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Annotated, Optional

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from typing_extensions import NotRequired, TypedDict

from base.errors import BadInput
from base.files import is_file, read_json, sync, write_json
from data.tokenizer import load_tokenizer
from model import GPT, model_config
from training.parallel import whole

FILES = ("model.safetensors", "optimizer.safetensors",
         "trainer.json", "config.json", "tokenizer.json")
REMEDY = "use another checkpoint of the run"
NAME = re.compile(r"[0-9]{8,18}")  # of a checkpoint's folder
# what a killed process leaves in checkpoints/; every other name with a dot is somebody else's
LEFT_OVER = re.compile(r"\.[0-9]{8,18}\.(new|old)"
                       r"|\.(newest|best)\.json\.([0-9]+|[0-9a-f]{32}\.tmp)")
READING_ATTEMPTS = 100  # of a reader while a training saves and prunes

Count = Annotated[int, Field(ge=0, lt=10**18)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class TrainerState(TypedDict):
    """What trainer.json holds."""
    iter: Count                     # optimiser updates done
    val_loss: Optional[Finite]      # of these weights, in nats; null if they were not evaluated
    best_val_loss: Optional[Finite]
    tokens: Count
    seconds: Finite
    wandb_id: Optional[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]]
    trained: NotRequired[Optional[list[str]]]  # names of the parameters that are trained; null: all


class Pointer(TypedDict):
    """What newest.json and best.json hold."""
    folder: str


# Writing ----------------------------------------------------------------------------------------

def model_tensors(model):
    """name -> tensor: parameters, each once however many names it has, and the buffers that are
    saved. Every process of a run must call it, and the next one too."""
    saved = model.state_dict().keys()
    tensors = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved:
            tensors[name] = whole(tensor.detach())
    return tensors


def folder_name(iteration):
    return f"{iteration:08d}"


def remove(path):
    """Deletes a file, a link or a folder with all that is in it, without following links."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_all(paths):
    """remove() of each; what cannot be deleted costs one line in all and ends nothing: on a
    network file system, say, a file that somebody still reads keeps its folder from going."""
    errors = []
    for path in paths:
        try:
            remove(path)
        except OSError as error:
            errors.append(error)
    if errors:
        print(f"warning    {len(errors)} left-overs cannot be deleted: {errors[0]}", flush=True)


def left_overs(root):
    """What earlier processes left in checkpoints/ when they were killed, or could not delete."""
    return [path for path in root.glob(".*") if LEFT_OVER.fullmatch(path.name)]


def write_folder(folder, tensors, optimizer, trainer, config, tokenizer):
    """A new folder with the files of a checkpoint, all of it on the disk when this returns."""
    folder.mkdir()
    for name, group in (("model", tensors), ("optimizer", optimizer)):
        on_cpu = {key: tensor.cpu().contiguous() for key, tensor in group.items()}
        save_file(on_cpu, folder / f"{name}.safetensors")
    (folder / "trainer.json").write_text(json.dumps(trainer, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer)
    manifest = {name: sha256(folder / name) for name in FILES}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*folder.iterdir(), folder):
        sync(path)


def save(out_dir, tensors, optimizer, trainer, config, tokenizer, keep_last):
    """Writes the checkpoint of trainer["iter"]: `tensors` and `optimizer` by name, trainer and
    config as JSON, tokenizer as the text it is. Points newest.json at it and best.json at the one
    with the lowest val_loss, then deletes what is neither among the newest keep_last nor the
    best, and what is of a later iter: damaged ones that the run went back from.

    BadInput if it cannot be written; the earlier checkpoints are then as they were."""
    root = Path(out_dir) / "checkpoints"
    folder = root / folder_name(trainer["iter"])
    new = root / f".{folder.name}.new"
    replaced = root / f".{folder.name}.old"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_all(left_overs(root))
        write_folder(new, tensors, optimizer, trainer, config, tokenizer)
        if folder.exists():  # it was damaged, and the run went back to an earlier one
            folder.rename(replaced)
        new.rename(folder)
        sync(root)
        # for other programs: we go by the folders' names, which say the same and cannot be torn
        # apart from them
        write_json(root / "newest.json", {"folder": folder.name})
        kept = [old for old in checkpoints(out_dir) if int(old.name) <= trainer["iter"]]
        losses = {old: val_loss(old) for old in kept}
        evaluated = [old for old in kept if losses[old] is not None]
        best = min(evaluated, key=losses.get, default=None)
        if best:
            write_json(root / "best.json", {"folder": best.name})
    except (OSError, SafetensorError, BadInput) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise BadInput(f"cannot write checkpoint {folder}: {error}; "
                       "earlier checkpoints are as they were") from error
    prune(root, {*kept[-keep_last:], best})


def prune(root, kept):
    """Deletes every checkpoint but those `kept`. What cannot be deleted is a line, and tried
    again by the next save."""
    try:
        for old in checkpoints(root.parent):
            if old not in kept:  # renamed first: a folder with a checkpoint's name is a whole one
                old.rename(root / f".{old.name}.old")
    except OSError as error:
        print(f"warning    cannot prune checkpoints: {error}", flush=True)
    remove_all(left_overs(root))


# Reading ----------------------------------------------------------------------------------------

def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(out_dir):
    """The checkpoint folders of a run, oldest first; none where no folder can be looked into."""
    root = Path(out_dir) / "checkpoints"
    try:
        named = [path for path in root.iterdir() if NAME.fullmatch(path.name)]
        names = [path.name for path in named if path.is_dir()]
    except (OSError, ValueError):
        return []
    return [root / name for name in sorted(names, key=int)]


def val_loss(folder):
    """The validation loss of a checkpoint in nats, or None if it was not evaluated or cannot be
    read."""
    try:
        return read_trainer(folder)["val_loss"]
    except BadInput:
        return None


def read_trainer(folder):
    """The TrainerState of a checkpoint folder. BadInput if it is damaged."""
    return read_json(folder / "trainer.json", REMEDY, TrainerState)


def damage(folder):
    """What is wrong with a checkpoint folder, in words, or None if every file is the one that was
    saved."""
    try:
        manifest = read_json(folder / "manifest.json", REMEDY, dict[str, str])
        for name in FILES:
            if not is_file(folder / name):
                return f"{name} is missing"
            if sha256(folder / name) != manifest.get(name):
                return f"{name} is not the file that was saved"
    except (BadInput, OSError) as error:
        return str(error)


class Checkpoint:
    """A checkpoint in memory: .folder, .sums (file -> sha256), .model and .optimizer (name ->
    tensor), .trainer (TrainerState), .config (dict), .tokenizer. BadInput if the files do not hold
    that, or do not agree."""

    def __init__(self, folder):
        self.folder = folder
        self.sums = read_json(folder / "manifest.json", REMEDY, dict[str, str])
        self.model = read_tensors(folder / "model.safetensors")
        self.optimizer = read_tensors(folder / "optimizer.safetensors")
        self.trainer = read_trainer(folder)
        self.config = read_json(folder / "config.json", REMEDY)
        self.tokenizer = load_tokenizer(folder / "tokenizer.json")
        vocab_size = self.config.get("vocab_size")
        if self.tokenizer.vocab_size != vocab_size:
            raise BadInput(
                f"{folder} is damaged: its tokenizer.json has {self.tokenizer.vocab_size} symbols, "
                f"its config.json says vocab_size {vocab_size!r}; {REMEDY}")


def read_tensors(path, remedy=REMEDY):
    """name -> tensor of a safetensors file; BadInput if it is none.

    The library maps the file into memory. These are copies: a file that is still mapped cannot
    quite be deleted on NFS, and one that is cut while mapped kills the process."""
    if not is_file(path):
        raise BadInput(f"{path} is missing or no regular file; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} is damaged: {error}; {remedy}") from error


def load(out_dir, which="newest", fall_back=False):
    """A checkpoint of a run: "newest", "best" or the name of its folder. BadInput, naming those
    that are whole, if it is not there or damaged; with fall_back the newest whole one is taken
    instead, and a line says so."""
    for attempt in range(READING_ATTEMPTS):
        folders = checkpoints(out_dir)
        try:
            return load_one_of(folders, out_dir, which, fall_back)
        except BadInput:
            # a training may have saved and pruned while we read: then it is not damaged but gone
            if checkpoints(out_dir) == folders or attempt == READING_ATTEMPTS - 1:
                raise


def load_one_of(folders, out_dir, which, fall_back):
    """What `load` does, of the checkpoint folders that were there when it looked."""
    if not folders:
        raise BadInput(f"no checkpoint in {out_dir}; train one with: "
                       f"python train.py configs/<name>.py --out_dir={out_dir}")
    root = Path(out_dir) / "checkpoints"
    if which == "best":
        which = read_json(root / "best.json", REMEDY, Pointer)["folder"]
    folder = folders[-1] if which == "newest" else root / str(which)
    if folder in folders:
        wrong = damage(folder)
        message = f"checkpoint {folder} is damaged: {wrong}"
    else:
        wrong = "no such folder"
        message = f"checkpoint {folder} is missing: {wrong}"
    if wrong is None:
        return Checkpoint(folder)
    sound = [other for other in folders if damage(other) is None]
    if fall_back and sound:
        print(f"{message}; going back to {sound[-1]}", flush=True)
        return Checkpoint(sound[-1])
    names = ", ".join(other.name for other in sound)
    raise BadInput(f"{message}; whole: {names or 'none'}")


def load_model(model, tensors, source):
    """Copies name -> tensor into the model. BadInput listing names only in the file (+), only in
    the model (-) and other shapes."""
    own = model_tensors(model)
    wrong = [f"+{name}" for name in tensors if name not in own]
    wrong += [f"-{name}" for name in own if name not in tensors]
    for name, tensor in own.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            there, here = tuple(tensors[name].shape), tuple(tensor.shape)
            wrong.append(f"{name} {there} in the file, {here} in the model")
    if wrong:
        raise BadInput(f"{source} does not fit the model (+ only in the file, - only in the "
                       f"model): {', '.join(wrong)}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def init_model(model, tensors, source):
    """Starts from another model's weights, name -> tensor. They may lack what a mixer adds to
    that model without changing what it computes (SSA's temperatures, on a softmax model). Returns
    the names of the parameters that they lack. BadInput as for load_model."""
    own = model_tensors(model)
    tensors = dict(tensors)
    lacking = set()
    for i, block in enumerate(model.blocks):
        if not hasattr(block.mixer, "be_neutral"):
            continue
        added = {f"blocks.{i}.mixer.{name}" for name in block.mixer.be_neutral()}
        if not added & tensors.keys():
            tensors |= {name: own[name] for name in added}
            lacking |= added
    load_model(model, tensors, source)
    return [name for name, _ in model.named_parameters() if name in lacking]


def least_parameters(config):
    """A number of parameters that a GPT of this config has at least: its embedding's and FFNs'."""
    embedding = config.vocab_size * (config.embed_rank or config.n_embd)
    return embedding + config.n_layer * 2 * config.n_embd * config.ffn_hidden


def build_model(checkpoint):
    """The model of a checkpoint, with its weights, in evaluation mode, on the CPU. BadInput if they
    do not fit its config.json; a model far beyond them is not even built."""
    config = model_config(checkpoint.config, checkpoint.folder / "config.json")
    stored = sum(tensor.numel() for tensor in checkpoint.model.values())
    if least_parameters(config) > stored:
        raise BadInput(f"{checkpoint.folder}: its config.json describes a model of "
                       f"{least_parameters(config):,} parameters or more, its model.safetensors "
                       f"has {stored:,}; {REMEDY}")
    model = GPT(config)
    load_model(model, checkpoint.model, checkpoint.folder)
    return model.eval()
