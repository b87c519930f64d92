"""What the stages of a run share."""

from dataclasses import dataclass

from pylorus.config import Config
from pylorus.dashboard import Dashboard
from pylorus.data.prepare import Images
from pylorus.machine import Engine
from pylorus.model.backbone import Backbone
from pylorus.parallel.processes import Processes
from pylorus.run_folder import RunFolder
from pylorus.signals import Stop


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
