"""Simulate how often `pylorus recalibrate` makes probabilities worse on new images of the clinic; prints Markdown.

    python benchmarks/recalibration.py           # 300 clinics per row
    python benchmarks/recalibration.py --quick   # 50

Three classes; an image's three scores are normal with standard deviation 1, and that of its true class is higher by 2.
The model's probabilities are exact where it was developed, with equally frequent classes. Each patient has one class
and two images with correlated scores (0.5). At the clinic the classes may be more or less frequent, and the model may
be overconfident: its log odds are too large by a factor. Each recalibration is evaluated on 20,000 new images of the
same clinic. "Written" is how often each rule accepts the recalibration: `falls` if the cross-validated log loss falls,
`shown` if the whole 95 % interval of its change is below 0.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
from numpy.typing import NDArray
from scipy import special

from pylorus.evaluation.calibration import calibration_scores
from pylorus.evaluation.recalibration import cross_validate_recalibration, fit_recalibration

CLINICS, NEW_IMAGES, SHIFT, SEED = 300, 20_000, 2.0, 20261127
SIZES = (20, 30, 50, 100, 200)
EVEN = (1 / 3, 1 / 3, 1 / 3)


@dataclass(frozen=True)
class Clinic:
    """How a clinic differs from the place of the development."""

    name: str
    prevalence: tuple[float, ...]
    factor: float

    def draw(
        self, images: int, generator: np.random.Generator
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Draw the model's probabilities, the true classes and the patients of some images."""
        patients = np.arange(images) // 2
        true = generator.choice(3, size=images // 2, p=self.prevalence)[patients]
        shared, own = generator.normal(size=(images // 2, 3))[patients], generator.normal(size=(images, 3))
        scores = np.sqrt(0.5) * (shared + own) + SHIFT * np.eye(3)[true]
        return special.softmax(self.factor * SHIFT * scores, axis=1), true, patients


CONDITIONS = (
    Clinic("no difference", EVEN, 1.0),
    Clinic("frequencies 40, 33, 27 %", (0.40, 0.33, 0.27), 1.0),
    Clinic("frequencies 60, 30, 10 %", (0.6, 0.3, 0.1), 1.0),
    Clinic("log odds × 1.5", EVEN, 1.5),
    Clinic("both", (0.6, 0.3, 0.1), 1.5),
)


def simulate(clinic: Clinic, images: int, *, clinics: int, generator: np.random.Generator) -> str:
    """Return the row of the table for one condition and number of images."""
    outcomes = []
    for _ in range(clinics):
        probabilities, true, patients = clinic.draw(images, generator)
        _, change = cross_validate_recalibration(probabilities, true, patients)
        fitted = fit_recalibration(probabilities, true, patients)
        new, new_true, _ = clinic.draw(NEW_IMAGES, generator)
        before, after = (calibration_scores(table, new_true) for table in (new, fitted.apply(new)))
        outcomes.append(
            (after.nll - before.nll, after.brier - before.brier, float(change.value < 0), float(change.high < 0))
        )
    loss, brier, falls, is_shown = np.array(outcomes).T
    cells = [clinic.name, str(images), *(f"{100 * (values > 0).mean():.0f} %" for values in (loss, brier))]
    cells.append(f"{loss.mean():+.3f}")
    for accepted in (falls > 0, is_shown > 0):
        worse = f"{100 * (loss[accepted] > 0).mean():.0f} %" if accepted.any() else "–"
        cells += [f"{100 * accepted.mean():.0f} %", worse]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 clinics per row instead of 300")
    clinics = 50 if parser.parse_args().quick else CLINICS
    generator = np.random.default_rng(SEED)
    columns = ("clinic", "images", "log loss worse", "Brier score worse", "mean change of log loss")
    rules = (f"{rule}: {what}" for rule in ("falls", "shown") for what in ("written", "of these worse"))
    print(f"{clinics} clinics per row\n\n| {' | '.join((*columns, *rules))} |\n|{' --- |' * 9}")
    for clinic in CONDITIONS:
        for images in SIZES:
            print(simulate(clinic, images, clinics=clinics, generator=generator), flush=True)


if __name__ == "__main__":
    main()
