"""What a model said about a set of images: checked once, so that nothing wrong is compared later."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import checked_names, checked_probabilities, group_codes, labels_in_range

SHOWN = 3
"""How many offending samples an error names."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """One model's probabilities for a set of images, and the truth.

    Attributes:
        sample: Names of the images, unique, of shape (n,), n >= 1.
        group: Names of what the images belong to (patients), of shape (n,).
        true: True classes, whole numbers in [0, classes), of shape (n,).
        probabilities: Of shape (n, classes); rows sum to one.
        class_names: Names of the columns, unique, of length classes.

    Raises:
        ValueError: If a shape, a label, a name or a probability is not as said above.

    Example:
        >>> said = Predictions(
        ...     sample=np.array(["a.png", "b.png"]),
        ...     group=np.array(["p1", "p2"]),
        ...     true=np.array([0, 1]),
        ...     probabilities=np.array([[0.8, 0.2], [0.6, 0.4]]),
        ...     class_names=("cancer", "other"),
        ... )
        >>> said.predicted.tolist(), said.classes
        ([0, 0], 2)
    """

    sample: NDArray[np.str_]
    group: NDArray[np.generic]
    true: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        table = checked_probabilities(self.probabilities)
        truth = labels_in_range(self.true, table.shape[1], name="true")
        if not len(truth) == len(table) == len(self.sample):
            raise ValueError(
                f"{len(self.sample)} samples, {len(truth)} true labels, probabilities of {len(table)} images"
            )
        if len(set(self.class_names)) != table.shape[1] or len(self.class_names) != table.shape[1]:
            raise ValueError(f"class names {list(self.class_names)} do not name {table.shape[1]} columns, one each")
        names, count = np.unique(checked_names(self.sample), return_counts=True)
        if (count > 1).any():
            raise ValueError(f"samples that come more than once: {_some(names[count > 1])}")
        group_codes(self.group, length=len(truth))  # refuses what can't name a group

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The likeliest class of each image, of shape (n,); of equally likely ones the first."""
        likeliest: NDArray[np.int64] = np.argmax(self.probabilities, axis=1).astype(np.int64)
        return likeliest

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the likeliest class is the true one, of shape (n,)."""
        right: NDArray[np.bool_] = self.predicted == self.true
        return right

    @property
    def clusters(self) -> NDArray[np.generic] | None:
        """The group of each image where groups hold several, else None."""
        return self.group if len(np.unique(self.group)) < len(self.true) else None


def aligned(first: Predictions, second: Predictions) -> Predictions:
    """Put the second model's predictions in the first's order of images and of classes.

    Raises:
        ValueError: If the two are not about the same images, classes, truth and groups: a paired comparison
            of different test sets would be a wrong number.

    Example:
        >>> one = Predictions(np.array(["a", "b"]), np.array([1, 2]), np.array([0, 1]), np.eye(2), ("x", "y"))
        >>> two = Predictions(np.array(["b", "a"]), np.array([2, 1]), np.array([0, 1]), np.eye(2), ("y", "x"))
        >>> aligned(one, two).sample.tolist(), aligned(one, two).probabilities.tolist()
        (['a', 'b'], [[1.0, 0.0], [0.0, 1.0]])
    """
    if set(first.class_names) != set(second.class_names):
        raise ValueError(f"classes differ: {list(first.class_names)} against {list(second.class_names)}")
    here, there = checked_names(first.sample), checked_names(second.sample)
    only = np.setxor1d(here, there)
    if len(only):
        raise ValueError(
            f"the two are not about the same images ({len(here)} against {len(there)}; "
            f"{len(only)} are in one only: {_some(only)}); compare runs with the same split"
        )
    rows = np.argsort(there)[np.searchsorted(there[np.argsort(there)], here)]
    columns = np.array([second.class_names.index(name) for name in first.class_names])
    # columns[i] is where the first's class i stands in the second; its inverse renames the second's labels.
    truth = np.argsort(columns)[second.true[rows]]
    groups = np.asarray(second.group)[rows]
    for name, differs in (
        ("true classes", truth != first.true),
        ("groups", groups != np.asarray(first.group)),
    ):
        if np.any(differs):
            raise ValueError(f"the two disagree on the {name} of {_some(here[np.atleast_1d(differs)])}")
    return Predictions(here, groups, truth, second.probabilities[rows][:, columns], first.class_names)


def _some(names: NDArray[np.str_]) -> str:
    shown = ", ".join(str(name) for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
