"""What an audit works on and reports: the image set, and findings with their severity, remedy and files."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import pandas as pd

from pylorus.data.files import Root

Severity: TypeAlias = Literal["leak", "error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("leak", "error", "warning", "note")
"""The most severe first. A leak invalidates the test, an error makes training wrong or impossible."""
STOPPING: tuple[Severity, ...] = ("leak", "error")
"""An image set with one of these is not fit for training."""


@dataclass(frozen=True)
class Item:
    """One occurrence of a finding.

    Attributes:
        files: Indices of the files in the image set's table: one file, or several that belong together.
        detail: What was found there, without names of files or patients; may be empty.
        group: The patient concerned; empty if there is none.
        content: Bytes of the file quoted in an error message, not to be shared; may be empty.
    """

    files: tuple[int, ...]
    detail: str = ""
    group: str = ""
    content: str = ""


@dataclass(frozen=True)
class Finding:
    """One kind of problem.

    Attributes:
        code: Machine-readable name, such as `near-copy-across-splits`.
        severity: One of SEVERITIES.
        sentence: What is wrong, with a count, without names of files or patients.
        mend: How to fix it.
        items: Occurrences, the most severe first; empty if it concerns the set as a whole.
    """

    code: str
    severity: Severity
    sentence: str
    mend: str
    items: tuple[Item, ...] = ()

    @property
    def is_blocking(self) -> bool:
        """Whether it must be fixed before training."""
        return self.severity in STOPPING


def sort_by_severity(findings: list[Finding]) -> tuple[Finding, ...]:
    """Sort findings by severity, the most severe first; the order is stable."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


@dataclass(frozen=True)
class ImageSet:
    """Files of an image set.

    Attributes:
        root: What the paths are relative to.
        table: One row per file: path, class, split (train, val, test or empty), group (empty if none was found);
            its index counts from 0.
        grouped: Whether groups are patients; else every image is its own group.
    """

    root: Root
    table: pd.DataFrame
    grouped: bool

    @property
    def has_split(self) -> bool:
        """Whether folders or a manifest define a split."""
        return bool((self.table["split"] != "").any())
