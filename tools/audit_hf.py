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
    apart     two sequences step by step in turn, each with its own cache, are those alone
    padding   tokens behind padding on the left, masked, are those without

Exit status 1 if anything fails. Needs `pip install transformers`; reads no network, no pickle and
no code that comes with a model.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import dataclasses
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
from base.errors import BadInput, exit_on_bad_input, is_out_of_memory, printable
from base.files import exists, read_json, write_json
from base.options import checked, option
from base.user_code import in_words
from tools import audit_hf_models as models
from tools.audit_tokens import (MEANING, QUESTIONS, VERDICT, Answer, Subject, judged, origin,
                                print_answer, report, rows_at, suffix_at)
from training.leaks import difference

RECORD = Path("results/audit_hf.json")
SECONDS = 120         # most for an architecture
BYTES = 12 * 2**30    # of address space, likewise
LENGTHS = (40, 140)
CACHES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
FILLED = ("recurrent_gemma",)  # they fill a cache that is given, and return none
PIECES = ([33, 7, 1, 12, 37], [5, 85], [64, 26], [2] * 45)
MEANING |= {
    "rough": "in float32, with other kernels than float64 takes: " + MEANING["suffix"],
    "cache": "decoding token by token differs from the whole sequence at once: look at positions, "
             "masks and windows of the cache",
    "pieces": "several tokens on top of a cache differ from the whole: chunked prefill, prompts "
              "that are reused and speculative decoding go wrong; look at masks by offset, and at "
              "states that start from zero",
    "apart": "a sequence's steps change another's: two cannot be decoded at once; look for state "
             "that is kept in the module",
    "padding": "a sequence behind padding on the left differs from the same without: batched "
               "generation goes wrong; look at positions and at what reads masked tokens",
}


@checked
class HFOptions:
    hf: str = option("", "a model type (llama), several (llama,gpt2), all, or a "
                     "folder with config.json", min_length=1)
    record: str = option("out/audit/hf.json", "the JSON file that --hf=all writes", min_length=1)


# Questions about a cache and padding --------------------------------------------------------------

class Misshapen(ValueError):
    """Logits that are not one a token."""


def shaped(y, idx):
    if y.shape[:2] != idx.shape:
        raise Misshapen(f"for tokens {tuple(idx.shape)} logits are {tuple(y.shape)}")
    return y


def step(model, piece, kept, start=None):
    """(logits, what to give the next step) of tokens on top of a cache; kept {}: at the beginning.
    start: the first position, to be told as generate() tells it."""
    from transformers import DynamicCache
    more = dict(kept)
    if not kept and model.config.model_type in FILLED:
        more["cache"] = DynamicCache(config=model.config)
    if start is not None:
        more["position_ids"] = torch.arange(start, start + piece.size(1))[None]
    out = model(input_ids=piece, use_cache=True, **more)
    for name in CACHES:
        if getattr(out, name, None) is not None:
            return shaped(out.logits, piece), {name: getattr(out, name)}
    if model.config.model_type in FILLED:
        return shaped(out.logits, piece), {"cache": more["cache"]}
    raise NoCache


class NoCache(Exception):
    """A model returns none."""


def cached(model, idx, sizes, positions=False):
    """Logits (B, T, V) of the tokens in pieces of the sizes, each on top of the cache before."""
    parts, kept, start = [], {}, 0
    for piece in idx.split(sizes, dim=1):
        y, kept = step(model, piece, kept, start if positions else None)
        parts.append(y)
        start += piece.size(1)
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
            except NoCache:
                return Answer(question, None, "it returns no cache", word="no cache")
            moved = difference(y, subject(idx))
            worst = max(worst, moved.max().item())
            if not worst <= most:
                where = {"pieces": shown(sizes), "moved": first_over(moved, most)}
                answer = judged(question, worst, most, smallest_pieces(subject, most) or where)
                if takes(model, "position_ids"):
                    y = subject.of(lambda x: cached(model, x, sizes, True), idx)
                    if difference(y, subject(idx)).max() <= most:
                        answer.figures += "; right with position_ids, as generate() gives them"
                return answer
        return judged(question, worst, most)
    return ask


def apart(subject):
    """Two sequences, step by step in turn, each with a cache of its own."""
    most = subject.limit("length")
    T = 12
    both = subject.tokens(2, T)

    def in_turn(idx):
        kept, parts = [{}, {}], [[], []]
        for t in range(T):
            for row in range(2):
                y, kept[row] = step(subject.module, idx[row:row + 1, t:t + 1], kept[row])
                parts[row].append(y)
        return torch.cat([torch.cat(rows, dim=1) for rows in parts])

    def one_by_one(idx):
        rows = [cached(subject.module, idx[row:row + 1], [1] * T) for row in range(2)]
        return torch.cat(rows)

    try:
        moved = difference(subject.of(in_turn, both), subject.of(one_by_one, both))
    except NoCache:
        return Answer("apart", None, "it returns no cache", word="no cache")
    size = moved.max().item()
    where = None if size <= most else {"tokens": T, "moved": first_over(moved, most)}
    return judged("apart", size, most, where)


def takes(model, name):
    return name in inspect.signature(model.forward).parameters


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
    if not takes(model, "attention_mask"):
        return Answer("padding", None, "its forward takes no attention_mask", word="no mask")
    most = subject.limit("length")
    worst = 0.0
    for T, pad in ((3, 1), (12, 5), (40, 23)):
        idx = subject.tokens(2, T)
        padded = torch.cat([torch.full((2, pad), pad_token(model)), idx], dim=1)
        padded[0] = subject.tokens(1, T + pad, seed=3)[0]  # a neighbour without padding
        mask = torch.ones_like(padded)
        mask[1, :pad] = 0
        y = subject.of(lambda x: masked(model, x, mask), padded)[1:, pad:]
        alone = subject.of(lambda x: masked(model, x, torch.ones_like(x)), idx)[1:]
        moved = difference(y, alone)
        worst = max(worst, moved.max().item())
        if not worst <= most:
            where = {"padding": pad, "tokens": T, "moved": first_over(moved, most)}
            return judged("padding", worst, most, where)
    return judged("padding", worst, most)


def masked(model, idx, mask):
    """Logits with a mask, and with positions as generate() makes them."""
    more = {}
    if takes(model, "position_ids"):
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return shaped(model(input_ids=idx, attention_mask=mask, **more).logits, idx)


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
    "pieces": with_cache("pieces", PIECES), "apart": apart, "padding": padding,
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


    def logits(idx):
        return shaped(model(input_ids=idx).logits, idx)

    return Subject(name, logits, range(first, words), (LENGTHS[0], longest), borders, model, dtype)


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
    for question, ask in ALL_QUESTIONS.items():
        subject = exact(name)  # anew: a call may change a model for good
        try:
            answer = ask(subject)
        except Misshapen as error:
            answer = Answer(question, False, str(error))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            answer = Answer(question, None, f"it raises {in_words(error)} ({origin(error)})",
                            word="raises")
        if answer.passed is False:
            excuse(answer, name)
        yield answer


def excuse(answer, name):
    """Takes back a FAIL that is what the architecture means to be, or a tie."""
    subject = exact(name)
    reason = BY_DESIGN.get(subject.module.config.model_type)
    if reason and answer.question not in ("rows", "repeat", "one", "apart"):
        answer.passed, answer.word = None, "design"
        answer.figures = f"by design: {reason}; {answer.figures}"
    elif answer.size is not None and answer.question in TIES:
        again = dataclasses.replace(subject, distinct=True)
        try:
            passed = ALL_QUESTIONS[answer.question](again).passed
        except Exception:
            return
        if passed:
            answer.passed, answer.word = None, "ties"
            answer.figures = f"ties of repeated tokens: passes without any; {answer.figures}"


# questions that compare calls of other sizes, in which equal scores may be ranked another way
TIES = ("length", "one", "cache", "pieces", "padding")
# model type -> why its outputs may see later tokens
BY_DESIGN = {
    "cpmant": "the text before the answer is a prompt, which looks both ways",
    "reformer": "LSH attention sorts all tokens into its chunks, later ones too",
    "xlnet": "without perm_mask every token sees all",
}


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


def audit_several(names, record):
    """Architectures, into the record, which keeps what it has of others. Returns whether all
    passed."""
    import transformers
    content = {"transformers": transformers.__version__, "torch": torch.__version__,
               "date": date.today().isoformat(), "architectures": {}}
    if exists(record):
        before = read_record(record)
        if before["transformers"] == content["transformers"]:
            content["architectures"] = before["architectures"]
    passed = True
    models.build("llama", torch.float32)  # loads here, once, what every process needs
    for name in names:
        found = audit_apart(name)
        content["architectures"][name] = found
        print(row_of(name, found), flush=True)
        write_json(record, content)
        passed = passed and all(answer["passed"] is not False for answer in found["answers"])
    return passed


def read_record(path):
    """A record's content. BadInput."""
    content = read_json(path, "write it again: python -m tools.audit --hf=all")
    if not isinstance(content.get("architectures"), dict):
        raise BadInput(f"{path} is no record of --hf=all; name another --record")
    return content


def row_of(name, found):
    cells = {a["question"]: a["word"] or VERDICT[a["passed"]] for a in found["answers"]}
    if not cells:
        return f"{printable(name):28} {printable(found.get('error') or found.get('skipped'))[:150]}"
    columns = " ".join(f"{cells.get(question, '-'):>8}" for question in ALL_QUESTIONS)
    return f"{name:28} {columns} {found['cpu_seconds']:6.1f} s"


@exit_on_bad_input("tools.audit")
def main():
    options, *_ = parse_options(HFOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    names = options.hf.split(",")
    if options.hf == "all":
        names = list(models.auto()[2])
    if len(names) > 1:
        sys.exit(not audit_several(names, Path(options.record)))
    started = time.perf_counter()
    found = []
    for answer in audit(options.hf):
        found.append(answer)
        print_answer(answer)
    path = Path("out/audit", f"hf.{Path(options.hf).name[:80]}.json")
    sys.exit(not report(options.hf, found, time.perf_counter() - started, path))


if __name__ == "__main__":
    main()
