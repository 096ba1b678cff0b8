"""Trains one model on one data set. Run: python train.py configs/shakespeare_pelican.py   (about a minute on two CPU cores)

    python train.py configs/shakespeare.py --mixer=lln --max_iters=500     any option of config.py; --help lists them
    python train.py configs/shakespeare.py --resume                        goes on from the newest checkpoint
    python train.py --eval_only --out_dir=out/shakespeare                  the validation loss of a run
    torchrun --nproc_per_node=2 train.py configs/shakespeare.py            several processes, see parallel.py

Writes out_dir/config.json, metrics.jsonl and checkpoints/. The batch and the dropout of a step depend on (seed, step)
only, so that every mixer sees the same data in the same order and a resumed run goes on bit for bit; the validation loss
is the mean over fixed windows of the validation split.
"""
import contextlib
import fcntl
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from config import BadInput, ModelOptions, Options, exit_on_bad_input, parse_options
from data import load_dataset
from data.files import read_json
from device import choose_device, choose_dtype
from metrics import Metrics
from mixers import load_mixer_file
from model import GPT
from parallel import World, join, synchronise_gradients

EVAL_TOKENS_AT_ONCE = 8192  # tokens in a forward pass of the evaluation; more is no faster and needs memory


@exit_on_bad_input("train.py")
def main():
    world = World()
    options, saved = read_options(sys.argv[1:])
    config = checkpoint.model_config(asdict(options) | {"vocab_size": 1}, "options")  # refused before data are fetched
    device = world.start(choose_device(options.device), options)
    dtype = choose_dtype(options.dtype, device, options.n_embd)
    data = world.first_alone(lambda: load_dataset(options.dataset, options.block_size))
    data.tokenizer  # each checkpoint carries it: better to miss it now
    config = replace(config, vocab_size=data.vocab_size)
    # what was left to be chosen, as chosen: this is what config.json records
    options = replace(options, device=device.type, dtype=str(dtype).removeprefix("torch."),
                      **{f.name: getattr(config, f.name) for f in fields(ModelOptions)})
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    if saved:
        compare_with(saved, options, config)
        check_tokenizer(saved, data)
    torch.manual_seed(options.seed)
    model = GPT(config).to(device)
    describe(options, model, data, device, dtype, world)
    if saved:
        checkpoint.load_model(model, saved.model, saved.folder)
    elif options.init_from:
        start = checkpoint.load(options.init_from)
        check_tokenizer(start, data)
        checkpoint.init_model(model, start.model, start.folder)
    if options.eval_only:
        loss, bpb = evaluate(model, data, options, device, autocast, world)
        print(f"{saved.folder}: val loss {loss:.4f} nats per token, {bpb:.4f} bits per byte")
    elif saved and saved.trainer["iter"] >= options.max_iters:
        print(f"{saved.folder} is at step {saved.trainer['iter']} of {options.max_iters}: nothing left to do; for more, raise --max_iters")
    else:
        with prepared_folder(options, world):
            train(options, config, model, data, device, autocast, saved, world)
    world.end()


# Before training -----------------------------------------------------------------------------------------------------

def read_options(argv):
    """The options of this command, and the checkpoint to go on from or to evaluate (or None).

    With --resume and --eval_only the run's own options go before the config file's, so that the command that started it
    goes on with it; what is to change is set on the command line."""
    parse = lambda base={}: parse_options(Options, argv, __doc__.splitlines()[0], base=base)
    options, config_file, given = parse()
    out_dir = options.out_dir
    if out_dir is None:
        out_dir = f"out/{Path(config_file).stem if config_file else options.dataset}"
        if "mixer" in given or not config_file:
            out_dir += "_" + options.mixer.replace(",", "+")
    saved = None
    if options.resume and options.overwrite:
        raise BadInput("--resume goes on with the run and --overwrite clears it; leave one of them out")
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
    default = lambda value, otherwise: otherwise if value is None else value
    options = replace(options, out_dir=out_dir, min_lr=default(options.min_lr, options.learning_rate / 10),
                      lr_decay_iters=default(options.lr_decay_iters, options.max_iters))
    if options.min_lr > options.learning_rate:
        raise BadInput(f"min_lr {options.min_lr} is above learning_rate {options.learning_rate}; lower it or leave it unset")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    return options, saved


def own_options(config):
    """What a run's config.json has to say on how to go on: not the machine, nor what was asked of that one command, nor a
    mixer file, which is code that only the user may name. What followed from another option goes on following it."""
    follow = {"lr_decay_iters": config.get("max_iters"), "min_lr": config["learning_rate"] / 10 if "learning_rate" in config else None}
    leave = {"vocab_size", "device", "overwrite", "resume", "eval_only", "mixer_file"}
    return {name: value for name, value in config.items() if name not in leave and (name not in follow or value != follow[name])}


def holds_run(out_dir):
    return any((Path(out_dir) / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints"))


def compare_with(saved, options, config):
    """BadInput if the checkpoint's model is not the one that the options describe; a line for every other difference."""
    old = checkpoint.model_config(saved.config, saved.folder / "config.json")
    changed = [f"{f.name} {getattr(old, f.name)} -> {getattr(config, f.name)}" for f in fields(config)
               if getattr(old, f.name) != getattr(config, f.name) and f.name != "dropout"]
    if changed:
        raise BadInput(f"{saved.folder} is of another model: {', '.join(changed)}; leave these as they were or start a new run")
    for name, value in asdict(options).items():
        if name in saved.config and saved.config[name] != value and name not in ("resume", "overwrite", "eval_only", "mixer_file"):
            print(f"changed since {saved.folder.name}: {name} {saved.config[name]} -> {value}")


def check_tokenizer(saved, data):
    """BadInput if a checkpoint's tokens mean something else than the data set's."""
    if saved.tokenizer.to_json() != data.tokenizer.to_json():
        raise BadInput(f"{saved.folder} was trained on other symbols than those of data set {data.name}; choose the --dataset it was "
                       "trained on, or one with the same alphabet")


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


def describe(options, model, data, device, dtype, world):
    groups = model.parameter_groups()
    total = sum(groups.values())
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    where += f", {world.size} processes ({options.parallel})" if world.size > 1 else ""
    print(f"{options.out_dir}: {options.mixer}, {options.arch}, on {where}, {str(dtype).removeprefix('torch.')}")
    print(f"data       {data.name}: {len(data.train):,} tokens to train on, {len(data.val):,} to validate, vocabulary {data.vocab_size:,}")
    for group, count in groups.items():
        print(f"{group:10} {count:>12,} parameters {100 * count / total:5.1f} %")
    print(f"{'all':10} {total:>12,} parameters")
    T = options.block_size
    count = lambda value, unit: "n/a" if value is None else f"{value:,.0f} {unit}"
    print(f"cost       {count(model.flops_per_token(T), 'forward FLOPs')} per token of {T}, a multiply-add being 2; "
          f"{count(model.state_bytes(T, dtype), 'bytes')} of state after {T} tokens", flush=True)


def compiled(model, data, options, device, autocast, world):
    """torch.compile(model.loss), or model.loss itself and one line that says why."""
    if options.parallel == "fsdp":
        print("compile: off, it does not go with --parallel=fsdp")
        return model.loss
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        print("compile: off, no C++ compiler found")
        return model.loss
    fast = torch.compile(model.loss)
    x, y = (world.rows(t).to(device) for t in data.batch(options.seed, 0, options.batch_size, options.block_size))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with autocast:
            fast(x, y).backward()  # compiles both passes here, where a failure can still be mended
    except Exception as error:  # the compiler's own; training must go on without it
        print(f"compile: off, it failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        fast = model.loss
    model.zero_grad()
    for name, buffer in model.named_buffers():  # the trial run counts for nothing
        buffer.copy_(buffers[name])
    return fast


# Training ------------------------------------------------------------------------------------------------------------

def learning_rate(step, options):
    """Of update `step`, counted from 0: linear warm-up, then decay to min_lr at lr_decay_iters."""
    peak, low, decay_iters = options.learning_rate, options.min_lr, options.lr_decay_iters
    if step < options.warmup_iters:
        return peak * (step + 1) / (options.warmup_iters + 1)
    if not options.decay_lr:
        return peak
    if step >= decay_iters:
        return low
    done = (step - options.warmup_iters) / (decay_iters - options.warmup_iters)
    left = 1 - done if options.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return low + left * (peak - low)


@torch.no_grad()
def evaluate(model, data, options, device, autocast, world):
    """The mean loss over the fixed validation windows: (nats per token, bits per byte)."""
    model.eval()
    total, count = 0.0, 0
    batches = list(data.val_batches(options.block_size, max(1, EVAL_TOKENS_AT_ONCE // options.block_size), options.eval_tokens))
    for i in range(world.rank, math.ceil(len(batches) / world.size) * world.size, world.size):
        # under FSDP all processes must take part in every forward pass: those without a batch left repeat the last
        x, y = batches[min(i, len(batches) - 1)]
        with autocast:
            loss = model.loss(x.to(device), y.to(device)).item()
        if i < len(batches):
            total, count = total + loss * y.numel(), count + y.numel()
    model.train()
    total, count = world.total([total, count], device)
    return total / count, total / count / math.log(2) / data.bytes_per_token


def make_optimizer(model, options, device):
    """AdamW with weight decay on matrices only: decaying norms and biases towards zero makes no sense."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=options.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2),
                             fused=device.type in ("cpu", "cuda"))


def train(options, config, model, data, device, autocast, saved, world):
    """From the start, or from the checkpoint `saved`, whose weights the model has, to max_iters."""
    forward_flops = model.flops_per_token(options.block_size)
    loss_fn = compiled(model, data, options, device, autocast, world) if options.compile else model.loss
    loss_fn = join(model, loss_fn, options, world)
    optimizer = make_optimizer(model, options, device)
    step, best, tokens, seconds, wandb_id = 0, None, 0, 0.0, None
    if saved:
        checkpoint.load_optimizer(model, optimizer, saved.optimizer, saved.folder)
        step, best, tokens, seconds, wandb_id = (saved.trainer[k] for k in ("iter", "best_val_loss", "tokens", "seconds", "wandb_id"))
        print(f"going on from {saved.folder}")
    metrics = Metrics(options, step, wandb_id) if world.rank == 0 else None
    bar = tqdm(total=options.max_iters, initial=step, unit="step", disable=world.rank > 0 or not sys.stderr.isatty())
    accumulation = options.gradient_accumulation_steps
    stop = catch_signals()
    started = time.perf_counter() - seconds  # the clock goes on where the saved run stopped
    last_log, last_tokens = time.perf_counter(), tokens

    def log(**values):
        flops = None if forward_flops is None else 3 * forward_flops * tokens  # the backward pass is twice the forward pass
        if metrics:
            metrics.log(iter=step, tokens=tokens, flops=flops, seconds=time.perf_counter() - started, **values)

    def save(val_loss=None):
        weights, moments = checkpoint.model_tensors(model), checkpoint.optimizer_tensors(model, optimizer)
        if metrics:
            metrics.sync()
            trainer = dict(iter=step, val_loss=val_loss, best_val_loss=best, tokens=tokens, seconds=time.perf_counter() - started,
                           wandb_id=metrics.wandb_id)
            checkpoint.save(options.out_dir, weights, moments, trainer, asdict(options) | {"vocab_size": config.vocab_size},
                            data.tokenizer.to_json(), options.keep_last)
        world.wait()

    stopping = False
    while True:
        if step < options.max_iters:
            lr = learning_rate(step, options)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(seed_of(options.seed, step, world.rank))
            x, y = data.batch(options.seed, step, options.batch_size * accumulation, options.block_size)
            train_loss = 0.0
            for i, (micro_x, micro_y) in enumerate(zip(x.split(options.batch_size), y.split(options.batch_size))):
                synchronise_gradients(loss_fn, model, on=i == accumulation - 1)
                with autocast:
                    loss = loss_fn(world.rows(micro_x).to(device), world.rows(micro_y).to(device)) / accumulation
                loss.backward()
                train_loss += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip or math.inf).item()
            train_loss, stopping = world.total([train_loss / world.size, bool(stop)], device)
            if not math.isfinite(train_loss + norm):
                raise not_finite(f"loss {train_loss}, gradient norm {norm}", step, options)
            optimizer.step()
            optimizer.zero_grad()
            model.apply_statistics()
            step += 1
            tokens += x.numel()
            bar.update()
            if step % options.log_interval == 0 or step == options.max_iters:
                now = time.perf_counter()
                speed = (tokens - last_tokens) / (now - last_log)
                last_log, last_tokens = now, tokens
                log(train_loss=train_loss, lr=lr, tokens_per_s=speed)
                bar.set_postfix_str(f"loss {train_loss:.4f}, {speed:,.0f} tokens/s")
                if bar.disable:
                    print(f"step {step:6}/{options.max_iters} | loss {train_loss:.4f} nats | lr {lr:.2e} | {speed:,.0f} tokens/s | {now - started:.1f} s")
        if step % options.eval_interval == 0 or step == options.max_iters:
            eval_started = time.perf_counter()
            val_loss, val_bpb = evaluate(model, data, options, device, autocast, world)
            if not math.isfinite(val_loss):
                raise not_finite(f"validation loss {val_loss}", step, options)
            is_best = best is None or val_loss < best
            best = val_loss if is_best else best
            log(val_loss=val_loss, val_bpb=val_bpb)
            bar.write(f"step {step:6}/{options.max_iters} | val loss {val_loss:.4f} nats per token | {val_bpb:.4f} bits per byte"
                      + (" | the best so far" if is_best else ""), file=sys.stdout)
            save(val_loss)
            last_log += time.perf_counter() - eval_started  # tokens_per_s is of training alone
        elif stopping:
            save()
        if stopping and step < options.max_iters:
            print(f"stopped by a signal after step {step}; go on with --resume")
        if stopping or step >= options.max_iters:
            break
    bar.close()
    if metrics:
        metrics.close()


def seed_of(*numbers):
    """One seed for torch's generators from several numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def not_finite(what, step, options):
    kept = checkpoint.checkpoints(options.out_dir)
    return BadInput(f"step {step}: {what} is not finite (batch {step} of seed {options.seed}); training stops, "
                    f"{f'the last good checkpoint is {kept[-1]}' if kept else 'before the first checkpoint'}; try a lower learning_rate")


def catch_signals():
    """A list that holds the signal's number once SIGTERM or Ctrl-C has come. A second one ends the process at once."""
    caught = []

    def handle(number, frame):
        caught.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return caught


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log that is read while it grows
    main()
