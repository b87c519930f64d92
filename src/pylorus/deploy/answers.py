"""Predictions of a trained network, whatever computes it: probabilities, classes, decisions and abstentions."""

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
from pylorus.deploy.network import NetworkOutput
from pylorus.evaluation.calibration import probabilities_of_logits
from pylorus.evaluation.conformal import prediction_sets


@dataclass(frozen=True, eq=False)
class ModelPredictions:
    """The predictions of a bundle for n images.

    Attributes:
        probabilities: Calibrated probabilities in [0, 1], of shape (n, classes).
        predicted: Index of the most probable class of each image, of shape (n,).
        positive: Whether the deciding class's probability reaches its threshold, of shape (n,).
        unlikeness: Distance from the training images in [0, 2], of shape (n,); see `pylorus.deploy.network.UNLIKENESS`.
        why: Why the model abstains, of shape (n,): "" (it answers), "unsure" or "unlike" (out-of-distribution).
        sets: Which classes are in each image's prediction set, of shape (n, classes); None if the bundle has no
            prediction sets.
    """

    probabilities: NDArray[np.float64]
    predicted: NDArray[np.int64]
    positive: NDArray[np.bool_]
    unlikeness: NDArray[np.float64]
    why: NDArray[np.str_]
    sets: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class InferenceModel(ABC):
    """A trained network that is loaded and ready for inference.

    Attributes:
        folder: The folder that it was loaded from.
        description: The content of model.json.
        sha256: SHA-256 of each of its files, by file name.
    """

    folder: Path
    description: Description
    sha256: Mapping[str, str]

    @property
    def input(self) -> InputFormat:
        """How an image file is turned into the network's input."""
        return self.description.input.form

    @abstractmethod
    def run_network(self, images: NDArray[np.uint8]) -> NetworkOutput:
        """Run the network on images.

        Args:
            images: uint8 RGB of shape (n, size, size, 3), as `input` reads them.

        Returns:
            Tensors on the CPU.
        """

    def calibrate_logits(self, logits: Tensor | NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the calibrated probabilities of logits, both of shape (n, classes)."""
        values = np.asarray(logits, dtype=np.float64)
        return probabilities_of_logits(values, temperature=self.description.calibration.temperature)

    def apply_thresholds(self, output: NetworkOutput, *, class_name: str | None = None) -> ModelPredictions:
        """Derive probabilities, classes, decisions at the stored threshold and abstentions from the network's output.

        Args:
            output: Output of the network for n images.
            class_name: Short name of the class that decides; None for the bundle's own.
        """
        names, abstention = self.description.short_names, self.description.abstention
        deciding = class_name or self.description.decision.class_name
        threshold = self.description.decision.thresholds[deciding]
        probabilities = self.calibrate_logits(output.logits)
        sets = self.description.prediction_sets
        unlikeness = np.asarray(output.unlikeness, dtype=np.float64)
        is_uncertain = probabilities.max(axis=1) < abstention.unsure_below
        return ModelPredictions(
            probabilities=probabilities,
            predicted=probabilities.argmax(axis=1).astype(np.int64),
            positive=probabilities[:, names.index(deciding)] >= (2.0 if threshold is None else threshold),
            unlikeness=unlikeness,
            why=np.where(unlikeness > abstention.unlike_above, "unlike", np.where(is_uncertain, "unsure", "")),
            sets=None if sets is None else prediction_sets(probabilities, sets.get_limits(names)),
        )

    def predict_images(self, images: NDArray[np.uint8], *, class_name: str | None = None) -> ModelPredictions:
        """Predict images: uint8 RGB of shape (n, size, size, 3), as `input` reads them."""
        return self.apply_thresholds(self.run_network(images), class_name=class_name)
