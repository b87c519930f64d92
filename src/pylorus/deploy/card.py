"""The model card in Markdown: what a reader must know before using the model. It names no files and no patients."""

import html
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.core.formatting import (
    format_number,
    format_percent,
    format_percent_at_least,
    format_threshold,
)
from pylorus.deploy.description import (
    OUT_OF_FOLD,
    Abstention,
    Description,
    Ensemble,
    InputSpecification,
    IntervalEstimate,
    PredictionSets,
    Weights,
)
from pylorus.deploy.licences import format_terms
from pylorus.evaluation.confusion import CLASS_METRICS
from pylorus.evaluation.wording import format_answered_shares, format_guarantee_sentence
from pylorus.runs.folder import explain_choice

PARTS = {"train": "training", "val": "validation", "test": "test"}


def render_model_card(
    description: Description,
    *,
    leaks: Mapping[str, int] | None = None,
    class_metrics: Mapping[str, Mapping[str, IntervalEstimate]] | None = None,
    training: str | None = None,
) -> str:
    """Return the text of MODEL_CARD.md.

    Args:
        description: The content of the bundle's model.json.
        leaks: Accepted leaks between splits: how many of each kind (patients, kinds of copies).
        class_metrics: Estimates on the test images by label of a metric and short name of a class, beside those of
            the description.
        training: Section on the training in Markdown; None: that of a single network.
    """
    sections = [
        f"# {format_markdown(description.architecture)}: {', '.join(map(format_markdown, description.classes))}",
        f"**{format_markdown(description.intended_use)}**\n\n" + _render_intended_use(description),
        "## Data\n\n" + _render_data(description, leaks or {}),
        "## Training\n\n" + (_render_training(description) if training is None else training),
        "## Input\n\n" + _render_input(description),
        "## Performance\n\n" + _render_performance(description, class_metrics or {}),
        "## Calibration\n\n" + _render_calibration(description),
        "## Thresholds\n\n" + _render_thresholds(description),
        *(
            ["## Prediction sets\n\n" + _render_prediction_sets(description, description.prediction_sets)]
            if description.prediction_sets is not None
            else []
        ),
        "## Abstention\n\n" + _render_abstention(description),
        "## Limits\n\n" + _render_limits(description),
        "## Licence and versions\n\n" + _render_licence(description),
    ]
    return "\n\n".join(sections) + "\n"


def _render_intended_use(description: Description) -> str:
    return (
        f"This model classifies single images into {len(description.classes)} classes. It is intended for research on "
        "images like those it was trained on: to measure how well such a model performs and to compare it with "
        "others. It is not intended to detect, rule out or treat a disease, and no decision about a patient may be "
        "based on it."
    )


def _render_data(description: Description, leaks: Mapping[str, int]) -> str:
    rows = [
        [
            format_markdown(name),
            format_markdown(short),
            *(f"{counts[index]:,}" for counts in description.training.images.values()),
        ]
        for index, (name, short) in enumerate(zip(description.classes, description.short_names, strict=True))
    ]
    totals = ["all", "", *(f"{sum(counts):,}" for counts in description.training.images.values())]
    titles = ["class", "short name", *(PARTS.get(part, format_markdown(part)) for part in description.training.images)]
    synthetic_note = (
        "The images are **synthetic**: the model knows nothing about stomachs. "
        if description.training.data == "synthetic"
        else ""
    )
    grouping = _format_leakage(grouped=description.training.grouped, leaks=leaks)
    if description.training.validated_on == OUT_OF_FOLD:
        grouping = (
            "An image may be in both columns, as the networks' runs split the images differently. In each run: "
            f"{grouping[0].lower()}{grouping[1:]}"
        )
    return (
        f"{render_table(titles, [*rows, totals])}\n\n{synthetic_note}{grouping} "
        f"SHA-256 of the split: `{description.training.split_sha256}`.{_format_fingerprints(description)}"
    )


def _format_fingerprints(description: Description) -> str:
    """Return a paragraph on the fingerprints in the bundle, "" if there are none."""
    summary = description.fingerprints
    if summary is None:
        return ""
    return (
        f"\n\nThe bundle carries salted fingerprints of the {summary.images:,} training and validation images, by "
        "which copies of them are found in an external validation. **Whoever has the bundle and an image can find out "
        "whether that image was one of them, and the fingerprints hold a rough pattern of the edges in each image.** A "
        "bundle without them takes training with deploy.fingerprints=false."
    )


def _format_leakage(*, grouped: bool, leaks: Mapping[str, int]) -> str:
    """Return a sentence on whether patients or copies of images are in more than one split."""
    if any(leaks.values()):
        patients = leaks.get("patient", 0)
        copies = sum(count for kind, count in leaks.items() if kind != "patient")
        return (
            f"**Leakage: patients ({patients}) and copies of images ({copies}) are in more than one split, which was "
            "accepted (data.accept_leaks=true): all results are optimistic.**"
        )
    if grouped:
        return "All images of a patient (group) are in the same split."
    return "Patients are unknown: images of one patient may be in several splits, which makes the results optimistic."


def get_fitting_images(description: Description) -> str:
    """Return the name of the images on which temperature and thresholds were fixed."""
    names = {"test": "test images (data.validation=test)", OUT_OF_FOLD: f"{OUT_OF_FOLD} images"}
    return names.get(description.training.validated_on, "validation images")


def get_measured_images(description: Description) -> str:
    """Return the name of the images of the results."""
    return f"{OUT_OF_FOLD if description.training.validated_on == OUT_OF_FOLD else 'test'} images"


def _format_epochs(epochs: int) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _format_trained_layers(learn: str) -> str:
    """Return which layers a stage trained: `head`, `all`, or a block's name, which includes all later layers."""
    return {"head": "classification head", "all": "all layers"}.get(
        learn, f"{format_markdown(learn)} and all later layers"
    )


def _render_training(description: Description) -> str:
    stages = [
        f"- {format_markdown(stage.name)}: {_format_trained_layers(stage.learn)} trained for "
        f"{_format_epochs(stage.epochs)}, weights of epoch {stage.best_epoch} used"
        f"{f': {format_markdown(stage.averaging)}' if stage.averaging else ''}"
        for stage in description.training.stages
    ]
    choice = format_markdown(explain_choice(description.shipped, validated_on=description.training.validated_on))
    loss = format_markdown(description.training.loss)
    return (
        f"Trained from {format_source(description.weights)} with seed {description.training.seed} and precision "
        f"{format_markdown(description.training.precision)}, minimizing {loss}:\n\n"
        + "\n".join(stages)
        + f"\n\nThe shipped network is that of stage **{format_markdown(description.shipped.name)}** "
        f"of its run ({choice})."
    )


def format_source(weights: Weights) -> str:
    """Return what training started from, with the digest of its file."""
    source = {
        "none": "random weights",
        "hub": "timm's pretrained weights",
        "factory": "the weights that its factory returned",
    }.get(weights.source, f"the weights file {format_markdown(weights.source)}")
    return f"{source}{f' (SHA-256 `{weights.sha256}`)' if weights.sha256 else ''}"


def _render_input(description: Description) -> str:
    inputs = dict.fromkeys(network.input for network in description.list_networks())
    return "\n\n".join(map(_format_input, inputs))


def _format_input(settings: InputSpecification) -> str:
    crop = "cropped to the endoscopic field of view, " if settings.crop == "auto" else ""
    mask = "text and plates of the console covered, " if settings.mask == "overlays" else ""
    halving = "; frames at least four times as large are first halved" if settings.policy > 2 else ""
    means, deviations = (", ".join(f"{value:.4g}" for value in channels) for channels in (settings.mean, settings.std))
    return (
        f"Each image is decoded to upright 8-bit RGB, {mask}{crop}resized to a square of {settings.size} × "
        f"{settings.size} pixels ({settings.fit}, {settings.interpolation}{halving}), divided by 255 and normalised "
        f"with mean {means} and standard deviation {deviations}."
    )


def _render_performance(description: Description, class_metrics: Mapping[str, Mapping[str, IntervalEstimate]]) -> str:
    metrics = description.test
    described = {
        each.label: getattr(metrics, each.name) for each in CLASS_METRICS.values() if hasattr(metrics, each.name)
    }
    by_class = {**described, **class_metrics}
    titles = ["class", *map(format_markdown, by_class), "AUROC"]
    rows = [
        [
            format_markdown(name),
            *(format_share(estimates[name]) for estimates in by_class.values()),
            format_area(metrics.auroc[name]),
        ]
        for name in description.short_names
    ]
    groups, clustering = "", ""
    if description.training.grouped:
        groups, clustering = f" of {metrics.groups:,} groups (patients)", " that keep each group's images together"
    caveat = (
        "\n\n**Optimistic: these images also served as validation images, on which the weights, the temperature and "
        "the thresholds were chosen.**"
        if description.training.validated_on == "test"
        else ""
    )
    return (
        f"Without abstentions, on {metrics.images:,} {get_measured_images(description)}{groups}, with 95 % confidence "
        f"intervals{clustering}: accuracy {format_share(metrics.accuracy)}.{caveat}\n\n{render_table(titles, rows)}"
    )


def _render_calibration(description: Description) -> str:
    calibration, fixed_on = description.calibration, get_fitting_images(description)
    divided = "Logits are" if description.ensemble is None else "The logarithm of the mean probabilities is"
    method = (
        f"{divided} divided by a temperature of {format_number(calibration.temperature, 3)}, fitted on "
        f"{calibration.images:,} {fixed_on}."
        if calibration.identified
        else f"The {calibration.images:,} {fixed_on} do not determine a temperature: {divided.lower()} left unchanged."
    )
    return (
        f"{method} Expected calibration error on the {get_measured_images(description)}: "
        f"{format_percent(calibration.ece_before)} % before, "
        f"{format_percent(calibration.ece_after)} % after."
    )


def format_threshold_guarantee(description: Description, name: str) -> str:
    """Return a sentence on what the stored threshold of a class guarantees.

    Args:
        description: The content of the bundle's model.json.
        name: Short name of the class.
    """
    decision = description.decision
    if decision.thresholds[name] is None:
        return f"There is no threshold for class {name}: no validation image is of this class."
    threshold = decision.get_threshold(name)
    if threshold is None:
        return (
            f"The threshold for {name} reaches a sensitivity of "
            f"{format_percent(decision.sensitivity, digits=None)} % on the "
            f"{get_fitting_images(description)}; an older Pylorus wrote this bundle, and no sensitivity is "
            f"guaranteed for new patients."
        )
    sentence = format_guarantee_sentence(
        threshold, class_name=name, grouped=description.training.grouped, part=_get_fitting_split(description)
    )
    return f"{sentence}{_format_unmeasured_average(description)}"


def _format_unmeasured_average(description: Description) -> str:
    """Return a sentence on an ensemble whose networks were measured some at a time, "" for any other model."""
    if description.ensemble is None or description.training.validated_on != OUT_OF_FOLD:
        return ""
    count, voters = len(description.ensemble.members), format_voters(description.ensemble)
    return (
        f" That holds where {voters} of its networks {'judges' if voters == 'one' else 'judge'} an image, as on these; "
        f"of the average of {'both' if count == 2 else f'all {count}'} it is not known."
    )


def format_comparison_limit(description: Description) -> str:
    """Return why the figures of an ensemble may differ from those on other images, "" for any other model."""
    if description.ensemble is None or description.training.validated_on != OUT_OF_FOLD:
        return ""
    return (
        f"The development's figures are those of {format_voters(description.ensemble)} of the "
        f"{len(description.ensemble.members)} networks at a time, on {OUT_OF_FOLD} images; those of the external "
        "images are of the average of all. A difference may come from the averaging."
    )


def format_voters(ensemble: Ensemble) -> str:
    """Return how many networks of an ensemble judged each image that it was measured on."""
    fewest, most = ensemble.voters
    return f"{fewest} to {most}" if fewest != most else "one" if most == 1 else f"{most}"


def _get_fitting_split(description: Description) -> str:
    """Return the split on which thresholds were fixed: validation, test or out-of-fold."""
    on = description.training.validated_on
    return on if on in ("test", OUT_OF_FOLD) else "validation"


def _render_thresholds(description: Description) -> str:
    decision = description.decision
    patients = "patients" if description.training.grouped else "images"
    rows = []
    for name in description.short_names:
        threshold, point = decision.get_threshold(name), decision.test[name]
        cells = [f"none: no {_get_fitting_split(description)} image", "", "", ""]
        if threshold is not None:
            lower_bounds = (threshold.sensitivity_reached, threshold.confidence_reached)
            cells = [
                format_threshold(threshold.threshold),
                f"{threshold.patients:,}",
                *(f"{format_percent_at_least(bound)} %" for bound in lower_bounds),
            ]
        rows.append([format_markdown(name), *cells, format_share(point.sensitivity), format_share(point.specificity)])
    titles = [
        *("class", "threshold", f"{_get_fitting_split(description)} {patients}"),
        f"guaranteed sensitivity at {format_percent(decision.confidence or 0, digits=None)} % confidence",
        f"confidence of a sensitivity of at least {format_percent(decision.sensitivity, digits=None)} %",
        *(f"{index} on {get_measured_images(description)}" for index in ("sensitivity", "specificity")),
    ]
    return (
        "An image is called positive for a class if its calibrated probability for that class reaches the threshold. "
        f"Unless another class is requested, {format_markdown(decision.class_name)} decides. "
        f"{format_markdown(format_threshold_guarantee(description, decision.class_name))}\n\n"
        f"{render_table(titles, rows)}\n\nThe guaranteed sensitivity is that for one image of a new patient, each "
        f"patient weighted equally; where patients with many images are harder to recognise, the sensitivity over all "
        f"images is lower. The guarantee holds for patients like those of the {get_fitting_images(description)}, "
        f"from the same hospitals. It does not account for what else was chosen on these images: "
        f"{'' if description.training.validated_on == OUT_OF_FOLD else 'the epoch and '}the temperature."
    )


def _render_prediction_sets(description: Description, sets: PredictionSets) -> str:
    patients = "patients" if description.training.grouped else "images"
    rows = [
        [
            format_markdown(name),
            f"{sets.patients[name]:,}",
            "always in the set" if (lowest := sets.lowest[name]) is None else format_threshold(lowest),
            format_share(sets.test.coverage[name]),
        ]
        for name in description.short_names
    ]
    titles = [
        "class",
        f"{_get_fitting_split(description)} {patients}",
        "in the set from a probability of",
        f"coverage on {get_measured_images(description)}",
    ]
    uncalibrated = [name for name in description.short_names if sets.lowest[name] is None]
    always = (
        f" Leaving a class out of a set takes at least {sets.patients_needed} {_get_fitting_split(description)} "
        f"{patients} of that class; with fewer, these classes are in every set: "
        f"{', '.join(map(format_markdown, uncalibrated))}."
        if uncalibrated
        else ""
    )
    return (
        "Besides its prediction, the model gives a set of classes for each image, calibrated separately for each "
        f"class on {get_fitting_images(description)} (split-conformal): for an image of a new patient, whatever its "
        "class, the set contains the true class with a probability of at least "
        f"{format_percent(sets.coverage, digits=None)} %, provided "
        f"that the patient is like those of the {get_fitting_images(description)}, from the same hospitals. An empty "
        f"set means that no class is as probable as is usual for images of that class.{always}\n\n"
        f"{render_table(titles, rows)}\n\nOn the {get_measured_images(description)}, a set contains "
        f"{format_set_size(sets.test.size)} classes on average. Each patient is weighted equally in these figures."
    )


def format_set_size(size: IntervalEstimate) -> str:
    """Format a mean number of classes with its interval.

    Example:
        >>> format_set_size(IntervalEstimate(1.2, 1.06, 1.414))
        '1.20 (1.06 to 1.41)'
    """
    value, low, high = (
        format_number(math.nan if number is None else number, 2) for number in (size.value, size.low, size.high)
    )
    return f"{value} ({low} to {high})"


def format_prediction_set(names: Sequence[str], members: NDArray[np.bool_]) -> str:
    """Format a prediction set for a table.

    Args:
        names: Short names of all classes.
        members: Whether each class is in the set, of shape (classes,).

    Example:
        >>> format_prediction_set(["GC", "GU", "CG"], np.array([True, False, True]))
        '{GC, CG}'
        >>> format_prediction_set(["GC", "GU"], np.zeros(2, dtype=bool))
        '{}'
    """
    return f"{{{', '.join(name for name, member in zip(names, members, strict=True) if member)}}}"


def _render_abstention(description: Description) -> str:
    abstention, fixed_on = description.abstention, get_fitting_images(description)
    measured = get_measured_images(description)
    most = "up to " if description.training.validated_on == OUT_OF_FOLD else ""  # each network has its own
    return (
        "The model abstains in two cases:\n\n"
        f"- **Out-of-distribution** (`unlike`): the {abstention.method} (from {most}{abstention.images:,} training "
        f"images) exceeds {format_number(abstention.unlike_above, 4)}. {_format_false_alarms(description)} Of the "
        f"{measured}, {format_share(abstention.unlike_test)} are flagged: the false-alarm rate.\n"
        "- **Uncertain** (`unsure`): the highest calibrated probability of any class is below "
        f"{format_number(abstention.unsure_below, 4)}. The threshold was set so that at most "
        f"{format_percent(abstention.false_alarms)} % of the correctly classified {fixed_on} are flagged as "
        f"uncertain; of the correctly classified {measured}, {format_share(abstention.unsure_test)} are.\n\n"
        f"The model answers {format_share(abstention.answered_test)} of the {measured}; of these, "
        f"{format_share(abstention.accuracy_answered)} are classified correctly."
    )


def format_answered_images(abstention: Abstention) -> str:
    """Return on how much of the test set the model answers and why it abstains on the rest, as a line of a log."""
    answered, unlike = abstention.answered_test.value, abstention.unlike_test.value
    if answered is None or unlike is None:
        return "how much of the test images it answers is undefined"
    return format_answered_shares(answered, unlike, abstention.accuracy_answered.value)


def _format_false_alarms(description: Description) -> str:
    """Return sentences on how many images of new patients the threshold for out-of-distribution images flags."""
    abstention, fixed_on = description.abstention, get_fitting_images(description)
    guarantee, wanted = abstention.guarantee, format_percent(abstention.false_alarms)
    if guarantee is None:
        return f"The threshold was set so that at most {wanted} % of the {fixed_on} are flagged as out-of-distribution."
    patients = "patients" if description.training.grouped else "images"
    counted = f"{guarantee.patients:,} {patients}" if description.training.grouped else f"{guarantee.images:,} images"
    confidence = format_percent(guarantee.confidence, digits=None)
    if guarantee.proportion_reached <= abstention.false_alarms:
        promise = f"With {confidence} % confidence, at most {wanted} % of the images of new patients are flagged"
        return f"{promise}, if they are like the {fixed_on} ({counted}), on which it was fixed."
    needed = f"; {wanted} % needs {guarantee.patients_needed:,} {patients}" if guarantee.patients_needed else ""
    promise = f"at most {format_percent(guarantee.proportion_reached)} % of the images of new patients are flagged"
    return (
        f"The {fixed_on} ({counted}) guarantee with {confidence} % confidence only that {promise}{needed}. None of "
        "them is flagged."
    )


def _render_limits(description: Description) -> str:
    lines = [
        "The model knows only its own classes: an image of anything else is assigned to one of them, unless it is "
        "flagged as out-of-distribution.",
        "Out-of-distribution detection is learnt from the model's own training images. Not every out-of-distribution "
        "image is detected, especially if it looks much like them; images from other endoscopes, with other light or "
        "after other preparation can be out-of-distribution too.",
        f"The results above hold for images like the {get_measured_images(description)}. Elsewhere, and where classes "
        "are rarer or more frequent, precision, calibration and thresholds differ: evaluate the model there first.",
        "The model sees single images, not patients: no clinical data, no course of disease.",
    ]
    if description.training.precision != "32":
        precision = "fp16" if description.training.precision == "16" else description.training.precision
        lines.append(
            f"The model was trained in {format_markdown(precision)}; its predictions and all "
            f"results here are computed in 32 bits."
        )
    return "\n".join(f"- {line}" for line in lines)


def _render_licence(description: Description) -> str:
    stated = (
        format_markdown(description.weights.licence)
        if description.weights.licence
        else "not stated; ask the provider of the weights"
    )
    versions = ", ".join(
        f"{format_markdown(name)} {format_markdown(version)}" for name, version in description.versions.items()
    )
    licence = "random weights, no licence" if description.weights.source == "none" else stated
    terms = format_terms(description)
    return f"Licence of the weights that training started from: {licence}.{terms}\n\nCreated with {versions}."


def format_share(figure: IntervalEstimate) -> str:
    """Format a proportion in percent with its interval, as on the console."""
    if figure.value is None:
        return "undefined"
    value = f"{format_percent(figure.value)} %"
    if figure.low is None or figure.high is None:
        return f"{value} (no interval)"
    return f"{value} ({format_percent(figure.low)} to {format_percent(figure.high)})"


def format_area(area: IntervalEstimate) -> str:
    """Format an AUROC with its interval as in the report: it is not a proportion of images.

    Example:
        >>> format_area(IntervalEstimate(0.6632, 0.51, 0.79)), format_area(IntervalEstimate(0.5, None, None))
        ('0.663 (0.510 to 0.790)', '0.500 (no interval)')
    """
    if area.value is None:
        return "undefined"
    value = format_number(area.value, 3)
    if area.low is None or area.high is None:
        return f"{value} (no interval)"
    return f"{value} ({format_number(area.low, 3)} to {format_number(area.high, 3)})"


def render_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_markdown(name: str) -> str:
    """Escape a name for Markdown and HTML."""
    escaped = html.escape(name, quote=False)
    # Dollar signs are formulas on some sites; an underscore inside a word is no emphasis.
    return re.sub(r"[\\`*\[\]|#~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", escaped)
