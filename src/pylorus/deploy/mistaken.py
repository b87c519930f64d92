"""The worst mistakes of a bundle's own run, as images to explain."""

from pathlib import Path

from pylorus.data.unreadable import UnreadableImageError, shown
from pylorus.deploy.sources import Item
from pylorus.errors import PylorusError
from pylorus.report.calibrated import calibrate
from pylorus.report.mistakes import surest_mistakes
from pylorus.report.saved_run import SavedRun, read_run
from pylorus.report.thumbnails import file_of, image_of


def mistaken(bundle: Path) -> tuple[str, dict[str, Item]]:
    """The shipped stage's name, and by their ids the test images of which it was surest and wrong, the surest first;
    none where it recognised them all. How sure it was is its calibrated probability, as `pylorus predict` gives it.

    Args:
        bundle: The folder `model` of a run that lies where it was made.

    Raises:
        PylorusError: If it is in no run, or that has no predictions of test images.
    """
    folder = bundle.resolve().parent
    if not (folder / "status.json").is_file() or bundle.resolve().name != "model":
        raise PylorusError(f"--mistakes: {bundle} is in no run; expected the folder `model` of a run.")
    run = read_run(folder)
    stage = next((each for each in run.finished_stages if run.shipped and each.name == run.shipped.name), None)
    if stage is None or stage.test is None or run.split is None:
        raise PylorusError(f"--mistakes: {folder} holds no predictions of test images.")
    said = stage.test.predictions if stage.validation is None else calibrate(stage.validation, stage.test).test
    rows = surest_mistakes(said)
    labels = [run.short_names.index(said.class_names[said.true[row]]) for row in rows]
    return stage.name, {
        str(said.sample[row]): _item(run, str(said.sample[row]), label) for row, label in zip(rows, labels, strict=True)
    }


def _item(run: SavedRun, sample: str, label: int) -> Item:
    path = file_of(run, sample)
    try:
        return Item(shown(path), image_of(run, sample), label)
    except UnreadableImageError as error:
        return Item(shown(path), path, label, error=str(error))
