"""MLflow: curves, settings, figures and the result, in a database in the run's folder unless asked otherwise."""

import hashlib
import logging
import os

import pandas as pd
from matplotlib.figure import Figure
from pytorch_lightning.loggers import Logger, MLFlowLogger

from pylorus.config.schema import Config
from pylorus.core.errors import PylorusError
from pylorus.runs.folder import RunFolder
from pylorus.training.dashboards import (
    View,
    build_shareable_config,
    format_run_name,
    format_sweep_name,
    list_tags,
)
from pylorus.training.run_results import RunResults, iter_settings

RUN_TAG = "pylorus.run"
"""Tag that holds the run's id, by which a resumed run is found again."""
PARAMETER_LENGTH = 500
"""Longest value of a parameter that every version of MLflow's servers accepts."""


class MLflowView(View):
    """A run in MLflow. To look at it: `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db`.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        tracking_uri: A database or server of yours; None: mlflow.db in the run's folder. A server needs
            logger.offline=false, since metrics, settings and figures leave the machine.
    """

    def __init__(self, config: Config, folder: RunFolder, tracking_uri: str | None = None) -> None:
        super().__init__(config, folder)
        self._artifacts = None if tracking_uri else (folder.path / "mlflow").absolute().as_uri()
        self._uri = tracking_uri or f"sqlite:///{(folder.path / 'mlflow.db').absolute()}"
        if config.logger.offline and not self._uri.startswith(("sqlite:", "file:", "/")):
            raise PylorusError(
                f"logger.args.tracking_uri: found {self._uri}, a server, with logger.offline=true. Add "
                "logger.offline=false to send metrics and settings there."
            )

    def start(self) -> None:
        """Start the run, or continue the one of an interrupted run.

        Raises:
            PylorusError: If MLflow is not installed.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
        try:
            import sqlalchemy  # noqa: F401  mlflow-skinny does not ask for it
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise PylorusError(
                f"logger=mlflow: needs mlflow-skinny and sqlalchemy ({error}). Run pip install 'pylorus[mlflow]' or, "
                "in a clone, pip install -e '.[mlflow]'."
            ) from None
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # creating the database logs every table
        self._client = MlflowClient(tracking_uri=self._uri)
        project = self.config.logger.project
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = (
            experiment.experiment_id
            if experiment is not None
            else self._client.create_experiment(project, artifact_location=self._artifacts)
        )
        status = self.folder.read_status()
        run_id = str(status.get("id") or hashlib.sha256(str(self.folder.path.absolute()).encode()).hexdigest()[:8])
        earlier = self._client.search_runs([experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{run_id}'")
        if earlier:
            self._run_id = earlier[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        model, *_, data = list_tags(self.config)
        tags = {
            RUN_TAG: run_id,
            "sweep": format_sweep_name(status) or "",
            "model": model,
            "stages": " ".join(self.config.stages),
            "data": data,
            **({"mlflow.note.content": self.config.logger.notes} if self.config.logger.notes else {}),
        }
        created = self._client.create_run(experiment_id, tags=tags, run_name=format_run_name(self.config, status))
        self._run_id = created.info.run_id
        for name, value in iter_settings(build_shareable_config(self.config)):
            self._client.log_param(self._run_id, name, str(value)[:PARAMETER_LENGTH])

    def create_logger(self) -> Logger:
        """Create a logger of the run."""
        return MLFlowLogger(tracking_uri=self._uri, run_id=self._run_id)

    def log_figure(self, name: str, figure: Figure) -> None:
        """Store a figure as an artifact."""
        self._client.log_figure(self._run_id, figure, f"{name}.png")

    def log_table(self, name: str, table: pd.DataFrame) -> None:
        """Store a table as an artifact that MLflow shows as a table."""
        self._client.log_text(self._run_id, table.to_csv(index=False), f"{name}.csv")

    def log_results(self, results: RunResults) -> None:
        """Show the indices with their limits as metrics, and as the report writes them in tags."""
        for name, value in (results.values | results.limits).items():
            self._client.log_metric(self._run_id, name, value, step=self.epoch)
        texts = results.texts | {"result/stage": results.stage, "result/class": results.class_name}
        for name, text in texts.items():
            self._client.set_tag(self._run_id, name, text)

    def log_model(self, results: RunResults) -> None:
        """Store the model with its card in the folder `model` of the artifacts."""
        self._client.log_artifacts(self._run_id, str(results.bundle), "model")

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")
