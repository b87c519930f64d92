"""Read what a report needs from the folders of runs, checked for consistency but not yet evaluated.

A path names a run or a sweep. Configuration, split, stages and predictions of a run must agree with each other.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from pylorus.core.errors import PylorusError, format_name_list
from pylorus.core.io import PARQUET_OPTIONS, check_writable_folder, read_json
from pylorus.core.privacy import HIDDEN_VALUE
from pylorus.evaluation.confusion import CLASS_METRICS, select_class_metrics
from pylorus.evaluation.intervals import Estimate
from pylorus.runs.folder import (
    LAST,
    STATUS,
    RunFolder,
    ShippedStage,
    TrainingResult,
    read_shipped,
    score_stage,
    select_stage,
)
from pylorus.runs.predictions import SavedPredictions, explain_stage_problems, read_predictions

# As in pylorus.data.split, whose import would load OpenCV and take 0.2 s.
COLUMNS = ["sample_id", "path", "class", "group", "split", "sha256"]
PARTS = ("train", "val", "test")

REPLICATE_KEYS = ("seed", "data.fold", "data.split_seed", "data.split_file")
"""Configuration keys in which replicates of one configuration may differ."""

MACHINE_KEYS = (
    "report",
    "cache",
    "logger",
    "data.root",
    "data.workers",
    "trainer.accelerator",
    "trainer.channels_last",
    "trainer.compile",
    "trainer.cuda_graphs",
    "trainer.devices",
    "trainer.nodes",
    "trainer.progress",
    "trainer.strategy",
    "trainer.threads",
    "trainer.time_limit",
)
"""Keys and groups that say where and how fast a run computes; they change its result by rounding at most.

Precision and batch size are not among them: they change what the model learns. Images are identified by their content.
"""

HASH_DIGITS = 12
"""Number of digits of a hash that tables cite."""


@dataclass(frozen=True, eq=False)
class SavedSplit:
    """The split of a run.

    Attributes:
        sha256: SHA-256 of split.csv, by which tables cite the split.
        table: One row per image: sample_id, path, class (name of the folder), group, split and sha256, all as text.
    """

    sha256: str
    table: pd.DataFrame

    @property
    def short_hash(self) -> str:
        """Short hash, as cited in tables."""
        return self.sha256[:HASH_DIGITS]

    @cached_property
    def test_set_hash(self) -> str:
        """Hash of the contents of the test images: the same for every split that tests on these images."""
        return compute_image_set_hash(set(self.get_split_rows("test")["sha256"]))

    @cached_property
    def rows_by_sample(self) -> pd.DataFrame:
        """The table with the sample ids as its index."""
        return self.table.set_index("sample_id")

    def get_split_rows(self, name: str) -> pd.DataFrame:
        """Return the rows of train, val or test."""
        return self.table[self.table["split"] == name]

    def count_by_split(self, class_name: str, column: str | None = None) -> list[int]:
        """Count the images of a class, or their distinct values of a column, in train, val and test."""
        images = self.table[self.table["class"] == class_name]
        tables = [images[images["split"] == name] for name in PARTS]
        return [len(table) if column is None else int(table[column].nunique()) for table in tables]

    @cached_property
    def groups_in_several_splits(self) -> int:
        """Number of groups that occur in more than one split (train, val, test)."""
        return self._count_in_several_splits("group")

    @cached_property
    def images_in_several_splits(self) -> int:
        """Number of images, identified by their content, that occur in more than one split (train, val, test)."""
        return self._count_in_several_splits("sha256")

    def _count_in_several_splits(self, column: str) -> int:
        return int((self.table.groupby(column)["split"].nunique() > 1).sum())


def read_split(path: Path) -> SavedSplit:
    """Read split.csv.

    Raises:
        PylorusError: If the file does not have the form in which a run writes it.
    """
    content = path.read_bytes()
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise PylorusError(f"{path}: cannot be read as a split: {error}") from error
    missing = [name for name in COLUMNS if name not in table.columns]
    unknown = set() if missing else set(table["split"]) - set(PARTS)
    if missing or unknown or table.empty:
        found = f"columns {list(table.columns)}" if missing else f"splits {sorted(unknown)}" if unknown else "no rows"
        raise PylorusError(f"{path}: found {found}, expected columns {COLUMNS} and splits {list(PARTS)}.")
    return SavedSplit(hashlib.sha256(content).hexdigest(), table)


def compute_image_set_hash(contents: set[str]) -> str:
    """Hash a set of images, each given by the hash of its content; independent of their order and names."""
    return hashlib.sha256("\n".join(sorted(contents)).encode()).hexdigest()


def compute_configuration_key(config: DictConfig, split: SavedSplit) -> str:
    """Compute a key that is the same for all replicates of a configuration, on whatever machine they ran.

    Images are identified by their content; those of folds, whose runs need not hold the same images, by their root
    folder. Whether there are folds matters, the number of the fold does not.
    """
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    folds = OmegaConf.select(config, "data.fold", default=None) is not None
    root = OmegaConf.select(config, "data.root", default=None)
    images = str(root) if folds else compute_image_set_hash(set(split.table["sha256"]))
    settings = _remove_keys(plain, "", (*REPLICATE_KEYS, *MACHINE_KEYS))
    return json.dumps([settings, folds, images], sort_keys=True, default=str)


def _remove_keys(values: dict[Any, Any], prefix: str, keys: Sequence[str]) -> dict[str, Any]:
    return {
        str(name): _remove_keys(value, f"{prefix}{name}.", keys) if isinstance(value, dict) else value
        for name, value in values.items()
        if f"{prefix}{name}" not in keys
    }


def find_contradiction(split: SavedSplit, split_name: str, samples: np.ndarray, classes: list[str]) -> str | None:
    """Describe how predictions and split disagree about images or classes; return None if they agree.

    Args:
        split: Split of the run.
        split_name: train, val or test.
        samples: Sample ids of the predicted images, of shape (images,).
        classes: Folder name of the true class of each image, in the same order.
    """
    rows = split.get_split_rows(split_name).set_index("sample_id")["class"]
    unmatched = len(set(samples) ^ set(rows.index))
    if unmatched:
        verb = "image is" if unmatched == 1 else "images are"
        return (
            f"{unmatched} {verb} either in the predictions or in the {split_name} split of split.csv, but not in both"
        )
    differing = int((rows.loc[list(samples)].to_numpy() != np.array(classes)).sum())
    verb = "image has" if differing == 1 else "images have"
    return f"{differing} {verb} another class in the predictions than in split.csv" if differing else None


@dataclass(frozen=True, eq=False)
class SavedStage:
    """One stage of a run.

    Attributes:
        name: Name of the stage.
        monitor: Validation metric that selected the best epoch: loss, accuracy, or an index of a class.
        curves: Content of metrics.csv, one row per epoch, or None if it is missing.
        validation: Predictions for the images that it was validated on, or None.
        test: Predictions for the test images, or None if the stage was not tested.
        own_metrics: Values of the user's own metrics on the test images, by metric and class.
        own_intervals: Lower and upper ends of their intervals; empty in a run of an older Pylorus.
        training: Content of stage.json, or None if the stage is not trained.
    """

    name: str
    monitor: str
    curves: pd.DataFrame | None
    validation: SavedPredictions | None
    test: SavedPredictions | None
    own_metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    own_intervals: tuple[dict[str, dict[str, float | None]], ...] = ({}, {})
    training: TrainingResult | None = None

    def get_own_estimate(self, metric: str, class_name: str) -> Estimate:
        """Return one of the user's own metrics on the test images; NaN where it, or its interval, is undefined."""
        saved = (values.get(metric, {}).get(class_name) for values in (self.own_metrics, *self.own_intervals))
        value, low, high = (math.nan if number is None else number for number in saved)
        reason = "the function returned NaN" if math.isnan(value) else "the jackknife gives no interval"
        return Estimate(value, low, high, reason="" if math.isfinite(low) else reason)


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A run as read from its folder.

    Attributes:
        folder: Folder of the run.
        status: Content of status.json; `state` says how far the run got.
        config: Content of config.yaml; empty if the run failed before writing it.
        split: Content of split.csv, or None if the run failed before writing it.
        stages: Planned stages, in order.
        environment: Content of environment.json, or empty.
        bundle: Content of model/model.json, or empty.
        network: Content of network.json, the blocks of the network; None if it is missing.
        audit: Content of audit.json, the findings on the images; empty if it is missing.
        given_parts: Splits (train, val, test) to which folders or a manifest assigned images; empty if the run made the
            whole split itself, None if catalog.parquet is missing.
        label: Name in tables.
        stem: Label in a form suitable for file names.
    """

    folder: Path
    status: Mapping[str, Any]
    config: DictConfig
    split: SavedSplit | None
    stages: tuple[SavedStage, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)
    bundle: Mapping[str, Any] = field(default_factory=dict)
    network: Sequence[Mapping[str, Any]] | None = None
    audit: Mapping[str, Any] = field(default_factory=dict)
    given_parts: frozenset[str] | None = None
    label: str = ""
    stem: str = ""

    @property
    def state(self) -> str:
        """State of the run: starting, running, finished, failed, interrupted or stopped."""
        return str(self.status["state"])

    @property
    def complete_stages(self) -> tuple[SavedStage, ...]:
        """Stages with predictions for the test images."""
        return tuple(stage for stage in self.stages if stage.test is not None)

    @cached_property
    def bundle_stage(self) -> ShippedStage | None:
        """Shipped stage of the run, whose network is in the bundle and which represents the run.

        For a run without a bundle, the rule chooses among the stages tested so far; for a bundle that does not name its
        stage, as written by versions without the rule, it is the last stage. None if no stage has test predictions.
        """
        if not self.complete_stages:
            return None
        if self.bundle:
            return read_shipped(self.bundle) or ShippedStage(self.complete_stages[-1].name, LAST, {})
        scores = {
            stage.name: score_stage(stage.validation.logits, stage.validation.predictions.true)
            for stage in self.complete_stages
            if stage.validation is not None
        }
        if not scores:
            return ShippedStage(self.complete_stages[-1].name, LAST, {})
        return select_stage(scores, asked=self.get_setting("deploy.stage"))

    @property
    def minutes(self) -> float:
        """Run time in minutes, without interruptions; NaN if unknown."""
        return RunFolder(self.folder).read_seconds(self.status) / 60

    @property
    def model(self) -> str:
        """Name of the model in timm, with its tag if known."""
        return str(self.bundle.get("architecture") or self.get_setting("model.name", "unknown model"))

    @property
    def initial_weights(self) -> str:
        """Source of the initial weights: hub, none (random weights) or the name of a file."""
        return str(self.bundle.get("weights", {}).get("from") or self.get_setting("model.weights", "–"))

    @property
    def short_names(self) -> list[str]:
        """Short names of the classes, in the order of the run."""
        return get_class_order(self.config)

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders, in the order of the run."""
        return [str(name) for name in self.get_setting("data.classes") or []]

    @property
    def has_groups(self) -> bool:
        """Whether groups (patients) are known from data.group or a manifest; otherwise each image is its own group."""
        if self.get_setting("data.group") is not None:
            return True
        return self.split is not None and bool((self.split.table["group"] != self.split.table["path"]).any())

    @property
    def fold(self) -> str | None:
        """Name of the fold in tables: its number, or its value of data.fold_column; None if the run is not a fold.

        A value that belongs to a single patient may be a name and is hidden, as in subgroup tables.
        """
        fold = self.get_setting("data.fold")
        if fold is None or self.get_setting("data.fold_column") is None:
            return None if fold is None else str(fold)
        patients = 0 if self.split is None else self.split.get_split_rows("test")["group"].nunique()
        return str(fold) if patients > 1 else HIDDEN_VALUE

    def explain_problems(self, stage: SavedStage) -> tuple[str, ...]:
        """Say what makes the results of a stage degenerate; see `explain_stage_problems`."""
        parts = {"test": stage.test, "val": stage.validation}
        return explain_stage_problems(
            stage.name,
            monitor=stage.monitor,
            curves=stage.curves,
            predictions={split: saved for split, saved in parts.items() if saved is not None},
            is_cross_entropy=self.get_setting("loss.name") == "cross_entropy",
            weights=self.initial_weights,
        )

    def get_setting(self, key: str, default: Any = None) -> Any:
        """Return the value of a configuration key, or the default if it is missing or null."""
        value = OmegaConf.select(self.config, key, default=default)
        return default if value is None else value


def get_metric_labels(run: SavedRun) -> dict[str, str]:
    """Return the indices of a class that a run's tables and curves show: their names, with their labels.

    Nothing is imported or computed for the user's own metrics: the run saved their values.
    """
    configured = run.get_setting("metrics", {})
    labels = {metric.name: metric.label for metric in select_class_metrics(map(str, configured))}
    return labels | {str(name): str(name) for name in configured if name not in CLASS_METRICS}


def read_config(folder: Path) -> DictConfig:
    """Read the configuration of a run; empty if the run failed before writing it.

    Raises:
        PylorusError: If config.yaml is damaged, or lost by a run that has trained.
    """
    path = RunFolder(folder).config
    if not path.is_file():
        if RunFolder(folder).has_trained:
            raise PylorusError(f"{path}: found no such file, so what the run did is unknown. Restore it from a backup.")
        return OmegaConf.create()
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # PyYAML's and OmegaConf's errors have no common base
        raise PylorusError(f"{path}: not a valid YAML file: {error}") from error
    if not isinstance(config, DictConfig):
        raise PylorusError(f"{path}: found a list, expected the configuration of a run (keys and values).")
    return config


def get_class_order(config: DictConfig) -> list[str]:
    """Return the short names of the classes in the order of the run; empty if they were not known yet."""
    names = OmegaConf.select(config, "data.short_names") or OmegaConf.select(config, "data.classes")
    return [str(name) for name in names or []]


def read_run(folder: Path, config: DictConfig | None = None, *, order: Sequence[str] = ()) -> SavedRun:
    """Read a run from its folder.

    Args:
        folder: Folder that contains status.json.
        config: Configuration from `read_config`, if already read.
        order: Short class names in the requested order; ignored if the run has other classes.

    Raises:
        PylorusError: If a file is damaged, or predictions and split contradict each other; the message names the file
            and the problem.
    """
    run_folder = RunFolder(folder)
    config = read_config(folder) if config is None else config
    try:
        status = run_folder.read_status()
    except (ValueError, KeyError) as error:
        raise PylorusError(f"{folder / STATUS}: not a valid status file: {error}") from error
    split = read_split(folder / "split.csv") if (folder / "split.csv").is_file() else None
    planned = OmegaConf.select(config, "stages", default=None) or {}
    stages = tuple(
        SavedStage(
            name=str(name),
            monitor=str(OmegaConf.select(config, f"stages.{name}.monitor", default="loss")),
            curves=read_curves(run_folder.get_stage(str(name)).path / "metrics.csv"),
            validation=_read_optional_predictions(run_folder.get_predictions_path(str(name), "val"), order),
            test=_read_optional_predictions(run_folder.get_predictions_path(str(name), "test"), order),
            own_metrics=run_folder.get_stage(str(name)).read_own_metrics().get("test", {}),
            own_intervals=tuple(
                run_folder.get_stage(str(name)).read_own_metrics().get(f"test/{end}", {}) for end in ("low", "high")
            ),
            training=run_folder.get_stage(str(name)).training_result,
        )
        for name in planned
    )
    run = SavedRun(
        folder=folder,
        status=status,
        config=config,
        split=split,
        stages=stages,
        environment=read_json(folder / "environment.json") or {},
        bundle=read_json(folder / "model" / "model.json") or {},
        network=read_json(folder / "network.json"),
        audit=read_json(folder / "audit.json") or {},
        given_parts=_read_given_splits(folder / "catalog.parquet"),
    )
    _check_predictions(run)
    return run


def _check_predictions(run: SavedRun) -> None:
    """Raise an error if those of the shipped stage are lost, or disagree with the split about images or classes."""
    shipped = read_shipped(run.bundle) if run.state == "finished" else None
    for stage in run.stages:
        if shipped is not None and stage.name == shipped.name and stage.test is None:
            file = RunFolder(run.folder).get_predictions_path(stage.name, "test")
            raise PylorusError(f"{file}: found no such file, so the run has no results. Restore it from a backup.")
    full = dict(zip(run.short_names, run.class_names, strict=True))
    validated_on = "test" if run.get_setting("data.validation") == "test" else "val"
    for stage in run.stages:
        for kind, split, saved in (("val", validated_on, stage.validation), ("test", "test", stage.test)):
            if saved is None:
                continue
            file = RunFolder(run.folder).get_predictions_path(stage.name, kind)
            if run.split is None:
                raise PylorusError(
                    f"{file}: split.csv is missing in the run's folder, so these predictions cannot be checked or "
                    "cited."
                )
            table = saved.predictions
            unknown = set(table.class_names) - set(full)
            if unknown:
                raise PylorusError(
                    f"{file}: found classes {sorted(unknown)}, expected those of config.yaml: {list(full)}."
                )
            classes = [full[table.class_names[label]] for label in table.true]
            problem = find_contradiction(run.split, split, np.asarray(table.sample), classes)
            if problem:
                raise PylorusError(
                    f"{file}: {problem}. The two files are not from the same run: restore the run's own files."
                )


def _read_given_splits(path: Path) -> frozenset[str] | None:
    """Read which splits came with the images; None if there is no catalog.

    Raises:
        PylorusError: If catalog.parquet is damaged.
    """
    if not path.is_file():
        return None
    try:
        splits = pd.read_parquet(path, columns=["split"], **PARQUET_OPTIONS)["split"]
    except (ValueError, OSError, KeyError) as error:  # pyarrow's errors derive from these
        raise PylorusError(f"{path}: cannot be read as a table with a column `split`: {error}") from error
    return frozenset(str(split) for split in splits.unique()) - {""}


def read_curves(path: Path) -> pd.DataFrame | None:
    """Read a stage's metrics.csv, one row per epoch in order; None if it is missing or empty."""
    if not path.is_file():
        return None
    try:
        table = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return None  # the stage failed in its first epoch
    except (ValueError, pd.errors.ParserError) as error:
        raise PylorusError(f"{path}: cannot be read as a CSV table: {error}") from error
    try:
        return table.astype({"step": int}).sort_values("step", ignore_index=True)
    except (ValueError, KeyError) as error:
        raise PylorusError(
            f"{path}: found columns {list(table.columns)}, expected a column `step` with whole epoch numbers."
        ) from error


def _read_optional_predictions(path: Path, order: Sequence[str]) -> SavedPredictions | None:
    return read_predictions(path, order=order) if path.is_file() else None


@dataclass(frozen=True)
class Scope:
    """The runs of a report and its output folder.

    Attributes:
        kind: "run", "sweep" or "runs".
        folders: Folders of the runs, each once; jobs of a sweep are in the order of their numbers.
        output: Output folder of the report.
    """

    kind: str
    folders: tuple[Path, ...]
    output: Path


def resolve_scope(paths: Sequence[Path], output: Path | None = None) -> Scope:
    """Find the runs in the given paths.

    Args:
        paths: Folders of runs or of sweeps (whose subfolders are runs).
        output: Output folder; None: `report` inside a single run or sweep, or in the current folder for several paths.

    Raises:
        PylorusError: If no path is given, or a path is neither a run nor a sweep.
    """
    if not paths:
        raise PylorusError("no path given; expected the folder of a run or of a sweep, as in: pylorus report FOLDER")
    if output is not None:
        check_writable_folder(output)
    folders = tuple({folder.resolve(): folder for path in paths for folder in _find_runs(path)}.values())
    if len(paths) > 1:
        return Scope("runs" if len(folders) > 1 else "run", folders, output or Path("report"))
    is_run = (paths[0] / STATUS).is_file()
    return Scope("run" if is_run else "sweep", folders, output or paths[0] / "report")


def _find_runs(path: Path) -> list[Path]:
    """Return the path itself if it is a run, or the runs directly inside it."""
    if not path.is_dir():
        raise PylorusError(f"{path}: no such folder; expected the folder of a run or of a sweep.")
    if (path / STATUS).is_file():
        return [path]
    jobs = [file.parent for file in path.glob(f"*/{STATUS}")]
    if jobs:
        return sorted(jobs, key=_get_job_order)
    deeper = sorted({file.parent for pattern in (f"*/*/{STATUS}", f"*/*/*/{STATUS}") for file in path.glob(pattern)})
    hint = f" There are runs deeper inside it:\n{format_name_list(deeper, most=4)}" if deeper else ""
    raise PylorusError(
        f"{path}: neither a run (it contains no {STATUS}) nor a sweep (none of its folders contains one).{hint}"
    )


def _get_job_order(folder: Path) -> tuple[int, str]:
    """Return a sort key that puts jobs 0, 1, …, 10 in numerical order before folders with other names."""
    return (int(folder.name), "") if folder.name.isdigit() else (1 << 31, folder.name)
