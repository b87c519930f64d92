"""Summary at the head of a report: its result, training data, best model, significant differences, and warnings."""

from collections.abc import Sequence
from dataclasses import dataclass

from pylorus.core.formatting import join_names
from pylorus.report.candidate import FOLDS, SET, Candidate, format_pool_notes
from pylorus.report.captions import (
    Caveat,
    collect_caveats,
    format_evaluation_counts,
)
from pylorus.report.evidence import Evidence
from pylorus.report.headline import Headline, KeyFigure, build_headline, build_image_figures
from pylorus.report.record_sections import find_stress_records
from pylorus.report.results import Result
from pylorus.report.run_tables import format_split_warnings
from pylorus.runs.folder import DAMAGED
from pylorus.runs.reading import SavedRun

KINDS = {"run": "Report of a run", "sweep": "Report of a sweep", "runs": "Report of several runs"}
STATES = {
    "finished": "did not test all its stages",
    "failed": "failed",
    "interrupted": "was interrupted",
    "stopped": "was stopped",
    "starting": "has not started training yet",
    "running": "is still running",
    "damaged": "has a damaged file and is left out",
}
"""Explains why a run is incomplete, by its state."""

MAX_LABELS = 4
"""Maximum number of labels that are listed; more are counted instead."""


@dataclass(frozen=True)
class Summary:
    """Head of a report.

    Attributes:
        title: Title of the page.
        subtitle: Dates of the runs.
        marks: Caveats, each with the labels of the runs concerned (empty if it concerns all).
        headline: Result of the winner; None without results, or with several test sets.
        findings: Sentences on which model is best, which differences are significant, and what was trained.
        warnings: Sentences on incomplete runs, results that are not compared and the use of the test sets.
        facts: Key figures on the provenance of the results: test images, split, evaluations of the test set.
    """

    title: str
    subtitle: str
    marks: tuple[tuple[Caveat, str], ...]
    headline: Headline | None
    findings: tuple[str, ...]
    warnings: tuple[str, ...]
    facts: tuple[KeyFigure, ...]


def build_summary(evidence: Evidence, *, kind: str) -> Summary:
    """Summarize a report; `kind` is one of `KINDS`."""
    labels = [run.label for run in evidence.runs]
    named = ", ".join(labels) if len(labels) <= MAX_LABELS else f"{len(labels)} runs"
    headline = build_headline(evidence)
    return Summary(
        title=f"{KINDS[kind]}: {named}",
        subtitle=_format_subtitle(evidence.runs),
        marks=_collect_caveats(evidence.runs),
        headline=headline,
        findings=tuple(_collect_findings(evidence)),
        warnings=tuple(_collect_warnings(evidence, headline)),
        facts=_collect_key_figures(evidence),
    )


def _format_subtitle(runs: Sequence[SavedRun]) -> str:
    days = sorted({str(run.status.get("started", ""))[:10] for run in runs} - {""})
    span = f"{days[0]} to {days[-1]}" if len(days) > 1 else "".join(days)
    return f"Started {span}" if span else ""


def _collect_caveats(runs: Sequence[SavedRun]) -> tuple[tuple[Caveat, str], ...]:
    marks = dict.fromkeys(mark for run in runs for mark in collect_caveats(run))
    return tuple(
        (mark, "" if len(marked) == len(runs) else ", ".join(marked))
        for mark in marks
        for marked in [[run.label for run in runs if mark in collect_caveats(run)]]
    )


def _collect_key_figures(evidence: Evidence) -> tuple[KeyFigure, ...]:
    if len(evidence.pools) > 1:
        sets = len(evidence.pools)
        return (
            KeyFigure("Runs", str(len(evidence.runs)), f"{len(evidence.results)} stages tested"),
            KeyFigure("Test sets", str(sets), "which must not be compared with each other"),
        )
    facts = []
    for winner in evidence.winners:
        facts += build_image_figures(winner.preferred or winner.leaders[0], winner.pool)
    for count in evidence.evaluation_counts if len(evidence.tests) == 1 else ():
        total = count.stages + count.epochs + count.other_stages
        detail = "at least; each one makes the best result more optimistic"
        facts.append(KeyFigure("Evaluations of the test set", f"{total}", detail))
    return tuple(facts)


def _collect_findings(evidence: Evidence) -> list[str]:
    sentences = [sentence for winner in evidence.winners for sentence in (winner.choice, winner.verdict)]
    # Only a report whose two criteria disagree has to explain that there is another winner.
    sentences += [each.rule for each in evidence.winners if each.preferred and each.preferred not in each.leaders]
    sentences += _format_training_sentences(evidence)
    if evidence.results:
        sentences.append(_explain_levels(evidence.results))
    return [sentence for sentence in sentences if sentence]


def _format_training_sentences(evidence: Evidence) -> list[str]:
    """Describe the training and its data; one sentence covers all runs of a pool with several splits."""
    sentences: list[str] = []
    pooled: set[SavedRun] = set()
    configurations = {each.label: each for each in evidence.configurations}
    for pool in evidence.pools:
        if pool.kind != SET:
            # All runs of the folds, including folds that other configurations lack.
            candidates = [configurations[each.label].shipped for each in pool.configurations]
            pooled |= {result.run for each in candidates for result in each.results}
            sentences.append(_format_training_on_splits(candidates))
    stages: dict[str, list[str]] = {}  # by what the runs have in common
    for run in evidence.runs:
        if run.split is not None and run not in pooled:
            names = " then ".join(stage.name for stage in run.complete_stages)
            stages.setdefault(_format_training_data(run), []).append(names)
    for data, trained in stages.items():
        alternatives = " or ".join(dict.fromkeys(filter(None, trained)))
        training = f"Models were trained ({alternatives})" if alternatives else "Models were to be trained"
        sentences.append(f"{training} {data}")
    return sentences


def _format_training_on_splits(candidates: Sequence[Candidate]) -> str:
    """Describe the training of runs on several splits."""
    runs = list(dict.fromkeys(result.run for each in candidates for result in each.results))
    tests = {test for each in candidates for test in each.tests}
    splits = [run.split for run in runs if run.split is not None]
    validation = "test" if runs[0].get_setting("data.validation") == "test" else "val"
    sizes = {
        name: _format_range([len(split.get_split_rows(name)) for split in splits])
        for name in ("train", validation, "test")
    }
    kind = "synthetic images" if runs[0].get_setting("data.kind") == "synthetic" else "images"
    stages = " or ".join(dict.fromkeys(" then ".join(stage.name for stage in run.complete_stages) for run in runs))
    rounds = f"{len(tests)} {'folds' if candidates[0].kind == FOLDS else 'splits'}"
    validated = "the test images" if validation == "test" else sizes[validation]
    return (
        f"Models were trained ({stages}) in {rounds}, each on {sizes['train']} {kind} of {len(runs[0].class_names)} "
        f"classes ({', '.join(runs[0].short_names)}), validated on {validated} and tested on {sizes['test']}."
    )


def _format_range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _format_training_data(run: SavedRun) -> str:
    """Describe the images of a run, in the end of a sentence; runs that differ only in the model get the same."""
    assert run.split is not None
    kind = "synthetic images" if run.get_setting("data.kind") == "synthetic" else "images"
    validation = "test" if run.get_setting("data.validation") == "test" else "val"
    sizes = {name: len(run.split.get_split_rows(name)) for name in ("train", validation, "test")}
    validated = "the test images" if validation == "test" else f"{sizes[validation]:,}"
    return (
        f"on {sizes['train']:,} {kind} of {len(run.class_names)} classes "
        f"({', '.join(run.short_names)}), validated on {validated} and tested on {sizes['test']:,} "
        f"(split {run.split.short_hash})."
    )


def _explain_levels(results: Sequence[Result]) -> str:
    if not any(result.run.has_groups for result in results):
        return (
            "All results are image-level: data.group does not identify patients, so several images of one patient "
            "count as if they came from different patients, and confidence intervals may be too narrow."
        )
    if any(result.patients is not None for result in results):
        return (
            "Results are image-level, with confidence intervals that allow for the clustering of images within groups "
            "(patients, or what stands in for them); patient-level results are given in addition."
        )
    return "Results are image-level; as each group (patient) has a single test image, they are also patient-level."


def _collect_split_warnings(runs: Sequence[SavedRun]) -> list[str]:
    """Collect the warnings about each split; for many splits, only count those with warnings."""
    splits = {run.split.sha256: run for run in runs if run.split is not None}
    by_split = {run.split.short_hash: format_split_warnings(run) for run in splits.values() if run.split is not None}
    warned = {cited: sentences for cited, sentences in by_split.items() if sentences}
    if len(by_split) > MAX_LABELS:
        return [
            f"{len(warned)} of {len(by_split)} splits have a class whose proportion in train, val or test differs from "
            'the requested one, or that has few groups there: see "Runs, data and split".'
        ] * bool(warned)
    has_several = len(by_split) > 1
    return [f"Split {cited}: {text}" if has_several else text for cited, texts in warned.items() for text in texts]


def _collect_warnings(evidence: Evidence, headline: Headline | None) -> list[str]:
    sentences = []
    for run in evidence.runs:
        planned, done = len(run.stages), len(run.complete_stages)
        if run.state != "finished" or done < planned:
            error = run.status.get("error") if evidence.options.names else None
            reason = f" Error: {error}" if error else ""
            progress = f"{done} of {planned} stages were tested" if planned else "no stage was tested"
            name = f"Job {run.folder.name}" if run.state == DAMAGED and run.folder.name.isdigit() else run.label
            sentences.append(f"{name} {STATES.get(run.state, run.state)} (state: {run.state}): {progress}.{reason}")
    sentences += _collect_problems(evidence, headline)
    sentences += [
        str(each["findings"][0]) for each in find_stress_records(evidence.runs).values() if each.get("shortcuts")
    ]
    sentences += _collect_split_warnings(evidence.runs)
    sentences += format_pool_notes(evidence.pools, evidence.configurations)
    sentences += format_evaluation_counts(evidence.evaluation_counts)
    if not evidence.results:
        sentences.insert(0, "No stage has test predictions yet, so this report only describes the runs.")
    return sentences


def _collect_problems(evidence: Evidence, headline: Headline | None) -> list[str]:
    """Say which shipped stages are degenerate, or began with random weights, if the verdict does not."""
    verdict = "" if headline is None else headline.verdict
    problems: dict[str, list[str]] = {}
    for result in evidence.results:
        if result.is_shipped:
            for sentence in result.run.explain_problems(result.stage):
                if sentence not in verdict:
                    problems.setdefault(sentence, []).append(result.label)
    return [f"{join_names(labels, most=MAX_LABELS)}: {sentence}" for sentence, labels in problems.items()]
