"""Which mixer can take attention's place in a trained model?

    python data/books/prepare.py --tokenizer=smollm2 --name=books_smollm2
    python -m tools.replace                      SmolLM2: 25 minutes of a free CPU core
    python -m tools.replace --table              what came out, and --picture=docs/replace.png
    python -m tools.replace --tune=swa_64,linear --tune_tokens=65536

Takes a pretrained model with softmax attention and puts another mixer into k of its layers, with
the same projections (see tools/replace_model.py), for each arm of ARMS:

1. each layer alone: the loss on a few windows of the training split says which layers mind least;
2. the k that mind least together, for k = 1, a quarter, half and all: the loss on windows of the
   validation split, evenly spread and the same for all, in bits per byte; the pass keys found
   (tools/passkey.py); of Top-Theta the scores kept;
3. the state of one sequence, and the time of a token, after --decode_tokens of them.

The softmax model itself stands beside. Everything goes to replace.json in out_dir as soon as it is
measured, so the same command goes on after an interruption; further arms join, other settings are
refused. --tune trains arms, all parameters of the model in which --tune_layers of the layers are
replaced, and the softmax model for as many tokens, as ordinary runs of train.py in out/replace.

Times are CPU seconds of one thread, in turns with softmax; the ratio is what counts. The mixer is
given a state after random inputs, the same in every layer.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import math
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, Optional

import torch

from base.command_line import nearest, parse_options
from base.errors import BadInput, exit_on_bad_input, first_few
from base.files import exists, write_json
from base.loss import head_loss
from base.options import checked, option
from data import load_dataset
from mixers.toptheta import TopTheta
from model import GPT, State
from tools.calibrate import Kept, hooked
from tools.claim_record import git_state
from tools.passkey import prompts, recall
from tools.replace_model import Replaced
from tools.replace_record import read_record
from tools.replace_table import draw, table
from tools.replace_tune import tune
from training import checkpoint, pretrained
from training.device import choose_device, choose_dtype
from training.run_folder import data_sha256, weights_sha256

ARMS = {  # name -> options of the mixer that takes the place
    "lln": dict(mixer="lln"),
    "linear": dict(mixer="linear"),
    "swa_64": dict(mixer="swa", swa_window=64),
    "swa_64_sinks": dict(mixer="swa", swa_window=64, swa_sinks=4),
    "toptheta_64": dict(mixer="toptheta", toptheta_k=64),
    "lln_diag": dict(mixer="lln_diag"),
    "performer_256": dict(mixer="performer", performer_features=256),
    "linformer": dict(mixer="linformer"),
    "pelican": dict(mixer="pelican"),  # nothing in its place
    "lln_rotated": dict(mixer="lln", rotate_features=True),
    "linear_rotated": dict(mixer="linear", rotate_features=True),
    "toptheta_16": dict(mixer="toptheta", toptheta_k=16),
    "lln_diag_rotated": dict(mixer="lln_diag", rotate_features=True),
    "performer_2048": dict(mixer="performer", performer_features=2048),
}
PIECE = 1024   # tokens at a time, of a long prefix
DECODED = 4    # tokens of a round, and how many rounds
ROUNDS = 5


@checked
class ReplaceOptions:
    init_from: str = option(
        "smollm2", "the pretrained model: a name, a .gguf or a folder, as of train.py")
    dataset: str = option("books_smollm2", "a data set in the model's tokens")
    out_dir: Optional[str] = option(
        None, "the folder of the record [default: results/<init_from>_replace]", min_length=1)
    arms: str = option("all", f"which: {', '.join(ARMS)}")
    block_size: int = option(512, "tokens of a window, and of a prompt with a pass key", ge=1)
    windows: int = option(8, "windows of the validation split to report", ge=2)
    select_windows: int = option(2, "windows of the training split to choose layers by", ge=1)
    fit_windows: int = option(2, "others of it, for what mixers measure on text", ge=1)
    prompts: int = option(8, "prompts with a pass key; 0: none", ge=0)
    decode_tokens: int = option(8192, "tokens before those that are timed; 0: none", ge=0)
    seed: int = option(1, "of the windows to choose by, of what is random in a mixer, of the keys",
                       ge=0, lt=2**31)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the heavy operations; auto: bfloat16 where it is fast")
    table: bool = option(False, "print the table of a record, and measure nothing")
    picture: Optional[str] = option(
        None, "with --table: draw the record into this .png too", min_length=1)
    tune: Optional[str] = option(None, "arms to train further, softmax besides", min_length=1)
    tune_tokens: int = option(65536, "tokens of each of these trainings", ge=1)
    tune_layers: Optional[int] = option(
        None, "how many layers are replaced there, those that mind least [default: half]", ge=1)
    tune_rate: float = option(2e-4, "their learning rate, the same for all", gt=0)


def arms_of(text, names):
    """The arms of a list. BadInput for one that is none of `names`."""
    if text == "all":
        return list(names)
    for name in text.split(","):
        if name not in names:
            raise BadInput(f"no arm {name!r}{nearest(name, names, '')}; have {', '.join(names)}")
    return list(dict.fromkeys(text.split(",")))


def counts_of(n_layer):
    """How many layers to replace: one, a quarter, half, all."""
    return sorted({1, math.ceil(n_layer / 4), math.ceil(n_layer / 2), n_layer})


# The model and its texts --------------------------------------------------------------------------

class Setting:
    """A pretrained model and all that its arms are measured on."""

    def __init__(self, options):
        self.options = options
        T = options.block_size
        self.device = choose_device(options.device)
        config = pretrained.read_config(options.init_from)
        if set(config.mixer.split(",")) != {"softmax"}:
            raise BadInput(f"--init_from={options.init_from}: its mixer is {config.mixer}; name a "
                           "model with softmax attention")
        if T > config.block_size:
            raise BadInput(f"--block_size={T}: {options.init_from} was trained on "
                           f"{config.block_size}; choose less")
        self.data = load_dataset(options.dataset, T)
        pretrained.check_tokenizer(options.init_from, self.data)
        self.dtype = choose_dtype(options.dtype, self.device, config.n_embd)
        # not frozen: autocast keeps its copies of weights that could be trained, of others it makes
        # new ones in each call, which costs a third more
        self.model = GPT(replace(config, block_size=T)).eval()
        tensors = pretrained.read_weights(options.init_from, self.model.config)
        checkpoint.init_model(self.model, tensors, options.init_from)
        self.model.to(self.device)
        self.report = list(self.data.val_batches(T, 1, options.windows * T))
        if len(self.report) < options.windows or self.report[-1][0].size(1) < T:
            raise BadInput(f"data/{self.data.name}: its validation split has fewer than "
                           f"{options.windows} windows of {T} tokens; lower --windows")
        n = options.select_windows + options.fit_windows
        x, y = (t.to(self.device) for t in self.data.batch(options.seed, 0, n, T))
        self.select = x[:options.select_windows], y[:options.select_windows]
        self.fit = x[options.select_windows:]
        self.prompts = prompts(self.data.tokenizer, T, options.prompts, options.seed)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def settings(self):
        """What a record is of: another's figures do not stand beside these."""
        names = ("init_from", "dataset", "block_size", "windows", "select_windows", "fit_windows",
                 "prompts", "decode_tokens", "seed")
        values = asdict(self.options)
        return {name: values[name] for name in names} | {
            "weights_sha256": weights_sha256(self.options.init_from),
            "data_sha256": data_sha256(self.data),
            "bytes_per_token": self.data.bytes_per_token,
            "dtype": str(self.dtype).removeprefix("torch."),
            "n_layer": self.model.config.n_layer,
        }

    @torch.no_grad()
    def losses(self):
        """Of the model as it is now, in nats, one for each window of the report."""
        with self.autocast():
            return [self.model.loss(x.to(self.device), y.to(self.device)).item()
                    for x, y in self.report]

    def keys_found(self):
        """{"right": share, "loss": nats per token} of the prompts, or None without any."""
        if not self.prompts:
            return None
        with self.autocast():
            return recall(self.model, self.prompts)._asdict()


# What is measured ---------------------------------------------------------------------------------

@torch.no_grad()
def each_alone(setting, replaced):
    """The loss in nats on the windows to choose by with one layer replaced, for each layer."""
    model, blocks = setting.model, setting.model.blocks
    replaced.put_in([])
    with setting.autocast():
        select, fit = (inputs_of_blocks(model, x) for x in (setting.select[0], setting.fit))
        losses = []
        for i, h in enumerate(select):
            replaced.put_in([i])
            replaced.fit_layer(i, fit[i])
            for block in blocks[i:]:
                h, _ = block(h)
            h = model.norm(h) / model.config.head_temperature
            losses.append(head_loss(h, model.head, setting.select[1]).item())
    replaced.put_in([])
    return losses


def inputs_of_blocks(model, x):
    """What comes to each block, (B, T, C), for tokens x (B, T)."""
    found = []
    handles = [block.register_forward_pre_hook(lambda module, args: found.append(args[0]))
               for block in model.blocks]
    model.hidden(x)
    for handle in handles:
        handle.remove()
    return found


def together(setting, replaced, layers):
    """What the record has of a set of layers replaced at once."""
    replaced.put_in(layers)
    with setting.autocast():
        replaced.fit(setting.fit)
    thresholds = [replaced.substitutes[i] for i in layers
                  if isinstance(replaced.substitutes[i], TopTheta)]
    counters = [Kept(mixer.thresholds.k, mixer.c_attn.sizes[1]) for mixer in thresholds]
    with hooked(thresholds, counters):
        losses = setting.losses()
    found = {"layers": layers, "losses": losses, "keys": setting.keys_found(), "kept": None}
    if counters:
        means = [counter.means() for counter in counters]
        found["kept"] = {name: statistics.mean(mean[name] for mean in means) for name in means[0]}
    replaced.put_in([])
    return found


@torch.no_grad()
def decoding(setting, replaced):
    """State and time of a token where all layers are replaced, after --decode_tokens."""
    model, n = setting.model, setting.options.decode_tokens
    if not n:
        return None
    everywhere = list(range(model.config.n_layer))
    states = {}
    for layers in ([], everywhere):
        replaced.put_in(layers)
        state = state_after(model, n)
        states[bool(layers)] = State(n, tuple((state, None) for _ in model.blocks))
    seconds = {False: [], True: []}
    token = setting.select[0][:1, :1]
    for number in range(1 + ROUNDS):
        for is_replaced, state in states.items():
            replaced.put_in(everywhere if is_replaced else [])
            started = time.process_time()
            for _ in range(DECODED):
                _, state = model.step(token, state)
            if number:  # the first one allocates
                seconds[is_replaced].append((time.process_time() - started) / DECODED)
            states[is_replaced] = state
    replaced.put_in(everywhere)
    bytes_then = model.state_bytes(n, torch.float32)
    replaced.put_in([])
    ratios = [other / own for own, other in zip(seconds[True], seconds[False])]
    return {"state_bytes": bytes_then, "softmax_state_bytes": model.state_bytes(n, torch.float32),
            "token_ms": 1e3 * statistics.median(seconds[True]),
            "softmax_token_ms": 1e3 * statistics.median(seconds[False]),
            "times_as_fast": statistics.median(ratios)}


def state_after(model, n):
    """The first layer's state after n random inputs of the size that a norm's output has."""
    block = model.blocks[0]
    if block.mixer is None:
        return None
    generator = torch.Generator().manual_seed(n)
    state = None
    for start in range(0, n, PIECE):
        size = 1, min(PIECE, n - start), model.config.n_embd
        x = torch.randn(size, generator=generator).to(model.norm.weight.device)
        _, state = block.mixer(block.norm1(x), state)
    return state


# The record ---------------------------------------------------------------------------------------

class Record:
    """replace.json, written after each figure."""

    def __init__(self, folder, setting):
        self.path = Path(folder) / "replace.json"
        self.content = {"begun": git_state(), "settings": setting.settings(), "softmax": None,
                        "arms": {}, "tuned": {}}
        if exists(self.path):
            before = read_record(folder)
            check_settings(self.path, before["settings"], self.content["settings"])
            self.content = before

    def arm(self, name):
        """The part of an arm (dict), to be filled."""
        empty = {"options": ARMS[name], "alone": None, "together": {}, "decoding": None}
        return self.content["arms"].setdefault(name, empty)

    def write(self):
        write_json(self.path, self.content)


def check_settings(path, before, now):
    """BadInput if a record was measured otherwise than it would be now."""
    changed = [f"{name} {before.get(name)}, not {now[name]}" for name in now
               if before.get(name) != now[name]]
    if changed:
        raise BadInput(f"{path} was measured with {first_few(changed)}; choose another --out_dir")


def measure(setting, record, names):
    """Measures what the record lacks of these arms."""
    content = record.content
    if content["softmax"] is None:
        content["softmax"] = {"losses": setting.losses(), "keys": setting.keys_found(),
                              "select": select_loss(setting)}
        record.write()
    say("softmax", setting, content["softmax"])
    for name in names:
        arm = record.arm(name)
        replaced = Replaced(setting.model, arm["options"], setting.options.seed)
        if arm["alone"] is None:
            arm["alone"] = each_alone(setting, replaced)
            record.write()
        order = sorted(range(len(arm["alone"])), key=arm["alone"].__getitem__)
        for k in counts_of(len(order)):
            if str(k) not in arm["together"]:
                arm["together"][str(k)] = together(setting, replaced, sorted(order[:k]))
                record.write()
            say(f"{name}, {k} layers", setting, arm["together"][str(k)])
        if arm["decoding"] is None:
            arm["decoding"] = decoding(setting, replaced)
            record.write()


@torch.no_grad()
def select_loss(setting):
    with setting.autocast():
        return setting.model.loss(*setting.select).item()


def say(what, setting, found):
    bits = statistics.mean(found["losses"]) / math.log(2) / setting.data.bytes_per_token
    keys = "" if not found["keys"] else f" | pass keys found {found['keys']['right']:.2f}"
    print(f"{what:28} {bits:.4f} bits per byte{keys}", flush=True)


# The command --------------------------------------------------------------------------------------

def folder_of(options):
    name = Path(options.init_from).name.removesuffix(".gguf")
    return Path(options.out_dir or f"results/{name}_replace")


@exit_on_bad_input("tools.replace")
def main():
    options, _, given = parse_options(ReplaceOptions, sys.argv[1:], __doc__.splitlines()[0],
                                      with_config_file=False)
    if options.picture and not options.table:
        raise BadInput("--picture goes with --table")
    folder = folder_of(options)
    if options.table:
        record = read_record(folder)
        print(table(record))
        if options.picture:
            print(draw(record, Path(options.picture)))
        return
    names = arms_of(options.arms, ARMS)
    to_tune = arms_of(options.tune, ARMS) if options.tune else []
    setting = Setting(options)
    record = Record(folder, setting)
    if to_tune and "arms" not in given:
        names = to_tune
    measure(setting, record, names)
    if to_tune:
        tune(setting, record, to_tune)
    print(f"the table: python -m tools.replace --table --out_dir={folder}")


if __name__ == "__main__":
    main()
