"""What a trained model attends to. Run: python -m tools.inspect_attention --out_dir=out/my_run

Takes 10 s for 4 layers and 64 tokens. Reads the beginning of the validation split, or --start, and
writes to out_dir/inspect:

    attention.json          every measure of tools/inspect_measures.py per layer and head, and how
                            far influence reaches per layer
    attention.safetensors   the matrices themselves: P of each layer (H, T, T), influence of each
                            layer and of the model (T, T)
    *.png                   attention maps, log weights, entropy over depth, weight by distance,
                            influence, SSA's temperatures, half-lives, gates

P is the matrix with y = P v in each head. It is not read out but probed, with columns of the
identity in place of the values v, so linear mixers have one too. Where its rows do not sum to 1, as
in mixers that decay and erase, it has other measures, and a picture with signs: what a head returns
is then scaled by a norm. Mixers without one show by influence alone: |dy_t / dx_s|, by automatic
differentiation, which needs nothing from the mixer.

Of learned decays: the half-life of each channel, ln 2 over its mean log decay on the text. Of gates
in (0, 1): the share of tokens and channels that is below 0.01 or above 0.99, where they hardly
learn.

B batch, T time, C channels, H heads, G key/value heads, D head size, E size of a head's values.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import contextlib
import math
import sys
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from safetensors.numpy import save

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input, printable
from base.files import is_file, write_file, write_json, writing
from base.options import checked, option
from base.terminal import is_terminal, width
from data import files, load_dataset
from data.tokenizer import read_prompt
from mixers import layer_mixers, load_mixer_file
from mixers.deltanet import DeltaNet
from mixers.gated_deltanet import GatedDeltaNet
from mixers.gla import GLA
from mixers.kda import KDA
from mixers.lln import LLN
from mixers.mamba2 import Mamba2
from mixers.parts.heads import QKV, repeat_heads
from mixers.parts.recurrent_heads import HeadNorm, MambaDecay, Projections
from mixers.regla import ReGLA
from mixers.ssa import SSA
from tools import inspect_measures as measures
from tools import inspect_plots as pictures
from training import checkpoint
from training.device import choose_device
from training.run_folder import check_tokenizer

INFLUENCE_TOKENS = 64  # the influence maps' part of the text: their cost grows with its square
PROBES = 16            # random directions that the norm of a Jacobian is estimated from
TOLERANCE = 1e-4       # of a row's sum and of y = P v, for float32
SILU_IS_ONE = 1.2784645427610738
# mixer -> the modules whose sigmoid is a gate, and what the gate is for
GATES = {
    GLA: {"decay_up": "forget"},
    ReGLA: {"forget": "forget", "refine": "refine"},
    DeltaNet: {"beta": "write"},
    GatedDeltaNet: {"beta": "write"},
    KDA: {"beta": "write", "gate_up": "output"},
}


@checked
class InspectOptions:
    out_dir: str = option("", "the run's folder")
    checkpoint: str = option(
        "newest", "newest, best, or the name of a folder in out_dir/checkpoints")
    start: Optional[str] = option(
        None, "the text, or FILE:path to read it from "
              "[default: the beginning of the validation split]")
    length: Optional[int] = option(
        None, "most tokens to read [default: block_size]", ge=2, lt=2**12)
    device: str = option("cpu", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    mixer_file: Optional[str] = option(
        None, "the Python file of the mixer, if the run was trained with one")


class NoMatrix(Exception):
    """Why a mixer has no attention matrix."""


def run_heads(mixer, x, values=None):
    """What meets in the heads of a mixer on x (B, T, C): q, k and v (B, heads, T, .), the result y
    (B, T, H E) before any norm of it, and of SSA tau, name -> (B, heads or 1, T, 1), with which q,
    k and v are already scaled. `values` (B, heads, T, E) take v's place."""
    seen = {"tau": {}}
    with contextlib.ExitStack() as hooks:
        if isinstance(mixer, Mamba2):
            hook_mamba2(mixer, seen, values, hooks)
        else:
            hook_heads(mixer, seen, values, hooks)
        mixer(x)
    return seen


def hook_heads(mixer, seen, values, hooks):
    """Notes in `seen` what passes through c_attn and comes to c_proj, or to the norm where heads
    have one."""
    def exchange_values(module, args, out):
        seen["q"], seen["k"], seen["v"], *state = out
        return seen["q"], seen["k"], seen["v"] if values is None else values, *state

    def keep_result(module, args):
        seen["y"] = args[0]

    def keep_heads(module, args):
        seen["y"] = args[0].transpose(1, 2).flatten(2)

    def keep_temperature(name):
        def keep(module, args, tau):
            seen["tau"][name] = tau
            seen[name] = tau * seen[name]
            # made for v, not for what took its place
            return torch.ones_like(tau) if name == "v" and values is not None else tau
        return keep

    hooks.enter_context(mixer.c_attn.register_forward_hook(exchange_values))
    if isinstance(getattr(mixer, "norm", None), HeadNorm):
        hooks.enter_context(mixer.norm.register_forward_pre_hook(keep_heads))
    else:
        hooks.enter_context(mixer.c_proj.register_forward_pre_hook(keep_result))
    if isinstance(mixer, SSA):
        for name, module in mixer.tau.items():
            hooks.enter_context(module.register_forward_hook(keep_temperature(name)))


def hook_mamba2(mixer, seen, values, hooks):
    """The same for Mamba-2, whose q, k and v come out of a convolution, and whose norm is behind
    the output gate: that is opened."""
    H, N, P = mixer.sizes

    def open_gate(module, args, out):
        gate, rest = out.split([H * P, out.size(2) - H * P], dim=2)
        return torch.cat([torch.full_like(gate, SILU_IS_ONE), rest], dim=2)

    def exchange_values(module, args, out):
        convolved, state = out
        v, k, q = convolved.split([H * P, N, N], dim=2)
        seen["q"], seen["k"] = q[:, None], k[:, None]
        seen["v"] = v.unflatten(2, (H, P)).transpose(1, 2)
        if values is not None:
            v = values.transpose(1, 2).flatten(2)
        return torch.cat([v, k, q], dim=2), state

    def keep_result(module, args):
        seen["y"] = args[0]

    hooks.enter_context(mixer.proj.register_forward_hook(open_gate))
    hooks.enter_context(mixer.conv.register_forward_hook(exchange_values))
    hooks.enter_context(mixer.norm.register_forward_pre_hook(keep_result))


def attention_matrix(mixer, x):
    """P (H, T, T), causal, with y = P v in every head for x (1, T, C); and the heads' q, k, v, y,
    tau (run_heads).

    SSA's v is the one scaled by its temperature, which P leaves out. NoMatrix, saying why, if the
    mixer has none."""
    known = isinstance(getattr(mixer, "c_attn", None), (QKV, Projections))
    if not isinstance(mixer, Mamba2) and not (known and hasattr(mixer, "c_proj")):
        raise NoMatrix("it has no queries, keys and values")
    heads = run_heads(mixer, x)
    T, (_, G, _, E) = x.size(1), heads["v"].shape
    H = heads["y"].size(2) // E
    N = math.ceil(T / E)
    # row n of the batch carries columns n E to n E + E - 1 of the identity
    identity = torch.eye(T, N * E, dtype=x.dtype, device=x.device).view(T, N, 1, E)
    identity = identity.permute(1, 2, 0, 3).expand(N, G, T, E)
    y = run_heads(mixer, x.expand(N, -1, -1), identity)["y"]  # (N, T, H E)
    P = y.unflatten(2, (H, E)).permute(2, 1, 0, 3).flatten(2)[:, :, :T]
    expected = (P @ repeat_heads(heads["v"], H)[0]).transpose(0, 1).flatten(1)
    largest = P.abs().sum(-1).max().clamp(min=1) * heads["v"].abs().max()
    if (expected - heads["y"][0]).abs().max() > TOLERANCE * largest:
        raise NoMatrix("what its heads return is no matrix times the values")
    return P, heads


def is_stochastic(P):
    """Whether the rows of P (H, T, T) are weights that sum to 1."""
    return bool(P.min() >= 0 and (P.sum(-1) - 1).abs().max() <= TOLERANCE)


def log_decay(mixer, x):
    """The log decay (heads, T, channels) that a mixer has learned for x (1, T, C), or None."""
    if hasattr(mixer, "log_decay"):
        return mixer.log_decay(x)[0]
    if isinstance(getattr(mixer, "decay", None), MambaDecay):
        [(g, _)] = outputs_of(mixer, [mixer.decay], x)
        return g[0].T[..., None]
    return None


def gates(mixer, x):
    """Name -> values in (0, 1) of a mixer's gates for x (1, T, C)."""
    names = next((names for kind, names in GATES.items() if isinstance(mixer, kind)), {})
    logits = outputs_of(mixer, [getattr(mixer, name) for name in names], x)
    return {gate: out.sigmoid() for gate, out in zip(names.values(), logits)}


def outputs_of(mixer, modules, x):
    """What each module within a mixer returns while it reads x."""
    outputs = {}

    def keep(module, args, out):
        outputs[module] = out

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(keep))
        mixer(x)
    return [outputs[module] for module in modules]


def influence(f, x, probes=PROBES, seed=0):
    """|dy_t / dx_s| (T, T): Frobenius norms of the Jacobians' blocks, for y = f(x), f: (B, T, C) ->
    (B, T, E), at x (1, T, C).

    Row t of a batch of T copies is asked about its token t alone, so a backward pass gives |u .
    dy_t/dx_s| for all t and s. Directions u are rows of a random orthogonal matrix: E / probes
    times the sum of squares is an unbiased estimate of the squared norm, and exact with E
    probes."""
    T = x.size(1)
    x = x.detach().expand(T, -1, -1).clone().requires_grad_()
    y = f(x).diagonal(dim1=0, dim2=1).T  # (T, E)
    E = y.size(1)
    gaussian = torch.randn(E, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    directions = torch.linalg.qr(gaussian).Q[:probes].to(y.dtype).to(y.device)
    squares = 0
    for u in directions:
        [gradient] = torch.autograd.grad(y, x, u.expand_as(y), retain_graph=True)
        squares = squares + gradient.square().sum(-1)
    return (squares * E / len(directions)).sqrt()


def mixer_inputs(model, idx):
    """layer -> x (1, T, C), what its mixer reads; layers without a mixer are left out."""
    inputs = {}

    def keep_input(layer):
        def keep(module, args):
            inputs[layer] = args[0]
        return keep

    with contextlib.ExitStack() as hooks:
        for layer, block in enumerate(model.blocks):
            if block.mixer is not None:
                hooks.enter_context(block.mixer.register_forward_pre_hook(keep_input(layer)))
        model.hidden(idx)
    return inputs


def model_influence(model, idx):
    """|dh_t / de_s| (T, T) of the last hidden states over the embeddings of idx (1, T), positions
    included."""
    embedded = []

    def keep(module, args, out):
        embedded.append(out)

    with model.drop.register_forward_hook(keep):
        model.hidden(idx)

    def last_hidden(x):
        def exchange(module, args, out):
            return x

        with model.drop.register_forward_hook(exchange):
            return model.hidden(idx.expand(len(x), -1))[0]

    return influence(last_hidden, embedded[0])


def reach(J):
    """How far an influence map (T, T) reaches: its rows, scaled to sum 1, by distance."""
    total = J.sum(1, keepdims=True)
    shares = np.divide(J, total, out=np.zeros_like(J), where=total > 0)
    by_distance = measures.weight_by_distance(shares)
    return dict(on_self=by_distance[0], on_previous=by_distance[1],
                mean_distance=measures.mean_distance(shares), by_distance=by_distance.tolist())


def array(t):
    """A tensor as a float64 array; made on the CPU, since MPS has no float64."""
    return t.detach().cpu().double().numpy()


def describe_heads(mixer, P, heads, signed):
    """The measures of each head of a layer; P (H, T, T), whose rows sum to 1 unless `signed`."""
    if signed:
        return [dict(head=h) | measures.describe_signed(P[h]) for h in range(len(P))]
    q = array(heads["q"][0])
    k = array(repeat_heads(heads["k"], len(P))[0])
    rows = []
    for h in range(len(P)):
        row = dict(head=h) | measures.describe(P[h])
        row["sigma_q"] = q[h].std()
        row["sigma_k"] = k[h].std()
        row["temperature_softmax"] = measures.temperature_softmax(q[h], k[h])
        if isinstance(mixer, LLN):
            alpha, beta = (parameter[h].item() for parameter in mixer.alpha_beta())
            row["alpha"] = alpha
            row["beta"] = beta
            row["temperature_lln"] = measures.temperature_lln(q[h], k[h], alpha, beta)
        rows.append(row)
    return rows


def inspect(model, idx):
    """Everything about a model on the tokens idx (1, T): (layers, a list of dicts with what can be
    written as JSON; the matrices by name, arrays (H, T, T) `attention.<layer>`, (T', T')
    `influence.<layer>` and `influence.model`)."""
    model.requires_grad_(False)
    layers = []
    matrices = {}
    inputs = mixer_inputs(model, idx)
    names = layer_mixers(model.config.mixer, model.config.n_layer)
    for layer, block in enumerate(model.blocks):
        row = dict(layer=layer, mixer=names[layer], no_matrix="it mixes no tokens", heads=[],
                   signed=False, ssa_temperature={}, half_lives=None, gates={}, influence=None)
        layers.append(row)
        if block.mixer is not None:
            inspect_mixer(row, matrices, block.mixer, inputs[layer])
    matrices["influence.model"] = array(model_influence(model, idx[:, :INFLUENCE_TOKENS]))
    return layers, matrices


def inspect_mixer(row, matrices, mixer, x):
    """Fills in a layer's row, and its matrices, from the mixer's input x (1, T, C)."""
    def outputs(x):
        return mixer(x)[0]

    J = array(influence(outputs, x[:, :INFLUENCE_TOKENS]))
    matrices[f"influence.{row['layer']}"] = J
    row["influence"] = reach(J)
    g = log_decay(mixer, x)
    if g is not None:
        row["half_lives"] = measures.half_lives(array(g)).tolist()
    for name, values in gates(mixer, x).items():
        row["gates"][name] = measures.saturation(array(values))
    try:
        P, heads = attention_matrix(mixer, x)
    except NoMatrix as reason:
        row["no_matrix"] = str(reason)
        return
    row["signed"] = not is_stochastic(P)
    P = array(P)
    matrices[f"attention.{row['layer']}"] = P
    row["no_matrix"] = None
    row["heads"] = describe_heads(mixer, P, heads, row["signed"])
    for name, tau in heads["tau"].items():
        row["ssa_temperature"][name] = array(tau[0, :, :, 0]).tolist()


# The columns of the printed tables: heading, format, and the measure, a key of a head's row
OF_BOTH = (
    ("  rank", ".1f", "effective_rank"),
    ("  self", ".3f", "weight_on_self"),
    (" prev.", ".3f", "weight_on_previous"),
    (" first", ".3f", "weight_on_first"),
    ("distance", ".2f", "mean_distance"),
)
COLUMNS = (
    (" entropy", ".2f", "entropy_bits"),
    (" of even", ".2f", "entropy_of_uniform"),
    ("   gap", ".3f", "spectral_gap"),
    *OF_BOTH,
)
SIGNED_COLUMNS = (
    ("negative", ".3f", "negative"),
    ("     sum", ".3g", "row_sum"),
    ("    size", ".3g", "row_size"),
    *OF_BOTH,
)
OF_WEIGHTS = "  ln var     ks    tau"
LEGEND = """\
entropy in bits a row, and as a share of even attention's; rank: effective; gap: 1 - |lambda_2|;
self, prev., first: mean weight; distance in tokens; ln var, ks: variance of the log weights and
their distance to a normal; tau: LLN's temperature, or softmax's
"""
SIGNED_LEGEND = """\
of matrices whose rows do not sum to 1: weights as shares of |P| in their row; negative: the share
of those below 0; sum, size: a row's sum of P and of |P|, on average
"""


def head_line(layer, head, columns):
    """A head's line of a printed table."""
    values = [f"{head[key]:{layout}}".rjust(len(heading)) for heading, layout, key in columns]
    start = f"{layer['layer']:>5} {head['head']:>4} {layer['mixer']:14}"
    if layer["signed"] or not has_room():
        return " ".join([start, *values])
    logs = head["log_weights"]
    ks = "-" if logs["ks"] is None else f"{logs['ks']:.3f}"
    tau = head.get("temperature_lln", head["temperature_softmax"])
    return " ".join([start, *values, f"{logs['variance']:>7.3f} {ks:>6} {tau:>6.2f}"])


def has_room():
    """Whether all columns fit; attention.json has what a narrow terminal does not show."""
    return not is_terminal() or width() >= 100


def table(layers, columns, more, legend):
    """The lines of the printed table of some layers; none without layers."""
    if not layers:
        return []
    headings = [heading for heading, *_ in columns]
    lines = [" ".join(["layer head mixer         ", *headings]) + (more if has_room() else "")]
    for layer in layers:
        lines += [head_line(layer, head, columns) for head in layer["heads"]]
    return [*lines, legend]


def memory_lines(layer):
    """The printed lines on a layer's decays and gates."""
    name = f"layer {layer['layer']}, {layer['mixer']}"
    if layer["half_lives"]:
        low, middle, high = np.quantile(layer["half_lives"], [0.05, 0.5, 0.95])
        yield (f"half-lives, {name}: 5 % of the channels up to {low:.3g} tokens, half up to "
               f"{middle:.3g}, 95 % up to {high:.3g}")
    for gate, row in layer["gates"].items():
        yield (f"{gate} gates, {name}: {row['mean']:.2f} on average, below 0.01 "
               f"{100 * row['below']:.1f} %, above 0.99 {100 * row['above']:.1f} %")


def summary(report):
    """The printed tables."""
    layers = report["layers"]
    with_matrix = [layer for layer in layers if layer["heads"]]
    lines = table([layer for layer in with_matrix if not layer["signed"]], COLUMNS,
                  OF_WEIGHTS, LEGEND)
    lines += table([layer for layer in with_matrix if layer["signed"]], SIGNED_COLUMNS, "",
                   SIGNED_LEGEND)
    influences = {}
    for layer in layers:
        if layer["no_matrix"]:
            lines.append(f"layer {layer['layer']}, {layer['mixer']}: no attention matrix: "
                         f"{layer['no_matrix']}")
        lines += memory_lines(layer)
        influences[f"layer {layer['layer']}"] = layer["influence"]
    influences["model"] = report["model"]
    for name, row in influences.items():
        if row:
            lines.append(f"influence, {name}: on itself {row['on_self']:.3f}, "
                         f"from the previous {row['on_previous']:.3f}, "
                         f"on average from {row['mean_distance']:.2f} tokens back")
    return "\n".join(lines)


def read_tokens(options, run, config):
    """Token ids (1, T) of the text to look at, T >= 2. BadInput if there is none, or if it is too
    long."""
    block = config.block_size
    if config.pos == "learned" and (options.length or 0) > block:
        raise BadInput(f"--length={options.length}: the model has learned positions for {block} "
                       f"tokens only; choose at most {block}")
    if options.start is not None:
        idx = torch.tensor([read_prompt(options.start, run.tokenizer)])
        if options.length is None and idx.size(1) > block:
            raise BadInput(f"--start is {idx.size(1)} tokens, and the model's block_size {block}; "
                           f"shorten it, or read its beginning with --length={block}")
    else:
        name = run.config.get("dataset")
        if not is_file(files.DATA / str(name) / "meta.json"):
            raise BadInput(f"data/{name}, which the run was trained on, is not here; "
                           "give a text with --start")
        data = load_dataset(name, block)
        check_tokenizer(run, data)
        # of a recall task its first row
        idx, _ = next(data.val_batches(max(options.length or 0, block), 1))
    idx = idx[:, :options.length or block]
    if idx.size(1) < 2:
        raise BadInput("the text is a single token, which can attend to itself only; "
                       "give more with --start")
    return idx


def check_finite(run, model, idx):
    """BadInput if what the model makes of the text is not finite: there is nothing to measure."""
    with torch.no_grad():
        h, _ = model.hidden(idx)
    if not h.isfinite().all():
        raise BadInput(f"{run.folder}: what the model makes of this text is not finite; "
                       "use another checkpoint of the run")


def output_folder(out_dir):
    """out_dir/inspect, made if it is not there. BadInput if it is a link: that leads elsewhere."""
    folder = Path(out_dir) / "inspect"
    if folder.is_symlink():
        raise BadInput(f"{folder} is a link, which is not followed; remove it")
    with writing(folder):
        folder.mkdir(exist_ok=True)
    return folder


def run_in_words(run, out_dir):
    """What the pictures are of: mixer, data set, step and seed, and the run's folder."""
    config = run.config
    return (f"{config['mixer']} on {config.get('dataset')}, step {run.trainer['iter']:,}, "
            f"seed {config.get('seed')} ({Path(out_dir).name})")


@exit_on_bad_input("tools.inspect_attention")
def main():
    description = __doc__.splitlines()[0]
    options, *_ = parse_options(InspectOptions, sys.argv[1:], description, with_config_file=False)
    if not options.out_dir:
        raise BadInput("which run? name its folder: --out_dir=out/shakespeare_ssa")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    device = choose_device(options.device)
    run = checkpoint.load(options.out_dir, options.checkpoint)
    model = checkpoint.build_model(run).to(device)
    idx = read_tokens(options, run, model.config).to(device)
    check_finite(run, model, idx)
    layers, matrices = inspect(model, idx)
    ids = idx[0].tolist()
    tokens = [run.tokenizer.decode_bytes([i]).decode("utf-8", "replace") for i in ids]
    report = dict(checkpoint=str(run.folder), run=run_in_words(run, options.out_dir),
                  text=run.tokenizer.decode(ids), tokens=tokens, layers=layers,
                  model=reach(matrices["influence.model"]))
    folder = output_folder(options.out_dir)
    write_json(folder / "attention.json", report)
    # in the order of their indices, which safetensors takes for granted
    single = {name: np.ascontiguousarray(matrix, np.float32) for name, matrix in matrices.items()}
    write_file(folder / "attention.safetensors", save(single))
    drawn = [path.name for path in pictures.draw(folder, report, matrices)]
    print(summary(report))
    written = ", ".join(["attention.json", "attention.safetensors", *drawn])
    print("\n" + printable(f"in {folder}: {written}"))


if __name__ == "__main__":
    main()
