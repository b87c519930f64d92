"""Weights & Biases and TensorBoard: views of what is in the run's folder, off unless requested.

A dashboard receives metrics, confusion matrices, and the configuration without folders and file names. It receives
images only with `logger.images=true`.
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
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from pylorus.config.schema import Config
from pylorus.core.errors import PylorusError, UnreadableImageError
from pylorus.core.privacy import redact_value
from pylorus.data.datamodule import ImageDataModule
from pylorus.evaluation.predictions import Predictions
from pylorus.model.classifier import StagePlan
from pylorus.report.result_figures import plot_confusion_matrix
from pylorus.runs.folder import RunFolder
from pylorus.runs.predictions import SavedPredictions

log = logging.getLogger(__name__)

PRIVATE = ("root", "manifest", "split_file", "group", "test_column", "test_values", "test_from", "fold_column")
"""Keys of `data` that contain folders, files, or a manifest's information on patients."""

MOST_MISTAKES = 16
"""The most misclassified images of a stage that are shown, if images may be sent."""


class Dashboard:
    """A run's view in the dashboard that the configuration selects; `csv` has none.

    It is a context manager: a run that ends with an error is marked as failed.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        shown: Whether this process sends anything; only one of several distributed processes does.
    """

    def __init__(self, config: Config, folder: RunFolder, *, shown: bool = True) -> None:
        matplotlib.use("agg")
        self.config, self.folder = config, folder
        self._name = config.logger.name if shown else "csv"
        self._view = _FailureGuard(self._name)
        self._wandb: Any = None
        self._tensorboard: TensorBoardLogger | None = None

    def __enter__(self) -> "Dashboard":
        if self._name == "tensorboard":
            self._tensorboard = TensorBoardLogger(self.folder.path, name="", version="tensorboard")
        if self._name == "wandb":
            try:
                self._wandb = _start_wandb_run(self.config, self.folder)
            except PylorusError:
                raise
            except Exception as error:  # its own errors, network errors, or errors of its service process
                raise PylorusError(
                    f"logger=wandb: Weights & Biases failed to start: {error}\nNothing has been trained yet. Remove "
                    "logger.offline=false to save everything on this machine and upload it later, or use logger=csv."
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._view.handle_errors():
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)
            if self._tensorboard is not None:
                self._tensorboard.experiment.close()

    def create_loggers(self, *, known_step: int = 0) -> list[Logger]:
        """Return the loggers that Lightning sends metrics to.

        Args:
            known_step: Steps up to this one were already sent before the run was interrupted.
        """
        if self._wandb is not None:
            return [_NewStepsLogger(WandbLogger(experiment=self._wandb), known_step, self._view)]
        return [_NewStepsLogger(self._tensorboard, known_step, self._view)] if self._tensorboard is not None else []

    def show_predictions(
        self, plan: StagePlan, part: str, saved: SavedPredictions, datamodule: ImageDataModule
    ) -> None:
        """Show a stage's confusion matrix on a split and, if images may be sent, the worst validation errors."""
        if self._wandb is None and self._tensorboard is None:
            return
        with self._view.handle_errors():
            self._show_split(f"{plan.name}/{part}", part, saved.predictions, datamodule)

    def _show_split(self, name: str, part: str, predictions: Predictions, datamodule: ImageDataModule) -> None:
        if self._wandb is not None:
            import wandb

            plot = wandb.plot.confusion_matrix(
                y_true=predictions.true.tolist(),
                preds=predictions.predicted.tolist(),
                class_names=list(predictions.class_names),
                title=name,
            )
            self._wandb.log({f"{name}/confusion": plot})
        else:
            self._add_figure(f"{name}/confusion", plot_confusion_matrix(predictions, title=name))
        if self.config.logger.images and part == "val":
            figure = plot_confident_errors(predictions, datamodule)
            if figure is not None:
                self._add_figure(f"{name}/mistakes", figure)

    def _add_figure(self, name: str, figure: Figure) -> None:
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(figure)})
        elif self._tensorboard is not None:
            self._tensorboard.experiment.add_figure(name, figure)


class _FailureGuard:
    """Logs a dashboard's failure during a run once; the run's files are complete without it."""

    def __init__(self, name: str) -> None:
        self._name, self._has_warned = name, False

    @contextmanager
    def handle_errors(self) -> Iterator[None]:
        """Continue after any error of a dashboard: each has its own kinds of errors, and none affects the run."""
        try:
            yield
        except UnreadableImageError:
            raise
        except Exception as error:
            if not self._has_warned:
                reason = str(error) or type(error).__name__
                log.warning("%s failed; the run continues and its files are complete: %s", self._name, reason)
            self._has_warned = True


class _NewStepsLogger(Logger):
    """Logger that forwards only what a dashboard does not have yet."""

    def __init__(self, dashboard: Logger, known_step: int, view: _FailureGuard) -> None:
        super().__init__()
        self._dashboard, self._known_step, self._view = dashboard, known_step, view

    @property
    def name(self) -> str | None:
        """Name of the dashboard's logger."""
        return self._dashboard.name

    @property
    def version(self) -> int | str | None:
        """Version of the dashboard's logger."""
        return self._dashboard.version

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `build_shareable_config` sends the configuration."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Forward metrics whose step is new."""
        if step is None or step > self._known_step:
            with self._view.handle_errors():
                self._dashboard.log_metrics(metrics, step)

    def save(self) -> None:
        """Save the dashboard's log."""
        with self._view.handle_errors():
            self._dashboard.save()


def plot_confident_errors(predictions: Predictions, datamodule: ImageDataModule) -> Figure | None:
    """Plot the misclassified validation images with the highest confidence; None if there are none."""
    wrong = np.flatnonzero(~predictions.correct)
    if not len(wrong):
        return None
    confidence = predictions.probabilities.max(axis=1)[wrong]
    rows = wrong[np.argsort(-confidence, kind="stable")][:MOST_MISTAKES].tolist()
    figure = Figure(figsize=(8, 2.2 * -(-len(rows) // 4)), layout="constrained")
    images = datamodule.get_dataset("val").load_rows(rows)
    panels = figure.subplots(-(-len(rows) // 4), 4, squeeze=False).flat
    true, predicted = (
        [predictions.class_names[label] for label in labels] for labels in (predictions.true, predictions.predicted)
    )
    for axes, row, image in zip(panels, rows, images, strict=False):
        axes.imshow(image)
        axes.set_title(f"{true[row]}, predicted as {predicted[row]}", fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def build_shareable_config(config: Config) -> dict[str, Any]:
    """Return the configuration as it may leave the machine: without folders, file names and values of a manifest."""
    shareable: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    for name in PRIVATE:
        del shareable["data"][name]
    if config.data.fold_column is not None:
        del shareable["data"]["fold"]
    del shareable["cache"]["folder"]
    shareable["model"]["args"] = {
        name: redact_value(f"model.args.{name}", value) for name, value in shareable["model"]["args"].items()
    }
    if config.model.weights not in ("hub", "none"):
        shareable["model"]["weights"] = "file"
    return shareable


def _start_wandb_run(config: Config, folder: RunFolder) -> Any:
    """Start a run in Weights & Biases, offline unless the user requests an online run.

    Raises:
        PylorusError: If an online run is requested and nobody is logged in.
    """
    # Read at import: without it wandb sends its own error reports to its vendor, in offline runs too.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    if not config.logger.offline and not wandb.login(prompt=False):
        raise PylorusError(
            "logger.offline=false: nobody is logged in to Weights & Biases on this machine. Run `wandb login` first, "
            "or remove logger.offline=false and upload the run later with `wandb sync`."
        )
    settings = wandb.Settings(
        console="off",  # the run's log contains file names
        disable_code=True,
        disable_git=True,
        save_code=False,
        x_disable_meta=True,  # the command line contains data.root
        silent=True,
    )
    return wandb.init(
        project=config.logger.project,
        name=_format_run_name(config, folder.path),
        group=folder.read_status().get("sweep"),
        id=folder.read_status().get("id"),
        resume="allow",
        dir=folder.path,
        mode="offline" if config.logger.offline else "online",
        config=build_shareable_config(config),
        settings=settings,
        reinit="finish_previous",
    )


def _format_run_name(config: Config, folder: Path) -> str:
    return f"{config.model.name} {'+'.join(config.stages)} {folder.parent.name}/{folder.name}"
