"""Which run a command of train.py is about: its options, the checkpoint it goes on from, its
folder, the lock on it.

The lock is taken before anything in the folder is looked at and kept to the end: what --resume
reads cannot change any more, and a run that began and ended while this one started is seen. """
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from dataclasses import asdict, fields, replace
from pathlib import Path

from pydantic import ValidationError

from base.command_line import one_line, one_spelling, read_given
from base.errors import BadInput, is_out_of_memory
from base.files import exists, is_file, read_json, write_json
from config import Options, filled_in
from mixers import layer_mixers
from model import model_config
from training import checkpoint, pretrained

# options that say nothing of the run as such
OF_ONE_COMMAND = {"resume", "overwrite", "other_data", "eval_only", "eval_split", "mixer_file"}
# model options that change no weights, so that a trained model may be evaluated with others
OF_EVALUATION = {"attn_temperature"}
# which config.json has besides the options
NOT_OPTIONS = {"vocab_size", "data_sha256", "init_sha256"}
# what a run consists of; the rest of its folder is the user's. In the order in which --overwrite
# moves them away
PARTS = ("config.json", "scores.json", "metrics.jsonl", "checkpoints", "wandb")
OVERWRITTEN = re.compile(rf"\.overwritten\.[0-9a-f]{{32}}\.({'|'.join(map(re.escape, PARTS))})")
# files of killed processes that were about to be renamed
LEFT_OVER = re.compile(r"\.metrics\.jsonl"
                       r"|\.(config\.json|metrics\.jsonl)\.([0-9]+|[0-9a-f]{32}\.tmp)")
LOCK_ATTEMPTS = 5
LOCK_SECONDS = 0.02
HASHED_AT_ONCE = 2**20  # bytes
HASHED_PIECES = 64      # of a larger file, evenly spread


# Options ----------------------------------------------------------------------------------------

def read_options(argv, description, lock=None):
    """The options of this command, and the checkpoint to go on from or to evaluate (or None).

    With --resume and --eval_only the run's own options go before the config file's, so that the
    command that started it goes on with it; what is to change is set on the command line. A
    FolderLock is taken before the run is read that --resume goes on with or --overwrite
    clears."""
    words = read_given(Options, argv, description)
    config_file, given = words.config_file, set(words.on_command_line)
    check_per_mixer(words)
    options = words.options(mixer=one_spelling(words.options().mixer))
    refuse_contradictions(options)
    options = replace(options, out_dir=choose_out_dir(options, config_file, given))
    saved = None
    own = {}
    if options.eval_only or options.resume:
        if not holds_run(options.out_dir):
            raise BadInput(f"{options.out_dir} holds no run; "
                           "start one without --resume and --eval_only")
        if lock and not options.eval_only:
            lock.take(options.out_dir)
        saved, own = read_run(options)
        own = without_what_the_file_says(own, options)
        report_differences(own, options, config_file, given)
        refuse_unnamed_network(own, options, given, saved)
        unchanged = {name: value for name, value in own.items() if name not in given}
        options = replace(options, **unchanged)
    elif holds_run(options.out_dir):
        if not options.overwrite:
            raise BadInput(f"{options.out_dir} already holds a run; go on with --resume, choose "
                           "another --out_dir, or clear it with --overwrite")
        if lock:
            lock.take(options.out_dir)
    if options.train_only == "mixer_new" and not options.init_from:
        raise BadInput("--train_only=mixer_new trains what the weights of --init_from lack; "
                       "name these, or leave it out")
    if not saved and options.init_from and pretrained.is_pretrained(options.init_from):
        chosen = given | words.in_config_file.keys() | own.keys()
        chosen |= words.per_mixer.get(one_spelling(options.mixer), {}).keys()
        options = pretrained.take_architecture(options, chosen)
    elif not saved and options.init_from and options.init_std is None:
        options = replace(options, init_std=start_of_run(options.init_from))
    return filled_in(fill_in_rates(options)), saved


def start_of_run(folder):
    """The init_std of a run, for parameters that are added to its weights."""
    path = Path(folder) / "config.json"
    own = own_options(read_json(path, checkpoint.REMEDY), path, checkpoint.REMEDY)
    return own.get("init_std", 0.02)  # older runs do not say


def check_per_mixer(words):
    """BadInput if a config file has options for a mixer that is none."""
    for mixer in words.per_mixer:
        try:
            layer_mixers(mixer)
        except ValueError as error:
            raise BadInput(f"config file {words.config_file}, per_mixer: {error}") from error


def refuse_contradictions(options):
    if options.resume and options.overwrite:
        raise BadInput("--resume goes on with the run and --overwrite clears it; "
                       "leave one of them out")
    if options.eval_split != "val" and not options.eval_only:
        raise BadInput(f"--eval_split={options.eval_split} goes with --eval_only; "
                       "training evaluates on val")


def choose_out_dir(options, config_file, given):
    """The run's folder: as set, or named after the config file and a mixer of the command line."""
    if options.out_dir is not None:
        return options.out_dir
    name = Path(config_file).stem if config_file else options.dataset
    if "mixer" in given or not config_file:
        name += "_" + options.mixer.replace(",", "+")
    return f"out/{name}"


def read_run(options):
    """(checkpoint or None, the run's own options) of the run in out_dir. BadInput if it cannot be
    gone on with."""
    out_dir = Path(options.out_dir)
    if half_cleared(out_dir):
        raise BadInput(f"{out_dir}: --overwrite had begun to clear the run in it and was stopped; "
                       "start the new run again with --overwrite")
    if options.eval_only or checkpoint.checkpoints(out_dir):
        saved = checkpoint.load(out_dir, fall_back=not options.eval_only)
        return saved, own_options(saved.config, saved.folder / "config.json", checkpoint.REMEDY)
    print(f"{out_dir} holds no checkpoint yet: starting from the beginning", flush=True)
    remedy = "clear the run with --overwrite"
    config = read_json(out_dir / "config.json", remedy)
    return None, own_options(config, out_dir / "config.json", remedy)


def own_options(config, source, remedy):
    """What a run's config.json (dict) has to say on how to go on. What followed from another
    option goes on following it. BadInput, naming `source` and `remedy`, for a value that is none
    of the option's.

    Left out are the folder, which may have moved, the machine, what was asked of that one command,
    a mixer file, which is code, and wandb_log: to run code or to use the network is only for this
    command to say."""
    names = {f.name for f in fields(Options)}
    values = {name: value for name, value in config.items() if name not in NOT_OPTIONS}
    unknown = [name for name in values if name not in names]
    if unknown:
        raise BadInput(f"{source}: no option {unknown[0]!r} here; {remedy}")
    try:
        checked = Options(**values)
    except ValidationError as error:
        raise BadInput(f"{source} is damaged: {one_line(error)}; {remedy}") from error
    for name in ("out_dir", "device", "wandb_log", *OF_ONE_COMMAND):
        values.pop(name, None)
    if values.get("lr_decay_iters") == checked.max_iters:
        values["lr_decay_iters"] = None
    if values.get("min_lr") == checked.learning_rate / 10:
        values["min_lr"] = None
    return values


def without_what_the_file_says(own, options):
    """A run's own options without those that followed from others, where the config file sets the
    same value: then they do not follow, and the file's goes on to hold."""
    recorded = {"lr_decay_iters": own.get("max_iters"),
                "min_lr": own.get("learning_rate", 0.0) / 10}
    return {name: value for name, value in own.items()
            if value is not None or getattr(options, name) != recorded.get(name)}


def report_differences(own, options, config_file, given):
    """A line for what the config file sets and the run has otherwise."""
    if not config_file:
        return
    defaults = Options()
    differing = []
    for name, value in own.items():
        in_file = getattr(options, name)
        if name not in given and in_file not in (value, None, getattr(defaults, name)):
            differing.append(f"{name} {'not set' if value is None else value}")
    if differing:
        print(f"as the run has it, not as {config_file}: {', '.join(differing)}", flush=True)


def refuse_unnamed_network(own, options, given, saved):
    """BadInput if weights would be fetched because a run's config.json says so, and not this
    command."""
    name = own.get("init_from")
    if saved or name is None or name == options.init_from:
        return
    if name in pretrained.NAMES and not exists(name):
        raise BadInput(f"{options.out_dir}/config.json starts from {name}, which is fetched from "
                       f"the network; if that is what you want, say so: --init_from={name}")


def fill_in_rates(options):
    """The options with min_lr and lr_decay_iters as they follow from the others if they are not
    set."""
    min_lr = options.min_lr
    if min_lr is None:
        min_lr = options.learning_rate / 10
    if min_lr > options.learning_rate:
        raise BadInput(f"min_lr {min_lr} is above learning_rate {options.learning_rate}; "
                       "lower it or leave it unset")
    decay_iters = options.lr_decay_iters
    if decay_iters is None:
        decay_iters = options.max_iters
    return replace(options, min_lr=min_lr, lr_decay_iters=decay_iters)


# What a run is compared with --------------------------------------------------------------------

def compare_with(saved, options, config):
    """BadInput if the checkpoint's model is not the one that the options describe; a line for
    every other difference."""
    old = model_config(saved.config, saved.folder / "config.json")
    changed = []
    for f in fields(config):
        before, now = getattr(old, f.name), getattr(config, f.name)
        may_change = f.name == "dropout" or (options.eval_only and f.name in OF_EVALUATION)
        if before != now and not may_change:
            changed.append(f"{f.name} {before} -> {now}")
    if changed:
        raise BadInput(f"{saved.folder} is of another model: {', '.join(changed)}; "
                       "leave these as they were or start a new run")
    trained = saved.config.get("train_only", "all")
    if options.train_only != trained:
        raise BadInput(f"{saved.folder} was trained with train_only {trained!r}, not "
                       f"{options.train_only!r}; leave it as it was, or start a new run with "
                       "--init_from")
    optimizer = saved.config.get("optimizer", "adamw")
    if options.optimizer != optimizer:
        raise BadInput(f"{saved.folder} was trained with optimizer {optimizer!r}, not "
                       f"{options.optimizer!r}, whose state is another; leave it as it was, or "
                       "start a new run with --init_from")
    for name, value in asdict(options).items():
        if name in saved.config and saved.config[name] != value and name not in OF_ONE_COMMAND:
            print(f"changed since {saved.folder.name}: {name} {saved.config[name]} -> {value}")


def check_tokenizer(saved, data):
    """BadInput if a checkpoint's tokens mean something else than the data set's."""
    if saved.tokenizer.to_json() != data.tokenizer.to_json():
        raise BadInput(
            f"{saved.folder} was trained on other symbols than those of data set {data.name}; "
            "choose the --dataset it was trained on, or one with the same alphabet")


def data_sha256(data):
    """The checksum of a data set's training and validation tokens: of all bytes of files up to 64
    MiB; of a larger one of 64 pieces of a MiB, evenly spread, and of its size, so that it takes
    no longer."""
    total = hashlib.sha256()
    for split in ("train", "val"):
        for name in (f"{split}.bin", f"{split}_targets.bin"):
            path = data.folder / name
            if not path.exists():
                continue
            size = path.stat().st_size
            total.update(f"{name} {size} ".encode())
            with open(path, "rb") as file:
                for start in pieces(size):
                    file.seek(start)
                    total.update(file.read(HASHED_AT_ONCE))
    return total.hexdigest()


def pieces(size):
    """Where the pieces of a file of that many bytes start that its checksum is made of; the last
    one ends with it."""
    count = -(-size // HASHED_AT_ONCE)
    if count <= HASHED_PIECES:
        return [HASHED_AT_ONCE * i for i in range(count)]
    return [(size - HASHED_AT_ONCE) * i // (HASHED_PIECES - 1) for i in range(HASHED_PIECES)]


def check_data(saved, data, insist=False):
    """BadInput if a checkpoint was trained on other symbols than the data set's, or on a data set
    of that name whose tokens have changed since; to `insist` turns the latter into a line."""
    check_tokenizer(saved, data)
    before = saved.config.get("data_sha256")  # None: saved before it was recorded
    if before is None or saved.config.get("dataset") != data.name:
        return
    now = data_sha256(data)
    if before == now:
        return
    what = (f"data set {data.name} has changed since {saved.folder} was trained on it "
            f"(sha256 {str(before)[:12]} then, {now[:12]} now)")
    if not insist:
        raise BadInput(f"{what}; prepare it again from the old text, or insist with --other_data")
    print(f"warning    {what}", flush=True)


# Where weights come from ------------------------------------------------------------------------

def weights_sha256(init_from):
    """The checksum of the weights that init_from names: of its file, of the files of a folder of
    Hugging Face's, of a run's newest checkpoint. BadInput where there are none."""
    if pretrained.is_pretrained(init_from):
        paths = pretrained.weight_paths(init_from)
    else:
        [*_, newest] = checkpoint.checkpoints(init_from) or [None]
        if newest is None:
            raise BadInput(f"no checkpoint in {init_from}; name a run that has one")
        paths = [newest / "model.safetensors"]
    sums = []
    for path in paths:
        if not is_file(path):  # or a training has deleted it since
            raise BadInput(f"{init_from}: {path} is no regular file; fetch it, or try again")
        try:
            sums.append(checkpoint.sha256(path))
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}; try again") from error
    return sums[0] if len(sums) == 1 else hashlib.sha256(" ".join(sums).encode()).hexdigest()


def start_from(options, model, data):
    """Gives the model the weights that init_from names. Returns the names of the parameters to
    train, or None: all; and the weights' checksum. BadInput if they do not fit, or with
    train_only=mixer_new if they lack none."""
    if pretrained.is_pretrained(options.init_from):
        pretrained.check_tokenizer(options.init_from, data)
        tensors = pretrained.read_weights(options.init_from, model.config)
        new = checkpoint.init_model(model, tensors, options.init_from)
        sha256 = weights_sha256(options.init_from)
    else:
        start = checkpoint.load(options.init_from)
        check_tokenizer(start, data)
        new = checkpoint.init_model(model, start.model, start.folder)
        sha256 = start.sums["model.safetensors"]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    count = sum(sizes[name] for name in new)
    share = 100 * count / sum(sizes.values())
    only = "; only these are trained" if options.train_only == "mixer_new" else ""
    print(f"{'new':10} {count:>12,} parameters {share:8.3f} % that {options.init_from} lacks{only}",
          flush=True)
    if options.train_only == "all":
        return None, sha256
    if not new:
        raise BadInput(f"train_only 'mixer_new': mixer {options.mixer!r} adds no parameters to "
                       f"{options.init_from}; leave it out, or choose --mixer=ssa")
    return new, sha256


def train_alone(model, names):
    """Freezes every other parameter; None: none."""
    for name, p in model.named_parameters():
        p.requires_grad_(names is None or name in names)


# The folder -------------------------------------------------------------------------------------

def holds_run(out_dir):
    """Whether there is a run in a folder, or what is left of one that --overwrite had begun to
    clear."""
    out_dir = Path(out_dir)
    if any(exists(out_dir / name) for name in ("config.json", "metrics.jsonl", "checkpoints")):
        return True
    return exists(out_dir) and half_cleared(out_dir)


def overwritten(out_dir):
    """Parts of an earlier run that --overwrite has moved away and that are still there."""
    return [path for path in out_dir.glob(".overwritten.*") if OVERWRITTEN.fullmatch(path.name)]


def half_cleared(out_dir):
    """Whether --overwrite was stopped between the first move and the new run's config.json."""
    return not exists(out_dir / "config.json") and bool(overwritten(out_dir))


class FolderLock:
    """Keeps a run folder for this process, from `take` to the end of the with block or of the
    process, however it ends. The file `lock` in the folder has the process's id.

    Not filelock: some of its versions empty the file of the process that has it, whose id is then
    lost, and on a disk without flock it falls back to a file that outlives a killed process."""

    def __init__(self):
        self.file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file:
            self.file.close()

    def take(self, out_dir):
        """Locks out_dir, which exists. BadInput if another process has it, naming that one, or if
        `lock` is no plain file: nothing is written through a link."""
        with writing_to(out_dir):
            file = open_plainly(Path(out_dir) / "lock")
            if not locks(file):
                holder = file.read(20).strip()
                file.close()
                raise BadInput(f"{out_dir} is in use by the training with process id {holder}; "
                               "wait for it, stop it, or choose another --out_dir")
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        self.file = file


def locks(file):
    """Whether a file could be locked; asked again for a moment, as a sweep that looks whether it is
    has it for as long."""
    for _ in range(LOCK_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(LOCK_SECONDS)
    return False


def open_plainly(path):
    """A file to read and write, made if it is not there. BadInput if it is a link, a pipe or the
    like."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadInput(f"{path} is a link, and a run writes through none; remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadInput(f"{path} is no regular file; remove it")
    return open(handle, "r+", errors="replace")


@contextlib.contextmanager
def writing_to(out_dir):
    """Inside, a full or read-only disk and the like become one line that names out_dir."""
    try:
        yield
    except ConnectionError:  # of standard output or of wandb, not of out_dir
        raise
    except OSError as error:
        raise BadInput(f"cannot write to out_dir {out_dir}: {error}; "
                       "free space or choose another --out_dir") from error


@contextlib.contextmanager
def prepared_folder(options, config, lock):
    """Inside, out_dir is this run's alone: locked, an earlier run cleared if so asked, with
    `config` (dict) in config.json. A run that ends for want of memory before it has recorded
    anything leaves no trace."""
    out_dir = Path(options.out_dir)
    with writing_to(out_dir):
        is_new = not out_dir.exists()
        out_dir.mkdir(parents=True, exist_ok=True)
        if not lock.file:
            lock.take(out_dir)
            if holds_run(out_dir):  # it did not when read_options looked
                raise BadInput(f"another run has begun in {out_dir} since this command started; "
                               "go on with --resume, or choose another --out_dir")
        if options.overwrite:
            move_away(out_dir)
        for name in ("checkpoints", "wandb"):
            if (out_dir / name).is_symlink():
                raise BadInput(f"{out_dir / name} is a link, and a run writes through none; "
                               "put a folder in its place, or choose another --out_dir")
        write_json(out_dir / "config.json", config)
        left_overs = [path for path in out_dir.glob(".*") if LEFT_OVER.fullmatch(path.name)]
        checkpoint.remove_all(left_overs + overwritten(out_dir))
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error) and not options.resume and nothing_recorded(out_dir):
                withdraw(out_dir, is_new)
            raise


def move_away(out_dir):
    """Takes the run in out_dir out of the way: one rename a part, within the folder, so that links
    are moved as such and folders that cannot be emptied go too. From the first rename on, that of
    config.json, --resume refuses what is left, until the new config.json is there. If a part cannot
    be moved, all are back where they were."""
    mark = uuid.uuid4().hex
    moved = []
    try:
        for name in PARTS:
            path = out_dir / name
            if path.exists() or path.is_symlink():
                new = out_dir / f".overwritten.{mark}.{name}"
                path.rename(new)
                moved.append((path, new))
    except OSError:
        for path, new in reversed(moved):
            new.rename(path)
        raise


def nothing_recorded(out_dir):
    path = out_dir / "metrics.jsonl"
    return not checkpoint.checkpoints(out_dir) and (not path.exists() or path.stat().st_size == 0)


def withdraw(out_dir, with_folder):
    """Deletes a run that never began; with_folder: the folder too, if nothing else is in it."""
    for name in ("config.json", "metrics.jsonl"):
        (out_dir / name).unlink(missing_ok=True)
    if with_folder and [path.name for path in out_dir.iterdir()] == ["lock"]:
        shutil.rmtree(out_dir)
