"""From where on the audit says something: written once, and into audit.json."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Limits of the audit. What they find and accuse wrongly was measured: `docs/audit.md`.

    Attributes:
        distance: Bits of 64 in which hashes of near copies may differ, at most 7.
        many: Images from which on turned and mirrored copies are looked for in `turned_distance` bits: they are seven
            times as many comparisons, whose number grows faster than that of the images.
        turned_distance: Bits; with 3 instead of 7 still 97 % and more of them were found.
        likeness: Least correlation of the thumbnails' fine structure of near copies, in [-1, 1]. Images of different
            things reached 0.83, copies that were written anew, made smaller, turned or mirrored 0.96 and more.
        contrast: Least spread of an image's grey levels; below it is blank and not compared.
        crowd: Images that one key of a hash is compared with.
        shortest: Pixels; a shorter side is tiny.
        longest: Pixels; a longer side is extreme.
        aspect: Longer side over shorter; above it is extreme.
        outlier: Robust standard deviations below the set's median from which on an image is blurred or dark
            (Iglewicz and Hoaglin 1993 advise 3.5).
        black: Mean grey level below which an image is dark, whatever the others are.
        least_for_outliers: Images that a set needs to be judged by its own median.
        imbalance: Largest class over smallest; from here on it is told.
        border: Share of the frame that makes a black border.
        letters: Shapes like letters that make a sign of text.
        shortcut: Difference between classes, of the share of images with border or text, that a model may learn.
        least_for_shortcut: Images that a class needs for that.
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
