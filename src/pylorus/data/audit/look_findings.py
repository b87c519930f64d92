"""What the pixels say: blurred and dark images, black borders, burned-in text, and whether a class is given away."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.data.audit.findings import Finding, Item, counted
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.facts import Facts, column_of

LEAST_SPREAD = {"sharpness": 0.1, "brightness": 4.0}
"""Spread (log units, grey levels) that a set is given at least: else in a set of like images all else is an outlier."""

Mask = NDArray[np.bool_]


def look_findings(images: ImageSet, facts: Sequence[Facts], thresholds: Thresholds) -> list[Finding]:
    """Findings about how images were taken; outliers are told from the set's own median."""
    places = np.flatnonzero([not problem for problem in column_of(facts, "problem")])
    if not len(places):
        return []
    classes = images.table["class"].to_numpy()[places].astype(np.str_)
    border, letters = column_of(facts, "border")[places], column_of(facts, "letters")[places]
    sharpness, brightness = column_of(facts, "sharpness")[places], column_of(facts, "brightness")[places]
    bordered, lettered = border >= thresholds.border, letters >= thresholds.letters
    return [
        *_light(places, sharpness, brightness, thresholds),
        *_border(places, border, bordered),
        *_shortcut("border", "a black border", bordered, classes, thresholds),
        *_text(places, letters, lettered),
        *_shortcut("text", "signs of burned-in text", lettered, classes, thresholds),
    ]


def below_median(values: NDArray[np.float64], *, least_spread: float) -> NDArray[np.float64]:
    """How many robust standard deviations each value lies below the median, of shape (images,).

    The deviation is 1.4826 times the median distance from the median (Rousseeuw and Croux 1993): what lies far off
    does not widen it.

    Example:
        >>> below_median(np.array([10.0, 11, 9, 10, 1]), least_spread=0.1).round(1).tolist()
        [0.0, -0.7, 0.7, 0.0, 6.1]
    """
    median = np.median(values)
    spread = max(1.4826 * float(np.median(np.abs(values - median))), least_spread)
    return np.asarray((median - values) / spread, dtype=np.float64)


def _light(
    places: NDArray[np.int64],
    sharpness: NDArray[np.float64],
    brightness: NDArray[np.float64],
    thresholds: Thresholds,
) -> list[Finding]:
    sharpness = np.log(np.maximum(sharpness, 1e-3))
    enough = len(places) >= thresholds.least_for_outliers
    blur = below_median(sharpness, least_spread=LEAST_SPREAD["sharpness"])
    dark = below_median(brightness, least_spread=LEAST_SPREAD["brightness"])
    black = brightness < thresholds.black
    darkened = black | ((dark >= thresholds.outlier) & enough)
    blurred = (blur >= thresholds.outlier) & enough & ~darkened  # in the dark all edges are faint
    findings = []
    if blurred.any():
        share = np.exp(sharpness - np.median(sharpness))
        details = [f"sharpness {value:.0%} of the set's median" for value in share]
        findings.append(
            Finding(
                "blurred",
                "warning",
                f"{counted(int(blurred.sum()), 'image')} far less sharp than the others.",
                "Look at them: out of focus, moved or enlarged? Images that show no finding teach none.",
                _items(places, blurred, -blur, details),
            )
        )
    if darkened.any():
        details = [
            f"mean grey level {value:.0f}, the set's median is {np.median(brightness):.0f}" for value in brightness
        ]
        findings.append(
            Finding(
                "dark",
                "warning",
                f"{counted(int(darkened.sum()), 'image')} far darker than the others.",
                "Look at them: was the lamp off, the lens covered, the exposure wrong?",
                _items(places, darkened, brightness, details),
            )
        )
    return findings


def _border(places: NDArray[np.int64], border: NDArray[np.float64], bordered: Mask) -> list[Finding]:
    if not bordered.any():
        return []
    return [
        Finding(
            "black-border",
            "note",
            f"{counted(int(bordered.sum()), 'image')} of {len(places):,} with a black border.",
            "data.crop=auto cuts to the field of view; below is what it would cut.",
            _items(places, bordered, -border, [f"{value:.0%} of the frame" for value in border]),
        )
    ]


def _text(places: NDArray[np.int64], letters: NDArray[np.int64], lettered: Mask) -> list[Finding]:
    if not lettered.any():
        return []
    return [
        Finding(
            "burned-in-text",
            "warning",
            f"{counted(int(lettered.sum()), 'image')} of {len(places):,} with signs of burned-in text beside the "
            "field of view: it may name the patient or the device.",
            "Export without overlays, or set data.crop=auto, and look at what it leaves before images are passed on.",
            _items(places, lettered, -letters, [f"{count} shapes like letters" for count in letters]),
        )
    ]


def _shortcut(name: str, what: str, marked: Mask, classes: NDArray[np.str_], thresholds: Thresholds) -> list[Finding]:
    """Whether something beside the mucosa tells the classes apart."""
    names, counts = np.unique(classes, return_counts=True)
    shares = {
        str(each): float(marked[classes == each].mean()) for each in names[counts >= thresholds.least_for_shortcut]
    }
    if len(shares) < 2 or max(shares.values()) - min(shares.values()) < thresholds.shortcut:
        return []
    told = ", ".join(f"{each} {share:.0%}" for each, share in shares.items())
    return [
        Finding(
            f"{name}-tells-the-class",
            "warning",
            f"The classes differ much in how many images have {what} ({told}): a model may learn that instead of the "
            "disease.",
            "Set data.crop=auto, or take images of all classes from the same devices and exports; compare the results "
            "with and without.",
        )
    ]


def _items(
    places: NDArray[np.int64], wanted: Mask, rank: NDArray[np.generic], details: Sequence[str]
) -> tuple[Item, ...]:
    order = np.argsort(rank, kind="stable")
    return tuple(Item((int(places[index]),), details[index]) for index in order if wanted[index])
