"""The curves of tools/report.py: what was logged of each run, as the page draws it itself, since
there one chooses what stands on the axes."""
from base.errors import printable
from tools import report_figures as figures
from tools.drawing import outlying

ROWS = 300  # of a run, at most; of more every n-th is taken, evaluations all
AXES = {"iter": "steps", "tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds"}
QUANTITIES = {"val_loss": "validation loss, nats per target",
              "train_loss": "training loss, nats per target",
              "val_accuracy": "accuracy on the validation data"}


def curves(arms, runs, looks, references):
    """{"axes": {key: name}, "quantities": {key: name}, "lines": [{"name", "loss"}], "beyond":
    [label of an arm far above all others], "arms": [{"name", "meta", "dash", "runs": [{"seed", key:
    [a value a row, or null]}]}]}, or None without a curve. Runs that are not in `arms`, still
    running say, are arms of their own mixer."""
    found = {arm.label: {"mixer": arm.mixer, "records": list(arm.records)} for arm in arms}
    for record in runs.others if arms else runs.others + runs.finished:
        mixer = record.config["mixer"].replace(",", "+")
        found.setdefault(mixer, {"mixer": mixer, "records": []})["records"].append(record)
    listed, counts = [], dict.fromkeys(QUANTITIES, 0)
    for label, of_arm in found.items():
        its_runs = []
        for record in of_arm["records"]:
            columns = columns_of(record)
            for name in QUANTITIES:
                known = sum(value is not None for value in columns[name])
                counts[name] = max(counts[name], known)
            its_runs.append(columns)
        listed.append({"name": figures.plain(label), "meta": looks.meta(label),
                       "dash": looks.dash(label), "runs": its_runs})
    # what is a curve comes before what is a single point, as early in a run
    order = sorted(filter(counts.get, counts), key=lambda name: counts[name] == 1)
    if not order:
        return None
    ends = {of_arm["meta"]["label"]: [run["val_loss"][-1] for run in of_arm["runs"]
                             if run["val_loss"] and run["val_loss"][-1] is not None]
            for of_arm in listed}
    return {"axes": AXES, "quantities": {name: QUANTITIES[name] for name in order},
            "beyond": sorted(outlying(ends)),
            "lines": [{"name": figures.plain(reference.name), "loss": reference.loss}
                      for reference in references],
            "arms": listed}


def columns_of(record):
    """{"seed", "name", key: values} of a run's rows."""
    rows = thinned(record.metrics)
    columns = {"seed": record.config["seed"], "name": printable(record.name)}
    for key in (*AXES, *QUANTITIES):
        values = [number(row.get(key)) for row in rows]
        columns[key] = values
    return columns


def number(value):
    """A finite number of a file of metrics to six digits, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e30:
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def thinned(rows):
    logged = [row for row in rows if row.get("val_loss") is None]
    every = -(-len(logged) // ROWS) or 1
    kept = {id(row) for row in logged[::every]}
    return [row for row in rows if row.get("val_loss") is not None or id(row) in kept]
