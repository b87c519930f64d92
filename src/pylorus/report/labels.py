"""What tables and figures call each run: its model, and what sets it apart from others of that model."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pylorus.report.redaction import flat, redacted
from pylorus.report.saved_run import SavedRun

UNTOLD = ("data.root", "report", "logger.", "trainer.progress", "trainer.accelerator", "data.workers", "stages.")
"""Keys that never set a run apart in a label: folders, views and speed; stages are told by their names."""

MOST = 3
"""Most settings that a label tells."""


def labelled(runs: Sequence[SavedRun], *, untold: Sequence[str] = ()) -> tuple[SavedRun, ...]:
    """The runs, each with a label that no other has.

    Args:
        runs: In their order.
        untold: Further keys and groups of keys that no label tells.
    """
    names = [run.model.partition(".")[0] for run in runs]
    often = Counter(names)
    told = []
    for name, run in zip(names, runs, strict=True):
        others = [other for other in runs if other is not run and _same(other, run)]
        told.append(f"{name} ({', '.join(_apart(run, others, untold))})" if often[name] > 1 else name)
    told = [name.removesuffix(" ()") for name in told]
    often = Counter(told)
    labels = [f"{name} [{run.folder.name}]" if often[name] > 1 else name for name, run in zip(told, runs, strict=True)]
    stems = make_stems(labels)
    return tuple(replace(run, label=label, stem=stem) for run, label, stem in zip(runs, labels, stems, strict=True))


def make_stems(labels: Sequence[str]) -> list[str]:
    """Labels for names of files: ASCII letters, digits and hyphens, each once."""
    stems: list[str] = []
    for label in labels:
        stem = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "run"
        taken = sum(other == stem or other.startswith(f"{stem}--") for other in stems)
        stems.append(f"{stem}--{taken + 1}" if taken else stem)
    return stems


def _same(first: SavedRun, second: SavedRun) -> bool:
    return first.model.partition(".")[0] == second.model.partition(".")[0]


def _apart(run: SavedRun, others: Sequence[SavedRun], untold: Sequence[str]) -> list[str]:
    """Settings of a run that not all others of its model share, as `key=value` with the key's last part."""
    own, theirs = flat(run.config), [flat(other.config) for other in others]
    stages = [stage.name for stage in run.stages]
    found = []
    if any([stage.name for stage in other.stages] != stages for other in others) and stages:
        found.append(" + ".join(stages) if len(stages) > 1 else f"{stages[0]} only")
    for key, value in own.items():
        if key in untold or key.startswith((*UNTOLD, *(f"{name}." for name in untold))):
            continue
        if any(other.get(key) != value for other in theirs):
            value_text = run.fold if key == "data.fold" else redacted(key, value)
            found.append(f"{key.rpartition('.')[2]}={value_text}")
    return found[:MOST]
