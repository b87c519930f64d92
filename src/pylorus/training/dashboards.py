"""Dashboards (TensorBoard, Weights & Biases, your own): views of what is in the run's folder, off unless requested.

A dashboard receives metrics, figures, the run's result, and the configuration without folders and file names. It
receives images only with `logger.images=true`, predictions of single images only with `logger.predictions=true`, and
the model only with `logger.artifact=true`. It never receives the names of this machine, its user, or the run's folder.
"""

import hashlib
import importlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any

import pandas as pd
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from pylorus.config.checks import FORWARDED_KEYS
from pylorus.config.instantiation import TARGET, get_object, get_target, instantiate, list_parameters
from pylorus.config.schema import Config
from pylorus.core.errors import PylorusError, UnreadableImageError
from pylorus.core.privacy import redact_value
from pylorus.data.dataset import ImageBatches
from pylorus.evaluation.predictions import Predictions
from pylorus.model.classifier import StagePlan
from pylorus.model.objectives import build_metrics
from pylorus.runs.folder import RunFolder
from pylorus.runs.predictions import SavedPredictions
from pylorus.training.run_results import (
    EPOCH,
    RUN_GROUP,
    RunResults,
    build_chart_layout,
    build_prediction_rows,
    collect_scalars,
    iter_figures,
    iter_settings,
    plot_confident_errors,
    read_run_results,
)

if TYPE_CHECKING:  # Matplotlib is imported where something is drawn: most runs have no dashboard
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

PRIVATE_KEYS = (
    *("root", "manifest", "columns", "split_file", "group"),
    *("test_column", "test_values", "test_from", "fold_column"),
)
"""Keys of `data` that contain folders, files, or a manifest's information on patients."""


class View:
    """One kind of dashboard: what a logger of Pylorus does. Derive a class from it to add one.

    `LOGGERS` lists those that are here; a class elsewhere is named by `logger._target_`, as in conf/logger/mlflow.yaml.

    Args:
        config: The run's configuration.
        folder: The run's folder.

    Attributes:
        epoch: Epochs of the run so far: where on the axis of the curves a figure belongs.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.config, self.folder, self.epoch = config, folder, 0

    def start(self) -> None:
        """Start the dashboard's record of this run, or continue it; an error here ends the run before it trains."""

    def create_logger(self) -> Logger:
        """Create the logger to which Lightning sends the metrics of a stage; no other thing is sent through it."""
        raise NotImplementedError

    def log_figure(self, name: str, figure: "Figure") -> None:
        """Show a figure under a name such as `finetune/val/confusion`."""

    def log_confusion(self, name: str, predictions: Predictions) -> None:
        """Show the confusion matrix of predictions."""
        from pylorus.report.result_figures import plot_confusion_matrix

        self.log_figure(name, plot_confusion_matrix(predictions, title=name.removesuffix("/confusion")))

    def log_table(self, name: str, table: pd.DataFrame) -> None:
        """Show a table under a name such as `finetune/val/predictions`."""

    def log_results(self, results: RunResults) -> None:
        """Show the result of the run; called once, after its model is written."""

    def log_model(self, results: RunResults) -> None:
        """Store the model with its card; called only with `logger.artifact=true`."""

    def finish(self, *, failed: bool) -> None:
        """End the record of this run."""


class TensorBoardView(View):
    """TensorBoard, in the folder `tensorboard` of the run."""

    def start(self) -> None:
        """Create the folder, and arrange the curves by stage."""
        _hide_host_name()
        self._logger = TensorBoardLogger(self.folder.path, name="", version="tensorboard")
        metrics = [metric.name for metric in build_metrics(self.config.metrics)]
        self._logger.experiment.add_custom_scalars(build_chart_layout(list(self.config.stages), metrics))
        if self.config.logger.notes:
            self._logger.experiment.add_text("notes", self.config.logger.notes)

    def create_logger(self) -> Logger:
        """Return the logger, the same for all stages."""
        return self._logger

    def log_figure(self, name: str, figure: "Figure") -> None:
        """Show a figure among the images."""
        self._logger.experiment.add_figure(name, figure, self.epoch)

    def log_table(self, name: str, table: pd.DataFrame) -> None:
        """Show a table among the texts, in Markdown."""
        lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
        text = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        self._logger.experiment.add_text(name, text, self.epoch)

    def log_results(self, results: RunResults) -> None:
        """Show the result among scalars and texts, and with the settings as a line of the table of hyperparameters."""
        from torch.utils.tensorboard.summary import hparams

        writer = self._logger.experiment
        for name, value in (results.values | results.limits).items():
            writer.add_scalar(name, value, self.epoch)
        for name, text in results.texts.items():
            writer.add_text(name, text, self.epoch)
        settings = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in iter_settings(build_shareable_config(self.config))
        }
        # `add_hparams` would write this to a folder of its own, as a second run.
        for summary in hparams(settings, results.values):  # type: ignore[no-untyped-call]
            writer.file_writer.add_summary(summary)

    def finish(self, *, failed: bool) -> None:
        """Write what is still in memory."""
        self._logger.experiment.close()


class WandbView(View):
    """Weights & Biases, offline unless the user requests an online run."""

    def start(self) -> None:
        """Start or continue the run; all curves have one axis, the epochs of all stages."""
        self._run = _start_wandb_run(self.config, self.folder)
        self._run.define_metric(EPOCH, hidden=True)
        for group in (RUN_GROUP, *self.config.stages):
            self._run.define_metric(f"{group}/*", step_metric=EPOCH)

    def create_logger(self) -> Logger:
        """Create a logger of the run."""
        return _WandbCurves(self._run)

    def log_figure(self, name: str, figure: "Figure") -> None:
        """Send a figure as an image: a table of W&B would be an artifact, with the path of the user's home."""
        import wandb

        from pylorus.report.result_figures import SCREEN_DPI

        content = BytesIO()
        figure.savefig(content, format="png", dpi=SCREEN_DPI, metadata={"Software": None})
        self._log({name: wandb.Image(Image.open(content))})  # wandb does not recognize a subclass of Figure

    def log_table(self, name: str, table: pd.DataFrame) -> None:
        """Send a table as HTML, for the same reason."""
        import wandb

        self._log({name: wandb.Html(table.to_html(index=False, border=0), inject=False)})

    def log_results(self, results: RunResults) -> None:
        """Show the indices as panels, and with their intervals in the summary, where tables of runs find them."""
        self._log(results.values)
        self._run.summary.update(
            results.limits
            | results.texts
            | {"result/stage": results.stage, "result/class": results.class_name, "result/sentence": results.sentence}
        )

    def log_model(self, results: RunResults) -> None:
        """Store the model as an artifact that is described by its card."""
        import wandb

        name = re.sub(r"[^\w.-]", "-", f"{self.config.model.name}-{self._run.id}", flags=re.ASCII)
        artifact = wandb.Artifact(
            name,
            type="model",
            description=(results.bundle / "MODEL_CARD.md").read_text(encoding="utf-8"),
            metadata=results.values | results.limits | {"stage": results.stage, "class": results.class_name},
        )
        artifact.add_dir(str(results.bundle))
        self._run.log_artifact(artifact, aliases=["shipped"])

    def finish(self, *, failed: bool) -> None:
        """End the run, marked as failed if it is."""
        self._run.finish(exit_code=int(failed))

    def _log(self, content: dict[str, Any]) -> None:
        self._run.log({EPOCH: self.epoch, **content}, step=self.epoch)


class _WandbCurves(Logger):
    """Send curves to a run of Weights & Biases, one row for each epoch of the run, also if the run was resumed."""

    name, version = "wandb", ""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `wandb.init` has them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of an epoch."""
        self._run.log({EPOCH: step, **metrics}, step=step)


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
        self.config, self._folder = config, folder
        target = get_target(config.logger)
        is_named = target is None or config.logger.name != "csv"
        self._name = config.logger.name if is_named else str((target or {})[TARGET])
        self._guard = _FailureGuard(self._name)
        self._view = build_view(config, folder) if shown else None
        if self._view is not None:
            import matplotlib

            matplotlib.use("agg")

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
        if self._view is None:
            return []
        return [_NewStepsLogger(self._view.create_logger(), known_step, self._guard, list(self.config.stages))]

    def show_predictions(self, plan: StagePlan, part: str, saved: SavedPredictions, datamodule: ImageBatches) -> None:
        """Show a stage's figures on a split; if they may be sent, its predictions and worst validation errors."""
        if self._view is None:
            return
        with self._guard.handle_errors():
            name = f"{plan.name}/{part}"
            self._view.epoch = self._count_epochs()
            self._view.log_confusion(f"{name}/confusion", saved.predictions)
            for kind, figure in iter_figures(saved.predictions, name):
                self._view.log_figure(f"{name}/{kind}", figure)
            if self.config.logger.predictions:
                self._view.log_table(f"{name}/predictions", build_prediction_rows(saved))
            if self.config.logger.images and part == "val":
                mistakes = plot_confident_errors(saved.predictions, datamodule)
                if mistakes is not None:
                    self._view.log_figure(f"{name}/mistakes", mistakes)

    def show_results(self) -> None:
        """Show the result of a run whose model is written and, if it may be sent, the model."""
        if self._view is None:
            return
        with self._guard.handle_errors():
            results = read_run_results(self._folder)
            self._view.epoch = self._count_epochs()
            self._view.log_figure("result/reliability", results.reliability)
            self._view.log_results(results)
            if self.config.logger.artifact:
                self._view.log_model(results)

    def _count_epochs(self) -> int:
        """Return how many epochs the stages that are trained took."""
        trained = [self._folder.get_stage(name).training_result for name in self.config.stages]
        return sum(result.epochs for result in trained if result is not None)


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

    def __init__(self, dashboard: Logger, known_step: int, guard: _FailureGuard, stages: list[str]) -> None:
        super().__init__()
        self._dashboard, self._known_step, self._guard, self._stages = dashboard, known_step, guard, stages

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
                self._dashboard.log_metrics(collect_scalars(metrics, self._stages), step)

    def save(self) -> None:
        """Save the dashboard's log."""
        with self._guard.handle_errors():
            self._dashboard.save()


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
        job_type="train",
        tags=list_tags(config),
        notes=config.logger.notes,
        id=_find_wandb_id(folder, status),
        resume="allow",
        dir=folder.path,
        mode="offline" if config.logger.offline else "online",
        config=build_shareable_config(config),
        settings=settings,
        reinit="finish_previous",
    )


def _find_wandb_id(folder: RunFolder, status: Mapping[str, Any]) -> str | None:
    """Return the id of the run in W&B: the one that it had before, that of a sweep's agent, or the run's own."""
    pattern = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(.+)")
    earlier = [match[1] for path in sorted(folder.path.glob("wandb/*")) if (match := pattern.fullmatch(path.name))]
    if earlier:
        return earlier[-1]
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else status.get("id")


def list_tags(config: Config) -> list[str]:
    """Return what a run is found by on a dashboard: its model, stages and kind of images."""
    return [tag[:64] for tag in dict.fromkeys((config.model.name, *config.stages, str(config.data.kind))) if tag]


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
