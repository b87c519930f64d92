"""What a trained network says of images, however it is computed: probabilities, classes, decisions and abstentions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pylorus.data.input import InputFormat
from pylorus.deploy.description import Description
from pylorus.deploy.network import Output
from pylorus.evaluation.calibration import probabilities_of_logits
from pylorus.evaluation.conformal import prediction_sets


@dataclass(frozen=True, eq=False)
class Answers:
    """What a bundle says of some images.

    Attributes:
        probabilities: Calibrated, of shape (n, classes).
        predicted: The likeliest class of each, of shape (n,).
        positive: Whether the deciding class's probability reaches its threshold, of shape (n,).
        unlikeness: Of shape (n,), in [0, 2].
        why: Why it abstains, of shape (n,): "", "unsure" or "unlike".
        sets: Which classes are in the prediction set of each, of shape (n, classes); None where the bundle has none.
    """

    probabilities: NDArray[np.float64]
    predicted: NDArray[np.int64]
    positive: NDArray[np.bool_]
    unlikeness: NDArray[np.float64]
    why: NDArray[np.str_]
    sets: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class TrainedModel(ABC):
    """A trained network, ready to be asked.

    Attributes:
        folder: Where it lies.
        description: All of model.json.
        sha256: Of each of its files, by name.
    """

    folder: Path
    description: Description
    sha256: Mapping[str, str]

    @property
    def input(self) -> InputFormat:
        """How a file becomes the network's input."""
        return self.description.input.form

    @abstractmethod
    def output(self, images: NDArray[np.uint8]) -> Output:
        """What the network says of images (n, size, size, 3) as `input` reads them, on the CPU."""

    def probabilities(self, logits: Tensor | NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Calibrated probabilities (n, classes) of logits."""
        given = np.asarray(logits, dtype=np.float64)
        return probabilities_of_logits(given, temperature=self.description.calibration.temperature)

    def decide(self, output: Output, *, class_name: str | None = None) -> Answers:
        """Probabilities, classes, decisions at the stored threshold, and where the model abstains.

        Args:
            output: Of the network.
            class_name: Short name of the class that decides; None: the bundle's own.
        """
        names, abstention = self.description.short_names, self.description.abstention
        deciding = class_name or self.description.decision.class_name
        threshold = self.description.decision.thresholds[deciding]
        shares = self.probabilities(output.logits)
        sets = self.description.prediction_sets
        unlike = np.asarray(output.unlikeness, dtype=np.float64)
        unsure = shares.max(axis=1) < abstention.unsure_below
        return Answers(
            probabilities=shares,
            predicted=shares.argmax(axis=1).astype(np.int64),
            positive=shares[:, names.index(deciding)] >= (2.0 if threshold is None else threshold),
            unlikeness=unlike,
            why=np.where(unlike > abstention.unlike_above, "unlike", np.where(unsure, "unsure", "")),
            sets=None if sets is None else prediction_sets(shares, sets.limits(names)),
        )

    def answer(self, images: NDArray[np.uint8], *, class_name: str | None = None) -> Answers:
        """What it says of images (n, size, size, 3), uint8 RGB as `input` reads them."""
        return self.decide(self.output(images), class_name=class_name)
