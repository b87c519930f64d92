"""Heat maps that `pylorus explain` left in a run's folder, for a report that may show images."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from PIL import Image

from pylorus.errors import PylorusError
from pylorus.report.saved_json import read_json
from pylorus.report.saved_run import SavedRun
from pylorus.report.thumbnails import small_jpeg

MAPS, RECORD, INDEX, OVERLAYS = "maps", "maps.json", "maps.csv", "overlays"
"""Their folder in the run, and what is in it: what they are, which image each is of, and the maps over the images."""
SUMS = "SHA256SUMS"
PASSED = "Networks with other weights gave other maps (randomisation check passed)."
FAILED = (
    "WARNING: networks with other weights gave much the same maps (randomisation check failed): do not read them as "
    "the model's reasons."
)


@dataclass(frozen=True)
class SavedMaps:
    """Heat maps of a run.

    Attributes:
        overlays: Small JPEGs in base64 by the id of the image.
        said: What they are, or why there are none.
    """

    overlays: dict[str, str] = field(default_factory=dict)
    said: str = ""


def saved_maps(run: SavedRun, *, stage: str) -> SavedMaps:
    """The heat maps of a stage's mistakes, where they were drawn with the run's own bundle.

    Args:
        run: The run.
        stage: Whose mistakes are shown.

    Raises:
        PylorusError: If a file of them is damaged.
    """
    place = run.folder / MAPS
    record = read_json(place / RECORD)
    if record is None:
        return SavedMaps(
            said="With `pylorus explain RUN/model --mistakes` before, heat maps stand beside these images."
        )
    sums = run.folder / "model" / SUMS
    if not sums.is_file() or record.get(SUMS) != hashlib.sha256(sums.read_bytes()).hexdigest():
        return SavedMaps(said="The heat maps in this run are of another bundle: not shown.")
    if record.get("stage") != stage:
        return SavedMaps(said=f"No heat maps: these mistakes are of {stage}, the bundle is of the last stage.")
    try:
        table = pd.read_csv(place / INDEX, dtype=str, keep_default_na=False)
        drawn = table[(table["sample"] != "") & (table["picture"] != "")]
        overlays = {
            str(sample): small_jpeg(np.asarray(Image.open(place / OVERLAYS / str(name)).convert("RGB")))
            for sample, name in zip(drawn["sample"], drawn["picture"], strict=True)
        }
    except (OSError, ValueError, KeyError) as error:
        raise PylorusError(
            f"{place}: damaged: {error}. Draw the maps again: pylorus explain {run.folder / 'model'} --mistakes"
        ) from error
    return SavedMaps(overlays, _said(record))


def _said(record: dict[str, object]) -> str:
    check = record.get("randomisation_check")
    passed = check.get("passed") if isinstance(check, dict) else None
    checked = "No randomisation check was made of them."
    if passed is not None:
        checked = PASSED if passed else FAILED
    return (
        f"On the right the network's own input, which may be cropped, and over it the map of the class that the image "
        f"was taken for: {record.get('method')}; yellow speaks most for it. {checked}"
    )
