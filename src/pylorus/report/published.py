"""The published study used for comparison: its confusion matrices and tables, as printed.

"Construction of gastroscopic image recognition model based on transfer learning and its application in gastric
cancer diagnosis", Academic Journal of Second Military Medical University 2019;40(5):483-491.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PublishedModel:
    """Printed results of one model after one stage.

    Attributes:
        model: Name of the model, as printed.
        stage: "pretrain" (only the new classification head was trained) or "finetune".
        counts: Table 4: rows are true classes, columns predicted ones, both in the order of the study's classes.
        precision: Tables 1-3, in whole percent: one value per class, then their average. Misprints are included.
        sensitivity: Likewise.
        f1: Likewise.
    """

    model: str
    stage: str
    counts: tuple[tuple[int, ...], ...]
    precision: tuple[int, ...]
    sensitivity: tuple[int, ...]
    f1: tuple[int, ...]

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Table 4 as counts of shape (classes, classes).

        Example:
            >>> int(STUDY.get_result("ResNet50", "finetune").confusion.trace())
            409
        """
        return np.array(self.counts, dtype=np.int64)


@dataclass(frozen=True)
class PublishedStudy:
    """A study and its printed results.

    Attributes:
        title: Title of the paper.
        source: Journal, year, volume and pages.
        doi: Digital object identifier.
        class_names: Class names, in the order of its tables.
        short_names: Their abbreviations.
        patients: Number of patients per class.
        training_images: Number of training images per class; one per patient.
        test_images: Number of test images per class; the study also validated every epoch on them.
        results: Three models in two stages.
    """

    title: str
    source: str
    doi: str
    class_names: tuple[str, ...]
    short_names: tuple[str, ...]
    patients: tuple[int, ...]
    training_images: tuple[int, ...]
    test_images: tuple[int, ...]
    results: tuple[PublishedModel, ...]

    def get_result(self, model: str, stage: str) -> PublishedModel:
        """Return the printed results of one model after one stage.

        Raises:
            KeyError: If the study has no such model or stage.

        Example:
            >>> STUDY.get_result("VGG19", "finetune").precision
            (92, 85, 90, 89)
        """
        for result in self.results:
            if (result.model, result.stage) == (model, stage):
                return result
        known = ", ".join(f"{result.model} {result.stage}" for result in self.results)
        raise KeyError(f"the study has no results for {model} {stage}; it has {known}")


STUDY = PublishedStudy(
    title=(
        "Construction of gastroscopic image recognition model based on transfer learning "
        "and its application in gastric cancer diagnosis"
    ),
    source="Academic Journal of Second Military Medical University 2019;40(5):483-491",
    doi="10.16781/j.0258-879x.2019.05.0483",
    class_names=("gastric cancer", "gastric ulcer", "chronic gastritis"),
    short_names=("GC", "GU", "CG"),
    patients=(2001, 2119, 2168),
    training_images=(1851, 1969, 2018),
    test_images=(150, 150, 150),
    results=(
        PublishedModel(
            model="VGG19",
            stage="pretrain",
            counts=((131, 16, 3), (13, 124, 13), (1, 13, 136)),
            precision=(90, 81, 89, 87),
            sensitivity=(87, 83, 91, 87),
            f1=(89, 82, 90, 87),
        ),
        PublishedModel(
            model="VGG19",
            stage="finetune",
            counts=((133, 15, 2), (11, 125, 14), (0, 7, 143)),
            precision=(92, 85, 90, 89),
            sensitivity=(89, 83, 95, 89),
            f1=(90, 84, 93, 89),
        ),
        PublishedModel(
            model="ResNet50",
            stage="pretrain",
            counts=((137, 13, 0), (10, 128, 12), (2, 15, 133)),
            precision=(92, 82, 92, 89),
            sensitivity=(91, 85, 89, 88),
            # The mean of the unrounded F1 is 88.49 %; 89 is the mean of the three rounded ones.
            f1=(92, 84, 90, 89),
        ),
        PublishedModel(
            model="ResNet50",
            stage="finetune",
            counts=((143, 7, 0), (11, 120, 19), (0, 4, 146)),
            precision=(93, 92, 88, 91),
            sensitivity=(95, 80, 97, 91),
            f1=(94, 85, 93, 91),
        ),
        PublishedModel(
            model="Inception-V3",
            stage="pretrain",
            counts=((112, 31, 7), (13, 121, 16), (2, 30, 118)),
            # Printed as 64 for GU, but its own confusion matrix gives 121 / 182 = 66.5 %.
            precision=(88, 64, 84, 79),
            sensitivity=(75, 81, 79, 78),
            f1=(81, 73, 81, 78),
        ),
        PublishedModel(
            model="Inception-V3",
            stage="finetune",
            counts=((132, 17, 1), (11, 130, 9), (2, 9, 139)),
            precision=(91, 83, 93, 89),
            sensitivity=(88, 87, 93, 89),
            f1=(89, 85, 93, 89),
        ),
    ),
)
"""The study that this project makes reproducible. Its images were never published; these numbers were."""
