"""Is a mixer real? Says pass or FAIL, with figures. Run: python -m tools.audit --mixer=lln

    python -m tools.audit --mixer=all --quick                every mixer, the first questions alone
    python -m tools.audit --mixer_file=mine.py --mixer=mine  a mixer of your own, half a minute
    python -m tools.audit --out_dir=out/shakespeare_lln      a run's newest checkpoint, as trained
    python -m tools.audit --hf=llama             a causal language model of transformers
    python -m tools.audit --module=model.py:GPT  a module of your own, tokens to logits
    python -m tools.audit --metric --out_dir=... a run's metric: probabilities, bytes, splits

Named mixers are built into two small models (GPT-2's and LLaMA's skeleton, the latter with RoPE and
grouped heads) with noise on all weights; everything runs on the CPU, in float64 unless a check is
about another dtype. Model options such as --lln_diag_mode are audited in a run that has them, of
two steps perhaps. Exit status 1 if anything fails.

The same is written as JSON: to mine.NAME.audit.json beside mine.py, to audit.json in a run's
folder, else to out/audit/NAME.json.

The first questions, with --quick the only ones, take about ten seconds:

    forward   forward(x, state=None) returns (y, state), y shaped like x; if not, nothing else is
              asked
    repeat rows suffix gradient length huge
              what no output may depend on, see training/leaks.py; the first four in every dtype,
              where float16 is computed in it too
    before    the first call sets nothing, no call looks up what another has left, and turns between
              training and evaluation change nothing
    split     a sequence in pieces of any lengths, down to single tokens, is the whole: outputs and
              gradients
    branch    stepping on from a state leaves the state as it was
    bytes     state_bytes(T, dtype) is the size of the largest real state up to T (n/a where a mixer
              does not say)
    storage   a state of constant size does not hold on to storage that grows with T
    learns    every parameter that is trained gets a gradient
    bits      the same seed gives the same bits, forward and backward

and then:

    bfloat16  a bfloat16 model, float32 weights under autocast, and without, stay near float64
    finite    no infinity, no NaN in outputs or gradients at inputs of 1,000 times the usual size,
              and in 3,000 tokens of the usual size
    depth     gradient norms of the layers of a fresh model of 12, largest over smallest
    lengths   every length up to 300 and more up to 1,100, in float32 fewer, beyond 2,048 and beyond
              block_size: a beginning alone is as in the whole
    onward    behind one call of each of these lengths the rest is as in the whole
    chance    what is drawn at random in training opens no leak: 200 draws
    inputs    repeated and equal tokens, zeros, one-sided, tiny and large ones
    batches   65 rows: none depends on another, alone or in another order each is the same, and
              gradients are the sum of the rows'
    sizes     heads of 64 and 128 channels, 384 channels, other skeletons, each of 12 layers
    modes     with and without gradients, in inference mode, with other threads; without norms too,
              where nothing may be written into the input
    compiled  as torch.compile traces it
    decode    700 single tokens, long pieces, one row and 16, in the precisions of training; the
              state's size at each
    ready     ready_to_decode() changes no output
    carried   the state holds all that goes on: sequences in turn, another copy of the model, behind
              a model of other weights
    derivative backward
              gradients are the derivatives by differences; a second backward pass gives the same,
              one of larger gradients the same in proportion, and none writes into what it is given
    slopes    gradients in the precisions of training are near those of float64
    used      the first questions after 220 steps of training and 1,000 calls, and as after 10,000;
              calls leave nothing in memory
    saved     a model of another seed that loads what a checkpoint's file holds gives the same,
              whatever both were asked before
    process   so do processes with other hash seeds
    seeds     another seed gives other weights: building a mixer seeds nothing
    flops     flops_per_token(T) is not less than the products counted
    aside     settings, generators and options stay; evaluation leaves no trace in training
    cost      exponents of T, of measured time, of memory kept for the backward pass and of the
              declared FLOPs; not judged
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import importlib
import sys
import time
from dataclasses import asdict
from typing import Optional

import torch

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input, is_out_of_memory, printable
from base.files import write_json
from base.options import checked, option
from base.user_code import in_words, place
from mixers import MIXERS, layer_mixers, load_mixer_file
from tools.audit_advice import ADVICE
from tools.audit_around import aside, bits, cost, flops, processes, saved, used
from tools.audit_commands import ready, seeds
from tools.audit_leaks import before, causality, chance, forward
from tools.audit_lengths import lengths
from tools.audit_numbers import depth, derivative, dtypes, learns, rough_gradients
from tools.audit_state import branch, carried, decode, split, state_size
from tools.audit_subject import Row, named, trained
from tools.audit_wide import batches, compiled, inputs, modes, sizes

VERDICT = {True: "pass", False: "FAIL", None: "n/a"}
QUICK = (forward, causality, before, split, branch, state_size, learns, bits)
CHECKS = (*QUICK, dtypes, depth, lengths, chance, inputs, batches, sizes, modes, compiled,
          decode, ready, carried, derivative, rough_gradients, used, saved, processes, seeds, flops,
          aside, cost)


@checked
class AuditOptions:
    mixer: Optional[str] = option(
        None, "a name of the registry, a pattern over layers (softmax,lln), or all", min_length=1)
    out_dir: Optional[str] = option(
        None, "audit the newest checkpoint of this run folder", min_length=1)
    mixer_file: Optional[str] = option(
        None, "a Python file of yours that registers its mixer in mixers.MIXERS", min_length=1)
    quick: bool = option(False, "the first questions alone, about ten seconds")


def audit(subject, checks=CHECKS):
    """The rows of all checks. Whatever a mixer's code raises fails the check that it was raised in;
    the same error is told once. Nothing else is asked of a mixer that fails `forward`."""
    told = {}  # (an error's text, its place) -> the check that told it
    for check in checks:
        passed = True
        try:
            for row in check(subject):
                passed = passed and row.passed is not False
                yield row
        except Exception as error:
            if is_out_of_memory(error):
                raise
            passed = False
            yield Row(check.__name__, False, what_was_raised(error, check, told), place(error))
        if check is forward and not passed:
            return


def what_was_raised(error, check, told):
    """An error in one line with its place, or where it was told already."""
    if isinstance(error, BadInput):  # it names the place
        return str(error)
    where = place(error)
    if (str(error), where) in told:
        return f"the same error as in {told[str(error), where]}"
    told[str(error), where] = check.__name__
    return f"{in_words(error)} ({where})"


# The report ---------------------------------------------------------------------------------------

def subjects(options):
    if (options.mixer is None) == (options.out_dir is None):
        raise BadInput("audit what? name a mixer, --mixer=lln or --mixer=all, "
                       "or a run, --out_dir=out/shakespeare_lln")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    if options.out_dir:
        return [trained(options.out_dir)]
    names = sorted(MIXERS) if options.mixer == "all" else [options.mixer]
    try:
        return [named(",".join(layer_mixers(name)), options.mixer_file) for name in names]
    except ValueError as error:
        raise BadInput(f"--mixer: {error}") from error


def print_row(row):
    """A line; of a fault up to three more: where, with how little, and what to look at."""
    print(f"{row.check:10} {VERDICT[row.passed]}  {printable(row.figures)}", flush=True)
    if row.passed is False:
        more = {"place": row.place, "smallest": row.smallest, "advice": ADVICE.get(row.check)}
        for name, text in more.items():
            if text:
                print(f"    {name:9} {printable(text)}", flush=True)


def print_matrix(reports):
    """A row for each subject, a column for each check that is judged; reports: name -> rows."""
    columns = []
    for rows in reports.values():
        for row in rows:
            if row.check != "cost" and row.check not in columns:
                columns.append(row.check)
    width = max(map(len, reports))
    print(" ".join([" " * width, *(f"{check:>8}" for check in columns)]))
    for name, rows in reports.items():
        verdicts = {row.check: VERDICT[row.passed] for row in rows}
        cells = [f"{verdicts.get(check, '-'):>8}" for check in columns]
        print(" ".join([f"{printable(name):{width}}", *cells]))


def as_json(row):
    return asdict(row) | {"advice": ADVICE.get(row.check, "") if row.passed is False else ""}


def write_report(subject, rows, seconds, quick):
    """The rows as JSON; where it cannot be written, a warning, since the verdict stands."""
    passed = all(row.passed is not False for row in rows)
    report = dict(audited=subject.name, passed=passed, seconds=round(seconds, 1),
                  torch=torch.__version__, quick=quick,
                  rows=[as_json(row) for row in rows])
    try:
        write_json(subject.report, report)
        return f", report in {subject.report}"
    except BadInput as error:
        print(f"tools.audit: warning: no report, {error}", file=sys.stderr)
        return ""


@exit_on_bad_input("tools.audit")
def main():
    for kind in ("metric", "module", "hf"):  # audits of other things, with options of their own
        if any(word.split("=")[0] == f"--{kind}" for word in sys.argv[1:]):
            return importlib.import_module(f"tools.audit_{kind}").main()
    description = __doc__.splitlines()[0]
    options, *_ = parse_options(AuditOptions, sys.argv[1:], description, with_config_file=False)
    reports = {}
    for subject in subjects(options):
        started = time.perf_counter()
        rows = []
        reports[subject.name] = rows
        for row in audit(subject, QUICK if options.quick else CHECKS):
            rows.append(row)
            print_row(row)
        seconds = time.perf_counter() - started
        failed = [row.check for row in rows if row.passed is False]
        verdict = f"FAIL ({', '.join(failed)})" if failed else "pass"
        where = write_report(subject, rows, seconds, options.quick)
        print(printable(f"{subject.name}: {verdict}, {seconds:.1f} s{where}") + "\n", flush=True)
    if len(reports) > 1:
        print_matrix(reports)
    sys.exit(any(row.passed is False for rows in reports.values() for row in rows))


if __name__ == "__main__":
    main()
