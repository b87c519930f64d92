"""Draw splits and folds of an image set at random, by whole groups, and explain how they differ from the request.

Groups have equal probabilities, and each class its share. Both functions are our own: scikit-learn has no random split
by groups that keeps class shares, and folds must not change with its version, as those of StratifiedGroupKFold did in
1.8. The folds are those of 1.8 and later, where a million groups take seven minutes in a Python loop.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.core.formatting import format_percent, join_names

TOLERANCE = 0.02
"""Deviation of a class's share from the requested one above which large groups may be exchanged to correct it."""
LARGE_GROUP_SHARE = 0.25
"""A group with more than this share of the split's images of a class is large and is drawn before the others."""
SIMILAR_SIZE_RATIO = 1.5
"""Groups up to this many times the size of a class's smallest groups are similar: none is too large to be drawn."""
CANDIDATES = 64
"""Groups inside and outside the split that one correction step compares."""
GROUP_WEIGHT = 0.1
"""Weight of the number of groups in the loss of the correction, relative to the images of a class."""

SHARE_TOLERANCE = 0.02
"""Deviation from the requested fraction above which a class is reported."""
MIN_GROUPS = 5
"""A split with fewer groups of a class is reported: single groups then determine what is learned or measured."""
PART_NAMES = {"train": "training", "val": "validation", "test": "test"}


def draw_part(
    labels: NDArray[np.int64], groups: NDArray[np.str_], *, share: float, seed: int, later: float = 0.0
) -> NDArray[np.bool_]:
    """Draw whole groups until they hold a share of each class's images.

    Each group has the same probability, with two exceptions that are never drawn: a group with more images than the
    whole split, and a group with more than half of a class's images, unless all groups of the class are about that
    large. Large groups are drawn first; the others fill up each class's share. Within a class, groups of similar size
    compete with each other (ordered pivotal sampling), so that the split's share of the groups is about its share of
    the images. Every class gets at least one group in the split and leaves at least one for each other split.

    Args:
        labels: Class of each image, of shape (images,).
        groups: Group of each image, of shape (images,). Neither the order of the images nor that of the class numbers
            changes the result.
        share: Share of each class's images, in (0, 1).
        seed: In [0, 2^32).
        later: Share of the remaining images that another split will take afterwards, in [0, 1); 0: there is none.

    Returns:
        Whether each image is in the split, of shape (images,).

    Raises:
        ValueError: If a class has fewer groups than there are splits, the arrays differ in length or are empty, or a
            share is out of range.

    Source:
        Deville and Tillé, Unequal probability sampling without replacement through a splitting method, Biometrika 85
        (1998): the pivotal method. Chauvet, On a characterization of ordered pivotal sampling, Bernoulli 18 (2012).

    Example:
        >>> labels, patients = np.repeat([0, 1], 200), np.repeat([f"p{n}" for n in range(80)], 5)
        >>> part = draw_part(labels, patients, share=0.15, seed=0)
        >>> int(part[labels == 0].sum()), int(part[labels == 1].sum())
        (30, 30)
    """
    if len(labels) != len(groups) or not len(labels):
        raise ValueError(f"{len(labels)} labels and {len(groups)} groups; expected equal numbers, at least one")
    if not 0 < share < 1 or not 0 <= later < 1:
        raise ValueError(f"share is {share} and later {later}; expected 0 < share < 1 and 0 <= later < 1")
    counts, group = _count_images(labels, groups)
    rng = np.random.RandomState(seed)  # same numbers in every version of NumPy
    order = rng.permutation(len(counts))
    drawn = np.empty(len(counts), dtype=np.bool_)
    drawn[order] = _SplitSampler(counts[order], share=share, later=later, rng=rng).draw_groups()
    return drawn[group]


def _count_images(labels: NDArray[np.int64], groups: NDArray[np.str_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return image counts of shape (groups, classes), and the group index of each image."""
    _, label = np.unique(labels, return_inverse=True)
    names, group = np.unique(groups, return_inverse=True)
    classes = int(label.max()) + 1
    counts = np.bincount(group * classes + label, minlength=len(names) * classes).reshape(len(names), classes)
    # Order the classes by their counts: renumbering the classes must not change the result.
    return counts[:, sorted(range(classes), key=lambda number: counts[:, number].tobytes())], group


class _SplitSampler:
    """State of one draw.

    Attributes:
        counts: Images of each group in each class, of shape (groups, classes); groups in random order.
        sizes: Images of each group.
        totals: Images of each class.
        left_out: Groups of each class that must stay outside the split.
        eligible: Whether each group is small enough to be drawn.
        members: Groups that have images of each class.
        target: Images of each class that the split should hold.
        large: Whether each group is drawn before the others.
        oversized: Whether each group alone has more images of a class than the split should hold.
        probabilities: Inclusion probability of each group, in [0, 1].
    """

    def __init__(self, counts: NDArray[np.int64], *, share: float, later: float, rng: np.random.RandomState) -> None:
        self.counts, self.rng = counts, rng
        self.sizes, self.totals = counts.sum(axis=1), counts.sum(axis=0)
        self.left_out = 2 if later else 1
        self.members = (counts > 0).sum(axis=0)
        if self.members.min() < 1 + self.left_out:
            raise ValueError(f"a class has {self.members.min()} groups, expected at least {1 + self.left_out}")
        self.eligible = self._find_eligible(share)
        images = counts[self.eligible].sum(axis=0)
        wanted = share * self.totals
        # If groups are excluded, the rest may not suffice for both splits: each gets its share of what there is.
        self.target = wanted * np.minimum(1, images / (wanted + later * (self.totals - wanted)))
        self.large = self.eligible & (counts > LARGE_GROUP_SHARE * self.target).any(axis=1)
        self.oversized = (counts > self.target + TOLERANCE * self.totals).any(axis=1)
        self.probabilities = self._compute_probabilities(self.target / images)

    def draw_groups(self) -> NDArray[np.bool_]:
        """Return whether each group is in the split, of shape (groups,)."""
        drawn = self._draw_from(self.large, self.probabilities)
        small = self.eligible & ~self.large
        missing = np.maximum(0, self.target - self.counts[drawn].sum(axis=0))
        images = np.maximum(1, self.counts[small].sum(axis=0))
        drawn |= self._draw_from(small, self.counts @ np.minimum(1, missing / images) / self.sizes)
        self._reduce_deviation(drawn, small, slack=TOLERANCE / 4)
        if self._is_uneven(drawn):
            self._reduce_deviation(drawn, self.eligible & ~self.oversized, slack=TOLERANCE)
        if self._has_missing_class(drawn):
            self._reduce_deviation(drawn, self.eligible, slack=1.0)
        return drawn

    def _find_eligible(self, share: float) -> NDArray[np.bool_]:
        small_enough = self.sizes <= share * self.sizes.sum() + 1e-9
        eligible: NDArray[np.bool_] = small_enough & (2 * self.counts <= self.totals).all(axis=1)
        for images in self.counts.T:
            needed = np.partition(self.sizes[images > 0], self.left_out - 1)[self.left_out - 1]
            eligible |= (images > 0) & (self.sizes <= SIMILAR_SIZE_RATIO * needed)
        return eligible

    def _compute_probabilities(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute inclusion probabilities from the share of the eligible images of each class that is to be drawn."""
        probabilities: NDArray[np.float64] = self.counts @ share / self.sizes
        one_group = 1 / (self.counts[self.eligible] > 0).sum(axis=0)
        for rare in np.flatnonzero(share < one_group):  # on average, one group of such a class is drawn
            has_class = self.counts[:, rare] > 0
            probabilities[has_class] = np.maximum(probabilities[has_class], one_group[rare])
        return probabilities

    def _draw_from(self, pool: NDArray[np.bool_], probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Draw from a pool of groups, class by class, with groups of similar size competing with each other."""
        members = np.flatnonzero(pool)
        main_class = (self.counts[members] / self.totals).argmax(axis=1)
        by_size = np.lexsort((-self.sizes[members], main_class))  # stable: groups of equal size keep their random order
        members, main_class = members[by_size], main_class[by_size]
        drawn = np.zeros(len(pool), dtype=np.bool_)
        for block in np.split(members, np.flatnonzero(np.diff(main_class)) + 1):
            uniforms = self.rng.random_sample(len(block)).tolist()
            drawn[block[_draw_pivotal(probabilities[block].tolist(), uniforms)]] = True
        return drawn

    def _reduce_deviation(self, drawn: NDArray[np.bool_], movable: NDArray[np.bool_], *, slack: float) -> None:
        """Add, remove and exchange random groups in place until no class deviates by more than `slack`."""
        inside = self.counts[drawn]
        sums, members, groups = inside.sum(axis=0), (inside > 0).sum(axis=0), len(inside)
        loss = float(self._compute_loss(sums, members, groups, slack))
        idle = 0
        while loss > 0 and idle < 3:
            moves = self._sample_moves(drawn, movable)
            signs = (moves >= 0) * np.array([-1, 1])
            rows = self.counts[moves] * signs[:, :, None]
            new_sums, new_members = sums + rows.sum(axis=1), members + np.sign(rows).sum(axis=1)
            new_groups = groups + signs.sum(axis=1)
            losses = self._compute_loss(new_sums, new_members, new_groups, slack)
            best = int(losses.argmin())
            if losses[best] >= loss:
                idle += 1
                continue
            removed, added = moves[best]
            if removed >= 0:
                drawn[removed] = False
            if added >= 0:
                drawn[added] = True
            sums, members, groups, loss = new_sums[best], new_members[best], int(new_groups[best]), float(losses[best])
            idle = 0

    def _sample_moves(self, drawn: NDArray[np.bool_], movable: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return pairs of a group to remove and a group to add, of shape (moves, 2); -1 means none."""
        removed, added = (np.append(-1, self._sample(mask)) for mask in (movable & drawn, movable & ~drawn))
        return np.stack(np.meshgrid(removed, added), axis=-1).reshape(-1, 2)

    def _sample(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        members = np.flatnonzero(mask)
        return self.rng.choice(members, min(CANDIDATES, len(members)), replace=False)

    def _compute_loss(
        self, sums: NDArray[np.int64], members: NDArray[np.int64], groups: NDArray[np.int64] | int, slack: float
    ) -> NDArray[np.float64]:
        """Compute how far sets of groups are from the target; a class that is absent from a split weighs most."""
        excess = np.maximum(0, np.abs(sums - self.target) / self.totals - np.maximum(slack, 0.5 / self.totals))
        lacking = np.maximum(0, 1 - members) + np.maximum(0, self.left_out - (self.members - members))
        group_deviation = np.abs(groups - self.probabilities[self.eligible].sum()) / len(self.sizes)
        loss = (excess**2).sum(axis=-1) + GROUP_WEIGHT * np.maximum(
            0, group_deviation - max(slack, 1 / len(self.sizes))
        ) ** 2
        # Round, so that ties are ties on every machine.
        return np.asarray(np.round(loss + 1000.0 * lacking.sum(axis=-1), 12))

    def _is_uneven(self, drawn: NDArray[np.bool_]) -> bool:
        deviation = np.abs(self.counts[drawn].sum(axis=0) - self.target) / self.totals
        return bool((deviation > TOLERANCE).any()) or self._has_missing_class(drawn)

    def _has_missing_class(self, drawn: NDArray[np.bool_]) -> bool:
        inside = (self.counts[drawn] > 0).sum(axis=0)
        return bool((inside < 1).any() or (self.members - inside < self.left_out).any())


def _draw_pivotal(probabilities: Sequence[float], uniforms: Sequence[float]) -> list[int]:
    """Draw indices by the ordered pivotal method: each with its probability, neighbours rarely together.

    Two undecided units compete. If their probabilities sum to less than 1, one takes over the sum and the other is out;
    else one is drawn and the other keeps the rest. The undecided one competes with the next unit.

    Args:
        probabilities: Inclusion probabilities, each in [0, 1].
        uniforms: As many uniform random numbers in [0, 1).
    """
    return list(_iter_pivotal(probabilities, uniforms))


def _iter_pivotal(probabilities: Sequence[float], uniforms: Sequence[float]) -> Iterator[int]:
    if not probabilities:
        return
    undecided, undecided_probability = 0, probabilities[0]
    for index in range(1, len(probabilities)):
        probability = probabilities[index]
        total = undecided_probability + probability
        if total < 1:
            if uniforms[index] * total < probability:
                undecided = index
            undecided_probability = total
        else:
            if uniforms[index] * (2 - total) < 1 - probability:  # the undecided unit is drawn
                yield undecided
                undecided = index
            else:
                yield index
            undecided_probability = total - 1
    if uniforms[0] < undecided_probability + 1e-9:
        yield undecided


def stratified_folds(
    labels: NDArray[np.int64], groups: NDArray[np.str_], *, folds: int, seed: int
) -> NDArray[np.int64]:
    """Assign each row to a fold: groups stay whole, classes are spread evenly.

    Groups are shuffled, then assigned one by one, those with the most uneven class counts first: each to the fold that
    makes the class shares vary least between the folds; ties go to the fold with the fewest images.

    Args:
        labels: Class of each row, of shape (rows,).
        groups: Group of each row, of shape (rows,); the names only affect the order that is shuffled.
        folds: Number of folds, at most the number of groups.
        seed: Seed of the shuffle, in [0, 2^32).

    Returns:
        Fold of each row, from 0 to folds - 1, of shape (rows,).

    Raises:
        ValueError: If the arrays differ in length, or there are fewer groups than folds.
    """
    if len(labels) != len(groups):
        raise ValueError(f"{len(labels)} labels and {len(groups)} groups; expected equal numbers")
    _, label, totals = np.unique(labels, return_inverse=True, return_counts=True)
    names, group = np.unique(groups, return_inverse=True)
    if not 1 <= folds <= len(names):
        raise ValueError(f"folds is {folds} with {len(names)} groups; expected 1 to {len(names)}")
    table = np.bincount(group * len(totals) + label, minlength=len(names) * len(totals))
    shuffled = np.arange(len(names))
    np.random.RandomState(seed).shuffle(shuffled)  # as in existing splits
    counts = table.reshape(len(names), len(totals)).astype(np.float64)[shuffled]
    order = np.argsort(-np.std(counts, axis=1), kind="stable")
    fold = np.empty(len(names), dtype=np.int64)
    fold[shuffled[order]] = _put_groups_in_folds(counts[order], totals, folds)
    return fold[group]


def _put_groups_in_folds(counts: NDArray[np.float64], totals: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """Assign groups to folds, in their order.

    Args:
        counts: Images of each group in each class, of shape (groups, classes).
        totals: Images of each class, of shape (classes,).
        folds: Number of folds.

    Returns:
        Fold of each group, of shape (groups,).
    """
    filled = np.zeros((folds, len(totals)))
    candidates = np.empty((folds, folds, len(totals)))  # candidates[i]: all folds with the group added to fold i
    diagonal = np.arange(folds)
    fold_of_group = np.empty(len(counts), dtype=np.int64)
    for index, group in enumerate(counts):
        candidates[:] = filled
        candidates[diagonal, diagonal] += group
        shares = candidates / totals
        shares -= shares.sum(axis=1, keepdims=True) / folds
        shares *= shares
        imbalance = np.sqrt(shares.sum(axis=1) / folds).mean(axis=1)
        best = _find_best_fold(imbalance.tolist(), filled.sum(axis=1).tolist())
        filled[best] += group
        fold_of_group[index] = best
    return fold_of_group


def _find_best_fold(imbalance: list[float], images: list[float]) -> int:
    best, least, fewest = 0, imbalance[0], images[0]
    for fold in range(1, len(imbalance)):
        value = imbalance[fold]
        # as np.isclose, which is too slow for a million calls
        is_tie = abs(value - least) <= 1e-8 + 1e-5 * abs(least)
        if value < least or (is_tie and images[fold] < fewest):
            best, least, fewest = fold, value, images[fold]
    return best


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
    # As arrays of numbers: with pandas' groups of each class, this would take a third of a second pass over few images.
    pool = table if part == "test" else table[table["split"] != "test"]
    labels, names = pd.factorize(pool["class"], sort=True)
    groups, group_names = pd.factorize(pool["group"], use_na_sentinel=False)
    is_inside = (pool["split"] == part).to_numpy(dtype=bool)
    keys, first, sizes = np.unique(labels * len(group_names) + groups, return_index=True, return_counts=True)
    key_labels, key_groups = np.divmod(keys, max(1, len(group_names)))
    is_mixed = (np.bincount(key_groups, minlength=len(group_names)) > 1)[key_groups]
    sampled = _RandomSplit(part, share, noun, joined, images=len(pool))
    alike: dict[tuple[str, str], list[str]] = {}  # classes by what is said of them
    for label, name in enumerate(names):
        actual = float(is_inside[labels == label].mean())
        if abs(actual - share) > SHARE_TOLERANCE:
            own = key_labels == label
            reason = sampled.explain_class(sizes[own], is_inside[first[own]], mixed=int(is_mixed[own].sum()))
            alike.setdefault((format_percent(actual), reason), []).append(str(name))
    if not alike:
        return ""
    deviations = [
        f"{actual} % of {_format_class_names(classes, len(names))} ({reason})"
        for (actual, reason), classes in alike.items()
    ]
    is_same_for_all = len(alike) == 1 and len(next(iter(alike.values()))) == len(names)
    overall = "" if is_same_for_all else f"; {format_percent(float(is_inside.mean()))} % of all classes together"
    pool_name = "images of each class" if part == "test" else "images of each class outside the test set"
    return (
        f"The {PART_NAMES[part]} set should contain {format_percent(share, digits=None)} % of the {pool_name} "
        f"but contains {', '.join(deviations)}{overall}."
    )


def _format_class_names(names: Sequence[str], classes: int) -> str:
    """Format the names of classes of which the same is said, out of the number of all classes."""
    if len(names) == 1:
        return f'"{names[0]}"'
    return "each class" if len(names) == classes else "each of " + join_names([f'"{name}"' for name in names])


@dataclass(frozen=True)
class _RandomSplit:
    """A split that was drawn at random.

    Attributes:
        part: Its name.
        share: Its requested fraction of `images`.
        noun: What a group is: patient or image.
        joined: Number of groups that were kept together with others because of copies.
        images: Number of images that it was drawn from.
    """

    part: str
    share: float
    noun: str
    joined: int
    images: int

    def explain_class(self, sizes: NDArray[np.int64], is_inside: NDArray[np.bool_], *, mixed: int) -> str:
        """Explain why the fraction of one class deviates, as far as the sizes of its groups show it.

        Args:
            sizes: Images of the class in each of its groups, of shape (groups,).
            is_inside: Whether each group is in this split, of shape (groups,).
            mixed: Number of these groups that have images of other classes too.
        """
        count, total, noun = len(sizes), int(sizes.sum()), self.noun
        inside, outside = sizes[is_inside], sizes[~is_inside]
        largest_inside, largest_outside = inside.max(initial=0), outside.max(initial=0)
        actual, largest_patient = inside.sum() / total, f"one {noun} has {{}} % of them"
        if actual > self.share and len(inside) == 1 and count * self.share < 1:
            left = "" if self.part == "test" else "remaining "
            return f"each split needs at least one of its {count} {left}{noun}s"
        if actual > self.share and largest_inside / total > self.share + SHARE_TOLERANCE:
            return largest_patient.format(format_percent(largest_inside / total))
        if actual < self.share and (2 * largest_outside > total or largest_outside > self.share * self.images):
            return f"{largest_patient.format(format_percent(largest_outside / total))}, too many to be drawn"
        if self.joined:
            return f"copies of images link {self.joined} {noun}s of the set to others"
        if mixed:
            verb = "has" if mixed == 1 else "have"
            return f"{mixed} of its {count} {noun}s {verb} images of other classes too and can't be divided"
        if np.median(sizes) > SHARE_TOLERANCE * total:
            low, high = sizes.min(), sizes.max()
            if noun == "image":
                return f"it has only {count} images"
            return f"its {count} patients of {low}{f' to {high}' if high > low else ''} images can't be divided"
        return f"the sizes of its {noun}s do not explain this; a new draw would come closer"


def _explain_small_counts(table: pd.DataFrame, noun: str) -> str:
    """Describe the classes with few groups in a split; "" if there are none."""
    parts = [part for part in PART_NAMES if (table["split"] == part).any()]
    counts = table.groupby(["class", "split"])["group"].nunique().unstack(fill_value=0)
    names: dict[str, list[str]] = {}
    for name, row in counts.iterrows():
        small_counts = [f"{row[part]} in {PART_NAMES[part]}" for part in parts if row[part] < MIN_GROUPS]
        if small_counts:
            names.setdefault(join_names(small_counts), []).append(str(name))
    if not names:
        return ""
    descriptions = [f"{_format_class_names(alike, len(counts))} {text}" for text, alike in names.items()]
    return (
        f"Fewer than {MIN_GROUPS} {noun}s of a class in a split: {'; '.join(descriptions)}. Single {noun}s determine "
        "what is learned or measured there."
    )
