"""Is a causal language model of transformers causal? Run: python -m tools.audit --hf=llama

    python -m tools.audit --hf=llama      a tiny random model of an architecture: seconds
    python -m tools.audit --hf=FOLDER     a folder with config.json, and model.safetensors or not
    python -m tools.audit --hf=all        every architecture, each in a process of its own, and a
                                          table; written to --record
    python -m tools.audit --hf=table --record=results/audit_hf.json
                                          the table of a record, as docs/audit.md has it

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
import multiprocessing
import queue
import resource
import sys
import time
from datetime import date
from pathlib import Path

import torch

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input, is_out_of_memory, printable
from base.files import exists, read_json, write_json
from base.options import checked, option
from base.user_code import in_words
from tools import audit_hf_models as models
from tools.audit_answers import MEANING, VERDICT, Answer, judged, print_answer, report
from tools.audit_hf_cache import PIECES, Misshapen, apart, padding, shaped, with_cache
from tools.audit_tokens import QUESTIONS, Subject, origin, rows_at, suffix_at

SECONDS = 120         # most for an architecture
BYTES = 12 * 2**30    # of address space, likewise
LENGTHS = (40, 140)
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
    hf: str = option("", "a model type (llama), several (llama,gpt2), all, a "
                     "folder with config.json, or table", min_length=1)
    record: str = option("out/audit/hf.json",
                         "the JSON file that --hf=all writes and --hf=table reads", min_length=1)


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
    found = {"answers": {}, "figures": {}}  # question -> verdict; of what did not pass, the text
    try:
        for answer in audit(name):
            found["answers"][answer.question] = answer.verdict
            if not answer.passed:
                found["figures"][answer.question] = answer.figures
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
        found = {"answers": {}, "error": f"no answer within {SECONDS} s of CPU time"}
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
        passed = passed and VERDICT[False] not in found["answers"].values()
    return passed


def read_record(path):
    """A record's content. BadInput."""
    content = read_json(path, "write it again: python -m tools.audit --hf=all")
    if not isinstance(content.get("architectures"), dict):
        raise BadInput(f"{path} is no record of --hf=all; name another --record")
    return content


def row_of(name, found):
    cells = found["answers"]
    if not cells:
        return f"{printable(name):28} {printable(found.get('error') or found.get('skipped'))[:150]}"
    columns = " ".join(f"{cells.get(question, '-'):>8}" for question in ALL_QUESTIONS)
    return f"{name:28} {columns} {found['cpu_seconds']:6.1f} s"


def table(record):
    """A record in Markdown: what did not pass, then the names of what did."""
    questions = list(ALL_QUESTIONS)
    lines = [f"transformers {record['transformers']}, torch {record['torch']}, {record['date']}: "
             f"{len(record['architectures'])} model types.", "",
             "| | " + " | ".join(questions) + " |", "|" + "---|" * (len(questions) + 1)]
    passed, others = [], []
    for name, found in sorted(record["architectures"].items()):
        words = found["answers"]
        if "skipped" in found or "error" in found:
            why = found.get("skipped", found.get("error")).removeprefix(f"--hf={name}: ")
            others.append(f"- `{name}`: {why}")
        elif set(words.values()) == {"pass"}:
            passed.append(f"`{name}`")
        else:
            cells = [words.get(question, "").replace("pass", "") for question in questions]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", f"All questions passed, {len(passed)}: {', '.join(passed)}."]
    if others:
        lines += ["", "Not asked:", "", *others]
    return "\n".join(lines)


@exit_on_bad_input("tools.audit")
def main():
    options, *_ = parse_options(HFOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    if options.hf == "table":
        print(table(read_record(Path(options.record))))
        return
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
