"""One page of HTML on runs, sweeps, claims, benches and inspections.

Run: python -m tools.report out/sweeps/shakespeare   (seconds)

    python -m tools.report results out/bench out/shakespeare_lln --out=page.html
    python -m tools.report out/sweeps/shakespeare --live      while a sweep runs; Ctrl-C ends it

The page needs nothing else and no network: verdicts, tables, curves and maps to zoom and filter,
with plotly.js inside (5 MB). A folder may be a run's, a sweep's, one of records, of bench.py's
results or of any of them, three levels down; runs that are named one by one are compared with
each other. What a run has in out_dir/inspect (tools/inspect_attention.py) is shown with it.

--live serves the page at http://127.0.0.1:<port>, to this machine alone, and follows the runs.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import sys
import time
from pathlib import Path
from typing import Optional

from base.command_line import paths_and_options
from base.errors import BadInput, exit_on_bad_input, printable
from base.files import write_file
from base.options import checked, option
from bench import git_revision
from mixers import load_mixer_file
from tools.compare import MARGIN_BPB
from tools.report_data import WHAT_TO_NAME, read_all
from tools.report_live import serve
from tools.report_page import page
from tools.report_sections import sections_of


@checked
class ReportOptions:
    out: str = option("out/report.html", "the file to write", min_length=1)
    live: bool = option(False, "serve the page on this machine while runs go on, write no file")
    port: int = option(8008, "of --live; 0: any that is free", ge=0, lt=2**16)
    baseline: Optional[str] = option(
        None, "what the others are compared with, as the table names it "
        "[default: softmax, or else the first by name]")
    margin_bpb: float = option(
        MARGIN_BPB, "bits per byte: losses of a text that differ by less are equivalent", gt=0)
    mixer_file: Optional[str] = option(
        None, "the Python file of the mixer, if a run was trained with one", min_length=1)


def read_command_line(words):
    """(paths, ReportOptions)"""
    names, options, given = paths_and_options(ReportOptions, words, __doc__.splitlines()[0])
    if not names:
        raise BadInput(f"nothing to report on; {WHAT_TO_NAME}")
    if "port" in given and not options.live:
        raise BadInput("--port is for --live; leave it out")
    if "out" in given and options.live:
        raise BadInput("--live writes no file; leave --out out")
    return names, options


@exit_on_bad_input("tools.report")
def main():
    names, options = read_command_line(sys.argv[1:])
    if options.mixer_file:
        load_mixer_file(options.mixer_file)

    def sections():
        return sections_of(read_all(names), options.baseline, options.margin_bpb)

    revision = git_revision() or "not known"
    made = f"{time.strftime('%Y-%m-%d %H:%M')}, revision {revision}: {', '.join(names)}"
    if options.live:
        serve(sections, made, options.port)
        return
    found = sections()
    write_file(Path(options.out), page(found, made).encode())
    for section in found:
        print(printable(f"{section.title}: {section.sentence}"))
    print(printable(f"{options.out} is written"))


if __name__ == "__main__":
    main()
