"""The table of a finished sweep: one row a job and stage, means over replicates, and what a search maximises."""

import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from pylorus.config.checks import load_config
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import (
    DASH,
    defuse_formulas,
    format_duration,
    format_percent,
    format_percent_with_unit,
    join_names,
)
from pylorus.core.io import write_atomically, write_text
from pylorus.evaluation.confusion import compute_class_metric, overall_indices, select_class_metrics
from pylorus.evaluation.replicates import summarize_replicates
from pylorus.report.page import write_report
from pylorus.runs.console import format_job_ends, print_next_commands
from pylorus.runs.folder import DAMAGED, RunFolder
from pylorus.runs.predictions import read_predictions
from pylorus.runs.reading import HASH_DIGITS, compute_configuration_key, read_config, read_run, read_split

SHIPPED = "yes"
"""Value in the column `shipped` of the stage that represents its job."""
ACCURACY = "accuracy"


def write_sweep_table(sweep: Path) -> int:
    """Print and write the table of all jobs of a sweep, and write its report.

    Returns:
        The exit code: 0, or 1 if a job did not finish or the report could not be written.
    """
    table = build_sweep_table(sweep)
    if table.empty:
        return 0
    with write_atomically(sweep / "sweep.csv") as temporary:
        defuse_formulas(table).to_csv(temporary, index=False)
    text, problems = format_sweep_table(table), collect_problems(sweep, table)
    write_text(sweep / "sweep.md", "\n\n".join([text, *problems]) + "\n")
    width = max(len(line) for line in text.splitlines() if line.startswith("|"))
    if sys.stdout.isatty() and width > shutil.get_terminal_size().columns:
        text = f"{format_sweep_table(table, is_short=True)}\n\nAll columns: {sweep / 'sweep.md'}"
    print("\n" + "\n\n".join([text, *problems]) + "\n")
    code = int((table["state"] != "finished").any())
    if table["test accuracy"].notna().any():
        try:
            print(f"report: {write_report([sweep], parallel=True)}")
        except PylorusError as error:
            print(f"error: the report was not written: {error}")
            code = 1
    print(f"sweep: {sweep}")
    _print_best_job(sweep, table)
    unfinished = table.loc[table["state"] != "finished", "job"].unique()
    for line in format_job_ends({str(job): _find_status(RunFolder(sweep / str(job))) for job in unfinished}):
        print(line)
    return code


def _print_best_job(sweep: Path, table: pd.DataFrame) -> None:
    """Print which job has the highest validation accuracy, and the commands that use its model.

    Nothing is printed if jobs are replicates of each other, or were tested on different images.
    """
    shipped = table[(table["shipped"] == SHIPPED) & (table["state"] == "finished")]
    if len(shipped) < 2 or shipped["test set"].nunique() > 1 or shipped["configuration"].duplicated().any():
        return
    best = shipped.iloc[0]  # the table is in this order
    accuracy = best[f"val {ACCURACY}"]
    ties = [str(job) for job in shipped.loc[shipped[f"val {ACCURACY}"] == accuracy, "job"] if job != best["job"]]
    same = (
        f"; job{'s' * (len(ties) > 1)} {join_names(ties)} {'have' if len(ties) > 1 else 'has'} the same" if ties else ""
    )
    print(
        f"best: job {best['job']}, stage {best['stage']} (highest validation accuracy, "
        f"{format_percent_with_unit(accuracy)}{same})"
    )
    print_next_commands(sweep / str(best["job"]) / "model")


def _find_status(folder: RunFolder) -> dict[str, Any]:
    """Return the status of a job; if any file that the table needs is damaged, that and the reason."""
    try:
        _read_job_rows(folder)
    except PylorusError as error:
        return {"state": DAMAGED, "error": str(error)}
    return folder.read_status()


def get_objective(folder: RunFolder) -> float | None:
    """Return the validation accuracy of a job's shipped stage, in [0, 1]; None if the job did not finish.

    A search optimizes nothing else: if it used the test images, their results would be optimistic.
    """
    if folder.read_status()["state"] != "finished":
        return None
    shipped = folder.shipped
    stage = list(load_config(folder.config).stages)[-1] if shipped is None else shipped.name
    return _compute_measures(folder, stage, "val", [])[f"val {ACCURACY}"]


def build_sweep_table(sweep: Path) -> pd.DataFrame:
    """Build a table with a row for each finished stage of each job, and one row for a job without any.

    Jobs with the same configuration (replicates with other seeds, folds or splits) have the same number in the column
    `configuration`. Configurations that were tested on the same images are listed together (column `test set`), ordered
    by the mean validation accuracy of each job's shipped stage, best first: ordering by the test set would make its
    results optimistic. Jobs without test predictions come last. Proportions are in [0, 1]; precision, sensitivity and
    F1 are averages over the classes, empty if one of them is undefined.
    """
    folders = [RunFolder(path.parent) for path in sorted(sweep.glob("*/status.json"))]
    rows = [row for folder in folders for row in _build_job_rows(folder)]
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    table["number"] = table["job"].map(lambda job: int(job) if str(job).isdigit() else 0)
    table = table.sort_values("number", kind="stable", ignore_index=True)
    tested = table["shipped"] == SHIPPED
    finished = tested & (table["state"] == "finished")
    done = finished.groupby(table["key"]).transform("any")
    tested &= finished | ~done
    is_counted = table.index.isin(table[tested].drop_duplicates(["key", "seed", "split"]).index)
    accuracy = table["val accuracy"].where(is_counted).groupby(table["key"]).transform("mean").fillna(-1.0).round(12)
    tests = table[tested].groupby("key")["tested on"].agg(lambda names: " ".join(sorted(set(names))))
    sets = table["key"].map(tests).fillna("")
    names = [name for name in dict.fromkeys(sets) if name]
    table["test set"] = [names.index(name) + 1 if name else 0 for name in sets]
    order = pd.DataFrame(
        {"untested": table["test set"] == 0, "set": table["test set"], "accuracy": -accuracy, "key": table["key"]}
    )
    order["first"] = table.groupby("key")["number"].transform("min")
    columns = ["untested", "set", "accuracy", "first"]
    table = table.loc[order.sort_values(columns, kind="stable").index].reset_index(drop=True)
    keys = list(dict.fromkeys(table["key"]))
    table["configuration"] = [keys.index(key) + 1 for key in table["key"]]
    front = ["configuration", "test set"]
    return table[[*front, *(name for name in table.columns if name not in (*front, "key", "number"))]]


def summarize_configurations(table: pd.DataFrame) -> pd.DataFrame:
    """Summarize each tested configuration in a row: the number of runs, and the accuracies of the finished ones.

    Runs with the same seed and split count once.

    Args:
        table: From `build_sweep_table`.

    Returns:
        `mean`, `SD`, `lowest` and `highest` of the shipped stages' accuracies on validation and test images, in
        [0, 1], in the order of the table.
    """
    rows = []
    shipped = table[table["shipped"] == SHIPPED]
    for number, replicates in shipped.groupby("configuration", sort=True):
        finished = replicates[replicates["state"] == "finished"]
        runs = (finished if len(finished) else replicates).drop_duplicates(["seed", "split"])
        row: dict[str, Any] = {
            "configuration": number,
            "test set": runs["test set"].iloc[0],
            "model": runs["model"].iloc[0],
            "stage": " or ".join(dict.fromkeys(runs["stage"])),
            "overrides": " ".join(_find_common_overrides(runs["overrides"])),
            "runs": len(runs),
            "jobs": ", ".join(map(str, runs["job"])),
        }
        for part in ("val", "test"):
            summary = summarize_replicates(runs[f"{part} accuracy"].to_numpy(dtype=float))
            row |= {
                f"{part} mean": summary.mean,
                f"{part} SD": summary.deviation,
                f"{part} lowest": summary.lowest,
                f"{part} highest": summary.highest,
            }
        rows.append(row)
    return pd.DataFrame(rows)


def format_sweep_table(table: pd.DataFrame, *, is_short: bool = False) -> str:
    """Format the table in Markdown: proportions in %, and only those overrides in which the jobs differ.

    If configurations have several runs, each is summarized in a row before the jobs; configurations with different test
    images are under separate headings.

    Args:
        table: From `build_sweep_table`.
        is_short: Whether to leave out what a terminal has no room for: all indices but accuracy, the duration, and what
            the overrides say or all jobs have in common.
    """
    configurations = summarize_configurations(table)
    several = bool(len(configurations)) and int(configurations["runs"].max()) > 1
    sets = sorted(set(table["test set"]) - {0})
    parts = []
    for number in sets:
        of_set = configurations[configurations["test set"] == number]
        parts.append(_format_heading(table[table["test set"] == number], number, len(sets), several=several))
        if several:
            parts += [_format_configurations(of_set, table), "Jobs:"]
        parts.append(_format_jobs(table[table["test set"] == number], table, numbered=several, is_short=is_short))
    untested = table[table["test set"] == 0]
    if len(untested):
        parts += ["Jobs without test predictions:"] * bool(sets)
        parts.append(_format_jobs(untested, table, numbered=False, is_short=is_short))
    return "\n\n".join(parts)


def collect_problems(sweep: Path, table: pd.DataFrame) -> list[str]:
    """Say which shipped stages of a sweep are degenerate: one predicted class, chance, an exploded loss.

    Args:
        sweep: Folder of the sweep.
        table: From `build_sweep_table`.
    """
    jobs: dict[str, list[str]] = {}
    for row in table[table["shipped"] == SHIPPED].to_dict("records"):
        run = read_run(sweep / str(row["job"]))
        (stage,) = (each for each in run.stages if each.name == row["stage"])
        for sentence in run.explain_problems(stage):
            jobs.setdefault(sentence, []).append(str(row["job"]))
    return [
        f"{'Job' if len(names) == 1 else 'Each of jobs'} {join_names(names)}: {sentence}"
        for sentence, names in jobs.items()
    ]


def _format_heading(rows: pd.DataFrame, number: int, sets: int, *, several: bool) -> str:
    """Return a heading that states what the rows below were tested on and how they are ordered."""
    name = "The same test images" if sets == 1 else f"Test set {number} of {sets}"
    subsets = rows.loc[rows["shipped"] == SHIPPED, "tested on"].nunique()
    images = f"{name}, in {subsets} subsets (folds or splits)" if subsets > 1 else name
    mean = ", averaged over a configuration's runs" if several else ""
    caveat = "; not to be ranked against the other test sets" if sets > 1 else ""
    return f"{images}{caveat}. Ordered by the validation accuracy of the shipped stage{mean}, best first."


def _format_configurations(configurations: pd.DataFrame, table: pd.DataFrame) -> str:
    common = _find_common_overrides(table.loc[table["state"] != DAMAGED, "overrides"])
    rows = []
    for row in configurations.to_dict("records"):
        differing = [override for override in _split_words(row["overrides"]) if override not in common]
        cells = [str(row[name]) for name in ("configuration", "model", "stage")]
        cells += [" ".join(differing) or "–", str(row["runs"]), row["jobs"]]
        rows.append([*cells, *(_format_spread(row, part) for part in ("val", "test"))])
    columns = ["configuration", "model", "stage", "overrides", "runs", "jobs"]
    return _render_markdown_table(
        [*columns, "val accuracy: mean ± SD (range)", "test accuracy: mean ± SD (range)"], rows
    )


def _format_spread(row: dict[Any, Any], part: str) -> str:
    if row["runs"] == 1:
        return format_percent(row[f"{part} mean"])
    ends = f"{format_percent(row[f'{part} lowest'])} to {format_percent(row[f'{part} highest'])}"
    return f"{format_percent(row[f'{part} mean'])} ± {format_percent(row[f'{part} SD'])} ({ends})"


def _format_jobs(rows: pd.DataFrame, table: pd.DataFrame, *, numbered: bool, is_short: bool) -> str:
    hidden = [
        *(name for name in rows.columns if name.startswith("val ") and name != f"val {ACCURACY}"),
        "test set",
        "tested on",
        "split",
        "seed",
        *([] if numbered else ["configuration"]),
    ]
    if is_short:
        hidden += [
            "minutes",
            *(name for name in rows.columns if name.startswith("test ") and name != f"test {ACCURACY}"),
        ]
        hidden += ["state"] * bool((table["state"] == "finished").all())
        hidden += ["model"] * bool(table["overrides"].str.contains(r"(?:^|\s)model=").all())
    rows = rows.drop(columns=list(dict.fromkeys(hidden)))
    common = _find_common_overrides(table.loc[table["state"] != DAMAGED, "overrides"])
    rows["overrides"] = [
        " ".join(word for word in _split_words(overrides) if word not in common) or "–"
        for overrides in rows["overrides"]
    ]
    for name in rows.columns:
        if name.startswith(("val ", "test ")):
            rows[name] = [format_percent(proportion) for proportion in rows[name]]
    if "minutes" in rows:
        rows["minutes"] = [DASH if math.isnan(value) else format_duration(60 * value) for value in rows["minutes"]]
        rows = rows.rename(columns={"minutes": "duration"})
    return _render_markdown_table(
        [str(name) for name in rows.columns], [[str(cell) for cell in row] for row in rows.itertuples(index=False)]
    )


def _render_markdown_table(header: list[str], body: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *body]) for column in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *body]]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" if index != 1 else f"|-{line}-|" for index, line in enumerate(lines))


def _split_words(overrides: str) -> list[str]:
    """Split overrides at the spaces between them, not at those in quotes."""
    return re.findall(r"""(?:'[^']*'|"[^"]*"|\S)+""", overrides)


def _find_common_overrides(overrides: pd.Series) -> list[str]:
    """Return the overrides that all command lines have in common, in the order of the first."""
    words = [_split_words(text) for text in overrides]
    return [word for word in words[0] if all(word in others for others in words)] if words else []


def _build_job_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the rows of a job, or a single one that says that it is damaged: the others can be reported."""
    try:
        return _read_job_rows(folder)
    except PylorusError:
        return [_describe_job(folder, OmegaConf.create(), {"state": DAMAGED}) | _list_missing_measures([])]


def _describe_job(folder: RunFolder, config: DictConfig, status: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": folder.path.name,
        "tested on": "",
        "split": "",
        "seed": OmegaConf.select(config, "seed", default=""),
        "job": folder.path.name,
        "model": OmegaConf.select(config, "model.name", default="–"),
        "stage": "–",
        "shipped": "",
        "overrides": " ".join(status.get("overrides", [])) or "–",
        "state": status["state"],
        "minutes": folder.read_seconds(status) / 60,
    }


def _list_missing_measures(metrics: Sequence[str]) -> dict[str, float]:
    measures = [ACCURACY, *(metric.label for metric in select_class_metrics(metrics))]
    return {f"{part} {measure}": float("nan") for part in ("val", "test") for measure in measures}


def _read_job_rows(folder: RunFolder) -> list[dict[str, Any]]:
    status = folder.read_status()
    config = read_config(folder.path)
    job = _describe_job(folder, config, status)
    stage_rows = []
    metrics = [str(name) for name in OmegaConf.select(config, "metrics", default=None) or {}]
    for stage in OmegaConf.select(config, "stages", default={}):
        if folder.get_predictions_path(stage, "test").is_file():
            measures: dict[str, float] = {}
            for part in ("val", "test"):
                measures |= _compute_measures(folder, stage, part, metrics)
            stage_rows.append({**job, "stage": stage, **measures})
    if stage_rows:
        split = read_split(folder.path / "split.csv")
        shipped = folder.shipped  # without a bundle that names it, the last stage represents the job
        names = [row["stage"] for row in stage_rows]
        stage_rows[names.index(shipped.name) if shipped is not None else -1]["shipped"] = SHIPPED
        for row in stage_rows:
            row |= {"key": compute_configuration_key(config, split), "split": split.short_hash}
            row["tested on"] = split.test_set_hash[:HASH_DIGITS]
    return stage_rows or [{**job, **_list_missing_measures(metrics)}]


def _compute_measures(folder: RunFolder, stage: str, part: str, metrics: Sequence[str]) -> dict[str, float]:
    """Compute accuracy and the average of each index that a run shows; the user's own indices were saved by the run."""
    counts = read_predictions(folder.get_predictions_path(stage, part)).confusion
    measures = {ACCURACY: float(overall_indices(counts).accuracy)}
    for metric in select_class_metrics(metrics):
        measures[metric.label] = float(compute_class_metric(metric, counts).mean())
    for name, by_class in folder.get_stage(stage).read_own_metrics().get(part, {}).items():
        measures[name] = float(np.mean(np.array(list(by_class.values()), dtype=float)))
    return {f"{part} {measure}": value for measure, value in measures.items()}
