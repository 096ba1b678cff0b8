"""The pictures of tools/inspect_attention.py: its report (dict) and matrices (name -> array) as PNG
files."""
import numpy as np
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from scipy import stats

from tools.colours import colour_of
from tools.drawing import BASELINE, GREY, WIDTH, label_ends, plain, save
from tools.inspect_measures import LONGEST, entropy, log_weights, uniform, weight_by_distance

FAINTEST = 1e-3  # weights below it look like it
BINS = 50        # of the histograms
TAU_TOKENS = 44  # of the text, under the temperatures
LABELLED = 44    # most tokens of a map that are written at its axes,
ROOM = 0.085     # inches, which each of them needs at least
WIDE = 16        # inches, of all panels of a figure at most,
NARROW = 5       # and of a figure at least, for its title
PLAIN = "{x:g}"  # of ticks: 0.01, not a power of ten
COLOURS = ("#3b6fb6", "#d1603d", "#4f9d69", "#8a5fa8")  # of heads, of queries, keys and values


def draw(folder, report, matrices):
    """Writes the pictures that there is something to show in; yields their paths."""
    for name, figure in figures(report, matrices):
        figure.suptitle(plain(report["run"]), fontsize=9, wrap=True)
        yield save(folder / name, figure)


def figures(report, matrices):
    """Yields (file name, Figure)."""
    layers, tokens = report["layers"], report["tokens"]
    with_matrix = [row for row in layers if row["heads"]]
    weights = [row for row in with_matrix if not row["signed"]]
    signed = [row for row in with_matrix if row["signed"]]
    tempered = [row for row in layers if row["ssa_temperature"]]
    decaying = [row for row in layers if row["half_lives"]]
    gated = [row for row in layers if row["gates"]]
    T = len(tokens)
    if weights:
        yield "attention_maps.png", attention_maps(weights, matrices, tokens)
        yield "log_weights.png", log_weight_histograms(weights, matrices)
        yield "entropy.png", entropy_over_depth(weights, T)
    if signed:
        yield "signed_maps.png", signed_maps(signed, matrices, tokens)
    if with_matrix:
        yield "distance.png", weight_over_distance(with_matrix, T)
    yield "influence.png", influence_maps(report, matrices)
    if tempered:
        yield "ssa_temperature.png", ssa_temperatures(tempered, tokens)
    if decaying:
        yield "half_lives.png", half_life_histograms(decaying, T)
    if gated:
        yield "gates.png", gate_histograms(gated)


def panels(rows, columns, size, **options):
    """A figure with rows x columns panels of `size` inches, smaller if there are many, and their
    axes as a 2-D array."""
    width, height = (min(side, WIDE / n) for side, n in zip(size, (columns, rows)))
    width, height = max(NARROW, width * columns + 1.2), height * rows + 0.8
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.tick_params(labelsize=7)
    return figure, axes


def log_map(ax, matrix, norm):
    """A heat map on a logarithmic scale; zeros stay white."""
    visible = np.where(matrix > 0, np.maximum(matrix, norm.vmin), np.nan)
    return ax.imshow(visible, norm=norm, cmap="magma_r", interpolation="nearest")


def title(layer):
    return f"{layer['mixer']}, layer {layer['layer']}"


def ink(layer):
    """The colour of a layer's mixer, the same as in all pictures: softmax's is black."""
    return BASELINE if layer["mixer"] == "softmax" else colour_of(layer["mixer"])


def map_side(T, rows, columns, usual):
    """Inches for the side of each map of T tokens; more than usual where that makes room for the
    tokens at its axes."""
    has_room = T <= LABELLED and WIDE / max(rows, columns) >= ROOM * T
    return max(usual, 1.4 * ROOM * T) if has_room else usual


def label_maps(axes, tokens):
    """Writes the tokens at the axes of maps of them, where there is room."""
    labels = [tick_label(token) for token in tokens]
    width, height = axes[0, 0].figure.get_size_inches()
    side = min(width / axes.shape[1], height / axes.shape[0])
    if len(labels) > LABELLED or side < ROOM * len(labels):
        return
    size = min(7, 60 * side / len(labels))  # points; of an inch, 72
    rotation = 90 if max(map(len, labels)) > 1 else 0
    for ax in axes.flat:
        ax.set_xticks(range(len(labels)), labels, rotation=rotation)
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(labelsize=size, length=0, pad=1)
        for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
            label.set_fontfamily("monospace")


def head_maps(layers, matrices, tokens, show):
    """A figure with a map of each head; show(ax, P (T, T)) draws one and returns its image."""
    H = max(len(layer["heads"]) for layer in layers)
    side = map_side(len(tokens), len(layers), H, 1.9)
    figure, axes = panels(len(layers), H, (side, side), sharex=True, sharey=True)
    for layer, row in zip(layers, axes):
        for ax in row[len(layer["heads"]):]:
            ax.set_axis_off()
        for h, ax in zip(range(len(layer["heads"])), row):
            image = show(ax, matrices[f"attention.{layer['layer']}"][h])
            ax.set_title(f"{title(layer)}, head {h}", fontsize=8)
    label_maps(axes, tokens)
    figure.supxlabel("token attended to", fontsize=9)
    figure.supylabel("token that attends", fontsize=9)
    return figure, axes, image


def attention_maps(layers, matrices, tokens):
    norm = LogNorm(FAINTEST, 1)
    figure, axes, image = head_maps(
        layers, matrices, tokens, lambda ax, P: log_map(ax, P, norm))
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.6, extend="min",
                    format=PLAIN)
    return figure


def signed_maps(layers, matrices, tokens):
    """Each row relative to its |P|: a norm behind the heads takes its size away."""
    norm = SymLogNorm(FAINTEST * 10, vmin=-1, vmax=1)

    def show(ax, P):
        sizes = np.abs(P).sum(1, keepdims=True)
        shares = np.divide(P, sizes, out=np.zeros_like(P), where=sizes > 0)
        later = np.triu(np.ones_like(P), 1) > 0
        return ax.imshow(np.where(later, np.nan, shares), norm=norm, cmap="RdBu_r",
                         interpolation="nearest")

    figure, axes, image = head_maps(layers, matrices, tokens, show)
    figure.colorbar(image, ax=axes, label="weight, as a share of the row's |P|", shrink=0.6,
                    format=PLAIN)
    return figure


def log_weight_histograms(layers, matrices):
    H = len(layers[0]["heads"])
    figure, axes = panels(len(layers), H, (2.1, 1.6))
    samples = []  # of each layer, of each head
    for layer in layers:
        samples.append([log_weights(P) for P in matrices[f"attention.{layer['layer']}"]])
    pooled = np.concatenate(sum(samples, []))
    low = np.quantile(pooled, 0.003)  # far outliers are not shown
    high = pooled.max()
    margin = 0.05 * (high - low) + 1e-3
    low -= margin
    high += margin
    for layer, row, xs in zip(layers, axes, samples):
        for h, (ax, x) in enumerate(zip(row, xs)):
            fit = layer["heads"][h]["log_weights"]
            ks = "" if fit["ks"] is None else f", ks {fit['ks']:.3f}"
            ax.set_title(f"{title(layer)}, head {h}\nvar {fit['variance']:.3g}{ks}", fontsize=7)
            ax.set(yticks=[], xlim=(low, high))
            if fit["ks"] is None:
                ax.axvline(fit["mean"], color=ink(layer))
                continue
            share = np.full(len(x), BINS / (high - low) / len(x))  # also of what is not shown
            ax.hist(x, BINS, range=(low, high), weights=share, color=ink(layer), alpha=0.5)
            grid = np.linspace(low, high, 200)
            normal = stats.norm.pdf(grid, fit["mean"], fit["variance"] ** 0.5)
            ax.plot(grid, normal, color="black", linewidth=1)
    figure.supxlabel("log of the attention weight over that of even attention; "
                     "line: the normal of the same mean and variance", fontsize=9)
    return figure


def entropy_over_depth(layers, T):
    figure, [[ax]] = panels(1, 1, (4.6, 3))
    depth = [layer["layer"] for layer in layers]
    values = [[head["entropy_bits"] for head in layer["heads"]] for layer in layers]
    for layer, heads in zip(layers, values):
        ax.scatter([layer["layer"]] * len(heads), heads, s=18, color=ink(layer), alpha=0.7)
    ax.plot(depth, [np.mean(heads) for heads in values], color=GREY, linewidth=1)
    even = entropy(uniform(T))
    ax.axhline(even, color=GREY, linestyle="--", linewidth=1)
    ax.annotate(f"even attention over {T} tokens", (0.99, even), (0, -3), fontsize=7, ha="right",
                va="top", xycoords=("axes fraction", "data"), textcoords="offset points")
    ax.set(xticks=depth, ylim=(0, max(even, *map(max, values)) * 1.05))
    ax.set_xlabel("layer", fontsize=9)
    ax.set_ylabel("entropy, bits a row; a point a head, line: their mean", fontsize=8)
    ax.set_xticklabels([f"{layer['layer']}\n{layer['mixer']}" for layer in layers])
    return figure


def weight_over_distance(layers, T):
    figure, axes = panels(1, len(layers), (2.6, 2.6), sharex=True, sharey=True)
    even = weight_by_distance(uniform(T))
    for layer, ax in zip(layers, axes[0]):
        for head in layer["heads"]:
            colour = COLOURS[head["head"] % len(COLOURS)]
            ax.plot(head["weight_by_distance"], linewidth=1, color=colour,
                    label=f"head {head['head']}")
        ax.plot(even, color=GREY, linestyle="--", linewidth=1, label="even")
        ax.set(title=title(layer), yscale="log", ylim=(FAINTEST / 10, 1))
        ax.title.set_fontsize(9)
        ax.yaxis.set_major_formatter(PLAIN)
    axes[0, -1].legend(fontsize=7, frameon=False)
    figure.supxlabel("tokens back", fontsize=9)
    figure.supylabel("mean weight", fontsize=9)
    return figure


def influence_maps(report, matrices):
    maps = {}  # by title
    for layer in report["layers"]:
        if layer["influence"]:
            maps[title(layer)] = matrices[f"influence.{layer['layer']}"]
    maps["the whole model"] = matrices["influence.model"]
    tokens = report["tokens"][:len(matrices["influence.model"])]
    side = map_side(len(tokens), 1, len(maps), 2.5)
    figure, axes = panels(1, len(maps), (side, side), sharex=True, sharey=True)
    norm = LogNorm(FAINTEST, 1)
    for (name, J), ax in zip(maps.items(), axes[0]):
        image = log_map(ax, J / J.max() if J.max() > 0 else J, norm)
        ax.set_title(name, fontsize=9)
    label_maps(axes, tokens)
    figure.supxlabel("token s that is changed", fontsize=9)
    figure.supylabel("output t", fontsize=9)
    figure.colorbar(image, ax=axes, label="|dy$_t$/dx$_s$|, largest = 1", shrink=0.8, extend="min",
                    format=PLAIN)
    return figure


VISIBLE = str.maketrans({"\n": "\u21b5", " ": "\u2423", "\t": "\u2192", "$": r"\$"})


def tick_label(token):
    """A token as a tick label: white space made visible, and no $ that would begin a formula."""
    return token.translate(VISIBLE)


def ssa_temperatures(layers, tokens):
    n = min(len(tokens), TAU_TOKENS)
    figure, axes = panels(len(layers), 1, (WIDTH - 1.2, 1.25), sharex=True, sharey=True)
    labels = [tick_label(token) for token in tokens[:n]]
    rotation = 90 if max(map(len, labels)) > 1 else 0
    axes[-1, 0].set_xticks(range(n), labels, rotation=rotation, fontsize=8, fontfamily="monospace")
    figure.supylabel("SSA's temperature $\\tau$, which multiplies", fontsize=8)
    for layer, ax in zip(layers, axes[:, 0]):
        ends = {}
        for colour, (name, heads) in zip(COLOURS, layer["ssa_temperature"].items()):
            for tau in heads:
                ax.plot(tau[:n], "o-", markersize=2.5, linewidth=1, color=colour)
            ends[{"q": "queries", "k": "keys", "v": "values"}[name]] = n - 1, tau[n - 1], colour
        ax.axhline(1, color=GREY, linestyle="--", linewidth=1)
        ax.set_ylabel(f"layer {layer['layer']}", fontsize=8)
        ax.grid(axis="x", color="0.92")
        ax.margins(x=0.01)
        label_ends(ax, ends)
    return figure


def half_life_histograms(layers, T):
    figure, axes = panels(1, len(layers), (2.6, 2.2), sharex=True, sharey=True)
    tokens = np.concatenate([np.ravel(layer["half_lives"]) for layer in layers])
    low, high = tokens.clip(0.1, LONGEST).min(), tokens.clip(0.1, LONGEST).max()
    edges = np.geomspace(low / 1.5, high * 1.5, 30)
    for layer, ax in zip(layers, axes[0]):
        values = np.ravel(layer["half_lives"]).clip(0.1, LONGEST)
        ax.hist(values, edges, weights=np.full(len(values), 1 / len(values)), color=ink(layer))
        ax.axvline(T, color=GREY, linestyle="--", linewidth=1)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        ax.xaxis.set_major_formatter(PLAIN)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_title(title(layer), fontsize=9)
    figure.supxlabel("half-life of a channel, tokens; dashed: the text's length", fontsize=9)
    figure.supylabel("share of channels", fontsize=9)
    return figure


def gate_histograms(layers):
    names = list(dict.fromkeys(name for layer in layers for name in layer["gates"]))
    figure, axes = panels(len(names), len(layers), (2.2, 1.6), sharex=True)
    for name, row in zip(names, axes):
        for layer, ax in zip(layers, row):
            if name not in layer["gates"]:
                ax.set_axis_off()
                continue
            ax.tick_params(labelbottom=True)  # the panel below may be none
            shares = layer["gates"][name]["histogram"]
            edges = np.linspace(0, 1, len(shares) + 1)
            ax.stairs(shares, edges, fill=True, color=ink(layer))
            ax.set_title(f"{title(layer)}, {name}", fontsize=8)
    figure.supxlabel("value of the gate", fontsize=9)
    figure.supylabel("share of tokens and channels", fontsize=9)
    return figure
