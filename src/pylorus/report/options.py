"""What a reader may choose of a report."""

from dataclasses import dataclass

from pylorus.errors import PylorusError
from pylorus.evaluation.comparison import RESAMPLES

CONFIDENCE = 0.95
"""Coverage of every interval in a report."""

LEVEL = 0.05
"""What a p must stay below to show a difference."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Choices of a report; the defaults show no name and no image.

    Attributes:
        class_name: Short name of the class that a threshold is fixed for; None: the class that decides in the first
            run's bundle.
        sensitivity: Which that threshold is to guarantee for new patients, in (0, 1]; None: that of the first run's
            bundle.
        guarantee: Confidence with which it is to guarantee it, in (0, 1); None: that of the first run's bundle.
        published: Whether the published study stands beside our results.
        thumbnails: Whether the worst mistakes are shown as small images.
        names: Whether file names, groups, folders and error messages, which may name patients, are shown.
        resamples: Random exchanges of two models' answers for a test of macro F1 and its like, >= 1.
        seed: Of these exchanges and of permutations: the same seed gives the same report.

    Raises:
        PylorusError: If sensitivity is not in (0, 1], or guarantee is not in (0, 1).
    """

    class_name: str | None = None
    sensitivity: float | None = None
    guarantee: float | None = None
    published: bool = False
    thumbnails: bool = False
    names: bool = False
    resamples: int = RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sensitivity is not None and not 0 < self.sensitivity <= 1:
            raise PylorusError(f"--sensitivity: found {self.sensitivity:g}, expected a share in (0, 1], such as 0.95.")
        if self.guarantee is not None and not 0 < self.guarantee < 1:
            raise PylorusError(f"--guarantee: found {self.guarantee:g}, expected a share in (0, 1), such as 0.9.")
