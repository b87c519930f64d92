"""Collect the most confident mistakes of a bundle's own run, as images to explain."""

from pathlib import Path

from pylorus.data.unreadable import UnreadableImageError, shown
from pylorus.deploy.sources import Item
from pylorus.errors import PylorusError
from pylorus.report.calibrated import calibrate
from pylorus.report.mistakes import surest_mistakes
from pylorus.report.saved_run import SavedRun, read_run
from pylorus.report.thumbnails import file_of, image_of


def mistaken(bundle: Path) -> tuple[str, dict[str, Item]]:
    """Return the shipped stage's name and its most confident mistakes on test images, by sample id.

    The most confident mistake comes first; there are none if all images were classified correctly. Confidence is the
    calibrated probability, as in `pylorus predict`.

    Args:
        bundle: The folder `model`, still in its run.

    Raises:
        PylorusError: If it is not in a run, or the run has no predictions for test images.
    """
    folder = bundle.resolve().parent
    if not (folder / "status.json").is_file() or bundle.resolve().name != "model":
        raise PylorusError(f"--mistakes: {bundle} is not in a run; expected the folder model/ of a run.")
    run = read_run(folder)
    stage = next(
        (candidate for candidate in run.finished_stages if run.shipped and candidate.name == run.shipped.name), None
    )
    if stage is None or stage.test is None or run.split is None:
        raise PylorusError(f"--mistakes: {folder} holds no predictions for test images.")
    predictions = stage.test.predictions if stage.validation is None else calibrate(stage.validation, stage.test).test
    rows = surest_mistakes(predictions)
    labels = [run.short_names.index(predictions.class_names[predictions.true[row]]) for row in rows]
    return stage.name, {
        str(predictions.sample[row]): _item(run, str(predictions.sample[row]), label)
        for row, label in zip(rows, labels, strict=True)
    }


def _item(run: SavedRun, sample: str, label: int) -> Item:
    path = file_of(run, sample)
    try:
        return Item(shown(path), image_of(run, sample), label)
    except UnreadableImageError as error:
        return Item(shown(path), path, label, error=str(error))
