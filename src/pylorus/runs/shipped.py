"""Choose the stage of a run that is shipped and reported: one rule for everything that has to choose a stage.

The stage with the highest validation accuracy is written to `model/`, headlines the report and represents the run in a
sweep. If accuracies are equal, the stage with the lower validation loss is chosen; if losses are equal too, the later
stage. `deploy.stage` overrides the rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from pylorus.percent import format_percent

ONLY, ACCURACY, LOSS, ORDER, KEY, LAST = CHOICES = ("only", "accuracy", "loss", "order", "key", "last")
"""How a stage is chosen; see `ShippedStage`."""


@dataclass(frozen=True)
class StageScore:
    """Performance of a stage on the validation images.

    Attributes:
        correct: Number of correctly classified images.
        images: Number of images, at least one.
        loss: Mean negative log-likelihood of the true class, in nats.
    """

    correct: int
    images: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Proportion of correctly classified images, in [0, 1]."""
        return self.correct / self.images


@dataclass(frozen=True)
class ShippedStage:
    """The stage whose network is shipped, and how it was chosen.

    Attributes:
        name: Name of the stage.
        chosen_by: `only`: there is no other stage; `accuracy`: highest validation accuracy; `loss`: equal accuracy,
            lower validation loss; `order`: both equal, later stage; `key`: set by deploy.stage; `last`: the last
            stage, which versions without this rule shipped.
        accuracy: Validation accuracy of each stage, in [0, 1], in the order of the stages; empty if unknown.
    """

    name: str
    chosen_by: str
    accuracy: dict[str, float]


def score_stage(logits: NDArray[np.float64], true: NDArray[np.int64]) -> StageScore:
    """Score a stage by its logits for the validation images.

    Args:
        logits: Uncalibrated logits of shape (images, classes).
        true: True classes, of shape (images,).

    Example:
        >>> score_stage(np.array([[2.0, 0.0], [1.0, 3.0]]), np.array([0, 0])).accuracy
        0.5
    """
    rows = np.arange(len(true))
    loss = -log_softmax(logits, axis=1)[rows, true].mean()
    return StageScore(int((logits.argmax(axis=1) == true).sum()), len(true), float(loss))


def select_stage(scores: Mapping[str, StageScore], *, asked: str | None = None) -> ShippedStage:
    """Choose the stage that is shipped.

    Args:
        scores: Score of each stage on the same validation images, in the order of the stages; at least one.
        asked: The value of deploy.stage; if that stage has no score yet, the rule decides.

    Example:
        >>> scores = {"pretrain": StageScore(17, 20, 0.4), "finetune": StageScore(14, 20, 0.9)}
        >>> select_stage(scores).name
        'pretrain'
    """
    accuracy = {name: score.accuracy for name, score in scores.items()}
    if asked is not None and asked in scores:
        return ShippedStage(asked, KEY, accuracy)
    most = max(score.correct for score in scores.values())
    best = {name: score.loss for name, score in scores.items() if score.correct == most}
    lowest = min(best.values())
    names = [name for name, loss in best.items() if loss == lowest]
    reason = ORDER if len(names) > 1 else LOSS if len(best) > 1 else ACCURACY if len(scores) > 1 else ONLY
    return ShippedStage(names[-1], reason, accuracy)


def read_shipped(description: Mapping[str, Any]) -> ShippedStage | None:
    """Return the shipped stage that the content of a model.json names; None if an earlier version wrote it."""
    entry = description.get("shipped")
    return None if entry is None else ShippedStage(**entry)


def explain_choice(shipped: ShippedStage, *, validated_on: str = "val") -> str:
    """Describe how a stage was chosen, in a phrase that follows its name.

    Args:
        shipped: The stage.
        validated_on: `val`, or `test` if the validation images were the test images.
    """
    own = format_percent(shipped.accuracy[shipped.name]) if shipped.name in shipped.accuracy else ""
    others = ", ".join(
        f"{name} {format_percent(accuracy)} %" for name, accuracy in shipped.accuracy.items() if name != shipped.name
    )
    reason = {
        ONLY: "the only stage",
        ACCURACY: f"highest validation accuracy: {own} %, against {others}",
        LOSS: f"validation accuracy {own} %, against {others}; lowest validation loss of the stages with that accuracy",
        ORDER: f"validation accuracy {own} %, against {others}; latest of the stages with that accuracy and loss",
        KEY: f"named by deploy.stage; validation accuracy {own} %{f', against {others}' if others else ''}",
        LAST: "the last stage: written by a version that did not compare stages",
    }[shipped.chosen_by]
    if validated_on == "test" and shipped.chosen_by in (ACCURACY, LOSS, ORDER):
        reason += "; the validation images are the test images, so the choice was made on the test images"
    return reason
