"""Trains one model on one data set. Run: python train.py configs/shakespeare_pelican.py   (about a minute on two CPU cores)

    python train.py configs/shakespeare.py --mixer=lln --max_iters=500     any option of config.py; --help lists them
    python train.py configs/shakespeare.py --resume                        goes on from the newest checkpoint
    python train.py --eval_only --out_dir=out/shakespeare                  the validation loss of a run
    torchrun --nproc_per_node=2 train.py configs/shakespeare.py            several processes, see parallel.py

Writes out_dir/config.json, metrics.jsonl and checkpoints/. The batch and the dropout of a step depend on (seed, step)
only, so that every mixer sees the same data in the same order and a resumed run goes on bit for bit; the validation loss
is the mean over fixed windows of the validation split.
"""
import math
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from typing import NamedTuple, Optional

import numpy as np
import torch
from tqdm import tqdm

from base.errors import BadInput, exit_on_bad_input
from config import ModelOptions
from data import load_dataset
from model import GPT, model_config
from training import checkpoint
from training.device import choose_device, choose_dtype, compiled, peak_memory, rows_per_pass
from training.leaks import check_builders, find_leak
from training.metrics import Metrics
from training.parallel import World, join, synchronise_gradients
from training.run_folder import check_tokenizer, compare_with, prepared_folder, read_options, start_from, train_alone

EVAL_TOKENS_AT_ONCE = 8192  # tokens in a forward pass of the evaluation; more is no faster and needs memory


@exit_on_bad_input("train.py")
def main():
    world = World()
    options, saved = read_options(sys.argv[1:], __doc__.splitlines()[0])
    config = model_config(asdict(options) | {"vocab_size": 1}, "options")  # refused before data are fetched
    check_builders(config.mixer)
    device = world.start(choose_device(options.device), options)
    dtype = choose_dtype(options.dtype, device, options.n_embd)
    data = world.first_alone(lambda: load_dataset(options.dataset, options.block_size))
    data.tokenizer  # each checkpoint carries it: better to miss it now
    config = replace(config, vocab_size=data.vocab_size)
    # what was left to be chosen, as chosen: this is what config.json records
    options = replace(options, device=device.type, dtype=str(dtype).removeprefix("torch."),
                      **{f.name: getattr(config, f.name) for f in fields(ModelOptions)})
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if saved:
        compare_with(saved, options, config)
        check_tokenizer(saved, data)
    torch.manual_seed(options.seed)
    model = GPT(config).to(device)
    describe(options, model, data, device, dtype, world)
    if saved:
        checkpoint.load_model(model, saved.model, saved.folder)
        train_alone(model, saved.trainer.get("trained"))
    elif options.init_from:
        train_alone(model, start_from(options, model, data))
    refuse_leaks(model, options)
    if options.eval_only:
        if options.eval_split not in data.cells:
            raise BadInput(f"data/{data.name} has no {options.eval_split} split; leave --eval_split out")
        result = evaluate(model, data, options, device, autocast, world, options.eval_split)
        print(f"{saved.folder}: {options.eval_split} loss {result.words()}")
        for cell, accuracy in (result.by_cell or {}).items():
            print(f"{cell:40} {shown(accuracy)}")
    elif saved and saved.trainer["iter"] >= options.max_iters:
        print(f"{saved.folder} is at step {saved.trainer['iter']} of {options.max_iters}: nothing left to do; for more, raise --max_iters")
    else:
        with prepared_folder(options, world):
            train(options, config, model, data, device, autocast, saved, world)
    world.end()


def refuse_leaks(model, options):
    """BadInput if an output of the model sees what it must not: its losses would mean nothing. With allow_leak, one line."""
    try:
        leak = find_leak(model, getattr(torch, options.dtype))
    except BadInput:  # it cannot be trained at all
        raise
    except Exception as error:  # of a mixer for GPUs alone, say
        if not options.allow_leak:
            error.add_note(f"mixer {options.mixer} could not be checked for leaks, in float64 on the CPU; --allow_leak trains it unchecked")
            raise
        leak = f"mixer {options.mixer} could not be checked, {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if leak and not options.allow_leak:
        mixer_file = f" --mixer_file={options.mixer_file}" if options.mixer_file else ""
        raise BadInput(f"{leak}; so nothing is reported. `python -m tools.audit{mixer_file} --mixer={options.mixer}` "
                       "says more; --allow_leak trains it all the same")
    if leak:
        print(f"warning    {leak}; its losses may not be compared", flush=True)


def describe(options, model, data, device, dtype, world):
    groups = model.parameter_groups()
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(groups.values()), groups
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    where += f", {world.size} processes ({options.parallel})" if world.size > 1 else ""
    print(f"{options.out_dir}: {options.mixer}, {options.arch}, on {where}, {str(dtype).removeprefix('torch.')}")
    print(f"data       {data.name}: {data.size()}, vocabulary {data.vocab_size:,}")
    for group, count in groups.items():
        print(f"{group:10} {count:>12,} parameters {100 * count / total:5.1f} %")
    print(f"{'all':10} {total:>12,} parameters")
    T = options.block_size
    count = lambda value, unit: "n/a" if value is None else f"{value:,.0f} {unit}"
    print(f"cost       {count(model.flops_per_token(T), 'forward FLOPs')} per token of {T}, a multiply-add being 2; "
          f"{count(model.state_bytes(T, dtype), 'bytes')} of state after {T} tokens", flush=True)


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


class Evaluation(NamedTuple):
    loss: float                # mean over the targets, in nats
    bpb: Optional[float]       # bits per byte; None for a recall task
    accuracy: Optional[float]  # share of right answers; None for a text
    by_cell: Optional[dict]    # {difficulty: accuracy}, None for rows longer than learned positions reach

    def words(self):
        if self.bpb is not None:
            return f"{self.loss:.4f} nats per token | {self.bpb:.4f} bits per byte"
        return f"{self.loss:.4f} nats per answer | accuracy {shown(self.accuracy)}"


def shown(accuracy):
    return "n/a" if accuracy is None else f"{accuracy:.4f}"


@torch.no_grad()
def evaluate(model, data, options, device, autocast, world, split="val"):
    """The Evaluation on the fixed windows or rows of a split."""
    model.eval()
    longest = options.block_size if options.pos == "learned" else math.inf
    batches = [batch for batch in data.eval_batches(split, options.block_size, max(1, EVAL_TOKENS_AT_ONCE // options.block_size), options.eval_tokens)
               if batch[0].size(1) <= longest]
    sums = np.zeros((len(data.cells[split]), 3))  # of each cell: loss, targets, right answers
    for i in range(world.rank, math.ceil(len(batches) / world.size) * world.size, world.size):
        # under FSDP all processes must take part in every forward pass: those without a batch left repeat the last
        x, y, cell = batches[min(i, len(batches) - 1)]
        x, y = x.to(device), y.to(device)
        with autocast:
            logits, loss = (None, model.loss(x, y)) if data.bytes_per_token else model(x, y)
        if i < len(batches):
            targets = (y != -1).sum().item()
            sums[cell] += loss.item() * targets, targets, 0 if logits is None else (logits.argmax(-1) == y).sum().item()
    model.train()
    sums = np.reshape(world.total(sums.flatten().tolist(), device), (-1, 3))
    loss, targets, right = sums.sum(0).tolist()
    if data.bytes_per_token:
        return Evaluation(loss / targets, loss / targets / math.log(2) / data.bytes_per_token, None, None)
    by_cell = {name: right / targets if targets else None for name, (_, targets, right) in zip(data.cells[split], sums.tolist())}
    return Evaluation(loss / targets, None, right / targets, by_cell)


def make_optimizer(model, options, device):
    """AdamW with weight decay on matrices only: decaying norms and biases towards zero makes no sense."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=options.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2),
                             fused=device.type in ("cpu", "cuda"))


def backward(model, loss_fn, x, y, rows_at_once, device, autocast, world):
    """Adds the gradients of the mean loss over the targets y != -1 of x and y (rows of all processes, T), in passes of
    rows_at_once rows. Returns the loss of this process's rows, such that its mean over the processes is that of all rows."""
    targets, total = (y != -1).sum().item(), 0.0
    for start in range(0, len(x), rows_at_once):
        synchronise_gradients(loss_fn, model, on=start + rows_at_once == len(x))
        own_x, own_y = (world.rows(t[start:start + rows_at_once]) for t in (x, y))
        share = (own_y != -1).sum().item() * world.size / targets  # so that each target counts alike
        with autocast:
            loss = loss_fn(own_x.to(device), own_y.to(device)) * share
        loss.backward()
        total += loss.item()
    return total


def train(options, config, model, data, device, autocast, saved, world):
    """From the start, or from the checkpoint `saved`, whose weights the model has, to max_iters."""
    forward_flops = model.flops_per_token(options.block_size)
    rows_at_once = rows_per_pass(options.batch_size, options.block_size, device, world.size)
    loss_fn = compiled(model, data, options, rows_at_once, device, autocast, world) if options.compile else model.loss
    loss_fn = join(model, loss_fn, options, world)
    optimizer = make_optimizer(model, options, device)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    step, best, tokens, seconds, wandb_id = 0, None, 0, 0.0, None
    if saved:
        checkpoint.load_optimizer(model, optimizer, saved.optimizer, saved.folder)
        step, best, tokens, seconds, wandb_id = (saved.trainer[k] for k in ("iter", "best_val_loss", "tokens", "seconds", "wandb_id"))
        print(f"going on from {saved.folder}")
    metrics = Metrics(options, step, wandb_id) if world.rank == 0 else None
    bar = tqdm(total=options.max_iters, initial=step, unit="step", disable=world.rank > 0 or not sys.stderr.isatty())
    rows_per_step = options.batch_size * options.gradient_accumulation_steps
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
                           wandb_id=metrics.wandb_id, trained=None if options.train_only == "all" else trained)
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
            x, y = data.batch(options.seed, step, rows_per_step, options.block_size)
            train_loss = backward(model, loss_fn, x, y, rows_at_once, device, autocast, world)
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
            result = evaluate(model, data, options, device, autocast, world)
            val_loss = result.loss
            if not math.isfinite(val_loss):
                raise not_finite(f"validation loss {val_loss}", step, options)
            is_best = best is None or val_loss < best
            best = val_loss if is_best else best
            log(val_loss=val_loss, val_bpb=result.bpb, val_accuracy=result.accuracy, val_accuracy_by_cell=result.by_cell,
                peak_bytes=peak_memory(device))
            bar.write(f"step {step:6}/{options.max_iters} | val loss {result.words()}" + (" | the best so far" if is_best else ""), file=sys.stdout)
            if result.by_cell:
                bar.write("accuracy    " + " | ".join(f"{cell}: {shown(value)}" for cell, value in result.by_cell.items()), file=sys.stdout)
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
