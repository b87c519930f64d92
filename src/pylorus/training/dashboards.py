"""Dashboards (TensorBoard, Weights & Biases, your own): views of what is in the run's folder, off unless requested.

A dashboard receives metrics, confusion matrices, and the configuration without folders and file names. It receives
images only with `logger.images=true`. It never receives the names of this machine, its user, or the run's folder.
"""

import hashlib
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import SimpleNamespace, TracebackType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from pylorus.config.checks import FORWARDED_KEYS
from pylorus.config.instantiation import TARGET, get_object, get_target, instantiate, list_parameters
from pylorus.config.schema import Config
from pylorus.core.errors import PylorusError, UnreadableImageError
from pylorus.core.privacy import redact_value
from pylorus.data.dataset import ImageBatches
from pylorus.evaluation.predictions import Predictions
from pylorus.model.classifier import StagePlan
from pylorus.report.figure_style import create_figure, replace_undrawable, report_style, wrap_text
from pylorus.report.result_figures import plot_confusion_matrix
from pylorus.runs.folder import RunFolder
from pylorus.runs.predictions import SavedPredictions

log = logging.getLogger(__name__)

PRIVATE_KEYS = (
    *("root", "manifest", "columns", "split_file", "group"),
    *("test_column", "test_values", "test_from", "fold_column"),
)
"""Keys of `data` that contain folders, files, or a manifest's information on patients."""

MAX_MISTAKES = 16
"""The most misclassified images of a stage that are shown, if images may be sent."""


class View:
    """One kind of dashboard: what a logger of Pylorus does. Derive a class from it to add one.

    `LOGGERS` lists those that are here; a class elsewhere is named by `logger._target_`, as in conf/logger/mlflow.yaml.

    Args:
        config: The run's configuration.
        folder: The run's folder.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.config, self.folder = config, folder

    def start(self) -> None:
        """Start the dashboard's record of this run, or continue it; an error here ends the run before it trains."""

    def create_logger(self) -> Logger:
        """Create the logger to which Lightning sends the metrics of a stage; no other thing is sent through it."""
        raise NotImplementedError

    def log_figure(self, name: str, figure: Figure) -> None:
        """Show a figure under a name such as `finetune/val/confusion`."""

    def log_confusion(self, name: str, predictions: Predictions) -> None:
        """Show the confusion matrix of predictions."""
        self.log_figure(name, plot_confusion_matrix(predictions, title=name.removesuffix("/confusion")))

    def finish(self, *, failed: bool) -> None:
        """End the record of this run."""


class TensorBoardView(View):
    """TensorBoard, in the folder `tensorboard` of the run."""

    def start(self) -> None:
        """Create the folder."""
        _hide_host_name()
        self._logger = TensorBoardLogger(self.folder.path, name="", version="tensorboard")

    def create_logger(self) -> Logger:
        """Return the logger, the same for all stages."""
        return self._logger

    def log_figure(self, name: str, figure: Figure) -> None:
        """Show a figure among the images."""
        self._logger.experiment.add_figure(name, figure)

    def finish(self, *, failed: bool) -> None:
        """Write what is still in memory."""
        self._logger.experiment.close()


class WandbView(View):
    """Weights & Biases, offline unless the user requests an online run."""

    def start(self) -> None:
        """Start or continue the run."""
        self._run = _start_wandb_run(self.config, self.folder)

    def create_logger(self) -> Logger:
        """Create a logger of the run."""
        return WandbLogger(experiment=self._run)

    def log_figure(self, name: str, figure: Figure) -> None:
        """Send a figure as an image: a table of W&B would be an artifact, with the path of the user's home."""
        import wandb

        self._run.log({name: wandb.Image(figure)})

    def finish(self, *, failed: bool) -> None:
        """End the run, marked as failed if it is."""
        self._run.finish(exit_code=int(failed))


class ExternalView(View):
    """A logger from outside Pylorus, derived from Lightning's: it gets metrics and configuration, and no figures.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        node: `_target_` and arguments of the logger.
    """

    def __init__(self, config: Config, folder: RunFolder, node: dict[str, Any]) -> None:
        super().__init__(config, folder)
        self._node = node

    def start(self) -> None:
        """Create the logger and hand it the configuration."""
        logger = instantiate(self._node, key="logger")
        if not isinstance(logger, Logger):
            raise PylorusError(
                f"logger: {self._node[TARGET]} gave {type(logger).__name__}, expected a logger derived from "
                "pytorch_lightning.loggers.Logger."
            )
        self._logger: Logger = logger
        self._logger.log_hyperparams(build_shareable_config(self.config))

    def create_logger(self) -> Logger:
        """Return the logger, the same for all stages."""
        return self._logger

    def finish(self, *, failed: bool) -> None:
        """Finalize the logger, as Lightning does."""
        self._logger.save()
        self._logger.finalize("failed" if failed else "success")


LOGGERS: dict[str, type[View] | None] = {"csv": None, "tensorboard": TensorBoardView, "wandb": WandbView}
"""The dashboards by `logger.name`; csv has none. conf/logger lists the choices."""


def get_logger_node(config: Config) -> dict[str, Any] | None:
    """Return the `_target_` of the logger with its arguments; None if the configuration names none.

    A logger from outside gets `logger.project` and `logger.offline` as arguments; a view reads them in `config`.

    Raises:
        PylorusError: If the target can't be imported.
    """
    node = get_target(config.logger)
    if node is None:
        return None
    target = get_object(node, key="logger")
    reads_config = isinstance(target, type) and issubclass(target, View)
    not_arguments = set(FORWARDED_KEYS["logger"]) - list_parameters(target) if reads_config else set()
    return {name: value for name, value in node.items() if name not in not_arguments}


def build_view(config: Config, folder: RunFolder) -> View | None:
    """Build the dashboard that the configuration names; None if it names none.

    Raises:
        PylorusError: If there is no such dashboard.
    """
    node = get_logger_node(config)
    if node is not None:
        target = get_object(node, key="logger")
        if isinstance(target, type) and issubclass(target, View):
            view: View = instantiate(node, key="logger", config=config, folder=folder)
            return view
        return ExternalView(config, folder, node)
    if config.logger.name not in LOGGERS:
        raise PylorusError(
            f"logger.name: found {config.logger.name}, which needs its file: write logger={config.logger.name}, "
            "without .name."
        )
    kind = LOGGERS[config.logger.name]
    return None if kind is None else kind(config, folder)


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
        self.config = config
        target = get_target(config.logger)
        is_named = target is None or config.logger.name != "csv"
        self._name = config.logger.name if is_named else str((target or {})[TARGET])
        self._guard = _FailureGuard(self._name)
        self._view = build_view(config, folder) if shown else None

    def __enter__(self) -> "Dashboard":
        if self._view is not None:
            try:
                self._view.start()
            except PylorusError:
                raise
            except Exception as error:  # its own errors, network errors, or errors of its service process
                advice = (
                    "Use"
                    if self.config.logger.offline
                    else "Remove logger.offline=false to save everything on this machine and upload it later, or use"
                )
                raise PylorusError(
                    f"logger={self._name}: the dashboard failed to start: {error}\nNothing has "
                    f"been trained yet. {advice} logger=csv."
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._view is not None:
            with self._guard.handle_errors():
                self._view.finish(failed=kind is not None)

    def create_loggers(self, *, known_step: int = 0) -> list[Logger]:
        """Return the loggers that Lightning sends metrics to.

        Args:
            known_step: Steps up to this one were already sent before the run was interrupted.
        """
        return [] if self._view is None else [_NewStepsLogger(self._view.create_logger(), known_step, self._guard)]

    def show_predictions(self, plan: StagePlan, part: str, saved: SavedPredictions, datamodule: ImageBatches) -> None:
        """Show a stage's confusion matrix on a split and, if images may be sent, the worst validation errors."""
        if self._view is None:
            return
        with self._guard.handle_errors():
            name = f"{plan.name}/{part}"
            self._view.log_confusion(f"{name}/confusion", saved.predictions)
            if self.config.logger.images and part == "val":
                figure = plot_confident_errors(saved.predictions, datamodule)
                if figure is not None:
                    self._view.log_figure(f"{name}/mistakes", figure)


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

    def __init__(self, dashboard: Logger, known_step: int, guard: _FailureGuard) -> None:
        super().__init__()
        self._dashboard, self._known_step, self._guard = dashboard, known_step, guard

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
            with self._guard.handle_errors():
                self._dashboard.log_metrics(metrics, step)

    def save(self) -> None:
        """Save the dashboard's log."""
        with self._guard.handle_errors():
            self._dashboard.save()


def plot_confident_errors(predictions: Predictions, datamodule: ImageBatches) -> Figure | None:
    """Plot the misclassified validation images with the highest confidence; None if there are none."""
    wrong = np.flatnonzero(~predictions.correct)
    if not len(wrong):
        return None
    confidence = predictions.probabilities.max(axis=1)[wrong]
    rows = wrong[np.argsort(-confidence, kind="stable")][:MAX_MISTAKES].tolist()
    with report_style():
        figure = create_figure(2.5 * -(-len(rows) // 4), width=8)
    images = datamodule.get_dataset("val").load_rows(rows)
    panels = figure.subplots(-(-len(rows) // 4), 4, squeeze=False).flat
    true, predicted = (
        [predictions.class_names[label] for label in labels] for labels in (predictions.true, predictions.predicted)
    )
    for axes, row, image in zip(panels, rows, images, strict=False):
        axes.imshow(image)
        title = wrap_text(replace_undrawable(f"{true[row]}, predicted as {predicted[row]}"), 1.85, 8)
        axes.set_title(title, fontsize=8, fontweight="normal", loc="center")
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def build_shareable_config(config: Config) -> dict[str, Any]:
    """Return the configuration as it may leave the machine: without folders, file names and values of a manifest."""
    shareable: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    for name in PRIVATE_KEYS:
        del shareable["data"][name]
    if config.data.fold_column is not None:
        del shareable["data"]["fold"]
    del shareable["cache"]["folder"]
    shareable["model"]["args"] = {
        name: redact_value(f"model.args.{name}", value) for name, value in shareable["model"]["args"].items()
    }
    for section in ("data", "augment", "loss", "logger"):
        shareable[section]["args"] = {
            name: redact_value(f"{section}.args.{name}", value) for name, value in shareable[section]["args"].items()
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
        x_save_requirements=False,  # packages installed from a folder are listed with its path
        host="pylorus",
        program="train.py",
        silent=True,
    )
    status = folder.read_status()
    return wandb.init(
        project=config.logger.project,
        name=format_run_name(config, status),
        group=format_sweep_name(status),
        id=status.get("id"),
        resume="allow",
        dir=folder.path,
        mode="offline" if config.logger.offline else "online",
        config=build_shareable_config(config),
        settings=settings,
        reinit="finish_previous",
    )


def format_run_name(config: Config, status: Mapping[str, Any]) -> str:
    """Return a name for a run on a dashboard: model, stages and the run's id in status.json, but not its folder."""
    return f"{config.model.name} {'+'.join(config.stages)} {status.get('id') or ''}".rstrip()


def format_sweep_name(status: Mapping[str, Any]) -> str | None:
    """Return a name that the jobs of a sweep share, without the name of its folder; None for a single run."""
    sweep = status.get("sweep")
    return None if not sweep else f"sweep {hashlib.sha256(str(sweep).encode()).hexdigest()[:8]}"


def _hide_host_name() -> None:
    """Have TensorBoard write another word than the name of this machine into the names of its files."""
    for module in ("tensorboard.summary.writer.event_file_writer", "tensorboardX.event_file_writer"):
        with suppress(ImportError):
            writer = importlib.import_module(module)
            writer.socket = SimpleNamespace(gethostname=lambda: "pylorus")  # type: ignore[attr-defined]
