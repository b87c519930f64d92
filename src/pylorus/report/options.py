"""What a reader may choose of a report."""

from dataclasses import dataclass

from pylorus.errors import PylorusError
from pylorus.evaluation.paired import RESAMPLES

CONFIDENCE = 0.95
"""Coverage of every interval in a report."""

LEVEL = 0.05
"""What a p must stay below to show a difference."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Choices of a report; the defaults show no name and no image.

    Attributes:
        class_name: Short name of the class that a threshold is fixed for; None: the first class.
        sensitivity: The share of that class to be found, in (0, 1].
        published: Whether the published study stands beside our results.
        thumbnails: Whether the worst mistakes are shown as small images.
        names: Whether file names, groups, folders and error messages, which may name patients, are shown.
        resamples: Resamples of each bootstrap, >= 2.
        seed: Of the bootstraps: the same seed gives the same report.

    Raises:
        PylorusError: If sensitivity is not in (0, 1].
    """

    class_name: str | None = None
    sensitivity: float = 0.95
    published: bool = False
    thumbnails: bool = False
    names: bool = False
    resamples: int = RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sensitivity <= 1:
            raise PylorusError(f"--sensitivity: found {self.sensitivity:g}, expected a share in (0, 1], such as 0.95.")
