"""Collect the most confident mistakes of a bundle's own run, as images to explain."""

from pathlib import Path

from pylorus.data.unreadable import UnreadableImageError, format_path
from pylorus.deploy.sources import Item
from pylorus.errors import PylorusError
from pylorus.report.calibrated import calibrate_predictions
from pylorus.report.mistakes import find_confident_errors
from pylorus.report.saved_run import SavedRun, read_run
from pylorus.report.thumbnails import read_run_image, resolve_image_file


def find_confident_mistakes(bundle: Path) -> tuple[str, dict[str, Item]]:
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
        (
            candidate
            for candidate in run.complete_stages
            if run.bundle_stage and candidate.name == run.bundle_stage.name
        ),
        None,
    )
    if stage is None or stage.test is None or run.split is None:
        raise PylorusError(f"--mistakes: {folder} holds no predictions for test images.")
    predictions = (
        stage.test.predictions if stage.validation is None else calibrate_predictions(stage.validation, stage.test).test
    )
    rows = find_confident_errors(predictions)
    labels = [run.short_names.index(predictions.class_names[predictions.true[row]]) for row in rows]
    return stage.name, {
        str(predictions.sample[row]): _create_item(run, str(predictions.sample[row]), label)
        for row, label in zip(rows, labels, strict=True)
    }


def _create_item(run: SavedRun, sample: str, label: int) -> Item:
    path = resolve_image_file(run, sample)
    try:
        return Item(format_path(path), read_run_image(run, sample), label)
    except UnreadableImageError as error:
        return Item(format_path(path), path, label, error=str(error))
