"""Label each run for tables and figures: its model, and the settings that distinguish it from runs of that model."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pylorus.report.redaction import collect_config_values, redact_value
from pylorus.report.saved_run import SavedRun

UNTOLD = ("data.root", "report", "logger.", "trainer.progress", "trainer.accelerator", "data.workers", "stages.")
"""Keys that never appear in a label: folders, loggers and speed. Stages are distinguished by their names."""

MOST = 3
"""Maximum number of settings in a label."""


def set_run_labels(runs: Sequence[SavedRun], *, untold: Sequence[str] = ()) -> tuple[SavedRun, ...]:
    """Return the runs, each with a unique label and file stem.

    Args:
        runs: The runs; their order is kept.
        untold: Further keys and groups of keys that must not appear in a label.
    """
    names = [run.model.partition(".")[0] for run in runs]
    counts = Counter(names)
    candidates = []
    for name, run in zip(names, runs, strict=True):
        others = [other for other in runs if other is not run and _is_same_model(other, run)]
        candidates.append(
            f"{name} ({', '.join(_collect_differing_settings(run, others, untold))})" if counts[name] > 1 else name
        )
    candidates = [name.removesuffix(" ()") for name in candidates]
    counts = Counter(candidates)
    labels = [
        f"{name} [{run.folder.name}]" if counts[name] > 1 else name for name, run in zip(candidates, runs, strict=True)
    ]
    stems = make_file_stems(labels)
    return tuple(replace(run, label=label, stem=stem) for run, label, stem in zip(runs, labels, stems, strict=True))


def make_file_stems(labels: Sequence[str]) -> list[str]:
    """Convert labels to unique stems for file names: ASCII lower-case letters, digits and hyphens."""
    stems: list[str] = []
    for label in labels:
        stem = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "run"
        duplicates = sum(other == stem or other.startswith(f"{stem}--") for other in stems)
        stems.append(f"{stem}--{duplicates + 1}" if duplicates else stem)
    return stems


def _is_same_model(first: SavedRun, second: SavedRun) -> bool:
    return first.model.partition(".")[0] == second.model.partition(".")[0]


def _collect_differing_settings(run: SavedRun, others: Sequence[SavedRun], untold: Sequence[str]) -> list[str]:
    """List the settings in which a run differs from others of its model, as `key=value` without the key's groups."""
    settings, other_settings = (
        collect_config_values(run.config),
        [collect_config_values(other.config) for other in others],
    )
    stages = [stage.name for stage in run.stages]
    differences = []
    if any([stage.name for stage in other.stages] != stages for other in others) and stages:
        differences.append(" + ".join(stages) if len(stages) > 1 else f"{stages[0]} only")
    for key, value in settings.items():
        if key in untold or key.startswith((*UNTOLD, *(f"{name}." for name in untold))):
            continue
        if any(other.get(key) != value for other in other_settings):
            value_text = run.fold if key == "data.fold" else redact_value(key, value)
            differences.append(f"{key.rpartition('.')[2]}={value_text}")
    return differences[:MOST]
