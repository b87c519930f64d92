"""A run as it lies in its folder: all that a report reads, checked, and nothing computed yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from pylorus.errors import PylorusError
from pylorus.report.redaction import HIDDEN
from pylorus.report.saved_json import read_json
from pylorus.report.saved_predictions import SavedPredictions, read_predictions
from pylorus.report.saved_split import SavedSplit, contradiction, read_split
from pylorus.runs.folder import RunFolder
from pylorus.runs.shipped import LAST, ShippedStage, choose_stage, read_shipped, score_stage


@dataclass(frozen=True, eq=False)
class SavedStage:
    """One stage of a run.

    Attributes:
        name: Of the stage.
        monitor: What named its best epoch: loss, accuracy, precision, sensitivity or f1.
        curves: metrics.csv, a row an epoch, or None where there is none.
        validation: What it said of the images validated on, or None.
        test: What it said of the test images, or None where it did not come so far.
    """

    name: str
    monitor: str
    curves: pd.DataFrame | None
    validation: SavedPredictions | None
    test: SavedPredictions | None


@dataclass(frozen=True, eq=False)
class SavedRun:
    """One run.

    Attributes:
        folder: Where it lies.
        status: status.json; `state` says how far it came.
        config: config.yaml; empty where it failed before.
        split: split.csv, or None where it did not come so far.
        stages: Those that it planned, in their order.
        environment: environment.json, or empty.
        bundle: model/model.json, or empty.
        network: network.json, the blocks of its network; None where there is none.
        audit: audit.json, what was found of its images; empty where there is none.
        given_parts: Parts of the split in which folders or a manifest put images; empty where the whole split is the
            run's own, None where its catalog is gone.
        label: What tables call it.
        stem: The same for the names of files.
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
        """Starting, running, finished, failed, interrupted or stopped."""
        return str(self.status["state"])

    @property
    def finished_stages(self) -> tuple[SavedStage, ...]:
        """The stages that predicted the test images."""
        return tuple(stage for stage in self.stages if stage.test is not None)

    @cached_property
    def shipped(self) -> ShippedStage | None:
        """The stage that stands for the run: the one whose network its bundle holds.

        Of a run without a bundle it is the one that the rule chooses among the stages that predicted up to now; of a
        bundle that does not name it, as versions without the rule wrote it, the last stage. None before any stage
        predicted the test images.
        """
        if not self.finished_stages:
            return None
        if self.bundle:
            return read_shipped(self.bundle) or ShippedStage(self.finished_stages[-1].name, LAST, {})
        scores = {
            stage.name: score_stage(stage.validation.logits, stage.validation.predictions.true)
            for stage in self.finished_stages
            if stage.validation is not None
        }
        if not scores:
            return ShippedStage(self.finished_stages[-1].name, LAST, {})
        return choose_stage(scores, asked=self.setting("deploy.stage"))

    @property
    def minutes(self) -> float:
        """How long it ran, interruptions left out; nan where that is not known."""
        return float(self.status.get("seconds", float("nan"))) / 60

    @property
    def model(self) -> str:
        """Timm's name of the model, with its tag where it is known."""
        return str(self.bundle.get("architecture") or self.setting("model.name", "unknown model"))

    @property
    def short_names(self) -> list[str]:
        """Short names of the classes, in the run's own order."""
        return class_order(self.config)

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders, in the same order."""
        return [str(name) for name in self.setting("data.classes") or []]

    @property
    def grouped(self) -> bool:
        """Whether groups are patients, told by data.group or by a manifest; else each image is its own."""
        if self.setting("data.group") is not None:
            return True
        return self.split is not None and bool((self.split.table["group"] != self.split.table["path"]).any())

    @property
    def fold(self) -> str | None:
        """What tables call its fold: a number, or a value of data.fold_column; None where it is no fold.

        A value that a single patient has may be a name and is not shown, as in subgroup tables.
        """
        fold = self.setting("data.fold")
        if fold is None or self.setting("data.fold_column") is None:
            return None if fold is None else str(fold)
        patients = 0 if self.split is None else self.split.part("test")["group"].nunique()
        return str(fold) if patients > 1 else HIDDEN

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a key of the configuration."""
        found = OmegaConf.select(self.config, key, default=default)
        return default if found is None else found


def read_config(folder: Path) -> DictConfig:
    """A run's configuration, empty where it failed before it had one.

    Raises:
        PylorusError: If config.yaml is damaged.
    """
    path = RunFolder(folder).config
    if not path.is_file():
        return OmegaConf.create()
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # PyYAML's and OmegaConf's errors have no common base
        raise PylorusError(f"{path}: damaged: {error}") from error
    if not isinstance(config, DictConfig):
        raise PylorusError(f"{path}: found a list, expected a run's configuration.")
    return config


def class_order(config: DictConfig) -> list[str]:
    """Short names of the classes, in the run's own order; none where they were not known yet."""
    names = OmegaConf.select(config, "data.short_names") or OmegaConf.select(config, "data.classes")
    return [str(name) for name in names or []]


def read_run(folder: Path, config: DictConfig | None = None, *, order: Sequence[str] = ()) -> SavedRun:
    """Reads a run's folder.

    Args:
        folder: Holds status.json.
        config: From `read_config`, where that was read before.
        order: Short names of the classes in the order wanted, for a run that has these classes.

    Raises:
        PylorusError: If a file is damaged, or predictions and split contradict each other; names file and fault.
    """
    place = RunFolder(folder)
    config = read_config(folder) if config is None else config
    try:
        status = place.status()
    except (ValueError, KeyError) as error:
        raise PylorusError(f"{folder / 'status.json'}: damaged: {error}") from error
    split = read_split(folder / "split.csv") if (folder / "split.csv").is_file() else None
    planned = OmegaConf.select(config, "stages", default=None) or {}
    stages = tuple(
        SavedStage(
            name=str(name),
            monitor=str(OmegaConf.select(config, f"stages.{name}.monitor", default="loss")),
            curves=_curves(place.stage(str(name)).path / "metrics.csv"),
            validation=_optional_predictions(place.predictions(str(name), "val"), order),
            test=_optional_predictions(place.predictions(str(name), "test"), order),
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
        given_parts=_given_parts(folder / "catalog.parquet"),
    )
    _check(run)
    return run


def _check(run: SavedRun) -> None:
    """Refuses predictions that the split does not know, or knows otherwise."""
    full = dict(zip(run.short_names, run.class_names, strict=True))
    validated_on = "test" if run.setting("data.validation") == "test" else "val"
    for stage in run.stages:
        for kind, part, saved in (("val", validated_on, stage.validation), ("test", "test", stage.test)):
            if saved is None:
                continue
            file = RunFolder(run.folder).predictions(stage.name, kind)
            if run.split is None:
                raise PylorusError(f"{file}: there is no split.csv in the run's folder, so no table could cite it.")
            said = saved.predictions
            unknown = set(said.class_names) - set(full)
            if unknown:
                raise PylorusError(f"{file}: found classes {sorted(unknown)}, config.yaml knows {list(full)}.")
            classes = [full[said.class_names[label]] for label in said.true]
            wrong = contradiction(run.split, part, np.asarray(said.sample), classes)
            if wrong:
                raise PylorusError(f"{file}: {wrong}. The two are not of one run: restore the run's own files.")


def _given_parts(path: Path) -> frozenset[str] | None:
    """Read which parts came with the images; None where there is no catalog.

    Raises:
        PylorusError: If catalog.parquet is damaged.
    """
    if not path.is_file():
        return None
    try:
        parts = pd.read_parquet(path, columns=["split"])["split"]
    except (ValueError, OSError, KeyError) as error:  # pyarrow's errors derive from these
        raise PylorusError(f"{path}: can't be read as a table with a column split: {error}") from error
    return frozenset(str(part) for part in parts.unique()) - {""}


def _curves(path: Path) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    try:
        table = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return None  # a stage that failed in its first epoch
    except (ValueError, pd.errors.ParserError) as error:
        raise PylorusError(f"{path}: can't be read as a table: {error}") from error
    try:
        return table.astype({"step": int}).sort_values("step", ignore_index=True)
    except (ValueError, KeyError) as error:
        raise PylorusError(f"{path}: found columns {list(table.columns)}, expected step, in whole epochs.") from error


def _optional_predictions(path: Path, order: Sequence[str]) -> SavedPredictions | None:
    return read_predictions(path, order=order) if path.is_file() else None
