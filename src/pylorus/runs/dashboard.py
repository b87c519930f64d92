"""Weights & Biases and TensorBoard: views of what lies in the run's folder, off unless asked for.

What leaves for a dashboard: metrics, confusion matrices, and the configuration without folders and file names. Images
leave only with `logger.images=true`.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from pylorus.config import Config
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.unreadable import UnreadableImageError
from pylorus.errors import PylorusError
from pylorus.model.classifier import StagePlan
from pylorus.predictions import class_names, confusion_of, labels_of
from pylorus.report.redaction import redacted
from pylorus.runs.folder import RunFolder

log = logging.getLogger(__name__)

PRIVATE = ("root", "manifest", "split_file", "group", "test_column", "test_values", "test_from", "fold_column")
"""Keys of data that name folders, files, or what a manifest says of patients."""

MOST_MISTAKES = 16
"""Wrongly classified images that a stage shows, where images may leave."""


class Dashboard:
    """One run's view in the dashboard that the configuration names; none for `csv`.

    A context: a run that ends with an error is shown as failed.

    Args:
        config: Of the run.
        folder: Of the run.
        shown: Whether this process shows anything.
    """

    def __init__(self, config: Config, folder: RunFolder, *, shown: bool = True) -> None:
        matplotlib.use("agg")
        self.config, self.folder = config, folder
        self._name = config.logger.name if shown else "csv"
        self._view = _View(self._name)
        self._wandb: Any = None
        self._tensorboard: TensorBoardLogger | None = None

    def __enter__(self) -> "Dashboard":
        if self._name == "tensorboard":
            self._tensorboard = TensorBoardLogger(self.folder.path, name="", version="tensorboard")
        if self._name == "wandb":
            try:
                self._wandb = _wandb_run(self.config, self.folder)
            except PylorusError:
                raise
            except Exception as error:  # its own, of the network, of its helper process
                raise PylorusError(
                    f"logger=wandb: Weights & Biases does not start: {error}\nNothing was trained yet. Leave "
                    "logger.offline=false out to keep everything here and send it later, or take logger=csv."
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._view.tried():
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)
            if self._tensorboard is not None:
                self._tensorboard.experiment.close()

    def loggers(self, *, known_step: int = 0) -> list[Logger]:
        """What Lightning sends the curves to; steps up to `known_step` were sent before a run was interrupted."""
        if self._wandb is not None:
            return [_News(WandbLogger(experiment=self._wandb), known_step, self._view)]
        return [_News(self._tensorboard, known_step, self._view)] if self._tensorboard is not None else []

    def show_predictions(self, plan: StagePlan, part: str, table: pd.DataFrame, served: ImageDataModule) -> None:
        """Shows a stage's confusion matrix on a part and, where images may leave, validation's worst mistakes."""
        if self._wandb is None and self._tensorboard is None:
            return
        with self._view.tried():
            self._show(f"{plan.name}/{part}", part, table, served)

    def _show(self, name: str, part: str, table: pd.DataFrame, served: ImageDataModule) -> None:
        if self._wandb is not None:
            import wandb

            true, predicted = labels_of(table)
            plot = wandb.plot.confusion_matrix(
                y_true=true.tolist(), preds=predicted.tolist(), class_names=class_names(table), title=name
            )
            self._wandb.log({f"{name}/confusion": plot})
        else:
            self._add_figure(f"{name}/confusion", confusion_figure(table, title=name))
        if self.config.logger.images and part == "val":
            figure = mistakes_figure(table, served)
            if figure is not None:
                self._add_figure(f"{name}/mistakes", figure)

    def _add_figure(self, name: str, figure: Figure) -> None:
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(figure)})
        elif self._tensorboard is not None:
            self._tensorboard.experiment.add_figure(name, figure)


class _View:
    """Has a dashboard's failure in the middle of a run be told once; the files are complete without it."""

    def __init__(self, name: str) -> None:
        self._name, self._told = name, False

    @contextmanager
    def tried(self) -> Iterator[None]:
        """Goes on after any error of a dashboard's: each has its own kinds, and none touches the run."""
        try:
            yield
        except UnreadableImageError:
            raise
        except Exception as error:
            if not self._told:
                said = str(error) or type(error).__name__
                log.warning("%s failed; the run goes on, its files hold everything: %s", self._name, said)
            self._told = True


class _News(Logger):
    """Hands on what a dashboard does not have yet."""

    def __init__(self, dashboard: Logger, known_step: int, view: _View) -> None:
        super().__init__()
        self._dashboard, self._known_step, self._view = dashboard, known_step, view

    @property
    def name(self) -> str | None:
        """The dashboard's."""
        return self._dashboard.name

    @property
    def version(self) -> int | str | None:
        """The dashboard's."""
        return self._dashboard.version

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Left to `shared_config`."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Hands metrics on where their step is new."""
        if step is None or step > self._known_step:
            with self._view.tried():
                self._dashboard.log_metrics(metrics, step)

    def save(self) -> None:
        """Has the dashboard save."""
        with self._view.tried():
            self._dashboard.save()


def confusion_figure(table: pd.DataFrame, *, title: str) -> Figure:
    """The confusion matrix with counts; shade is the share of the true class."""
    counts, names = confusion_of(table), class_names(table)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(1.5 + len(names), 1.2 + len(names)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(
            column,
            row,
            str(count),
            ha="center",
            va="center",
            color="white" if shares[row, column] > 0.5 else "black",
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def mistakes_figure(table: pd.DataFrame, served: ImageDataModule) -> Figure | None:
    """The wrongly classified validation images that the model was surest of; None where there is none."""
    wrong = table.index[table["true"] != table["predicted"]]
    if not len(wrong):
        return None
    sureness = table.filter(like="probability/").max(axis=1)
    chosen = sureness[wrong].sort_values(ascending=False).index[:MOST_MISTAKES]
    figure = Figure(figsize=(8, 2.2 * -(-len(chosen) // 4)), layout="constrained")
    images = served.dataset("val").fitted([int(row) for row in chosen])
    places = figure.subplots(-(-len(chosen) // 4), 4, squeeze=False).flat
    for axes, row, image in zip(places, chosen, images, strict=False):
        axes.imshow(image)
        axes.set_title(f"{table.loc[row, 'true']}, taken for {table.loc[row, 'predicted']}", fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def shared_config(config: Config) -> dict[str, Any]:
    """The configuration as it may leave the machine: without folders, file names and values of a manifest."""
    shared: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    for name in PRIVATE:
        del shared["data"][name]
    if config.data.fold_column is not None:
        del shared["data"]["fold"]
    del shared["cache"]["folder"]
    shared["model"]["args"] = {
        name: redacted(f"model.args.{name}", value) for name, value in shared["model"]["args"].items()
    }
    if config.model.weights not in ("hub", "none"):
        shared["model"]["weights"] = "file"
    return shared


def _wandb_run(config: Config, folder: RunFolder) -> Any:
    """A run of its own in Weights & Biases, offline unless the user is logged in and asks.

    Raises:
        PylorusError: If it is to go online and nobody is logged in.
    """
    # Read as it starts: else it reports on its own working to its makers, of offline runs too.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    if not config.logger.offline and not wandb.login(prompt=False):
        raise PylorusError(
            "logger.offline=false: nobody is logged in to Weights & Biases on this machine. Run `wandb login` first, "
            "or leave logger.offline out and send the run later with `wandb sync`."
        )
    settings = wandb.Settings(
        console="off",  # our own lines name files
        disable_code=True,
        disable_git=True,
        save_code=False,
        x_disable_meta=True,  # the command line holds data.root
        silent=True,
    )
    return wandb.init(
        project=config.logger.project,
        name=_run_name(config, folder.path),
        group=folder.status().get("sweep"),
        id=folder.status().get("id"),
        resume="allow",
        dir=folder.path,
        mode="offline" if config.logger.offline else "online",
        config=shared_config(config),
        settings=settings,
        reinit="finish_previous",
    )


def _run_name(config: Config, folder: Path) -> str:
    return f"{config.model.name} {'+'.join(config.stages)} {folder.parent.name}/{folder.name}"
