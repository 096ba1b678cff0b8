"""The record of a run: metrics.jsonl always, the same numbers mirrored to wandb if asked for.

One JSON object per log line and per evaluation, absent values null:
iter (optimiser updates done), train_loss and val_loss (nats per token), val_bpb (bits per byte), val_accuracy and
val_accuracy_by_cell (share of right answers, and {difficulty: share}; for recall tasks), lr, tokens (read in training),
flops (of training, by each mixer's own formula), tokens_per_s, seconds (of training and evaluation, over resumes),
peak_bytes (the most memory so far; see device.peak_memory).
"""
import json
import os
from pathlib import Path

from base.errors import BadInput

KEYS = ("iter", "train_loss", "val_loss", "val_bpb", "val_accuracy", "val_accuracy_by_cell", "lr", "tokens", "flops", "tokens_per_s", "seconds",
        "peak_bytes")


class Metrics:
    def __init__(self, options, iteration, wandb_id):
        """Goes on with out_dir/metrics.jsonl after `iteration`, and with the wandb run wandb_id if there is one."""
        drop_lines_after(iteration, options.out_dir)
        self.file = open(Path(options.out_dir) / "metrics.jsonl", "a")
        self.wandb = None
        if options.wandb_log:
            self.wandb = start_wandb(options.wandb_project, options.wandb_run_name or Path(options.out_dir).name, options.out_dir, id=wandb_id,
                                     resume="allow", config=vars(options), tags=[options.mixer[:64], f"seed {options.seed}"])
        self.wandb_id = self.wandb.id if self.wandb else wandb_id

    def log(self, **values):
        row = dict.fromkeys(KEYS) | values
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log({key: value for key, value in row.items() if value is not None}, step=row["iter"])

    def sync(self):
        """Returns when every line is on the disk."""
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def drop_lines_after(iteration, out_dir):
    """A run that goes on from `iteration` writes what came after it again."""
    path = Path(out_dir) / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iter"] <= iteration]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error!r}); move it away to go on without the earlier lines") from error
    aside = path.with_name(".metrics.jsonl")
    aside.write_text("".join(kept))
    aside.replace(path)


def start_wandb(project, name, folder, **more):
    """A wandb run that keeps its files in `folder`; without an account or a network an offline one, and one line that says so."""
    import wandb  # takes half a second: only for those who ask
    start = dict(project=project, name=name, dir=folder, settings=wandb.Settings(silent=True, init_timeout=20), **more)
    try:
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        run = wandb.init(mode=mode, **start)
    except wandb.Error:
        run = wandb.init(mode="offline", **start)
    if run.offline:
        print(f"wandb: offline, for want of an account or a network; to upload later: wandb sync {Path(run.dir).parent}", flush=True)
    return run
