"""The summary: what was trained on what, who is best, what is shown and what is not."""

from collections.abc import Sequence
from dataclasses import dataclass

from pylorus.report.candidate import FOLDS, SET, Candidate, Pool, describe_pools
from pylorus.report.evidence import Evidence
from pylorus.report.looks import look_sentences
from pylorus.report.marks import Mark, marks_of
from pylorus.report.result import Result
from pylorus.report.run_tables import split_warnings
from pylorus.report.saved_run import SavedRun
from pylorus.report.table import DASH, in_percent
from pylorus.report.winner import Winner
from pylorus.runs.shipped import KEY, LAST

KINDS = {"run": "Report of a run", "sweep": "Report of a sweep", "runs": "Report of several runs"}
STATES = {
    "finished": "did not test all its stages",
    "failed": "failed",
    "interrupted": "was interrupted",
    "stopped": "was stopped",
    "starting": "has not begun",
    "running": "is still running",
}
"""What became of a run that has not given all it should, by its state."""

MANY = 4
"""Labels beyond this number are counted, not listed."""


@dataclass(frozen=True)
class Fact:
    """One figure at the head of the page: what it is, the figure, what it rests on."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True)
class Summary:
    """The head of a report.

    Attributes:
        title: Of the page.
        subtitle: Of what, when.
        marks: What a reader must know first, each with the runs that it is about.
        facts: The figures that matter.
        findings: Sentences: what was done, who is best, what is shown.
        warnings: Sentences: what did not finish, what is not compared, how often the test set was looked at.
    """

    title: str
    subtitle: str
    marks: tuple[tuple[Mark, str], ...]
    facts: tuple[Fact, ...]
    findings: tuple[str, ...]
    warnings: tuple[str, ...]


def summarize(evidence: Evidence, *, kind: str) -> Summary:
    """The summary of a run, a sweep or several runs."""
    labels = [run.label for run in evidence.runs]
    named = ", ".join(labels) if len(labels) <= MANY else f"{len(labels)} runs"
    return Summary(
        title=f"{KINDS[kind]}: {named}",
        subtitle=_subtitle(evidence.runs),
        marks=_marks(evidence.runs),
        facts=_facts(evidence),
        findings=tuple(_findings(evidence)),
        warnings=tuple(_warnings(evidence)),
    )


def _subtitle(runs: Sequence[SavedRun]) -> str:
    days = sorted({str(run.status.get("started", ""))[:10] for run in runs} - {""})
    span = f"{days[0]} to {days[-1]}" if len(days) > 1 else "".join(days)
    return f"Started {span}" if span else ""


def _marks(runs: Sequence[SavedRun]) -> tuple[tuple[Mark, str], ...]:
    marks = dict.fromkeys(mark for run in runs for mark in marks_of(run))
    return tuple(
        (mark, "" if len(marked) == len(runs) else ", ".join(marked))
        for mark in marks
        for marked in [[run.label for run in runs if mark in marks_of(run)]]
    )


def _facts(evidence: Evidence) -> tuple[Fact, ...]:
    if len(evidence.pools) > 1:
        sets = len(evidence.pools)
        return (
            Fact("Runs", str(len(evidence.runs)), f"{len(evidence.results)} stages tested"),
            Fact("Test sets", str(sets), "not to be compared with each other"),
        )
    facts = []
    for winner in evidence.winners:
        chosen = winner.preferred or winner.leaders[0]
        how = _describe_choice(winner)
        facts += [_accuracy_fact(chosen, how), *_image_facts(chosen, winner.pool)]
    for looks in evidence.looks if len(evidence.tests) == 1 else ():
        total = looks.here + looks.epochs + looks.elsewhere
        facts.append(Fact("Looks at the test set", f"{total}", "known; each makes the best figure more optimistic"))
    return tuple(facts)


def _accuracy_fact(chosen: Candidate, how: str) -> Fact:
    accuracy = in_percent(chosen.accuracy)
    interval = f"{accuracy.interval_text}; " if accuracy.interval_text not in ("", DASH) else ""
    if chosen.kind == SET:
        name, over = "Test accuracy", f", mean of {chosen.replicate_words}" if chosen.replicates > 1 else ""
    elif chosen.kind == FOLDS:
        name, over = "Accuracy, folds pooled", f", {chosen.replicate_words}"
    else:
        name, over = "Mean test accuracy", f", {chosen.replicate_words}"
    return Fact(name, f"{accuracy.value_text} %", f"{interval}{chosen.label}{over}, {how}")


def _image_facts(chosen: Candidate, pool: Pool) -> list[Fact]:
    test = chosen.representative.test
    if pool.kind == SET:
        groups = f"of {test.groups:,} groups" if test.clusters is not None else "each its own group"
        return [
            Fact("Test images", f"{test.images:,}", groups),
            Fact("Split", chosen.representative.split, "first digits of the SHA-256 of split.csv"),
        ]
    if pool.kind == FOLDS:
        predictions = chosen.pooled[0]
        number = len(set(predictions.group.tolist()))
        words = f"of {number:,} groups" if number < len(predictions.true) else "each its own group"
        folds = f"{len(chosen.rounds[0])} of {chosen.wanted_folds}"
        return [
            Fact("Test images", f"{len(predictions.true):,}", f"{words}, each tested in one fold"),
            Fact("Folds", folds, "a split of its own each"),
        ]
    return [Fact("Splits", str(len(chosen.by_test)), "with test images that overlap")]


def _describe_choice(winner: Winner) -> str:
    """By what the candidate at the head was chosen, in few words."""
    if winner.chosen is None:
        return "by test accuracy"
    shipped = winner.chosen.run.shipped
    if len(winner.pool.configurations) == 1 and shipped is not None and shipped.chosen_by in (KEY, LAST):
        return "named by deploy.stage" if shipped.chosen_by == KEY else "the last stage, which the bundle holds"
    on_test = winner.chosen.run.setting("data.validation") == "test"
    return "chosen by accuracy on these very images" if on_test else "chosen by validation accuracy"


def _findings(evidence: Evidence) -> list[str]:
    sentences = _training_sentences(evidence)
    for winner in evidence.winners:
        sentences += [winner.rule, winner.verdict, winner.choice]
    if evidence.results:
        sentences.append(_levels(evidence.results))
    return [sentence for sentence in sentences if sentence]


def _training_sentences(evidence: Evidence) -> list[str]:
    """What was trained on what; one sentence for all runs of a pool with several splits."""
    sentences: list[str] = []
    pooled: set[SavedRun] = set()
    every = {each.label: each for each in evidence.configurations}
    for pool in evidence.pools:
        if pool.kind != SET:
            # Of folds all runs, also those of folds that others lack.
            candidates = [every[each.label].shipped for each in pool.configurations]
            pooled |= {result.run for each in candidates for result in each.results}
            sentences.append(_trained_on_several(candidates))
    sentences += dict.fromkeys(_trained(run) for run in evidence.runs if run.split is not None and run not in pooled)
    return sentences


def _trained_on_several(candidates: Sequence[Candidate]) -> str:
    """What the runs of several splits were trained on."""
    runs = list(dict.fromkeys(result.run for each in candidates for result in each.results))
    tests = {test for each in candidates for test in each.tests}
    splits = [run.split for run in runs if run.split is not None]
    part = "test" if runs[0].setting("data.validation") == "test" else "val"
    sizes = {name: _range([len(split.part(name)) for split in splits]) for name in ("train", part, "test")}
    kind = "drawn images" if runs[0].setting("data.kind") == "synthetic" else "images"
    stages = " or ".join(dict.fromkeys(" then ".join(stage.name for stage in run.finished_stages) for run in runs))
    parts = f"{len(tests)} {'folds' if candidates[0].kind == FOLDS else 'splits'}"
    validated = "the test images" if part == "test" else sizes[part]
    return (
        f"Trained ({stages}) in {parts}, each on {sizes['train']} {kind} of {len(runs[0].class_names)} classes "
        f"({', '.join(runs[0].short_names)}), validated on {validated}, tested on {sizes['test']}."
    )


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _trained(run: SavedRun) -> str:
    """What was trained on what; the same words for runs that differ in the model alone."""
    assert run.split is not None
    kind = "drawn images" if run.setting("data.kind") == "synthetic" else "images"
    part = "test" if run.setting("data.validation") == "test" else "val"
    sizes = {name: len(run.split.part(name)) for name in ("train", part, "test")}
    validated = "the test images" if part == "test" else f"{sizes[part]:,}"
    stages = " then ".join(stage.name for stage in run.finished_stages)
    done = f"Trained ({stages})" if stages else "Meant to be trained"
    return (
        f"{done} on {sizes['train']:,} {kind} of {len(run.class_names)} classes "
        f"({', '.join(run.short_names)}), validated on {validated}, tested on {sizes['test']:,}; "
        f"split {run.split.cited}."
    )


def _levels(results: Sequence[Result]) -> str:
    if not any(result.run.grouped for result in results):
        return (
            "All figures are image-level: data.group names no patients, so several images of one patient count as if "
            "they were of several, and intervals may be too narrow."
        )
    if any(result.patients is not None for result in results):
        return (
            "Figures are image-level, with intervals that keep the images of a group (the "
            "patient, or what stands in for one) together; patient-level figures stand beside them."
        )
    return "Figures are image-level; each group (patient) has one test image, so they are patient-level too."


def _split_warnings(runs: Sequence[SavedRun]) -> list[str]:
    """What is to be known of each split, once; of many splits only how many have such a warning."""
    splits = {run.split.sha256: run for run in runs if run.split is not None}
    found = {run.split.cited: split_warnings(run) for run in splits.values() if run.split is not None}
    warned = {cited: sentences for cited, sentences in found.items() if sentences}
    if len(found) > MANY:
        return [
            f"{len(warned)} of {len(found)} splits have a class that is not in its share in a part, or few groups of "
            'it: see "Runs, data and split".'
        ] * bool(warned)
    prefix = len(found) > 1
    return [f"Split {cited}: {text}" if prefix else text for cited, texts in warned.items() for text in texts]


def _warnings(evidence: Evidence) -> list[str]:
    said = []
    for run in evidence.runs:
        planned, done = len(run.stages), len(run.finished_stages)
        if run.state != "finished" or done < planned:
            error = run.status.get("error") if evidence.options.names else None
            why = f" Its error: {error}" if error else ""
            told = f"{done} of {planned} stages were tested" if planned else "no stage was tested"
            said.append(f"{run.label} {STATES.get(run.state, run.state)} (state: {run.state}): {told}.{why}")
    said += _split_warnings(evidence.runs)
    said += describe_pools(evidence.pools, evidence.configurations)
    said += look_sentences(evidence.looks)
    if not evidence.results:
        said.insert(0, "No stage predicted test images yet: there is nothing to report but the runs themselves.")
    return said
