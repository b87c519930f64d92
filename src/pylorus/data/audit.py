"""Audit an image set: collect findings from the facts of its files, and convert them to JSON; no file is opened."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from pylorus import __version__
from pylorus.data.audit_checks import check_classes_and_groups, check_copies, check_files
from pylorus.data.audit_findings import SEVERITIES, Finding, ImageSet, Item, Thresholds, sort_by_severity
from pylorus.data.audit_image_checks import FieldSample, check_fields, check_image_quality
from pylorus.data.catalog import compute_sample_id
from pylorus.data.decode import POLICY_VERSION
from pylorus.data.image_facts import Facts, extract_fact_column
from pylorus.data.leakage import Copies, find_copies

FORMAT = 1
"""Version of audit.json; increment when readers of the previous version would fail."""


@dataclass(frozen=True)
class Audit:
    """Result of an audit.

    Attributes:
        images: The files that were audited.
        samples: Sample id of each file, which identifies it where names must not appear.
        readable: Number of files that can be decoded.
        findings: All findings, the most severe first.
        fields: Fields of view of some images.
        thresholds: Limits that the audit used.
    """

    images: ImageSet
    samples: tuple[str, ...]
    readable: int
    findings: tuple[Finding, ...]
    fields: tuple[FieldSample, ...]
    thresholds: Thresholds

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings of each severity."""
        return {name: sum(finding.severity == name for finding in self.findings) for name in SEVERITIES}

    @property
    def exit_code(self) -> int:
        """1 if there is a leak or an error, else 0."""
        return int(any(finding.is_blocking for finding in self.findings))

    @property
    def sizes(self) -> pd.DataFrame:
        """Number of files by class (rows) and split (columns); without splits, one column with an empty name."""
        table = self.images.table
        counts = pd.crosstab(table["class"], table["split"])
        return counts[[name for name in ("train", "val", "test", "") if name in counts]]


def audit(
    images: ImageSet,
    facts: Sequence[Facts],
    thresholds: Thresholds,
    *,
    fields: Sequence[FieldSample] = (),
    copies: Copies | None = None,
) -> Audit:
    """Run all checks on an image set.

    Args:
        images: Files of the image set.
        facts: Facts of each file, in the order of the table.
        thresholds: Limits of the checks.
        fields: Fields of view of some of the files, from `look_for_fields`.
        copies: Result of `find_copies`; None: copies are searched for.

    Raises:
        ValueError: If the number of facts differs from the number of files.
    """
    if len(facts) != len(images.table):
        raise ValueError(f"found {len(facts)} facts, expected {len(images.table)}: one per file.")
    findings = [
        *check_copies(images, copies if copies is not None else find_copies(facts, thresholds)),
        *check_classes_and_groups(images, thresholds),
        *check_files(images, facts, thresholds),
        *check_image_quality(images, facts, thresholds),
        *check_fields(fields),
    ]
    digests = extract_fact_column(facts, "sha256")
    samples = tuple(compute_sample_id(path, digest) for path, digest in zip(images.table["path"], digests, strict=True))
    readable = int((extract_fact_column(facts, "problem") == "").sum())
    return Audit(images, samples, readable, sort_by_severity(findings), tuple(fields), thresholds)


def convert_audit_to_json(result: Audit, *, names: bool) -> dict[str, Any]:
    """Convert an audit to JSON-compatible values.

    Args:
        result: The audit.
        names: Whether to name paths, the root and groups; else files are identified by sample ids, groups by numbers.
    """
    group_aliases = build_group_aliases(result)
    return {
        "format": FORMAT,
        "pylorus": __version__,
        "decoder": POLICY_VERSION,
        "root": str(result.images.root) if names else None,
        "named": names,
        "grouped": result.images.grouped,
        "files": len(result.images.table),
        "readable": result.readable,
        "counts": result.counts,
        "sizes": {
            str(name): {str(part) or "all": int(count) for part, count in row.items()}
            for name, row in result.sizes.iterrows()
        },
        "thresholds": asdict(result.thresholds),
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "sentence": finding.sentence,
                "mend": finding.remedy,
                "items": [_convert_item_to_json(result, item, group_aliases, names=names) for item in finding.items],
            }
            for finding in result.findings
        ],
    }


def build_group_aliases(result: Audit) -> dict[str, str]:
    """Return an alias of each group for use where names must not appear: hashes could be reversed by guessing."""
    groups = dict.fromkeys(item.group for finding in result.findings for item in finding.items if item.group)
    return {group: f"group {number}" for number, group in enumerate(sorted(groups), start=1)}


def _convert_item_to_json(
    result: Audit, item: Item, group_aliases: Mapping[str, str], *, names: bool
) -> dict[str, Any]:
    values: dict[str, Any] = {"samples": [result.samples[index] for index in item.files]}
    if names:
        # JSON is UTF-8: bytes of a name that are not UTF-8 are escaped.
        paths = result.images.get_values("path", item.files)
        values["paths"] = [path.encode("utf-8", "backslashreplace").decode("utf-8") for path in paths]
    if item.detail or item.content:
        values["detail"] = ": ".join(filter(None, (item.detail, item.content if names else "")))
    if item.group:
        values["group"] = item.group if names else group_aliases[item.group]
    return values
