"""Compare the split with the requested fractions: sentences for the terminal and the report."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pandas as pd

SHARE_TOLERANCE = 0.02
"""Deviation from the requested fraction above which a class is reported."""
MIN_GROUPS = 5
"""A split with fewer groups of a class is reported: single groups then determine what is learned or measured."""
PART_NAMES = {"train": "training", "val": "validation", "test": "test"}


def get_requested_fractions(
    *, given: Collection[str], chosen: bool, fixed: bool, validation: str, test_fraction: float, val_fraction: float
) -> dict[str, float]:
    """Return the requested fraction of each split that is drawn at random; other splits have no entry.

    Args:
        given: Splits that folders or a manifest define, including train; empty if they define none.
        chosen: Whether the test images are those of a fold or of a column's values.
        fixed: Whether all splits are those of another run (data.split_file).
        validation: data.validation.
        test_fraction: data.test_fraction, of all images.
        val_fraction: data.val_fraction, of all images but the test images.

    Example:
        >>> words = {"validation": "cut", "test_fraction": 0.15, "val_fraction": 0.2}
        >>> get_requested_fractions(given=(), chosen=False, fixed=False, **words)
        {'test': 0.15, 'val': 0.2}
        >>> get_requested_fractions(given=("train", "test"), chosen=False, fixed=False, **words)
        {'val': 0.2}
    """
    fractions = {} if chosen or given else {"test": test_fraction}
    if validation == "cut" and (chosen or "val" not in given):
        fractions["val"] = val_fraction
    return {} if fixed else fractions


def explain_split(
    table: pd.DataFrame, asked: Mapping[str, float], *, grouped: bool, joined: int = 0
) -> tuple[str, ...]:
    """Return sentences about splits that deviate from the requested fractions or have few groups of a class.

    Args:
        table: One row per image, with the columns class, group and split.
        asked: Requested fraction of each split, from `get_requested_fractions`.
        grouped: Whether groups are patients; else every image is its own group.
        joined: Number of groups that were kept together with others because of copies.
    """
    noun = "patient" if grouped else "image"
    sentences = [_explain_fractions(table, part, share, noun, joined) for part, share in asked.items()]
    return tuple(sentence for sentence in (*sentences, _explain_small_counts(table, noun)) if sentence)


def _explain_fractions(table: pd.DataFrame, part: str, share: float, noun: str, joined: int) -> str:
    """Describe the classes whose fraction in a split deviates from the requested one, with reasons; "" if none does."""
    pool = table if part == "test" else table[table["split"] != "test"]
    mixed = pool.groupby("group")["class"].nunique()
    sampled = _RandomSplit(part, share, noun, joined, images=len(pool), mixed=frozenset(mixed.index[mixed > 1]))
    deviations = [
        f'{100 * actual:.1f} % of "{name}" ({sampled.explain_class(rows)})'
        for name, rows in pool.groupby("class", sort=True)
        for actual in [float((rows["split"] == part).mean())]
        if abs(actual - share) > SHARE_TOLERANCE
    ]
    if not deviations:
        return ""
    pool_name = "images of each class" if part == "test" else "images of each class outside the test set"
    overall = float((pool["split"] == part).mean())
    return (
        f"The {PART_NAMES[part]} set should contain {100 * share:g} % of the {pool_name} but contains "
        f"{', '.join(deviations)}; {100 * overall:.1f} % of all classes together."
    )


@dataclass(frozen=True)
class _RandomSplit:
    """A split that was drawn at random.

    Attributes:
        part: Its name.
        share: Its requested fraction of `images`.
        noun: What a group is: patient or image.
        joined: Number of groups that were kept together with others because of copies.
        images: Number of images that it was drawn from.
        mixed: Groups with images of several classes.
    """

    part: str
    share: float
    noun: str
    joined: int
    images: int
    mixed: frozenset[str]

    def explain_class(self, rows: pd.DataFrame) -> str:
        """Explain why the fraction of one class deviates, as far as the sizes of its groups show it."""
        groups = rows.groupby("group").agg(images=("split", "size"), split=("split", "first"))
        is_inside, count, noun = groups["split"] == self.part, len(groups), self.noun
        inside, outside = groups.loc[is_inside, "images"], groups.loc[~is_inside, "images"]
        actual, largest_patient = inside.sum() / len(rows), f"one {noun} has {{:.1f}} % of them"
        if actual > self.share and len(inside) == 1 and count * self.share < 1:
            left = "" if self.part == "test" else "remaining "
            return f"each split needs at least one of its {count} {left}{noun}s"
        if actual > self.share and inside.max() / len(rows) > self.share + SHARE_TOLERANCE:
            return largest_patient.format(100 * inside.max() / len(rows))
        if actual < self.share and (2 * outside.max() > len(rows) or outside.max() > self.share * self.images):
            return f"{largest_patient.format(100 * outside.max() / len(rows))}, too many to be drawn"
        if self.joined:
            return f"copies of images link {self.joined} {noun}s of the set to others"
        mixed = len(self.mixed.intersection(groups.index))
        if mixed:
            verb = "has" if mixed == 1 else "have"
            return f"{mixed} of its {count} {noun}s {verb} images of other classes too and can't be divided"
        if groups["images"].median() > SHARE_TOLERANCE * len(rows):
            low, high = groups["images"].min(), groups["images"].max()
            if noun == "image":
                return f"it has only {count} images"
            return f"its {count} patients of {low}{f' to {high}' if high > low else ''} images can't be divided"
        return f"the sizes of its {noun}s do not explain this; a new draw would come closer"


def _explain_small_counts(table: pd.DataFrame, noun: str) -> str:
    """Describe the classes with few groups in a split; "" if there are none."""
    parts = [part for part in PART_NAMES if (table["split"] == part).any()]
    counts = table.groupby(["class", "split"])["group"].nunique().unstack(fill_value=0)
    descriptions = []
    for name, row in counts.iterrows():
        small_counts = [f"{row[part]} in {PART_NAMES[part]}" for part in parts if row[part] < MIN_GROUPS]
        if small_counts:
            descriptions.append(f'"{name}" {_join_words(small_counts)}')
    if not descriptions:
        return ""
    return (
        f"Fewer than {MIN_GROUPS} {noun}s of a class in a split: {'; '.join(descriptions)}. Single {noun}s determine "
        "what is learned or measured there."
    )


def _join_words(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
