"""What an audit says: findings, each with how grave it is, what mends it, and the files that it is about."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["leak", "error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("leak", "error", "warning", "note")
"""From the gravest on. A leak makes a test worthless, an error makes training wrong or impossible."""
STOPPING: tuple[Severity, ...] = ("leak", "error")
"""With one of these an image set is not fit to train on."""


@dataclass(frozen=True)
class Item:
    """One thing that a finding is about.

    Attributes:
        files: Positions of the files in the image set's table: one file, or those that belong together.
        detail: What was found there, without any name of a file or a patient; may be empty.
        group: The patient that it is about; empty where it is about none.
        content: What the file's own bytes say, as in an error's message: not for passing on; may be empty.
    """

    files: tuple[int, ...]
    detail: str = ""
    group: str = ""
    content: str = ""


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Attributes:
        code: Its name for machines, such as `near-copy-across-splits`.
        severity: One of SEVERITIES.
        sentence: What is wrong, with its count and without any name of a file or a patient.
        mend: What to do about it.
        items: Where, the gravest first; empty where it is about the set as a whole.
    """

    code: str
    severity: Severity
    sentence: str
    mend: str
    items: tuple[Item, ...] = ()

    @property
    def stops(self) -> bool:
        """Whether it must be mended before training."""
        return self.severity in STOPPING


def in_order(findings: list[Finding]) -> tuple[Finding, ...]:
    """The gravest first; equally grave ones as they came."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "image"), counted(1200, "image"), counted(2, "copy", "copies")
        ('1 image', '1,200 images', '2 copies')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
