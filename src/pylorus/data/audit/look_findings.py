"""Check image quality: blurred and dark images, black borders, burned-in text, and shortcuts that reveal the class."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.data.audit.findings import Finding, Item, format_quantity
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.facts import Facts, extract_fact_column

LEAST_SPREAD = {"sharpness": 0.1, "brightness": 4.0}
"""Least spread (log units, grey levels): otherwise small differences in a homogeneous set would be outliers."""

Mask = NDArray[np.bool_]


def check_image_quality(images: ImageSet, facts: Sequence[Facts], thresholds: Thresholds) -> list[Finding]:
    """Return findings about image quality; outliers are relative to the median of the set."""
    indices = np.flatnonzero([not problem for problem in extract_fact_column(facts, "problem")])
    if not len(indices):
        return []
    classes = images.table["class"].to_numpy()[indices].astype(np.str_)
    border, letters = extract_fact_column(facts, "border")[indices], extract_fact_column(facts, "letters")[indices]
    sharpness, brightness = (
        extract_fact_column(facts, "sharpness")[indices],
        extract_fact_column(facts, "brightness")[indices],
    )
    has_border, has_text = border >= thresholds.border, letters >= thresholds.letters
    return [
        *_check_sharpness_and_brightness(indices, sharpness, brightness, thresholds),
        *_check_borders(indices, border, has_border),
        *_check_shortcut("border", "a black border", has_border, classes, thresholds),
        *_check_text(indices, letters, has_text),
        *_check_shortcut("text", "signs of burned-in text", has_text, classes, thresholds),
    ]


def measure_deviation_below_median(values: NDArray[np.float64], *, least_spread: float) -> NDArray[np.float64]:
    """Compute how many robust standard deviations each value is below the median, of shape (images,).

    The robust standard deviation is 1.4826 times the median absolute deviation (Rousseeuw and Croux 1993), which
    outliers do not inflate.

    Example:
        >>> measure_deviation_below_median(np.array([10.0, 11, 9, 10, 1]), least_spread=0.1).round(1).tolist()
        [0.0, -0.7, 0.7, 0.0, 6.1]
    """
    median = np.median(values)
    spread = max(1.4826 * float(np.median(np.abs(values - median))), least_spread)
    return np.asarray((median - values) / spread, dtype=np.float64)


def _check_sharpness_and_brightness(
    indices: NDArray[np.int64],
    sharpness: NDArray[np.float64],
    brightness: NDArray[np.float64],
    thresholds: Thresholds,
) -> list[Finding]:
    sharpness = np.log(np.maximum(sharpness, 1e-3))
    has_reference = len(indices) >= thresholds.least_for_outliers
    blur_score = measure_deviation_below_median(sharpness, least_spread=LEAST_SPREAD["sharpness"])
    dark_score = measure_deviation_below_median(brightness, least_spread=LEAST_SPREAD["brightness"])
    is_black = brightness < thresholds.black
    is_dark = is_black | ((dark_score >= thresholds.outlier) & has_reference)
    is_blurred = (blur_score >= thresholds.outlier) & has_reference & ~is_dark  # dark images have faint edges
    findings = []
    if is_blurred.any():
        relative_sharpness = np.exp(sharpness - np.median(sharpness))
        details = [f"sharpness {value:.0%} of the set's median" for value in relative_sharpness]
        findings.append(
            Finding(
                "blurred",
                "warning",
                f"{format_quantity(int(is_blurred.sum()), 'image')} much less sharp than the others.",
                "Inspect them: out of focus, motion blur or upscaled? A model can't learn from images that "
                "don't show the finding.",
                _build_items(indices, is_blurred, -blur_score, details),
            )
        )
    if is_dark.any():
        details = [
            f"mean grey level {value:.0f}, the set's median is {np.median(brightness):.0f}" for value in brightness
        ]
        findings.append(
            Finding(
                "dark",
                "warning",
                f"{format_quantity(int(is_dark.sum()), 'image')} much darker than the others.",
                "Inspect them: was the light off, the lens covered, or the exposure wrong?",
                _build_items(indices, is_dark, brightness, details),
            )
        )
    return findings


def _check_borders(indices: NDArray[np.int64], border: NDArray[np.float64], has_border: Mask) -> list[Finding]:
    if not has_border.any():
        return []
    return [
        Finding(
            "black-border",
            "note",
            f"{format_quantity(int(has_border.sum()), 'image')} of {len(indices):,} with a black border.",
            "data.crop=auto crops to the field of view; see below what it would crop.",
            _build_items(indices, has_border, -border, [f"{value:.0%} of the frame" for value in border]),
        )
    ]


def _check_text(indices: NDArray[np.int64], letters: NDArray[np.int64], has_text: Mask) -> list[Finding]:
    if not has_text.any():
        return []
    return [
        Finding(
            "burned-in-text",
            "warning",
            f"{format_quantity(int(has_text.sum()), 'image')} of {len(indices):,} with signs of burned-in text "
            "outside the field of view: it may identify the patient or the device.",
            "Export without overlays, or set data.crop=auto and check what remains before you share images.",
            _build_items(
                indices,
                has_text,
                -letters,
                [f"{count} letter-like {'shape' if count == 1 else 'shapes'}" for count in letters],
            ),
        )
    ]


def _check_shortcut(
    name: str, feature: str, has_feature: Mask, classes: NDArray[np.str_], thresholds: Thresholds
) -> list[Finding]:
    """Return a finding if something other than the mucosa distinguishes the classes."""
    names, counts = np.unique(classes, return_counts=True)
    proportions = {
        str(each): float(has_feature[classes == each].mean()) for each in names[counts >= thresholds.least_for_shortcut]
    }
    if len(proportions) < 2 or max(proportions.values()) - min(proportions.values()) < thresholds.shortcut:
        return []
    proportions_text = ", ".join(f"{each} {share:.0%}" for each, share in proportions.items())
    return [
        Finding(
            f"{name}-tells-the-class",
            "warning",
            f"The proportion of images with {feature} differs between classes ({proportions_text}): a model may "
            "learn this instead of the disease.",
            "Set data.crop=auto, or use images of all classes from the same devices and exports; compare the results "
            "with and without cropping.",
        )
    ]


def _build_items(
    indices: NDArray[np.int64], selected: Mask, rank: NDArray[np.generic], details: Sequence[str]
) -> tuple[Item, ...]:
    order = np.argsort(rank, kind="stable")
    return tuple(Item((int(indices[index]),), details[index]) for index in order if selected[index])
