"""What is said of an ensemble: in its model card, on the console and on its page."""

import time
from collections.abc import Sequence
from pathlib import Path

from pylorus.core.formatting import format_bytes, format_count, format_number
from pylorus.deploy.card import (
    format_markdown,
    format_share,
    format_source,
    format_voters,
    get_fitting_images,
    get_measured_images,
    render_table,
)
from pylorus.deploy.description import OUT_OF_FOLD, Description, Ensemble, Gain, IntervalEstimate
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.wording import format_gain_sentence
from pylorus.report.headline import KeyFigure
from pylorus.report.mistakes import Section, Sentences
from pylorus.report.page import write_page
from pylorus.report.summary import Summary
from pylorus.report.table import (
    Cell,
    Column,
    Table,
    convert_to_number_cell,
    convert_to_percent_cell,
    create_rows,
    create_text_columns,
)


def render_training_section(description: Description) -> str:
    """Return the section of the model card on the networks and on what they are as an ensemble, in Markdown."""
    ensemble = get_ensemble(description)
    cells = _list_member_cells(ensemble)
    rows = [
        [*map(format_markdown, row), format_share(member.accuracy), format_source(member.weights)]
        for *row, member in zip(*cells.values(), ensemble.members, strict=True)
    ]
    titles = [*cells, "accuracy on its run's test images", "trained from"]
    losses = ", ".join(dict.fromkeys(format_markdown(member.training.loss) for member in ensemble.members))
    digests = "\n".join(f"- {number}: `{member.bundle}`" for number, member in enumerate(ensemble.members))
    return (
        f"{len(ensemble.members)} networks, each trained by a run of its own, minimizing {losses}:\n\n"
        f"{render_table(titles, rows)}\n\nSHA-256 of the SHA256SUMS of the bundle of each:\n\n{digests}\n\n"
        "## Ensemble\n\n" + "\n\n".join(f"{sentence}" for sentence in format_ensemble_sentences(description))
    )


def get_ensemble(description: Description) -> Ensemble:
    """Return what a description says of its networks; it is that of an ensemble."""
    assert description.ensemble is not None
    return description.ensemble


def _list_member_cells(ensemble: Ensemble) -> dict[str, list[str]]:
    """Return the columns of a table of the networks by title, with one cell for each; those without content are out."""
    members = ensemble.members
    columns = {
        "network": [str(number) for number in range(len(members))],
        "architecture": [member.architecture for member in members],
        "seed": [str(member.training.seed) for member in members],
        "fold": ["" if member.fold is None else str(member.fold) for member in members],
        "training images": [f"{sum(member.training.images['train']):,}" for member in members],
        "stage": [f"{member.shipped.name}, epoch {member.training.stages[-1].best_epoch}" for member in members],
        "temperature": [format_number(member.calibration.temperature, 3) for member in members],
    }
    return {title: cells for title, cells in columns.items() if any(cells)}


def format_ensemble_sentences(description: Description) -> list[str]:
    """Return what an ensemble computes, on what it was measured, what averaging gains and what it costs."""
    ensemble, calibration = get_ensemble(description), description.calibration
    count, images = len(ensemble.members), get_fitting_images(description)
    scaled = (
        f"divided by a temperature of {format_number(calibration.temperature, 3)}, fitted on {calibration.images:,} "
        f"{images}"
        if calibration.identified
        else f"not changed: the {calibration.images:,} {images} determine no temperature"
    )
    sentences = [
        f"The logits of each of {count} networks are divided by that network's own temperature; softmax gives its "
        f"probabilities, of which the mean over the networks is taken. The logarithm of this mean is {scaled}; softmax "
        "gives the probabilities of the ensemble. Its unlikeness is the mean of that of the networks.",
        _format_measurement(description, ensemble),
    ]
    if ensemble.left_out:
        sentences.append(
            f"{format_count(ensemble.left_out, 'test image')} of their runs left out, as every network was developed "
            "on the image or on others of its patient."
        )
    sentences += [_format_gain(gain, ensemble.gain_images) for gain in ensemble.gains]
    if not ensemble.gains:
        sentences.append(
            "What averaging gains is not known, since no image has the votes of two networks. Several seeds of each "
            "fold, or of one split, would show it."
        )
    cost = ensemble.cost
    sentences.append(
        f"Cost: {cost.parameters:,} parameters in {format_bytes(cost.bytes)}, and {cost.milliseconds:.3g} ms for one "
        f"image on {cost.device}, {cost.times_member:.2f} times as long as its networks take on average."
    )
    return sentences


def _format_measurement(description: Description, ensemble: Ensemble) -> str:
    """State which images the thresholds and the figures are of, and which networks judged them."""
    count, voters = len(ensemble.members), format_voters(ensemble)
    everyone = "both" if count == 2 else f"all {count}"
    if description.training.validated_on != OUT_OF_FOLD:
        who = f"{everyone} networks" if min(ensemble.voters) == count else f"{voters} of {count} networks"
        return (
            f"Temperature, thresholds and abstention were fixed on {description.calibration.images:,} validation "
            f"images; the figures are of {description.test.images:,} test images. Each is judged by {who}, of which "
            "none was trained on it."
        )
    return (
        "Each image is judged only by networks whose run kept it and its patient out of training and validation: "
        f"{voters} of {count}. Temperature, thresholds and abstention were fixed on these {description.test.images:,} "
        "out-of-fold images; in the figures, those for each patient's images were fixed on other patients. So all "
        f"figures, and what the thresholds guarantee, are those of {voters} of the networks at a time. How the average "
        f"of {everyone} performs on new images is not known; an evaluation on images that none of them was trained on "
        "would show it."
    )


def _format_gain(gain: Gain, images: int) -> str:
    """State what averaging gains on so many images, and of which scores it is shown."""
    sentence = format_gain_sentence(
        *map(_convert_estimate, (gain.accuracy, gain.balanced_accuracy, gain.brier, gain.log_loss)),
        against=_format_other(gain),
        images=images,
    )
    if gain.best is not None:
        return sentence
    return (
        f"{sentence} Before its temperature, a mean of probabilities never has a higher Brier score or log loss than "
        "its parts have on average, whatever the images; with it, it may."
    )


def _format_other(gain: Gain) -> str:
    if gain.best is None:
        return "the mean of the networks that judge an image"
    return f"the network that is best on the validation images (network {gain.best})"


def _convert_estimate(figure: IntervalEstimate) -> Estimate:
    return Estimate.from_saved(vars(figure))


def write_ensemble_page(description: Description, output: Path, notes: Sequence[str]) -> Path:
    """Write the page of an ensemble with its tables.

    Args:
        description: The content of the ensemble's model.json.
        output: Folder to write to.
        notes: Sentences on what was left out.
    """
    ensemble, test = get_ensemble(description), description.test
    patients = f" of {format_count(test.groups, 'patient')}" if description.training.grouped else ""
    basis = f"{test.images:,} {get_measured_images(description)}{patients}."
    sentences = format_ensemble_sentences(description)
    summary = Summary(
        title=f"{description.architecture[0].upper()}{description.architecture[1:]}",
        subtitle=f"Made {time.strftime('%Y-%m-%d')}. {basis}",
        marks=(),
        headline=None,
        findings=tuple(sentences[1:-1]),
        warnings=tuple(notes),
        facts=(
            KeyFigure("Accuracy", format_share(test.accuracy), basis),
            KeyFigure("Networks", str(len(ensemble.members)), description.architecture),
            KeyFigure(
                "Time for an image",
                f"{ensemble.cost.times_member:.2f} times",
                f"that of one of its networks, on {ensemble.cost.device}",
            ),
        ),
    )
    tables = [_build_member_table(ensemble)]
    gains = [_build_gain_table(ensemble, basis)] if ensemble.gains else []
    sections = (
        Section("gain", "What averaging gains", (*gains, Sentences(tuple(sentences[:1]))), is_appendix=False),
        Section("results", "Results", (_build_result_table(description, basis),), is_appendix=False),
        Section("networks", "Its networks", (*tables, Sentences(tuple(sentences[-1:]))), is_appendix=False),
    )
    return write_page(output, summary, sections)


def _build_gain_table(ensemble: Ensemble, basis: str) -> Table:
    rows: list[list[Cell]] = [
        [
            _format_other(gain),
            *(convert_to_percent_cell(_convert_estimate(each)) for each in (gain.accuracy, gain.balanced_accuracy)),
            *(convert_to_number_cell(_convert_estimate(each)) for each in (gain.brier, gain.log_loss)),
        ]
        for gain in ensemble.gains
    ]
    return Table(
        key="gain",
        title="Scores of the ensemble minus those of single networks on the same images",
        basis=basis,
        columns=(
            *create_text_columns("minus"),
            Column("accuracy", unit="points"),
            Column("balanced accuracy", unit="points"),
            Column("Brier score"),
            Column("log loss", unit="nats"),
        ),
        rows=create_rows(rows),
        notes=(
            f"On {format_count(ensemble.gain_images, 'image')} with the votes of at least two networks; 95 % intervals "
            "by bootstrap over patients. Brier score and log loss: below 0 the ensemble is better.",
        ),
    )


def _build_result_table(description: Description, basis: str) -> Table:
    test = description.test
    rows: list[list[Cell]] = [
        [
            name,
            *(convert_to_percent_cell(_convert_estimate(each[name])) for each in (test.sensitivity, test.specificity)),
            convert_to_percent_cell(_convert_estimate(test.precision[name])),
            convert_to_number_cell(_convert_estimate(test.auroc[name])),
        ]
        for name in description.short_names
    ]
    return Table(
        key="results",
        title="Results by class, without abstentions",
        basis=basis,
        columns=(
            *create_text_columns("class"),
            Column("sensitivity", unit="%"),
            Column("specificity", unit="%"),
            Column("precision", unit="%"),
            Column("AUROC"),
        ),
        rows=create_rows(rows),
        notes=(
            f"Accuracy: {format_share(test.accuracy)}. The model answers "
            f"{format_share(description.abstention.answered_test)} of the images; of these, "
            f"{format_share(description.abstention.accuracy_answered)} are classified correctly. MODEL_CARD.md has "
            "thresholds and their guarantees.",
        ),
    )


def _build_member_table(ensemble: Ensemble) -> Table:
    cells = _list_member_cells(ensemble)
    rows: list[list[Cell]] = [
        [*row, convert_to_percent_cell(_convert_estimate(member.accuracy))]
        for *row, member in zip(*cells.values(), ensemble.members, strict=True)
    ]
    return Table(
        key="networks",
        title="The networks",
        basis="Accuracy: on the test images of each network's own run.",
        columns=(*create_text_columns(*cells), Column("accuracy", unit="%")),
        rows=create_rows(rows),
        notes=(),
    )
