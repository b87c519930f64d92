"""The jobs of a sweep in one table, best first, made from what lies in their folders."""

from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from pylorus.errors import PylorusError
from pylorus.evaluation.confusion import class_indices, overall_indices
from pylorus.files import whole, write_text
from pylorus.percent import percent
from pylorus.predictions import confusion_of
from pylorus.report.write import write_report
from pylorus.runs.folder import RunFolder
from pylorus.validation import loaded

SHIPPED = "yes"
"""Marks the stage that stands for its job."""
MEASURES = ["accuracy", "precision", "sensitivity", "F1"]


def sum_up(sweep: Path) -> int:
    """Prints and writes the table of all jobs of a sweep; gives 1 if one did not finish, else 0."""
    table = sweep_table(sweep)
    if table.empty:
        return 0
    with whole(sweep / "sweep.csv") as temporary:
        table.to_csv(temporary, index=False)
    shown = as_text(table)
    write_text(sweep / "sweep.md", shown + "\n")
    print(f"\n{shown}\n")
    code = int((table["state"] != "finished").any())
    if table["test accuracy"].notna().any():
        try:
            print(f"report: {write_report([sweep])}")
        except PylorusError as error:
            print(f"error: no report: {error}")
            code = 1
    print(f"sweep: {sweep}")
    for job in table.loc[table["state"] != "finished", "job"].unique():
        status = RunFolder(sweep / str(job)).status()
        print(f"job {job} {status['state']}: {status.get('error', 'see its run.log')}")
    return code


def objective(folder: RunFolder) -> float | None:
    """The validation accuracy of the stage that a job ships, in [0, 1]; None if it did not finish.

    A search looks at nothing else: one that saw the test images would make their figures optimistic.
    """
    if folder.status()["state"] != "finished":
        return None
    shipped = folder.shipped
    stage = list(loaded(folder.config).stages)[-1] if shipped is None else shipped.name
    return _measures(pd.read_parquet(folder.predictions(stage, "val")), "val")["val accuracy"]


def sweep_table(sweep: Path) -> pd.DataFrame:
    """A row for each stage that each job finished, and one for a job without any.

    Jobs are ordered by the validation accuracy of the stage that they ship, best first: choosing by the test set would
    make its figures optimistic. Shares are in [0, 1]; precision, sensitivity and F1 are averages over the classes,
    empty where one is undefined.
    """
    folders = [RunFolder(path.parent) for path in sorted(sweep.glob("*/status.json"))]
    rows = [row for folder in folders for row in _rows(folder)]
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    shipped = table["val accuracy"].where(table["shipped"] == SHIPPED)
    accuracy = shipped.groupby(table["job"]).transform("max").fillna(-1.0)
    number = table["job"].map(lambda job: int(job) if str(job).isdigit() else 0)
    order = pd.DataFrame({"accuracy": -accuracy, "number": number}).sort_values(["accuracy", "number"], kind="stable")
    return table.loc[order.index].reset_index(drop=True)


def as_text(table: pd.DataFrame) -> str:
    """The table in Markdown: shares in %, of the overrides only those in which jobs differ."""
    shown = table.drop(columns=["val precision", "val sensitivity", "val F1"])
    words = [set(overrides.split()) for overrides in shown["overrides"]]
    common = set.intersection(*words)
    shown["overrides"] = [
        " ".join(word for word in overrides.split() if word not in common) or "–" for overrides in shown["overrides"]
    ]
    for name in shown.columns:
        if name.startswith(("val ", "test ")):
            shown[name] = [percent(share) for share in shown[name]]
    shown["minutes"] = [f"{minutes:.1f}" for minutes in shown["minutes"]]
    header = [str(name) for name in shown.columns]
    body = [[str(cell) for cell in row] for row in shown.itertuples(index=False)]
    widths = [max(len(row[place]) for row in [header, *body]) for place in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *body]]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" if place != 1 else f"|-{line}-|" for place, line in enumerate(lines))


def _rows(folder: RunFolder) -> list[dict[str, Any]]:
    status = folder.status()
    config = OmegaConf.load(folder.config) if folder.config.is_file() else OmegaConf.create()
    job = {
        "job": folder.path.name,
        "model": OmegaConf.select(config, "model.name", default="–"),
        "stage": "–",
        "shipped": "",
        "overrides": " ".join(status.get("overrides", [])) or "–",
        "state": status["state"],
        "minutes": _minutes(status),
    }
    measured = []
    for stage in OmegaConf.select(config, "stages", default={}):
        if folder.predictions(stage, "test").is_file():
            shares: dict[str, float] = {}
            for part in ("val", "test"):
                shares |= _measures(pd.read_parquet(folder.predictions(stage, part)), part)
            measured.append({**job, "stage": stage, **shares})
    if measured:
        shipped = folder.shipped  # without a bundle that names it the last stage stands for the job
        names = [row["stage"] for row in measured]
        measured[names.index(shipped.name) if shipped is not None else -1]["shipped"] = SHIPPED
    nothing = {f"{part} {measure}": float("nan") for part in ("val", "test") for measure in MEASURES}
    return measured or [{**job, **nothing}]


def _measures(predictions: pd.DataFrame, part: str) -> dict[str, float]:
    counts = confusion_of(predictions)
    found = class_indices(counts)
    means = [found.precision.mean(), found.sensitivity.mean(), found.f1.mean()]
    shares = [float(overall_indices(counts).accuracy), *(float(mean) for mean in means)]
    return {f"{part} {measure}": share for measure, share in zip(MEASURES, shares, strict=True)}


def _minutes(status: dict[str, Any]) -> float:
    return float(status.get("seconds", float("nan"))) / 60
