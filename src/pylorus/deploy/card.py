"""The model card: what its reader must know before the model is used, in Markdown; no file and no patient is named."""

import html
import math
from collections.abc import Mapping, Sequence

from pylorus.deploy.description import Description, Figure, PredictionSets
from pylorus.evaluation.sentence import guarantee_sentence, percent_at_least, threshold_text
from pylorus.percent import percent
from pylorus.runs.shipped import describe_choice

PARTS = {"train": "training", "val": "validation", "test": "test"}


def model_card(said: Description, *, leaks: Mapping[str, int] | None = None) -> str:
    """The text of MODEL_CARD.md.

    Args:
        said: The bundle's description.
        leaks: What lies in two parts of the split and was accepted, by kind and with its count.
    """
    sections = [
        f"# {_text(said.architecture)}: {', '.join(map(_text, said.classes))}",
        f"**{_text(said.intended_use)}**\n\n" + _use(said),
        "## Data\n\n" + _data(said, leaks or {}),
        "## Training\n\n" + _training(said),
        "## Input\n\n" + _input(said),
        "## What it was found to be worth\n\n" + _worth(said),
        "## Calibration\n\n" + _calibration(said),
        "## Thresholds\n\n" + _thresholds(said),
        *(["## Prediction sets\n\n" + _sets(said, said.prediction_sets)] if said.prediction_sets is not None else []),
        "## When it does not answer\n\n" + _abstention(said),
        "## Limits\n\n" + _limits(said),
        "## Licence and versions\n\n" + _licence(said),
    ]
    return "\n\n".join(sections) + "\n"


def _use(said: Description) -> str:
    return (
        f"It tells {len(said.classes)} classes of single images apart. It is meant for research on images like those "
        "it was trained on: to measure how well such a model does, and to compare it with others. It is not meant to "
        "find, exclude or treat a disease, and no decision about a patient may rest on it."
    )


def _data(said: Description, leaks: Mapping[str, int]) -> str:
    rows = [
        [_text(name), _text(short), *(f"{counts[place]:,}" for counts in said.training.images.values())]
        for place, (name, short) in enumerate(zip(said.classes, said.short_names, strict=True))
    ]
    totals = ["all", "", *(f"{sum(counts):,}" for counts in said.training.images.values())]
    titles = ["class", "short name", *(PARTS.get(part, _text(part)) for part in said.training.images)]
    kind = "The images were **drawn**: it knows nothing about stomachs. " if said.training.data == "synthetic" else ""
    grouped = _parts_sentence(grouped=said.training.grouped, leaks=leaks)
    return f"{_table(titles, [*rows, totals])}\n\n{kind}{grouped} SHA-256 of the split: `{said.training.split_sha256}`."


def _parts_sentence(*, grouped: bool, leaks: Mapping[str, int]) -> str:
    """Whether patients or copies lie in two parts of the split."""
    if any(leaks.values()):
        patients = leaks.get("patient", 0)
        copies = sum(count for kind, count in leaks.items() if kind != "patient")
        return (
            f"**Leaking: in two parts of the split lie patients ({patients}) and copies of images ({copies}), as was "
            "accepted (data.accept_leaks=true): all figures are optimistic.**"
        )
    if grouped:
        return "All images of a patient (group) lie in one part."
    return "Patients are not known: images of one patient may lie in several parts, which makes figures optimistic."


def _fixed_on(said: Description) -> str:
    """What temperature and thresholds were fixed on."""
    return "test images (data.validation=test)" if said.training.validated_on == "test" else "validation images"


def _count_epochs(epochs: int) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _training(said: Description) -> str:
    stages = [
        f"- {_text(stage.name)}: learns {_text(stage.learn)}, {_count_epochs(stage.epochs)}, "
        f"keeps epoch {stage.best_epoch}"
        for stage in said.training.stages
    ]
    source = {"none": "random weights", "hub": "timm's pretrained weights"}.get(
        said.weights.source, f"weights of the file {_text(said.weights.source)}"
    )
    digest = f" (SHA-256 `{said.weights.sha256}`)" if said.weights.sha256 else ""
    choice = _text(describe_choice(said.shipped, validated_on=said.training.validated_on))
    return (
        f"From {source}{digest}, seed {said.training.seed}, precision {_text(said.training.precision)}:\n\n"
        + "\n".join(stages)
        + f"\n\nThis is the network of stage **{_text(said.shipped.name)}** of its run: {choice}."
    )


def _input(said: Description) -> str:
    form = said.input
    crop = "cropped to the endoscopic field of view, " if form.crop == "auto" else ""
    means, deviations = (", ".join(f"{each:.4g}" for each in values) for values in (form.mean, form.std))
    return (
        f"An image is decoded to upright RGB of 8 bits, {crop}made a square of {form.size} × {form.size} pixels "
        f"({form.fit}, {form.interpolation}), divided by 255 and normalised by mean {means} and "
        f"standard deviation {deviations}."
    )


def _worth(said: Description) -> str:
    found = said.test
    titles = ["class", "sensitivity", "specificity", "precision", "AUROC"]
    tables = (found.sensitivity, found.specificity, found.precision, found.auroc)
    rows = [[_text(name), *(_shown(table[name]) for table in tables)] for name in said.short_names]
    groups = f" of {found.groups:,} groups (patients), kept together in the intervals" if said.training.grouped else ""
    seen = (
        "\n\n**Optimistic: these images were also validated on, and chose weights, temperature and thresholds.**"
        if said.training.validated_on == "test"
        else ""
    )
    return (
        f"On {found.images:,} test images{groups}, all of them answered, in % with 95 % intervals: accuracy "
        f"{_shown(found.accuracy)}.{seen}\n\n{_table(titles, rows)}"
    )


def _calibration(said: Description) -> str:
    found, fixed_on = said.calibration, _fixed_on(said)
    how = (
        f"Logits are divided by {found.temperature:.3f}, fitted on {found.images:,} {fixed_on}."
        if found.identified
        else f"The {found.images:,} {fixed_on} tell no temperature: logits are left as they are."
    )
    return (
        f"{how} Expected calibration error of the test images: {percent(found.ece_before)} % before, "
        f"{percent(found.ece_after)} % after."
    )


def threshold_sentence(said: Description, name: str) -> str:
    """What the stored threshold of a class guarantees."""
    decision = said.decision
    if decision.thresholds[name] is None:
        return f"No validation image is of class {name}: there is no threshold for it."
    fixed = decision.fixed_threshold(name)
    if fixed is None:
        return (
            f"The threshold for {name} reaches a sensitivity of {100 * decision.sensitivity:g} % on the "
            f"{_fixed_on(said)}; the bundle is of an older Pylorus and guarantees no sensitivity for new patients."
        )
    return guarantee_sentence(fixed, class_name=name, grouped=said.training.grouped, part=_fixed_part(said))


def _fixed_part(said: Description) -> str:
    """The part of the split that thresholds were fixed on."""
    return "test" if said.training.validated_on == "test" else "validation"


def _thresholds(said: Description) -> str:
    decision = said.decision
    patients = "patients" if said.training.grouped else "images"
    rows = []
    for name in said.short_names:
        fixed, point = decision.fixed_threshold(name), decision.test[name]
        cells = [f"none: no {_fixed_part(said)} image", "", "", ""]
        if fixed is not None:
            shares = (fixed.sensitivity_reached, fixed.confidence_reached)
            cells = [
                threshold_text(fixed.threshold),
                f"{fixed.patients:,}",
                *(percent_at_least(each) for each in shares),
            ]
        rows.append([_text(name), *cells, _shown(point.sensitivity), _shown(point.specificity)])
    asked = f"{100 * decision.sensitivity:g} %"
    titles = [
        *("class", "threshold", f"{_fixed_part(said)} {patients}"),
        f"guaranteed sensitivity at {100 * (decision.confidence or 0):g} % confidence",
        f"confidence of {asked} sensitivity",
        *("sensitivity on test images", "specificity on test images"),
    ]
    return (
        "An image is called positive for a class where its calibrated probability reaches the threshold. Unless "
        f"another is asked for, {_text(decision.class_name)} decides. "
        f"{_text(threshold_sentence(said, decision.class_name))}\n\n"
        f"{_table(titles, rows)}\n\nThe sensitivity guaranteed is that for one image of a new patient, each patient "
        "counting the same; where patients with many images are harder to recognise, that of all images is lower. The "
        f"guarantee holds for patients like those of the {_fixed_on(said)}, from the same hospitals. It takes no "
        "account of what else was chosen on them: the epoch and the temperature."
    )


def _sets(said: Description, sets: PredictionSets) -> str:
    patients = "patients" if said.training.grouped else "images"
    rows = [
        [
            _text(name),
            f"{sets.patients[name]:,}",
            "always in the set" if (lowest := sets.lowest[name]) is None else threshold_text(lowest),
            _shown(sets.test.coverage[name]),
        ]
        for name in said.short_names
    ]
    titles = ["class", f"{_fixed_part(said)} {patients}", "in the set from a probability of", "coverage on test images"]
    few = [name for name in said.short_names if sets.lowest[name] is None]
    always = (
        f" Of {', '.join(map(_text, few))} there are fewer than {sets.patients_needed} {_fixed_part(said)} "
        f"{patients}, which it takes to leave a class out: it is in every set."
        if few
        else ""
    )
    return (
        "Beside its answer the model gives a set of classes for each image, calibrated apart for each class on "
        f"{_fixed_on(said)} (split-conformal): for an image of a new patient, of whatever class, the set holds the "
        f"true class with a chance of at least {100 * sets.coverage:g} %, if the patient is one like those of the "
        f"{_fixed_on(said)}, from the same hospitals. An empty set says that no class is as likely as is "
        f"usual for it.{always}\n\n"
        f"{_table(titles, rows)}\n\nOn the test images a set holds {set_size_text(sets.test.size)} classes "
        "on average. Each patient counts the same in these figures."
    )


def set_size_text(size: Figure) -> str:
    """A mean number of classes with its interval.

    Example:
        >>> set_size_text(Figure(1.2, 1.06, 1.414))
        '1.20 (1.06 to 1.41)'
    """
    value, low, high = ("–" if each is None else f"{each:.2f}" for each in (size.value, size.low, size.high))
    return f"{value} ({low} to {high})"


def _abstention(said: Description) -> str:
    found, fixed_on = said.abstention, _fixed_on(said)
    return (
        f"- **Unlike** its training images: {found.method} (of {found.images:,} training images) above "
        f"{found.unlike_above:.4f}. Fixed so that {percent(found.false_alarms)} % of the {fixed_on} at most are "
        f"called unlike; of the test images {_shown(found.unlike_test)} % are: the false-alarm rate.\n"
        f"- **Unsure**: the likeliest class's calibrated probability below {found.unsure_below:.4f}. Fixed so that "
        f"{percent(found.false_alarms)} % of the rightly recognised {fixed_on} at most are called unsure; of "
        f"such test images {_shown(found.unsure_test)} % are.\n\n"
        f"It answers {_shown(found.answered_test)} % of the test images, and of these "
        f"{_shown(found.accuracy_answered)} % rightly."
    )


def _limits(said: Description) -> str:
    lines = [
        "It knows its classes only: an image of anything else gets one of them, unless it is called unlike.",
        "What unlike means is learnt from its own training images. Not every foreign image is found, above all where "
        "it looks much like them; other endoscopes, lights and preparations can be foreign too.",
        "Its figures hold for images like its test images. Elsewhere, and where classes are rarer or more frequent, "
        "precision, calibration and thresholds differ: evaluate it there first.",
        "It sees single images, not patients; no clinical data, no course.",
    ]
    if said.training.precision != "32":
        lines.append(
            f"It was trained in {_text(said.training.precision)}; its predictions and all figures here are computed in "
            "32 bits."
        )
    return "\n".join(f"- {line}" for line in lines)


def _licence(said: Description) -> str:
    licence = _text(said.weights.licence) if said.weights.licence else "not stated; ask where they came from"
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in said.versions.items())
    own = "random weights, no licence" if said.weights.source == "none" else licence
    return f"Licence of the weights that training began from: {own}.\n\nMade with {versions}."


def _shown(figure: Figure) -> str:
    value, low, high = (math.nan if each is None else each for each in (figure.value, figure.low, figure.high))
    if math.isnan(value):
        return "undefined"
    return f"{percent(value)} ({percent(low)} to {percent(high)})"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(name: str) -> str:
    """A name as Markdown shows it, whatever letters are in it."""
    safe = html.escape(name, quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*[]|#~" else letter for letter in safe)
