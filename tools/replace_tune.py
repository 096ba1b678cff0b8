"""The trainings of tools.replace: a model with some layers replaced goes on as an ordinary run of
train.py, which resumes, in out/replace."""
import json
import math
import shutil
import statistics
from dataclasses import asdict, fields
from pathlib import Path

from base.errors import BadInput
from base.files import exists, write_json
from config import ModelOptions, Options
from mixers import has_effect
from tools.replace_model import Replaced
from tools.sweep_runs import Run, train_and_score
from training import checkpoint

BATCH_SIZE = 2
RUNS = Path("out/replace")


def tune(setting, record, names):
    """Trains these arms and softmax for --tune_tokens each, and adds what came of them."""
    options = setting.options
    n_layer = setting.model.config.n_layer
    k = options.tune_layers or math.ceil(n_layer / 2)
    if k > n_layer:
        raise BadInput(f"--tune_layers={k}: the model has {n_layer}; choose less")
    for name in ["softmax", *names]:
        key = f"{name}-{k if name != 'softmax' else 0}-{options.tune_tokens}"
        if key not in record.content["tuned"]:
            record.content["tuned"][key] = tuned(setting, record, name, k, key)
            record.write()
        found = record.content["tuned"][key]
        print(f"{key:32} {found['before']:.4f} -> {found['after']:.4f} bits per byte", flush=True)


def tuned(setting, record, name, k, key):
    """What the record has of one training, which is carried out or gone on with."""
    options, config = setting.options, setting.model.config
    replaced, layers = None, []
    if name != "softmax":
        arm = record.content["arms"][name]
        order = sorted(range(len(arm["alone"])), key=arm["alone"].__getitem__)
        layers = sorted(order[:k])
        replaced = Replaced(setting.model, arm["options"], options.seed)
        replaced.put_in(layers)
        with setting.autocast():
            replaced.fit(setting.fit)
        config = replaced.config
    before = bits_per_byte(setting)
    mixer = replaced.pattern(layers) if replaced else config.mixer
    folder = RUNS / f"{options.init_from.replace('/', '_')}-{key}"
    start = folder.with_name(f"{folder.name}-start")
    run = run_of(setting, config, mixer, start, folder)
    if not exists(start / "checkpoints"):
        write_start(setting, start, config, mixer)
    if replaced:
        replaced.put_in([])
    error = train_and_score(run)
    if error:
        raise BadInput(f"{folder}: {error}; the same command goes on")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(start)
    return {"layers": layers, "before": before, "after": rows[-1]["val_bpb"],
            "tokens": rows[-1]["tokens"], "rate": options.tune_rate}


def bits_per_byte(setting):
    return statistics.mean(setting.losses()) / math.log(2) / setting.data.bytes_per_token


def write_start(setting, folder, config, mixer):
    """The model as it is now as a run's folder, which --init_from takes."""
    values = asdict(config) | {"mixer": mixer}
    trainer = dict(iter=0, val_loss=None, best_val_loss=None, tokens=0, seconds=0.0, wandb_id=None)
    checkpoint.save(folder, checkpoint.model_tensors(setting.model), {}, trainer, values,
                    setting.data.tokenizer.to_json(), keep_last=1)
    write_json(folder / "config.json",
               {name: value for name, value in values.items() if name != "vocab_size"})


def run_of(setting, config, mixer, start, folder):
    """The Run of train.py that goes on from `start`: evaluated on the windows of the report."""
    options = setting.options
    T = options.block_size
    steps = max(1, options.tune_tokens // (BATCH_SIZE * T))
    given = {f.name: getattr(config, f.name) for f in fields(ModelOptions)}
    defaults = asdict(Options())
    given = {name: value for name, value in given.items()
             if value != defaults[name] and has_effect(name, mixer, config.n_layer)}
    given |= dict(
        mixer=mixer, init_from=start, dataset=options.dataset, block_size=T, batch_size=BATCH_SIZE,
        max_iters=steps, eval_interval=steps, eval_tokens=options.windows * T, log_interval=1,
        learning_rate=options.tune_rate, min_lr=0.0, lr_schedule="linear",
        warmup_iters=max(1, steps // 10), weight_decay=0.0, beta2=0.95, seed=options.seed,
        keep_last=1, device=setting.device.type, dtype=options.dtype)
    return Run(str(folder), tuple(f"--{name}={value}" for name, value in given.items()), False)
