"""Limits of the audit, all in one place; audit.json records them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Limits of the audit. Detection rates and false positives were measured: see `docs/audit.md`.

    Attributes:
        distance: Maximum Hamming distance of the 64-bit hashes of near copies, at most 7.
        many: Number of images above which rotated and mirrored copies are searched for within `turned_distance` bits:
            they take seven times as many comparisons, and comparisons grow faster than the number of images.
        turned_distance: Maximum Hamming distance in bits; with 3 instead of 7, at least 97 % were still found.
        likeness: Least correlation of the fine structure of near copies' thumbnails, in [-1, 1]. Images of different
            subjects reached 0.83; copies that were re-encoded, downscaled, rotated or mirrored 0.96 and more.
        contrast: Standard deviation of grey levels below which an image is blank and not compared.
        crowd: Maximum number of images that are compared per hash key.
        shortest: Shorter side in pixels below which an image is tiny.
        longest: Longer side in pixels above which an image is very large.
        aspect: Ratio of the longer to the shorter side above which the proportions are odd.
        outlier: Robust standard deviations below the set's median from which an image is blurred or dark (Iglewicz
            and Hoaglin 1993 recommend 3.5).
        black: Mean grey level below which an image is dark, regardless of the others.
        least_for_outliers: Images that a set needs for outliers to be detected.
        imbalance: Ratio of the largest to the smallest class from which imbalance is reported.
        border: Fraction of the frame from which dark edges are a black border.
        letters: Number of letter-like shapes that indicate text.
        shortcut: Difference between classes in the proportion of images with border or text from which it is reported.
        least_for_shortcut: Images that a class needs for this comparison.
    """

    distance: int = 7
    many: int = 200_000
    turned_distance: int = 3
    likeness: float = 0.9
    contrast: float = 4.0
    crowd: int = 256
    shortest: int = 64
    longest: int = 8000
    aspect: float = 3.0
    outlier: float = 3.5
    black: float = 16.0
    least_for_outliers: int = 30
    imbalance: float = 3.0
    border: float = 0.1
    letters: int = 4
    shortcut: float = 0.3
    least_for_shortcut: int = 10
