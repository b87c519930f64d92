"""The audit of an image set: what is wrong with it, as plain values; no file is opened here."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from pylorus import __version__
from pylorus.data.audit.copy_findings import copy_findings
from pylorus.data.audit.duplicates import Copies, find_copies
from pylorus.data.audit.field_findings import SeenField, field_findings
from pylorus.data.audit.file_findings import file_findings
from pylorus.data.audit.findings import SEVERITIES, Finding, Item, in_order
from pylorus.data.audit.group_findings import set_findings
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.audit.look_findings import look_findings
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.facts import Facts, column_of
from pylorus.data.image import POLICY_VERSION
from pylorus.data.reading import sample_id

FORMAT = 1
"""Of audit.json; counts up when a reader of the old one would go wrong."""


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        images: What was looked at.
        samples: Id of each file, by which it is told where no name may be.
        readable: How many files give an image.
        findings: The gravest first.
        fields: Fields of view of some images.
        thresholds: From where on something was said.
    """

    images: ImageSet
    samples: tuple[str, ...]
    readable: int
    findings: tuple[Finding, ...]
    fields: tuple[SeenField, ...]
    thresholds: Thresholds

    @property
    def counts(self) -> dict[str, int]:
        """Findings of each severity."""
        return {name: sum(finding.severity == name for finding in self.findings) for name in SEVERITIES}

    @property
    def exit_code(self) -> int:
        """1 where there is a leak or an error, else 0."""
        return int(any(finding.stops for finding in self.findings))

    @property
    def sizes(self) -> pd.DataFrame:
        """Files by class and part: rows are classes, columns parts; without parts one column with an empty name."""
        table = self.images.table
        found = pd.crosstab(table["class"], table["split"])
        return found[[name for name in ("train", "val", "test", "") if name in found]]


def audit(
    images: ImageSet,
    facts: Sequence[Facts],
    thresholds: Thresholds,
    *,
    fields: Sequence[SeenField] = (),
    copies: Copies | None = None,
) -> Audit:
    """What is wrong with an image set.

    Args:
        images: Its files.
        facts: Of each file, in the order of the table.
        thresholds: From where on something is said.
        fields: Fields of view of some of them, from `look_for_fields`.
        copies: What `find_copies` found, where that is known already.

    Raises:
        ValueError: If there are not as many facts as files.
    """
    if len(facts) != len(images.table):
        raise ValueError(f"found {len(facts)} facts, expected {len(images.table)}: one a file.")
    findings = [
        *copy_findings(images, copies if copies is not None else find_copies(facts, thresholds)),
        *set_findings(images, thresholds),
        *file_findings(images, facts, thresholds),
        *look_findings(images, facts, thresholds),
        *field_findings(fields),
    ]
    digests = column_of(facts, "sha256")
    samples = tuple(sample_id(path, digest) for path, digest in zip(images.table["path"], digests, strict=True))
    readable = sum(not problem for problem in column_of(facts, "problem"))
    return Audit(images, samples, readable, in_order(findings), tuple(fields), thresholds)


def as_json(found: Audit, *, names: bool) -> dict[str, Any]:
    """An audit as plain values.

    Args:
        found: The audit.
        names: Whether paths, the root and groups are named; else files are told by sample id, groups by a number.
    """
    group_numbers = numbered_groups(found)
    return {
        "format": FORMAT,
        "pylorus": __version__,
        "decoder": POLICY_VERSION,
        "root": str(found.images.root) if names else None,
        "named": names,
        "grouped": found.images.grouped,
        "files": len(found.images.table),
        "readable": found.readable,
        "counts": found.counts,
        "sizes": {
            str(name): {str(part) or "all": int(count) for part, count in row.items()}
            for name, row in found.sizes.iterrows()
        },
        "thresholds": asdict(found.thresholds),
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "sentence": finding.sentence,
                "mend": finding.mend,
                "items": [_item_json(found, item, group_numbers, names=names) for item in finding.items],
            }
            for finding in found.findings
        ],
    }


def numbered_groups(found: Audit) -> dict[str, str]:
    """What stands for each group where none may be named: a hash of a patient's number could be guessed."""
    groups = dict.fromkeys(item.group for finding in found.findings for item in finding.items if item.group)
    return {group: f"group {number}" for number, group in enumerate(sorted(groups), start=1)}


def _item_json(found: Audit, item: Item, group_numbers: Mapping[str, str], *, names: bool) -> dict[str, Any]:
    paths = found.images.table["path"]
    said: dict[str, Any] = {"samples": [found.samples[index] for index in item.files]}
    if names:
        # JSON is UTF-8: bytes of a name that are none are written as escapes.
        said["paths"] = [
            str(paths.iloc[index]).encode("utf-8", "backslashreplace").decode("utf-8") for index in item.files
        ]
    if item.detail or item.content:
        said["detail"] = ": ".join(filter(None, (item.detail, item.content if names else "")))
    if item.group:
        said["group"] = item.group if names else group_numbers[item.group]
    return said
