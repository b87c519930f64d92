"""What the stages of a run share."""

from dataclasses import dataclass

from pylorus.config import Config
from pylorus.data.prepare import Images
from pylorus.machine.engine import Engine
from pylorus.model.backbone import Backbone
from pylorus.parallel.processes import Processes
from pylorus.runs.dashboard import Dashboard
from pylorus.runs.folder import RunFolder
from pylorus.runs.signals import Stop


@dataclass(frozen=True)
class Run:
    """What the stages of a run share.

    Attributes:
        config: All of it.
        folder: Where it is written down.
        images: Split.
        backbone: Whose network goes from stage to stage.
        engine: What it computes on.
        dashboard: Where it is shown.
        processes: Who computes it.
        stop: Whether it is asked to end.
    """

    config: Config
    folder: RunFolder
    images: Images
    backbone: Backbone
    engine: Engine
    dashboard: Dashboard
    processes: Processes
    stop: Stop
