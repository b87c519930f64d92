"""Draws a part of an image set by chance: groups whole, each with the same chance, classes in their shares."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.02
"""How far the share of a class may lie from what was asked before a large group is exchanged for it."""
LARGE = 0.25
"""A group with more than this share of a class's images in the part is large: it is drawn before the others."""
ALIKE = 1.5
"""Groups up to this many times the size of a class's smallest are alike: none of them is too large to be drawn."""
CANDIDATES = 64
"""Groups on each side that one step of the correction compares."""
GROUPS = 0.1
"""What the number of groups weighs in the correction, where the images of a class weigh 1."""


def draw_part(
    labels: NDArray[np.int64], groups: NDArray[np.str_], *, share: float, seed: int, later: float = 0.0
) -> NDArray[np.bool_]:
    """Draw whole groups until they hold a share of each class's images.

    Each group has the same chance, except that these stay out: a group with more images than the whole part, and a
    group with more than half of a class's images, unless all groups of the class are about that large. Large groups
    are drawn first, the others fill what is left of each class's share. Within a class, groups of similar size compete
    with each other (ordered pivotal sampling), so that a part has about as many groups as images for its share.
    Every class gets at least one group in the part and, where it has enough, leaves one for each other part.

    Args:
        labels: Class of each image, of shape (images,).
        groups: Group of each image, of shape (images,). Neither the order of the images nor that of the class numbers
            changes the result.
        share: Share of each class's images, in (0, 1).
        seed: In [0, 2^32).
        later: Share of the remaining images that another part will be drawn from, in [0, 1); 0: none is.

    Returns:
        Whether each image is in the part, of shape (images,).

    Raises:
        ValueError: If a class has fewer groups than there are parts, the arrays differ in length or are empty, or a
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
        raise ValueError(f"{len(labels)} labels and {len(groups)} groups; expected as many of each, at least one")
    if not 0 < share < 1 or not 0 <= later < 1:
        raise ValueError(f"share is {share} and later {later}; expected 0 < share < 1 and 0 <= later < 1")
    counts, group = _count_images(labels, groups)
    rng = np.random.RandomState(seed)  # whose numbers are the same in every version of NumPy
    order = rng.permutation(len(counts))
    drawn = np.empty(len(counts), dtype=np.bool_)
    drawn[order] = _Draw(counts[order], share=share, later=later, rng=rng).draw()
    return drawn[group]


def _count_images(labels: NDArray[np.int64], groups: NDArray[np.str_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Images of each group in each class, of shape (groups, classes), and the group of each image."""
    _, label = np.unique(labels, return_inverse=True)
    names, group = np.unique(groups, return_inverse=True)
    classes = int(label.max()) + 1
    counts = np.bincount(group * classes + label, minlength=len(names) * classes).reshape(len(names), classes)
    # In an order that follows from the classes' groups: a user may number the classes anew.
    return counts[:, sorted(range(classes), key=lambda number: counts[:, number].tobytes())], group


class _Draw:
    """One draw of a part.

    Attributes:
        counts: Images of each group in each class, of shape (groups, classes); the groups in an order by chance.
        sizes: Images of each group.
        totals: Images of each class.
        left_out: Groups of each class that must stay outside the part.
        eligible: Whether each group is small enough to be drawn.
        target: Images of each class that the part should hold.
        large: Whether each group is drawn before the others.
        oversized: Whether each group has by itself more images of a class than the part should hold.
        chances: Of each group, in [0, 1].
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
        # Where groups stay out, the others may not suffice for both parts: each gets its share of what there is.
        self.target = wanted * np.minimum(1, images / (wanted + later * (self.totals - wanted)))
        self.large = self.eligible & (counts > LARGE * self.target).any(axis=1)
        self.oversized = (counts > self.target + TOLERANCE * self.totals).any(axis=1)
        self.chances = self._compute_chances(self.target / images)

    def draw(self) -> NDArray[np.bool_]:
        """Whether each group is in the part."""
        drawn = self._draw_from(self.large, self.chances)
        small = self.eligible & ~self.large
        missing = np.maximum(0, self.target - self.counts[drawn].sum(axis=0))
        images = np.maximum(1, self.counts[small].sum(axis=0))
        drawn |= self._draw_from(small, self.counts @ np.minimum(1, missing / images) / self.sizes)
        self._correct(drawn, small, slack=TOLERANCE / 4)
        if self._is_uneven(drawn):
            self._correct(drawn, self.eligible & ~self.oversized, slack=TOLERANCE)
        if self._lacks_class(drawn):
            self._correct(drawn, self.eligible, slack=1.0)
        return drawn

    def _find_eligible(self, share: float) -> NDArray[np.bool_]:
        small_enough = self.sizes <= share * self.sizes.sum() + 1e-9
        eligible: NDArray[np.bool_] = small_enough & (2 * self.counts <= self.totals).all(axis=1)
        for images in self.counts.T:
            needed = np.partition(self.sizes[images > 0], self.left_out - 1)[self.left_out - 1]
            eligible |= (images > 0) & (self.sizes <= ALIKE * needed)
        return eligible

    def _compute_chances(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        """The chance of each group from the share of each class that is to be drawn of the eligible ones."""
        chances: NDArray[np.float64] = self.counts @ share / self.sizes
        one_group = 1 / (self.counts[self.eligible] > 0).sum(axis=0)
        for rare in np.flatnonzero(share < one_group):  # such a class sends one group on average
            has = self.counts[:, rare] > 0
            chances[has] = np.maximum(chances[has], one_group[rare])
        return chances

    def _draw_from(self, pool: NDArray[np.bool_], chances: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Draws from the groups of a pool, each class by itself, groups of similar size against each other."""
        members = np.flatnonzero(pool)
        own = (self.counts[members] / self.totals).argmax(axis=1)
        by_size = np.lexsort((-self.sizes[members], own))  # stable: groups of one size stay in their order by chance
        members, own = members[by_size], own[by_size]
        drawn = np.zeros(len(pool), dtype=np.bool_)
        for block in np.split(members, np.flatnonzero(np.diff(own)) + 1):
            drawn[block[_draw_pivotal(chances[block].tolist(), self.rng.random_sample(len(block)).tolist())]] = True
        return drawn

    def _correct(self, drawn: NDArray[np.bool_], movable: NDArray[np.bool_], *, slack: float) -> None:
        """Adds, removes and exchanges groups by chance, in place, until no class is further off than the slack."""
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
        """Pairs of a group to remove and one to add, of shape (moves, 2); -1 for none."""
        removed, added = (np.append(-1, self._sample(mask)) for mask in (movable & drawn, movable & ~drawn))
        return np.stack(np.meshgrid(removed, added), axis=-1).reshape(-1, 2)

    def _sample(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        members = np.flatnonzero(mask)
        return self.rng.choice(members, min(CANDIDATES, len(members)), replace=False)

    def _compute_loss(
        self, sums: NDArray[np.int64], members: NDArray[np.int64], groups: NDArray[np.int64] | int, slack: float
    ) -> NDArray[np.float64]:
        """How far sets of groups are from the target: first in classes that a part lacks, then in images and groups."""
        off = np.maximum(0, np.abs(sums - self.target) / self.totals - np.maximum(slack, 0.5 / self.totals))
        lacking = np.maximum(0, 1 - members) + np.maximum(0, self.left_out - (self.members - members))
        fewer = np.abs(groups - self.chances[self.eligible].sum()) / len(self.sizes)
        loss = (off**2).sum(axis=-1) + GROUPS * np.maximum(0, fewer - max(slack, 1 / len(self.sizes))) ** 2
        # Rounded, so that equal ones are equal on every machine.
        return np.asarray(np.round(loss + 1000.0 * lacking.sum(axis=-1), 12))

    def _is_uneven(self, drawn: NDArray[np.bool_]) -> bool:
        off = np.abs(self.counts[drawn].sum(axis=0) - self.target) / self.totals
        return bool((off > TOLERANCE).any()) or self._lacks_class(drawn)

    def _lacks_class(self, drawn: NDArray[np.bool_]) -> bool:
        inside = (self.counts[drawn] > 0).sum(axis=0)
        return bool((inside < 1).any() or (self.members - inside < self.left_out).any())


def _draw_pivotal(chances: Sequence[float], luck: Sequence[float]) -> list[int]:
    """Indices drawn by the ordered pivotal method: each with its chance, neighbours seldom together.

    Two undecided ones meet: one takes over the chance of both, or is drawn where that exceeds 1; the other is out or
    keeps the rest, and meets the next.

    Args:
        chances: Each in [0, 1].
        luck: As many uniform numbers in [0, 1).
    """
    return list(_pivot(chances, luck))


def _pivot(chances: Sequence[float], luck: Sequence[float]) -> Iterator[int]:
    if not chances:
        return
    open_one, open_chance = 0, chances[0]
    for number in range(1, len(chances)):
        chance = chances[number]
        both = open_chance + chance
        if both < 1:
            if luck[number] * both < chance:
                open_one = number
            open_chance = both
        else:
            if luck[number] * (2 - both) < 1 - chance:  # the open one is drawn
                yield open_one
                open_one = number
            else:
                yield number
            open_chance = both - 1
    if luck[0] < open_chance + 1e-9:
        yield open_one
