"""Options of a report."""

from dataclasses import dataclass

from pylorus.errors import PylorusError
from pylorus.evaluation.comparison import RESAMPLES

CONFIDENCE = 0.95
"""Coverage of every interval in a report."""

LEVEL = 0.05
"""Significance level: a difference is significant if its p-value is below it."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of a report; the defaults show no name and no image.

    Attributes:
        class_name: Short or full name of the class for which a threshold is fixed; None: the deciding class of the
            first run's configuration (deploy.class_name).
        sensitivity: True sensitivity that this threshold has to guarantee for new patients, in (0, 1]; None: that of
            the first run (deploy.sensitivity).
        guarantee: Confidence of this guarantee, in (0, 1); None: that of the first run (deploy.confidence).
        published: Whether to compare with the results of the published study.
        thumbnails: Whether to show the worst mistakes as small images.
        names: Whether to show file names, groups, folders and error messages, which may name patients.
        resamples: Number of random exchanges of two models' predictions in tests of macro F1 and similar indices, >= 1.
        seed: Random seed of these exchanges and of permutation tests: the same seed gives the same report.

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
            raise PylorusError(
                f"--sensitivity: found {self.sensitivity:g}, expected a proportion in (0, 1], such as 0.95."
            )
        if self.guarantee is not None and not 0 < self.guarantee < 1:
            raise PylorusError(f"--guarantee: found {self.guarantee:g}, expected a proportion in (0, 1), such as 0.9.")
