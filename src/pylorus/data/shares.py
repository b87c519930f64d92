"""What a split was asked to hold and what it holds: sentences for the terminal and the report, from the same facts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pandas as pd

TOLERANCE = 0.02
"""A share further than this from what was asked is told."""
FEW = 5
"""Groups of a class in a part below which single groups decide what is learned or measured there."""
PART_NAMES = {"train": "training", "val": "validation", "test": "test"}


def find_asked_shares(
    *, given: Collection[str], chosen: bool, fixed: bool, validation: str, test_fraction: float, val_fraction: float
) -> dict[str, float]:
    """The share that each part drawn by chance was to hold; no entry for a part that was not drawn.

    Args:
        given: Parts in which folders or a manifest put images, train included; empty where they say nothing.
        chosen: Whether the test images are those of a fold or of a column's values.
        fixed: Whether all parts are those of another run's split (data.split_file).
        validation: data.validation.
        test_fraction: data.test_fraction, of all images.
        val_fraction: data.val_fraction, of all but the test images.

    Example:
        >>> words = {"validation": "cut", "test_fraction": 0.15, "val_fraction": 0.2}
        >>> find_asked_shares(given=(), chosen=False, fixed=False, **words)
        {'test': 0.15, 'val': 0.2}
        >>> find_asked_shares(given=("train", "test"), chosen=False, fixed=False, **words)
        {'val': 0.2}
    """
    asked = {} if chosen or given else {"test": test_fraction}
    if validation == "cut" and (chosen or "val" not in given):
        asked["val"] = val_fraction
    return {} if fixed else asked


def describe_split(
    table: pd.DataFrame, asked: Mapping[str, float], *, grouped: bool, joined: int = 0
) -> tuple[str, ...]:
    """Sentences about parts whose shares are not those asked for, and about parts with few groups of a class.

    Args:
        table: One row an image, with the columns class, group and split.
        asked: From `find_asked_shares`.
        grouped: Whether groups are patients; else every image is its own group.
        joined: How many groups the cut kept together with others because they hold copies of each other's images.
    """
    noun = "patient" if grouped else "image"
    sentences = [_describe_share(table, part, share, noun, joined) for part, share in asked.items()]
    return tuple(sentence for sentence in (*sentences, _describe_few(table, noun)) if sentence)


def _describe_share(table: pd.DataFrame, part: str, share: float, noun: str, joined: int) -> str:
    """The classes of which a part does not hold the share that was asked, each with the reason; else nothing."""
    pool = table if part == "test" else table[table["split"] != "test"]
    mixed = pool.groupby("group")["class"].nunique()
    drawn = _Drawn(part, share, noun, joined, images=len(pool), mixed=frozenset(mixed.index[mixed > 1]))
    found = [
        f'{100 * got:.1f} % of "{name}" ({drawn.explain(rows)})'
        for name, rows in pool.groupby("class", sort=True)
        for got in [float((rows["split"] == part).mean())]
        if abs(got - share) > TOLERANCE
    ]
    if not found:
        return ""
    images = "images" if part == "test" else "images that are not tested on"
    total = float((pool["split"] == part).mean())
    return (
        f"The {PART_NAMES[part]} set was to hold {100 * share:g} % of the {images} of each class, and holds "
        f"{', '.join(found)}; {100 * total:.1f} % of all classes together."
    )


@dataclass(frozen=True)
class _Drawn:
    """A part that was drawn: its share of `images`, and the groups with images of several classes."""

    part: str
    share: float
    noun: str
    joined: int
    images: int
    mixed: frozenset[str]

    def explain(self, rows: pd.DataFrame) -> str:
        """Why the part does not hold its share of one class's images, as far as the sizes of groups show it."""
        groups = rows.groupby("group").agg(images=("split", "size"), split=("split", "first"))
        is_inside, count, noun = groups["split"] == self.part, len(groups), self.noun
        inside, outside = groups.loc[is_inside, "images"], groups.loc[~is_inside, "images"]
        got, most = inside.sum() / len(rows), f"one {noun} has {{:.1f}} % of them"
        if got > self.share and len(inside) == 1 and count * self.share < 1:
            left = "" if self.part == "test" else "remaining "
            return f"each part needs one of its {count} {left}{noun}s"
        if got > self.share and inside.max() / len(rows) > self.share + TOLERANCE:
            return most.format(100 * inside.max() / len(rows))
        if got < self.share and (2 * outside.max() > len(rows) or outside.max() > self.share * self.images):
            return f"{most.format(100 * outside.max() / len(rows))}, too many to be drawn"
        if self.joined:
            return f"copies of images tie {self.joined} {noun}s of the set to others"
        mixed = len(self.mixed.intersection(groups.index))
        if mixed:
            return f"{mixed} of its {count} {noun}s have images of other classes too and stay whole"
        if groups["images"].median() > TOLERANCE * len(rows):
            low, high = groups["images"].min(), groups["images"].max()
            each = (
                f"of {low}{f' to {high}' if high > low else ''} images stay whole" if noun == "patient" else "are all"
            )
            return f"its {count} {noun}s {each}"
        return f"the sizes of its {noun}s do not explain this, a new draw would come closer"


def _describe_few(table: pd.DataFrame, noun: str) -> str:
    """The classes with few groups in a part; nothing where there are none."""
    parts = [part for part in PART_NAMES if (table["split"] == part).any()]
    counts = table.groupby(["class", "split"])["group"].nunique().unstack(fill_value=0)
    found = []
    for name, row in counts.iterrows():
        few = [f"{row[part]} in {PART_NAMES[part]}" for part in parts if row[part] < FEW]
        if few:
            found.append(f'"{name}" {_join(few)}')
    if not found:
        return ""
    return (
        f"Fewer than {FEW} {noun}s of a class are in a part: {'; '.join(found)}. Single {noun}s decide what is learned "
        "or measured there."
    )


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
