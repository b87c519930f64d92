"""Tables of runs and their splits, what is known about leakage between the splits, and the runs' command lines."""

from collections.abc import Sequence

from pylorus.core.errors import TRAIN_COMMAND
from pylorus.core.formatting import format_command
from pylorus.core.privacy import redact_overrides
from pylorus.data.stratification import explain_split, get_requested_fractions
from pylorus.report.captions import (
    count_epochs_run,
    format_averaging,
    format_caveats,
    format_depth,
    format_training_basis,
    get_augmentation_name,
    get_peak_learning_rate,
)
from pylorus.report.table import Cell, Column, Number, Row, Table, create_text_columns
from pylorus.runs.reading import PARTS, SavedRun, SavedStage

NO_PATIENTS = "neither data.group, nor a manifest column `group`, nor data.patients=dicom identifies patients"


def build_run_table(runs: Sequence[SavedRun]) -> Table:
    """Build the table of all runs, including those without results."""
    return Table(
        key="runs",
        title="Runs",
        basis=format_caveats(runs),
        columns=(
            *create_text_columns("run", "model", "weights", "state", "finished stages", "shipped stage", "split"),
            Column("minutes"),
        ),
        rows=tuple(_build_run_row(run) for run in runs),
    )


def build_setting_table(runs: Sequence[SavedRun]) -> Table | None:
    """Build the table of how each stage was trained, one row per run and stage; None if no stage is known."""
    has_averages = any(format_averaging(run, stage) for run in runs for stage in run.stages)
    rows = [_build_setting_row(run, stage, averaging=has_averages) for run in runs for stage in run.stages]
    if not rows:
        return None
    return Table(
        key="training-settings",
        title="How each stage was trained",
        basis=format_training_basis(runs),
        columns=(
            *create_text_columns("run", "stage", "trained layers"),
            Column("run", heading="epochs"),
            Column("planned", heading="epochs"),
            Column("peak learning rate"),
            *create_text_columns("schedule", "augmentation", "optimizer"),
            Column("weight decay"),
            Column("batch size"),
            *create_text_columns(*(["weights used"] if has_averages else [])),
            Column("seed"),
        ),
        rows=tuple(rows),
    )


def _build_setting_row(run: SavedRun, stage: SavedStage, *, averaging: bool) -> Row:
    """Build the row of a stage, with a cell for the average of its weights if some stage has one."""

    def get_setting(key: str, default: object = "–") -> str:
        return str(run.get_setting(f"stages.{stage.name}.{key}", default))

    rate = get_peak_learning_rate(run, stage)
    decay = run.get_setting("optimizer.weight_decay")
    size = run.environment.get("batch_size", run.get_setting("trainer.batch_size"))
    batch = int(size) * int(run.get_setting("trainer.accumulate", 1)) if str(size).isdigit() else str(size)
    return Row(
        (
            run.label,
            stage.name,
            format_depth(run, stage),
            count_epochs_run(stage),
            int(run.get_setting(f"stages.{stage.name}.epochs", 0)),
            "–" if rate is None else Number(rate, words=f"{rate:g}"),
            get_setting("schedule"),
            get_augmentation_name(run, stage),
            str(run.get_setting("optimizer.name", "–")),
            "–" if decay is None else Number(float(decay), words=f"{float(decay):g}"),
            batch,
            *([format_averaging(run, stage) or "those of the epoch's last step"] if averaging else []),
            str(run.get_setting("seed", "–")),
        )
    )


def format_command_lines(runs: Sequence[SavedRun], *, names: bool) -> str:
    """Return the command line of each run below a comment that names the run, so that all can be pasted into a shell.

    Folder names are redacted unless `names` is True.
    """
    lines = []
    for run in runs:
        words = [str(word) for word in run.status.get("overrides", [])]
        lines.append(f"# {run.label}")
        lines.append(f"{TRAIN_COMMAND} {format_command(words if names else redact_overrides(words))}".rstrip())
    return "\n".join(lines)


def build_split_table(run: SavedRun) -> Table:
    """Build the table of images and groups per class in the training, validation and test split of a run."""
    assert run.split is not None
    short_names = dict(zip(run.class_names, run.short_names, strict=True))
    grouped = run.has_groups

    def build_row(name: str, counts: Sequence[Cell], patients: Sequence[Cell], *, strong: bool = False) -> Row:
        return Row((name, *counts, *(patients if grouped else ())), strong=strong)

    rows = [
        build_row(
            f"{short_names[name]} ({name})" if short_names[name] != name else name,
            run.split.count_by_split(name),
            run.split.count_by_split(name, "group"),
        )
        for name in run.class_names
    ]
    tables = [run.split.get_split_rows(part) for part in PARTS]
    rows.append(
        build_row("all", [len(part) for part in tables], [int(part["group"].nunique()) for part in tables], strong=True)
    )
    return Table(
        key=f"split-{run.stem}",
        title="Images by class and split (training, validation, test)" + (", with their groups" if grouped else ""),
        basis=format_training_basis([run]),
        columns=(
            *create_text_columns("class"),
            *(Column(part, heading="images") for part in PARTS),
            *(Column(part, heading="groups") for part in PARTS if grouped),
        ),
        rows=tuple(rows),
        notes=_format_split_notes(run),
    )


def format_split_sentences(run: SavedRun) -> tuple[str, ...]:
    """Say what is known about leakage between the splits of a run."""
    assert run.split is not None
    identical, groups = run.split.images_in_several_splits, run.split.groups_in_several_splits
    sentences = [f"Identical images in more than one split (train, val, test): {identical}."]
    if run.has_groups:
        sentences.append(f"Groups (patients) in more than one split: {groups}.")
    else:
        sentences.append(f"Whether a patient occurs in more than one split is unknown: {NO_PATIENTS}.")
    return (*sentences, *format_split_warnings(run))


def format_split_warnings(run: SavedRun) -> tuple[str, ...]:
    """Warn of split sizes that differ from those requested, and of splits with few groups of a class."""
    if run.split is None:
        return ()
    requested: dict[str, float] = {}
    if run.given_parts is not None:
        requested = get_requested_fractions(
            given=run.given_parts,
            chosen=run.get_setting("data.fold") is not None or run.get_setting("data.test_column") is not None,
            fixed=run.get_setting("data.split_file") is not None,
            validation=str(run.get_setting("data.validation")),
            test_fraction=float(run.get_setting("data.test_fraction")),
            val_fraction=float(run.get_setting("data.val_fraction")),
        )
    merged_groups = int(run.audit.get("joined_groups", 0))
    return explain_split(run.split.table, requested, grouped=run.has_groups, joined=merged_groups)


def _format_split_notes(run: SavedRun) -> tuple[str, ...]:
    assert run.split is not None
    if not run.has_groups:
        return (f"Each image is its own group: {NO_PATIENTS}.",)
    several = int((run.split.table.groupby("group")["class"].nunique() > 1).sum())
    if not several:
        return ()
    if several == 1:
        return ("1 group has images with different labels (classes), and is counted in each of these classes.",)
    return (f"{several:,} groups have images with different labels (classes), and are counted in each of these.",)


def _build_run_row(run: SavedRun) -> Row:
    return Row(
        (
            run.label,
            run.model,
            run.initial_weights.replace("\\", "/").rpartition("/")[2],
            run.state,
            ", ".join(stage.name for stage in run.complete_stages) or "none",
            run.bundle_stage.name if run.bundle and run.bundle_stage else "–",
            run.split.short_hash if run.split else "–",
            Number(run.minutes, digits=1 if run.minutes >= 10 else 2),
        )
    )
