"""State shared by the stages of a run."""

from dataclasses import dataclass

from pylorus.config import Config
from pylorus.data.prepare import RunImages
from pylorus.machine.engine import Engine
from pylorus.model.backbone import Backbone
from pylorus.parallel.processes import Processes
from pylorus.runs.dashboard import Dashboard
from pylorus.runs.folder import RunFolder
from pylorus.runs.signals import StopRequest


@dataclass(frozen=True)
class Run:
    """State shared by the stages of a run.

    Attributes:
        config: The run's configuration.
        folder: The run's folder.
        images: The catalog with its split.
        backbone: The network, passed from stage to stage.
        engine: The compute engine.
        dashboard: Loggers of the run's dashboards.
        processes: The run's distributed processes.
        stop: Whether the run has been asked to stop.
    """

    config: Config
    folder: RunFolder
    images: RunImages
    backbone: Backbone
    engine: Engine
    dashboard: Dashboard
    processes: Processes
    stop: StopRequest
