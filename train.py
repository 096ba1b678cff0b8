"""Trains one model on one data set.

    python train.py configs/shakespeare_pelican.py               a minute on two CPU cores
    python train.py configs/shakespeare.py --mixer=lln           any option; --help lists them
    python train.py configs/shakespeare.py --resume              goes on from the newest checkpoint
    python train.py --eval_only --out_dir=out/shakespeare        the validation loss of a run
    torchrun --nproc_per_node=2 train.py configs/shakespeare.py  several processes, see parallel.py

Writes out_dir/config.json, metrics.jsonl and checkpoints/. The batch and the dropout of a step
depend on (seed, step) only, so that every mixer sees the same data in the same order and a
resumed run goes on bit for bit; the validation loss is the mean over fixed windows of the
validation split.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import contextlib
import math
import os
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch
from tqdm import tqdm

from base.errors import BadInput, exit_on_bad_input
from base.terminal import width, wrapped
from data import load_dataset
from mixers.parts.products import always_fast_products
from model import GPT, model_config
from training import checkpoint
from training.contract import check_builders
from training.device import (
    choose_device,
    choose_dtype,
    compiled,
    peak_memory,
    rows_per_pass,
    seed_generators,
)
from training.evaluation import evaluate, print_evaluation
from training.leaks import refuse_leaks
from training.machine import Machine, catch_signals, refuse_what_cannot_fit
from training.metrics import Metrics, check_wandb
from training.optimizer import load_optimizer, make_optimizer, optimizer_tensors, step_if_finite
from training.pace import Pace
from training.parallel import World, join, synchronise_gradients, whole
from training.report import before_training, costs_of, describe, show_result
from training.run_folder import (
    FolderLock, check_data, compare_with, data_sha256, prepared_folder, read_options, start_from,
    train_alone)


@exit_on_bad_input("train.py")
def main():
    world = World()
    with FolderLock() as lock:
        carry_out(world, lock)
        world.end()


def carry_out(world, lock):
    first = world.rank == 0  # the one that writes
    description = __doc__.splitlines()[0]
    options, saved = read_options(sys.argv[1:], description, lock if first else None)
    check_builders(options.mixer)
    if options.threads:
        torch.set_num_threads(min(options.threads, os.cpu_count()))
    device = world.start(choose_device(options.device), options)
    dtype = choose_dtype(options.dtype, device, options.n_embd)
    if device.type == "cpu":
        always_fast_products()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    machine = Machine(device, autocast, world)
    data = world.first_alone(lambda: load_dataset(
        options.dataset, options.block_size, options.holdout))
    data.tokenizer  # each checkpoint carries it: better to miss it now
    config = model_config(asdict(options) | {"vocab_size": data.vocab_size}, "options")
    options = as_chosen(options, device, dtype)
    if options.wandb_log:
        check_wandb(options)
    if saved:
        compare_with(saved, options, config)
        check_data(saved, data, options.other_data)
        refuse_different_starts(saved, machine)
    if not options.eval_only:
        row_length = data.meta.get("row_length", options.block_size)
        refuse_what_cannot_fit(options, config, row_length, machine)
    torch.manual_seed(options.seed)
    model = GPT(config).to(device)
    model.checkpoint_activations = options.checkpoint_activations
    describe(options, model, data, machine)
    start_sha256 = None
    if saved:
        checkpoint.load_model(model, saved.model, saved.folder)
        train_alone(model, saved.trainer.get("trained"))
        start_sha256 = saved.config.get("init_sha256")
    elif options.init_from:
        names, start_sha256 = start_from(options, model, data)
        train_alone(model, names)
    refuse_leaks(model, options)
    if options.eval_only:
        print_evaluation(options, model, data, machine, saved)
    elif saved and saved.trainer["iter"] >= options.max_iters:
        print(f"{saved.folder} is at step {saved.trainer['iter']} of {options.max_iters}: "
              "nothing left to do; for more, raise --max_iters")
    else:
        record = asdict(options) | {"data_sha256": data_sha256(data),
                                    "init_sha256": start_sha256}
        folder = prepared_folder(options, record, lock) if first else contextlib.nullcontext()
        with folder:
            train(options, record, model, data, machine, saved)


def as_chosen(options, device, dtype):
    """The options with what was left open as it was chosen: this is what config.json records."""
    return replace(options, device=device.type, dtype=str(dtype).removeprefix("torch."),
                   threads=torch.get_num_threads())


def refuse_different_starts(saved, machine):
    """BadInput if the processes have read different checkpoints: the lock is the first one's
    alone."""
    step = saved.trainer["iter"]
    [total] = machine.world.total([step], machine.device)
    if total != step * machine.world.size:
        raise BadInput("the run went on while this command started; start it again")


# Training ---------------------------------------------------------------------------------------

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


def backward(model, loss_fn, x, y, rows_at_once, machine):
    """Adds the gradients of the mean loss over the targets y != -1 of x and y (rows of all
    processes, T), in passes of rows_at_once rows. Returns a loss of this process's rows for each
    pass, on the device, such that their sum's mean over the processes is the loss of all rows."""
    world = machine.world
    targets = (y != -1).sum().item()
    losses = []
    for start in range(0, len(x), rows_at_once):
        end = start + rows_at_once
        synchronise_gradients(loss_fn, model, on=end == len(x))
        own_x, own_y = world.rows(x[start:end]), world.rows(y[start:end])
        own_targets = (own_y != -1).sum().item()
        if own_targets == 0:  # a mean over none is 0/0; any other counts for nothing below
            own_y = own_y.clamp(min=0)
        share = own_targets * world.size / targets  # so that each target counts alike
        with machine.autocast:
            loss = loss_fn(own_x.to(machine.device), own_y.to(machine.device)) * share
        loss.backward()
        losses.append(loss.detach())
    return losses


def train(options, record, model, data, machine, saved):
    """To max_iters, from the start or from `saved`, whose weights the model has. record:
    config.json."""
    caught = catch_signals()  # before the bar, which says that Ctrl-C is worth a checkpoint
    run = Training(options, record, model, data, machine, saved)
    stopping = False
    while True:
        if run.step < options.max_iters:
            stopping = run.update(caught)
            if stopping:
                run.say(f"stopping after step {run.step}, with a checkpoint; "
                        "Ctrl-C once more ends it without")
            if run.step % options.log_interval == 0 or run.step == options.max_iters:
                run.log_training()
        if run.step % options.eval_interval == 0 or run.step == options.max_iters:
            run.evaluate_and_save()
        elif stopping:
            run.save()
        if stopping or run.step >= options.max_iters:
            break
    run.close()
    if run.step < options.max_iters:
        print(f"stopped by a signal after step {run.step}; go on with --resume")
    else:
        show_result(options, model, data, machine)


class Training:
    """A run under way: where it stands, and what it needs to go on."""

    def __init__(self, options, record, model, data, machine, saved):
        self.options = options
        self.record = record
        self.model = model
        self.data = data
        self.machine = machine
        device, world = machine.device, machine.world
        self.rows_at_once = rows_per_pass(
            options.batch_size, options.block_size, device, world.size)
        self.costs = costs_of(options, model)
        loss_fn = model.loss
        if options.compile:
            loss_fn = compiled(
                model, data, options, self.rows_at_once, device, machine.autocast, world)
        self.loss_fn = join(model, loss_fn, options, world)
        self.optimizer = make_optimizer(model, options, device)
        self.step = 0  # optimiser updates done
        self.tokens = 0
        self.best_val_loss = None
        seconds = 0.0
        wandb_id = None
        if saved:
            load_optimizer(model, self.optimizer, saved.optimizer, saved.folder)
            self.step = saved.trainer["iter"]
            self.tokens = saved.trainer["tokens"]
            self.best_val_loss = saved.trainer["best_val_loss"]
            seconds = saved.trainer["seconds"]
            wandb_id = saved.trainer["wandb_id"]
            print(f"going on from {saved.folder}")
        first = world.rank == 0
        self.metrics = Metrics(options, self.step, wandb_id, self.costs) if first else None
        self.bar = tqdm(total=options.max_iters, initial=self.step, unit="step",
                        ncols=max(10, width() - 3), disable=not first or not sys.stderr.isatty())
        # the clock goes on where the saved run stopped
        self.started = time.perf_counter() - seconds
        self.last_log = time.perf_counter()
        self.last_tokens = self.tokens
        self.pace = Pace(self.say, device)

    def update(self, caught):
        """One step of the optimiser. Returns whether a process has `caught` a signal by then."""
        options, step, world = self.options, self.step, self.machine.world
        self.lr = learning_rate(step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        seed_generators(seed_of(options.seed, step, world.rank), self.machine.device)
        rows = options.batch_size * options.gradient_accumulation_steps
        x, y = self.data.batch(options.seed, step, rows, options.block_size)
        if (y == -1).all():
            raise BadInput(f"step {step}: no answer is due in the batch: the rows of "
                           f"data/{self.data.name} have targets of 0 alone; prepare it again")
        losses = backward(self.model, self.loss_fn, x, y, self.rows_at_once, self.machine)
        largest = options.grad_clip or math.inf
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest))
        step_if_finite(self.optimizer, norm)
        self.optimizer.zero_grad()
        self.model.apply_statistics()
        # a GPU works through all of this without a stop: numbers are read back here, all at once
        numbers = torch.stack([*losses, norm, torch.full_like(norm, bool(caught))])
        *losses, norm, stopping = world.total(numbers, self.machine.device)
        self.train_loss, norm = sum(losses) / world.size, norm / world.size
        if not math.isfinite(self.train_loss + norm):
            raise not_finite(f"loss {self.train_loss}, gradient norm {norm}", step, options)
        if step == 0:
            self.say(before_training(self.train_loss, options, self.data.vocab_size))
        self.step += 1
        self.tokens += x.numel()
        self.bar.update()
        self.pace.step()
        return bool(stopping)

    def log(self, **values):
        if not self.metrics:
            return
        flops = None
        if self.costs["flops_per_token"] is not None:  # a backward pass is twice a forward pass
            flops = 3 * self.costs["flops_per_token"] * self.tokens
        seconds = time.perf_counter() - self.started
        self.metrics.log(iter=self.step, tokens=self.tokens, flops=flops, seconds=seconds, **values)

    def log_training(self):
        now = time.perf_counter()
        speed = (self.tokens - self.last_tokens) / (now - self.last_log)
        self.last_log, self.last_tokens = now, self.tokens
        self.log(train_loss=self.train_loss, lr=self.lr, tokens_per_s=speed)
        self.bar.set_postfix_str(f"loss {self.train_loss:.4f}, {speed:,.0f} tokens/s")
        if self.bar.disable:
            print(f"step {self.step:6}/{self.options.max_iters} | loss {self.train_loss:.4f} nats "
                  f"| lr {self.lr:.2e} | {speed:,.0f} tokens/s | {now - self.started:.1f} s")

    def evaluate_and_save(self):
        started = time.perf_counter()
        if self.step == self.options.max_iters:
            self.refuse_late_leaks()
        result = evaluate(self.model, self.data, self.options, self.machine)
        if not math.isfinite(result.loss):
            raise not_finite(f"validation loss {result.loss}", self.step, self.options)
        praise = ""
        if self.best_val_loss is None or result.loss < self.best_val_loss:
            self.best_val_loss = result.loss
            praise = " | the best so far"
        self.log(val_loss=result.loss, val_bpb=result.bpb, val_accuracy=result.accuracy,
                 val_accuracy_by_cell=result.by_cell,
                 peak_bytes=peak_memory(self.machine.device))
        self.say(f"step {self.step:6}/{self.options.max_iters} | val loss {result.words()}{praise}")
        if result.by_cell:
            self.say(f"accuracy    {result.cells()}")
        self.save(result.loss)
        self.last_log += time.perf_counter() - started  # tokens_per_s is of training alone
        self.pace.restart()

    def refuse_late_leaks(self):
        """BadInput if the trained model leaks: its last loss is not reported, its weights are
        kept."""
        if self.options.allow_leak or self.options.parallel == "fsdp":  # shards cannot be copied
            return
        try:
            refuse_leaks(self.model, self.options, trained=True)
        except Exception:
            self.save()
            raise

    def say(self, line):
        """Prints a line above the progress bar, over the ^C that a terminal may write behind it."""
        if not self.bar.disable:
            print(f"\r{' ' * (width() - 1)}\r", end="", file=sys.stderr, flush=True)
        self.bar.write(wrapped(line), file=sys.stdout)

    def save(self, val_loss=None):
        """A checkpoint of this step. val_loss: of these weights, in nats, if they were
        evaluated."""
        weights = checkpoint.model_tensors(self.model)
        moments = optimizer_tensors(self.model, self.optimizer)
        if self.metrics:
            self.metrics.sync()
            trained = None
            if self.options.train_only != "all":
                parameters = self.model.named_parameters()
                trained = [name for name, p in parameters if p.requires_grad]
            state = dict(
                iter=self.step, val_loss=val_loss, best_val_loss=self.best_val_loss,
                tokens=self.tokens, seconds=time.perf_counter() - self.started,
                wandb_id=self.metrics.wandb_id, trained=trained)
            config = self.record | {"vocab_size": self.data.vocab_size}
            tokenizer = self.data.tokenizer.to_json()
            checkpoint.save(self.options.out_dir, weights, moments, state, config, tokenizer,
                            self.options.keep_last)
        self.machine.world.wait()

    def close(self):
        self.bar.close()
        if self.metrics:
            self.metrics.close()


def seed_of(*numbers):
    """One seed for torch's generators from several numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def not_finite(what, step, options):
    kept = checkpoint.checkpoints(options.out_dir)
    last = f"the last good checkpoint is {kept[-1]}" if kept else "before the first checkpoint"
    return BadInput(f"step {step}: {what} is not finite (batch {step} of seed {options.seed}); "
                    f"training stops, {last}; try a lower learning_rate")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log that is read while it grows
    main()
