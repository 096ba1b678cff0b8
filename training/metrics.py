"""The record of a run: metrics.jsonl always, the same numbers mirrored to wandb if asked for.

One JSON object (`Row`) per log line and per evaluation, absent values null.
"""
import hashlib
import json
import os
import re
import shlex
import socket
from pathlib import Path
from typing import Annotated, Optional

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from base.errors import BadInput
from base.files import exists, parse_json, read_bytes, write_file

LARGEST = 2**31  # bytes of a metrics.jsonl that is read; a million lines have a tenth of it
WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")

Number = NotRequired[Optional[Annotated[float, Field(allow_inf_nan=False)]]]


class Row(TypedDict):
    iter: int                # optimiser updates done
    train_loss: Number       # nats per token, or per answer
    val_loss: Number
    val_bpb: Number          # bits per byte; of a text
    val_accuracy: Number     # share of right answers; of a recall task
    val_accuracy_by_cell: NotRequired[Optional[dict[str, Optional[float]]]]  # {difficulty: share}
    lr: Number
    tokens: int              # read in training
    flops: Number            # of training, by each mixer's own formula
    tokens_per_s: Number
    seconds: Number          # of training and evaluation, over resumes
    peak_bytes: Number       # the most memory so far; see device.peak_memory


KEYS = tuple(Row.__annotations__)


class Metrics:
    def __init__(self, options, iteration, wandb_id, costs):
        """Goes on with out_dir/metrics.jsonl after `iteration`, and with the wandb run wandb_id.
        costs: what wandb is told of the model besides the options, {name: number}."""
        path = Path(options.out_dir) / "metrics.jsonl"
        drop_lines_after(iteration, path)
        # it is a file of ours by now; should another have put a link there since, it is not
        # followed
        self.file = open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW), "a")
        self.wandb = None
        self.wandb_id = wandb_id
        if options.wandb_log:
            self.wandb = start_wandb(
                options.wandb_project, options.wandb_run_name or Path(options.out_dir).name,
                options.out_dir, id=wandb_id, resume="allow", config=vars(options) | costs,
                tags=[options.mixer[:64], f"seed {options.seed}"])
            self.wandb_id = self.wandb.id
            define_metrics(self.wandb)
            self.wandb.summary.update(costs)

    def log(self, **values):
        row = dict.fromkeys(KEYS) | values
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb:
            present = {key: value for key, value in row.items() if value is not None}
            self.wandb.log(present, step=row["iter"])

    def sync(self):
        """Returns when every line is on the disk."""
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def drop_lines_after(iteration, path):
    """Leaves the whole lines of a metrics.jsonl up to `iteration`: a run that goes on from there
    writes what came after it again. BadInput if one of its lines is none of ours."""
    remedy = "move it away to go on without the earlier lines"
    content = read_bytes(path, LARGEST, remedy) if exists(path) else b""
    schema = TypeAdapter(Row)
    kept = []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):  # half of one: the process was killed while it wrote
            continue
        try:
            row = schema.validate_python(parse_json(line), strict=True)
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(map(str, detail["loc"]))
            message = f"{path} is damaged: line {number}: {where} {detail['msg']}; {remedy}"
            raise BadInput(message) from error
        except ValueError as error:
            raise BadInput(f"{path} is damaged: line {number} is no JSON; {remedy}") from error
        if row["iter"] <= iteration:
            kept.append(line)
    write_file(path, b"".join(kept))


def check_wandb(options):
    """BadInput for what wandb would refuse, before anything is written."""
    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in WANDB_MODES:
        raise BadInput(f"WANDB_MODE={mode} in the environment; have {', '.join(WANDB_MODES)}")
    forbidden = sorted(set(options.wandb_project) & set("/\\#?%:"))
    if forbidden or len(options.wandb_project) > 128:
        raise BadInput(f"--wandb_project={options.wandb_project}: a project's name has at most 128 "
                       "characters and none of / \\ # ? % :")


def define_metrics(run):
    """Steps below every chart, the best of the evaluations in the summary, and no charts of what
    counts the steps in another way."""
    run.define_metric("*", step_metric="iter")
    for name, best in (("val_loss", "min"), ("val_bpb", "min"), ("val_accuracy", "max")):
        run.define_metric(name, step_metric="iter", summary=best)
    for name in ("iter", "seconds", "tokens", "flops"):
        run.define_metric(name, hidden=True)


def wandb_group(folder):
    """The group of the runs in a folder, of which no other folder has the same: its name, and what
    stands for its place on this machine."""
    folder = Path(folder).resolve()
    place = hashlib.sha256(f"{socket.gethostname()}:{folder}".encode(errors="replace"))
    return f"{folder.name[:100]}-{place.hexdigest()[:8]}"


def sync_command(folder):
    """What uploads all offline runs of a folder, its own and those of the runs in it."""
    return f"wandb sync {shlex.quote(str(folder))}/*/wandb/offline-run-*"


def say_how_to_sync(folder):
    """Prints that command, if anything in the folder of a sweep is offline."""
    if any(folder.glob("*/wandb/offline-run-*")):
        print(f"wandb: to upload all that is offline here: {sync_command(folder)}")


def wandb_id_of(folder):
    """The id of the wandb run that a run's folder has, as its file is named, or None."""
    for path in sorted(Path(folder).glob("wandb/*run-*/run-*.wandb")):
        if found := re.fullmatch(r"run-(\w{1,64})\.wandb", path.name, re.ASCII):
            return found[1]
    return None


def start_wandb(project, name, folder, say=True, **more):
    """A wandb run that keeps its files in `folder`; without an account or a network an offline
    one, and one line that says so unless `say` is False. BadInput for what wandb does not
    accept."""
    import wandb  # takes half a second: only for those who ask
    try:
        settings = wandb.Settings(silent=True, init_timeout=20)
        start = dict(project=project, name=name, dir=folder, settings=settings, **more)
        mode, why = wandb.setup().settings.mode, "as you asked"  # WANDB_MODE, or `wandb offline`
        try:
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                mode, why = "offline", "as there is no account (`wandb login`)"
            run = wandb.init(mode=mode, **start)
        except wandb.Error:
            run, why = wandb.init(mode="offline", **start), "as the server does not answer"
    except (ValueError, wandb.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"wandb cannot start: {reason}; "
                       "leave out --wandb_log, or mend its settings") from error
    if run.offline and say:
        print(f"wandb: offline, {why}; to upload later: "
              f"wandb sync {shlex.quote(str(Path(run.dir).parent))}", flush=True)
    return run
