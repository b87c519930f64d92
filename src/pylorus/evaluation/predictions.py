"""Predictions of a model for a set of images, checked once on construction."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import check_labels, check_names, check_probabilities, encode_groups

SHOWN = 3
"""Number of samples that an error message names."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Probabilities of one model for a set of images, with their true classes.

    Attributes:
        sample: Names of the images, unique, of shape (n,), n >= 1.
        group: Groups (patients) of the images, of shape (n,).
        true: True classes, whole numbers in [0, classes), of shape (n,).
        probabilities: Class probabilities of shape (n, classes); rows sum to one.
        class_names: Names of the columns, unique, of length classes.

    Raises:
        ValueError: If a shape, a label, a name or a probability is not as described above.

    Example:
        >>> predictions = Predictions(
        ...     sample=np.array(["a.png", "b.png"]),
        ...     group=np.array(["p1", "p2"]),
        ...     true=np.array([0, 1]),
        ...     probabilities=np.array([[0.8, 0.2], [0.6, 0.4]]),
        ...     class_names=("cancer", "other"),
        ... )
        >>> predictions.predicted.tolist(), predictions.classes
        ([0, 0], 2)
    """

    sample: NDArray[np.str_]
    group: NDArray[np.generic]
    true: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        table = check_probabilities(self.probabilities)
        truth = check_labels(self.true, table.shape[1], name="true")
        if not len(truth) == len(table) == len(self.sample):
            raise ValueError(
                f"found {len(self.sample)} samples, {len(truth)} true labels and probabilities of {len(table)} images; "
                "expected equally many"
            )
        if len(set(self.class_names)) != table.shape[1] or len(self.class_names) != table.shape[1]:
            raise ValueError(
                f"class names are {list(self.class_names)}; expected a unique name for each of {table.shape[1]} columns"
            )
        names, count = np.unique(check_names(self.sample), return_counts=True)
        if (count > 1).any():
            raise ValueError(f"samples that occur more than once: {_format_some_names(names[count > 1])}")
        encode_groups(self.group, length=len(truth))  # checks the names of the groups

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each image, of shape (n,); for ties, the first."""
        labels: NDArray[np.int64] = np.argmax(self.probabilities, axis=1).astype(np.int64)
        return labels

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the predicted class of each image is the true one, of shape (n,)."""
        flags: NDArray[np.bool_] = self.predicted == self.true
        return flags

    @property
    def clusters(self) -> NDArray[np.generic] | None:
        """The group of each image if a group has several images, otherwise None."""
        return self.group if len(np.unique(self.group)) < len(self.true) else None


def align_predictions(first: Predictions, second: Predictions) -> Predictions:
    """Reorder the second model's predictions to the first's order of images and classes.

    Raises:
        ValueError: If the two differ in images, classes, true classes or groups, because a paired comparison of
            different test sets is wrong.

    Example:
        >>> one = Predictions(np.array(["a", "b"]), np.array([1, 2]), np.array([0, 1]), np.eye(2), ("x", "y"))
        >>> two = Predictions(np.array(["b", "a"]), np.array([2, 1]), np.array([0, 1]), np.eye(2), ("y", "x"))
        >>> align_predictions(one, two).sample.tolist(), align_predictions(one, two).probabilities.tolist()
        (['a', 'b'], [[1.0, 0.0], [0.0, 1.0]])
    """
    if set(first.class_names) != set(second.class_names):
        raise ValueError(f"the classes differ: {list(first.class_names)} and {list(second.class_names)}")
    first_names, second_names = check_names(first.sample), check_names(second.sample)
    unmatched = np.setxor1d(first_names, second_names)
    if len(unmatched):
        raise ValueError(
            f"the two predictions are not for the same images ({len(first_names)} and {len(second_names)} images; "
            f"{len(unmatched)} are in only one of them: {_format_some_names(unmatched)}); compare runs with the same split"
        )
    rows = np.argsort(second_names)[np.searchsorted(second_names[np.argsort(second_names)], first_names)]
    columns = np.array([second.class_names.index(name) for name in first.class_names])
    # columns[i] is the second's column of the first's class i; its inverse converts the second's labels.
    truth = np.argsort(columns)[second.true[rows]]
    groups = np.asarray(second.group)[rows]
    for name, differs in (
        ("true classes", truth != first.true),
        ("groups", groups != np.asarray(first.group)),
    ):
        if np.any(differs):
            raise ValueError(
                f"the two predictions disagree on the {name} of {_format_some_names(first_names[np.atleast_1d(differs)])}"
            )
    return Predictions(first_names, groups, truth, second.probabilities[rows][:, columns], first.class_names)


def _format_some_names(names: NDArray[np.str_]) -> str:
    """Format the first `SHOWN` names, and the number of the others."""
    text = ", ".join(str(name) for name in names[:SHOWN])
    return text if len(names) <= SHOWN else f"{text} and {len(names) - SHOWN} more"
