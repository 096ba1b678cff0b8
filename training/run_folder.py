"""Which run a command of train.py is about: its options, the checkpoint it goes on from, its folder and the lock on it."""
import contextlib
import fcntl
import os
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

from base.command_line import parse_options, read_config_file
from base.errors import BadInput
from base.files import read_json
from config import Options, filled_in
from model import model_config
from training import checkpoint, pretrained

OF_ONE_COMMAND = {"resume", "overwrite", "eval_only", "eval_split", "mixer_file"}  # options that say nothing of the run as such


def read_options(argv, description):
    """The options of this command, and the checkpoint to go on from or to evaluate (or None).

    With --resume and --eval_only the run's own options go before the config file's, so that the command that started it
    goes on with it; what is to change is set on the command line."""
    parse = lambda base={}: parse_options(Options, argv, description, base=base)
    options, config_file, given = parse()
    out_dir = options.out_dir
    if out_dir is None:
        out_dir = f"out/{Path(config_file).stem if config_file else options.dataset}"
        if "mixer" in given or not config_file:
            out_dir += "_" + options.mixer.replace(",", "+")
    saved, own = None, {}
    if options.resume and options.overwrite:
        raise BadInput("--resume goes on with the run and --overwrite clears it; leave one of them out")
    if options.eval_split != "val" and not options.eval_only:
        raise BadInput(f"--eval_split={options.eval_split} goes with --eval_only; training evaluates on val")
    if options.eval_only or options.resume:
        if not holds_run(out_dir):
            raise BadInput(f"{out_dir} holds no run; start one without --resume and --eval_only")
        if options.eval_only or checkpoint.checkpoints(out_dir):
            saved = checkpoint.load(out_dir, fall_back=not options.eval_only)
        else:
            print(f"{out_dir} holds no checkpoint yet: starting from the beginning", flush=True)
        own = own_options(saved.config if saved else read_json(Path(out_dir) / "config.json", "clear the run with --overwrite"))
        differing = [name for name in vars(options) if name in own and name not in given and config_file
                     and getattr(options, name) not in (own[name], None, getattr(Options(), name))]
        if differing:
            print(f"as the run has it, not as {config_file}: {', '.join(f'{name} {own[name]}' for name in differing)}", flush=True)
        options, *_ = parse(own)
    elif holds_run(out_dir) and not options.overwrite:
        raise BadInput(f"{out_dir} already holds a run; go on with --resume, choose another --out_dir, or clear it with --overwrite")
    if options.train_only == "mixer_new" and not options.init_from:
        raise BadInput("--train_only=mixer_new trains what the weights of --init_from lack; name these, or leave it out")
    if not saved and options.init_from and pretrained.is_pretrained(options.init_from):
        in_file = read_config_file(config_file, Options) if config_file else {}
        options = pretrained.take_architecture(options, given | in_file.keys() | own.keys())
    default = lambda value, otherwise: otherwise if value is None else value
    options = replace(options, out_dir=out_dir, min_lr=default(options.min_lr, options.learning_rate / 10),
                      lr_decay_iters=default(options.lr_decay_iters, options.max_iters))
    if options.min_lr > options.learning_rate:
        raise BadInput(f"min_lr {options.min_lr} is above learning_rate {options.learning_rate}; lower it or leave it unset")
    return filled_in(options), saved


def own_options(config):
    """What a run's config.json has to say on how to go on: not the machine, nor what was asked of that one command, nor a
    mixer file, which is code that only the user may name. What followed from another option goes on following it."""
    follow = {"lr_decay_iters": config.get("max_iters"), "min_lr": config["learning_rate"] / 10 if "learning_rate" in config else None}
    leave = {"vocab_size", "device", *OF_ONE_COMMAND}
    return {name: value for name, value in config.items() if name not in leave and (name not in follow or value != follow[name])}


def holds_run(out_dir):
    return any((Path(out_dir) / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints"))


def compare_with(saved, options, config):
    """BadInput if the checkpoint's model is not the one that the options describe; a line for every other difference."""
    old = model_config(saved.config, saved.folder / "config.json")
    changed = [f"{f.name} {getattr(old, f.name)} -> {getattr(config, f.name)}" for f in fields(config)
               if getattr(old, f.name) != getattr(config, f.name) and f.name != "dropout"]
    if changed:
        raise BadInput(f"{saved.folder} is of another model: {', '.join(changed)}; leave these as they were or start a new run")
    if options.train_only != saved.config.get("train_only", "all"):
        raise BadInput(f"{saved.folder} was trained with train_only {saved.config.get('train_only', 'all')!r}, not {options.train_only!r}; leave it as "
                       "it was, or start a new run with --init_from")
    for name, value in asdict(options).items():
        if name in saved.config and saved.config[name] != value and name not in OF_ONE_COMMAND:
            print(f"changed since {saved.folder.name}: {name} {saved.config[name]} -> {value}")


def check_tokenizer(saved, data):
    """BadInput if a checkpoint's tokens mean something else than the data set's."""
    if saved.tokenizer.to_json() != data.tokenizer.to_json():
        raise BadInput(f"{saved.folder} was trained on other symbols than those of data set {data.name}; choose the --dataset it was "
                       "trained on, or one with the same alphabet")


def start_from(options, model, data):
    """Gives the model the weights that init_from names. Returns the names of the parameters to train, or None: all.
    BadInput if they do not fit, or with train_only=mixer_new if they lack none."""
    if pretrained.is_pretrained(options.init_from):
        new = checkpoint.init_model(model, pretrained.load(options.init_from, model.config), options.init_from)
    else:
        start = checkpoint.load(options.init_from)
        check_tokenizer(start, data)
        new = checkpoint.init_model(model, start.model, start.folder)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    count, total = sum(sizes[name] for name in new), sum(sizes.values())
    print(f"{'new':10} {count:>12,} parameters {100 * count / total:8.3f} % that {options.init_from} lacks"
          + ("; only these are trained" if options.train_only == "mixer_new" else ""), flush=True)
    if options.train_only == "all":
        return None
    if not new:
        raise BadInput(f"train_only 'mixer_new': mixer {options.mixer!r} adds no parameters to {options.init_from}; leave it out, or choose --mixer=ssa")
    return new


def train_alone(model, names):
    """Freezes every other parameter; None: none."""
    for name, p in model.named_parameters():
        p.requires_grad_(names is None or name in names)


@contextlib.contextmanager
def prepared_folder(options, world):
    """Inside, out_dir is this run's alone: cleared if so asked, with config.json in it, and locked. The system releases the
    lock when the process ends, however it ends."""
    if world.rank > 0:
        yield
        return
    out_dir = Path(options.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with open(out_dir / "lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise BadInput(f"{out_dir} is in use by the training with process id {lock.read().strip()}; wait for it, stop "
                               "it, or choose another --out_dir") from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            if options.overwrite:
                for name in ("config.json", "metrics.jsonl", "checkpoints", "wandb"):  # ours; the rest is the user's
                    path = out_dir / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            checkpoint.write_json(out_dir / "config.json", asdict(options))
            yield
    except ConnectionError:  # of standard output or of wandb, not of out_dir
        raise
    except OSError as error:
        raise BadInput(f"cannot write to out_dir {out_dir}: {error}; free space or choose another --out_dir") from error
