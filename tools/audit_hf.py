"""Is a causal language model of transformers causal? Run: python -m tools.audit --hf=llama

    python -m tools.audit --hf=llama      a tiny random model of an architecture: seconds
    python -m tools.audit --hf=FOLDER     a folder with config.json, and model.safetensors or not
    python -m tools.audit --hf=all        every architecture, each in a process of its own, and a
                                          table; written to --record
    python -m tools.audit_hf              the table of the record results/audit_hf.json, for
                                          docs/audit.md

All in float64, also what a model computes in float32; in float32 as it ships once more, named
"rough". The questions of tools/audit_tokens.py, and

    rough     suffix and rows in float32, with the kernels that are the default there
    cache     a beginning, then token by token from the cache, is the whole
    pieces    so are pieces of several tokens
    padding   tokens behind padding on the left, masked, are those without

Exit status 1 if anything fails. Needs `pip install transformers`; reads no network, no pickle and
no code that comes with a model.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import inspect
import multiprocessing
import queue
import resource
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input, printable
from base.files import write_json
from base.options import checked, option
from base.user_code import in_words
from tools import audit_hf_models as models
from tools.audit_tokens import (MEANING, QUESTIONS, VERDICT, Answer, Subject, answers, judged,
                                print_answer, report, rows_at, suffix_at)
from training.leaks import difference

RECORD = Path("results/audit_hf.json")
SECONDS = 120         # most for an architecture
BYTES = 12 * 2**30    # of address space, likewise
LENGTHS = (40, 140)
CACHES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
PIECES = ([33, 7, 1, 12, 37], [5, 85], [64, 26], [2] * 45)
MEANING |= {
    "rough": "in float32, with other kernels than float64 takes: " + MEANING["suffix"],
    "cache": "decoding token by token differs from the whole sequence at once: look at positions, "
             "masks and windows of the cache",
    "pieces": "several tokens on top of a cache differ from the whole: chunked prefill, prompts "
              "that are reused and speculative decoding go wrong; look at masks by offset, and at "
              "states that start from zero",
    "padding": "a sequence behind padding on the left differs from the same without: batched "
               "generation goes wrong; look at positions and at what reads masked tokens",
}


@checked
class HFOptions:
    hf: str = option("", "a model type (llama), a folder with config.json, or all", min_length=1)
    record: str = option("out/audit/hf.json", "the JSON file that --hf=all writes", min_length=1)


# Questions about a cache and padding --------------------------------------------------------------

def cached(model, idx, sizes):
    """Logits (B, T, V) of the tokens in pieces of the sizes, each on top of the cache before; None
    where the model returns no cache."""
    parts, kept = [], {}
    for piece in idx.split(sizes, dim=1):
        out = model(input_ids=piece, use_cache=True, **kept)
        name = next((n for n in CACHES if getattr(out, n, None) is not None), None)
        if name is None:
            return None
        kept = {name: getattr(out, name)}
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def with_cache(question, splits):
    """The question's function: whether pieces of these sizes are the whole."""
    def ask(subject):
        model = subject.module
        worst = 0.0
        most = subject.limit("length")
        for sizes in splits:
            idx = subject.tokens(2, sum(sizes))
            try:
                y = subject.of(lambda x: cached(model, x, sizes), idx)
            except Exception as error:
                return Answer(question, None, f"pieces {shown(sizes)}: it raises {in_words(error)}")
            if y is None:
                return Answer(question, None, "it returns no cache")
            moved = difference(y, subject(idx))
            worst = max(worst, moved.max().item())
            if not worst <= most:
                where = {"pieces": shown(sizes), "moved": first_over(moved, most)}
                return judged(question, worst, most, smallest_pieces(subject, most) or where)
        return judged(question, worst, most)
    return ask


def first_over(moved, most):
    """The first position at which a row moves more than it may."""
    return (~(moved <= most)).any(0).nonzero()[0].item()


def shown(sizes):
    return "+".join(map(str, sizes)) if len(sizes) <= 6 else f"{sizes[0]}+{sizes[1]}+..."


def smallest_pieces(subject, most):
    """The smallest beginning and piece behind it that fail, or None."""
    for T in (2, 3, 4, 6, 9, 12, 17, 24, 33, 48, 65, 80):
        for last in sorted({1, 2, 3, T // 2, T - 1}):
            if not 0 < last < T:
                continue
            idx = subject.tokens(2, T)
            y = subject.of(lambda x: cached(subject.module, x, [T - last, last]), idx)
            moved = difference(y, subject(idx))
            if not moved.max() <= most:
                return {"pieces": f"{T - last}+{last}", "moved": first_over(moved, most)}
    return None


def padding(subject):
    model = subject.module
    parameters = inspect.signature(model.forward).parameters
    if "attention_mask" not in parameters:
        return Answer("padding", None, "its forward takes no attention_mask")
    most = subject.limit("length")
    worst = 0.0
    for T, pad in ((3, 1), (12, 5), (40, 23)):
        idx = subject.tokens(2, T)
        padded = torch.cat([torch.full((2, pad), pad_token(model)), idx], dim=1)
        padded[0] = subject.tokens(1, T + pad, seed=3)[0]  # a neighbour without padding
        mask = torch.ones_like(padded)
        mask[1, :pad] = 0
        try:
            y = subject.of(lambda x: masked(model, x, mask), padded)[1:, pad:]
            alone = subject.of(lambda x: masked(model, x, torch.ones_like(x)), idx)[1:]
        except Exception as error:
            return Answer("padding", None, f"it raises {in_words(error)}")
        moved = difference(y, alone)
        worst = max(worst, moved.max().item())
        if not worst <= most:
            where = {"padding": pad, "tokens": T, "moved": first_over(moved, most)}
            return judged("padding", worst, most, where)
    return judged("padding", worst, most)


def masked(model, idx, mask):
    """Logits with a mask, and with positions as generate() makes them."""
    more = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=idx, attention_mask=mask, **more).logits


def pad_token(model):
    token = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if token is None else token


def rough(subject):
    """suffix and rows in float32."""
    rough = subject_of(subject.name, torch.float32)
    most = rough.limit("suffix")
    T = rough.lengths[-1]
    moves = [suffix_at(rough, T, rough.cuts(T)), rows_at(rough, T)]
    size, where = max(moves, key=lambda move: move[0])
    return judged("rough", size, most, None if size <= most else where)


ALL_QUESTIONS = QUESTIONS | {
    "rough": rough,
    "cache": with_cache("cache", ([1] * 50, [20] + [1] * 30)),
    "pieces": with_cache("pieces", PIECES), "padding": padding,
}


# The audit ----------------------------------------------------------------------------------------

LONGEST = 1100  # tokens; windows beyond are said not to be reached


def subject_of(name, dtype=torch.float64):
    """The Subject of a model type or folder."""
    model = models.build(name, dtype)
    sizes = {size for size in models.thresholds(model.config).values() if size < LONGEST // 2}
    borders = {63, 64, 65, 128}
    for size in sizes:
        borders |= {size - 1, size, size + 1, 2 * size}
    longest = max([*LENGTHS, *(2 * size + 5 for size in sizes)])
    words = model.config.get_text_config().vocab_size
    first = models.FIRST_TOKEN if words > 2 * models.FIRST_TOKEN else 0
    return Subject(name, lambda idx: model(input_ids=idx).logits, range(first, words),
                   (LENGTHS[0], longest), borders, model, dtype)


def exact(name):
    """The Subject in float64, or in float32 where it cannot run in float64."""
    subject = subject_of(name)
    try:
        subject(subject.tokens(1, LENGTHS[0]))
    except Exception:
        subject = subject_of(name, torch.float32)
    return subject


def audit(name):
    """Yields the Answers of a model type or folder. BadInput."""
    subject = exact(name)
    for answer in answers(subject, ALL_QUESTIONS):
        reason = BY_DESIGN.get((subject.module.config.model_type, answer.question))
        if answer.passed is False and reason:
            answer.passed = None
            answer.figures = f"by design: {reason} ({answer.figures})"
        yield answer


BY_DESIGN = {}


# Every architecture -------------------------------------------------------------------------------

def in_process(name, results):
    """In a process of its own: puts what was found of an architecture, as a dict."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    started = time.process_time()
    found = {"answers": []}
    try:
        for answer in audit(name):
            found["answers"].append(asdict(answer))
    except BadInput as error:
        found["skipped"] = str(error)
    except Exception as error:
        found["error"] = in_words(error)
    found["cpu_seconds"] = round(time.process_time() - started, 1)
    results.put(found)


def audit_apart(name):
    """What is found of an architecture (dict), from a process with limits of time and memory."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=in_process, args=(name, results))
    process.start()
    try:
        found = results.get(timeout=4 * SECONDS)
    except queue.Empty:
        found = {"answers": [], "error": f"no answer within {SECONDS} s of CPU time"}
        process.kill()
    process.join()
    return found


def audit_all(record):
    """Every architecture, into the record. Returns whether all passed."""
    import transformers
    content = {"transformers": transformers.__version__, "torch": torch.__version__,
               "date": date.today().isoformat(), "architectures": {}}
    for name in models.auto()[2]:
        found = audit_apart(name)
        content["architectures"][name] = found
        print(row_of(name, found), flush=True)
        write_json(record, content)
    return all(answer["passed"] is not False for found in content["architectures"].values()
               for answer in found["answers"])


def row_of(name, found):
    cells = {a["question"]: VERDICT[a["passed"]] for a in found["answers"]}
    if not cells:
        return f"{printable(name):28} {printable(found.get('error') or found.get('skipped'))[:150]}"
    columns = " ".join(f"{cells.get(question, '-'):>8}" for question in ALL_QUESTIONS)
    return f"{name:28} {columns} {found['cpu_seconds']:6.1f} s"


@exit_on_bad_input("tools.audit")
def main():
    options, *_ = parse_options(HFOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    if options.hf == "all":
        sys.exit(not audit_all(Path(options.record)))
    started = time.perf_counter()
    found = []
    for answer in audit(options.hf):
        found.append(answer)
        print_answer(answer)
    path = Path("out/audit", f"hf.{Path(options.hf).name[:80]}.json")
    sys.exit(not report(options.hf, found, time.perf_counter() - started, path))


if __name__ == "__main__":
    main()
