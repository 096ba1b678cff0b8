"""The audit's questions about what is around a mixer: chance, checkpoints, processes, costs."""
import copy
import dataclasses
import gc
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time

import numpy as np
import torch
from safetensors.torch import load, save
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from base.files import ROOT
from base.user_code import in_words
from tools.audit_leaks import look
from tools.audit_subject import EXACT, Row, Worst, asked, normal, tokens
from training import checkpoint
from training.chance import Chance, call
from training.leaks import KINDS, bare_copy, difference, limit, parts

COST_LENGTHS = (2048, 4096)
VISIBLE = 0.25  # of products without weights, the least that a mask lets through: half of a square,
                # and a window in blocks half of a block and its padding


def bits(subject):
    def once():
        found = []
        for model in subject.build():
            torch.manual_seed(0)
            idx = tokens(model, 4, 130)
            model.train().loss(idx, idx.roll(-1, 1)).backward()
            for p in model.parameters():
                found.append(p.detach())
                if p.grad is not None:
                    found.append(p.grad)
        return found

    same = all(map(torch.equal, once(), once()))
    yield Row("bits", same, f"the same seed gives {'the same' if same else 'other'} bits")


def cost(subject):
    """Never judged, not even by what a mixer raises at lengths that nobody asked it for."""
    model = subject.build(block_size=max(COST_LENGTHS))[0].train()
    for name, mixer in parts(model).items():
        if mixer is model.blocks[0].mlp:
            continue
        try:
            early, late = (costs(mixer, model.config.n_embd, T) for T in COST_LENGTHS)
        except Exception as error:
            yield Row("cost", None, f"{name} at {max(COST_LENGTHS):,} tokens: {in_words(error)}")
            continue
        exponents = []
        for what in early:
            if early[what]:  # a mixer without parameters may keep no memory
                exponents.append(f"{what} T^{math.log2(late[what] / early[what]):.2f}")
        milliseconds = f"{1e3 * late['time']:.0f} ms at {max(COST_LENGTHS):,} tokens"
        yield Row("cost", None, f"{name}: {', '.join(exponents)}; {milliseconds}")


def costs(mixer, C, T):
    """Seconds of a forward and backward pass over T tokens, the fastest of up to 3, bytes kept
    between the two, and FLOPs if declared."""
    times = []
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def give_back(t):
        return t

    for _ in range(3):
        x = normal(1, T, C).float().requires_grad_()
        kept.clear()
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
            y = mixer(x.clone())[0]
        y.sum().backward()
        times.append(time.perf_counter() - started)
        if times[-1] > 1:  # long enough for chance to matter little
            break
    found = {"time": min(times), "memory": sum(kept.values())}
    if hasattr(mixer, "flops_per_token"):
        found["declared FLOPs"] = T * mixer.flops_per_token(T)
    return found


def some_steps(model, steps, T=24, seconds=10.0):
    """Trains a model a little, as train.py does."""
    idx = torch.randint(model.config.vocab_size, (steps, 4, T + 1), generator=generator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    started = time.perf_counter()
    for batch in idx:
        torch.manual_seed(0)
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.apply_statistics()
        if time.perf_counter() - started > seconds:  # of a large run
            break
    return model.eval()


def generator():
    return torch.Generator().manual_seed(0)


def used(subject, steps=220, calls=1000, steps_told=10_000):
    """The first questions once more, after steps of training and many calls, and as if after a
    long run."""
    worst = {kind: Worst(limit(kind)) for kind in KINDS}
    kept = []
    with torch.random.fork_rng(devices=[]):
        for model in subject.build():
            some_steps(model, steps)
            bare = bare_copy(model, 0)
            x = normal(2, 3, model.config.n_embd)
            for name, module in asked(bare).items():
                with torch.no_grad():
                    before = call(module, x)
                    alive = tensors_alive()
                    started = time.perf_counter()
                    for done in range(1, calls + 1):
                        y = call(module, x)
                        if time.perf_counter() - started > 10:
                            break
                    if tensors_alive() - alive > done / 4:
                        kept.append(f"{name}: {tensors_alive() - alive:,} tensors are left of "
                                    f"{done:,} calls; a long run fills the memory")
                moved = difference(y, before)
                worst["repeat"].note(moved.max().item(), limit("repeat"),
                                     f"after {calls:,} calls", "3 tokens, 2 rows")
            look(worst, bare, 71, {1, 64, 70}, EXACT)
            for _ in range(steps_told):  # of which a schedule learns in apply_statistics() alone
                bare.apply_statistics()
            look(worst, bare, 71, {1, 64, 70}, EXACT)
    if kept:
        yield Row("used", False, "; ".join(kept))
        return
    kind = max(worst, key=lambda kind: worst[kind].size / worst[kind].limit)
    yield worst[kind].row("used", KINDS[kind][0] + ", of a mixer that was used",
                          f"; after {steps} steps, {calls:,} calls, and {steps_told:,} steps more "
                          "by apply_statistics() alone")


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def outputs_of(model, T=70):
    """In evaluation and in training, where nothing is dropped."""
    idx = tokens(model, 2, min(T, model.config.block_size))
    found = []
    for training in (False, True):
        torch.manual_seed(0)
        with torch.no_grad(), Chance(still=True):
            found.append(model.train(training)(idx)[0])
    model.eval()
    return found


def saved(subject, steps=20):
    """A model of another seed that loads what a checkpoint holds is that model, though both were
    evaluated with other weights before."""
    differs = []
    with torch.random.fork_rng(devices=[]):
        for model, other in zip(subject.build(), reseeded(subject)):
            with torch.no_grad():
                for p in other.parameters():
                    p += 0.1 * torch.randn(p.shape, generator=generator(), dtype=p.dtype)
            outputs_of(model)
            outputs_of(other)
            with torch.enable_grad():
                some_steps(model, steps)
            # as train.py does, by what a checkpoint's file can hold
            tensors = checkpoint.model_tensors(model).items()
            written = save({name: tensor.contiguous() for name, tensor in tensors})
            with torch.no_grad():
                checkpoint.load_model(other, load(written), "the checkpoint")
            for mode, mine, its in zip(("evaluation", "training"), outputs_of(model),
                                       outputs_of(other)):
                if not torch.equal(mine, its):
                    moved = difference(its.double(), mine.double()).max().item()
                    differs.append(f"by {moved:.0e} of the largest in {mode}")
    if differs:
        yield Row("saved", False, "loaded into a model of another seed the outputs differ, "
                  f"{differs[0]}: something is in neither parameters nor buffers, or was kept from "
                  "before",
                  smallest="2 rows of 70 tokens")
    else:
        yield Row("saved", True, "a model of another seed that loads the weights gives the same")


def reseeded(subject):
    """The subject's models, all generators seeded otherwise."""
    states = random.getstate(), np.random.get_state()
    random.seed(1)
    np.random.seed(1)
    try:
        return subject.build(seed=1)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def processes(subject, seeds=(1, 2, 3)):
    """Another process, whose hashes of strings are others, gives the same weights and outputs."""
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "tools.audit_process", *subject.argv]
    started = [subprocess.Popen(command, env=environment | {"PYTHONHASHSEED": str(seed)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for seed in seeds]
    answers = [process.communicate() for process in started]
    if any(process.returncode for process in started):  # it ran here, and there it does not
        reason = answers[0][1].strip().splitlines() or ["it ended"]
        yield Row("process", None, f"could not be asked: {reason[-1]}")
        return
    first, *others = (json.loads(out) for out, _ in answers)
    differing = [what for what in first if any(first[what] != other[what] for other in others)]
    if differing:
        yield Row("process", False, f"{' and '.join(differing)} differ between processes of other "
                  "hash seeds: something depends on hash(), on the order of a set, or on chance")
    else:
        yield Row("process", True, f"{len(seeds)} processes with other hash seeds give the same")


def digest(tensors):
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def fingerprint(subject):
    """What processes compare."""
    weights, outputs = [], []
    for model in subject.build():
        weights += model.state_dict().values()
        outputs += outputs_of(model)
    return {"weights": digest(t.flatten() for t in weights), "outputs": digest(outputs)}


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, those with weights apart."""

    def __init__(self, module):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.with_weights = self.others = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            flops = count(*args, **kwargs, out_val=result)
            of_weights = any(t.untyped_storage().data_ptr() in self.weights
                             for t in args if isinstance(t, torch.Tensor))
            self.with_weights += flops * of_weights
            self.others += flops * (not of_weights)
        return result


@torch.no_grad()
def flops(subject, lengths=(192, 448)):
    """A mixer may declare less than is counted only where a mask throws products away."""
    wrong = []
    figures = []
    for model in subject.build():
        for name, module in parts(model).items():
            if not hasattr(module, "flops_per_token"):
                continue
            for T in lengths:
                x = normal(1, T, model.config.n_embd).float()
                with Products(module) as counted, sdpa_kernel(SDPBackend.MATH):
                    module(x)
                least = (counted.with_weights + counted.others * VISIBLE) / T
                declared = module.flops_per_token(T)
                words = f"{name}: {declared:,.0f} declared a token of {T}, {least:,.0f} at least"
                figures.append(words)
                if declared < 0.98 * least:
                    wrong.append(words)
    if not figures:
        yield Row("flops", None, "the mixer has no flops_per_token")
    elif wrong:
        yield Row("flops", False, f"{wrong[0]} by the products counted, of which a mask may throw "
                  "three quarters away where no weights take part")
    else:
        yield Row("flops", True, figures[-1])


def aside(subject):
    """What a call must leave as it was: settings of torch, generators, the model's options; and
    evaluation leaves no trace in training."""
    found = []
    with torch.random.fork_rng(devices=[]):
        for model in subject.build(skeletons=[dict(pos="none")]):
            options = dataclasses.asdict(model.config)
            idx = tokens(model, 2, 20)
            for training in (False, True):
                model.train(training)
                ends = []
                for seed, recording in ((1, True), (2, False)):
                    with torch.set_grad_enabled(recording):
                        before = settings()
                        torch.manual_seed(seed)
                        model.loss(idx, idx)
                        ends.append(torch.get_rng_state())
                        found += [f"{name} is changed by a call"
                                  for name, value in settings().items() if value != before[name]]
                if torch.equal(*ends):
                    found.append("torch's generator is seeded anew in a call")
            if dataclasses.asdict(model.config) != options:
                found.append("the model's options are changed by a call")
            if any(overwrites(module, model.config.n_embd) for module in asked(model).values()):
                found.append("an output is overwritten by the next call")
            if leaves_a_trace(model.eval(), idx.flip(1)[:, :9]):
                found.append("what is seen in evaluation changes the model at the next "
                             "apply_statistics()")
    if found:
        yield Row("aside", False, "; ".join(dict.fromkeys(found)))
    else:
        yield Row("aside", True, "settings, generators and options stay; evaluation leaves no "
                  "trace")


def settings():
    return {"the default dtype": torch.get_default_dtype(),
            "whether gradients are recorded": torch.is_grad_enabled(),
            "the number of threads": torch.get_num_threads(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "the precision of products": torch.get_float32_matmul_precision(),
            "the state of Python's random": hash(random.getstate()),
            "the state of numpy's random": hash(np.random.get_state()[1].tobytes())}


@torch.no_grad()
def overwrites(module, C):
    x, other = normal(2, 20, C).float(), normal(2, 20, C, seed=1).float()
    y, _ = module(x.clone())
    kept = y.clone()
    module(other)
    return not torch.equal(y, kept)


@torch.no_grad()
def leaves_a_trace(model, idx):
    other = copy.deepcopy(model)
    model(idx)
    model.apply_statistics()
    other.apply_statistics()
    return not all(map(torch.equal, outputs_of(model), outputs_of(other)))
