"""Read the heat maps that `pylorus explain` saved in a run's folder, for reports that may show images."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from PIL import Image

from pylorus.errors import PylorusError
from pylorus.report.saved_json import read_json
from pylorus.report.saved_run import SavedRun
from pylorus.report.thumbnails import encode_thumbnail

MAPS, RECORD, INDEX, OVERLAYS = "maps", "maps.json", "maps.csv", "overlays"
"""Their folder in the run and its contents: a description, the image of each map, and the maps over the images."""
SUMS = "SHA256SUMS"
PASSED = "Networks with randomised weights gave different maps (randomisation check passed)."
FAILED = (
    "WARNING: networks with randomised weights gave nearly the same maps (randomisation check failed): do not "
    "interpret them as the reasons for the model's predictions."
)


@dataclass(frozen=True)
class SavedMaps:
    """Heat maps of a run.

    Attributes:
        overlays: Small JPEGs in base64 by image id.
        said: Explanation of the maps, or of why there are none.
    """

    overlays: dict[str, str] = field(default_factory=dict)
    said: str = ""


def read_saved_maps(run: SavedRun, *, stage: str) -> SavedMaps:
    """Read the heat maps of a stage's misclassified images, if they were computed with the run's own bundle.

    Args:
        run: The run.
        stage: Name of the stage whose misclassified images are shown.

    Raises:
        PylorusError: If one of their files is damaged.
    """
    folder = run.folder / MAPS
    record = read_json(folder / RECORD)
    if record is None or not record.get("finished"):
        return SavedMaps(
            said="To show heat maps beside these images, run `pylorus explain RUN/model --mistakes` before the report."
        )
    sums = run.folder / "model" / SUMS
    if not sums.is_file() or record.get(SUMS) != hashlib.sha256(sums.read_bytes()).hexdigest():
        return SavedMaps(said="The heat maps in this run were computed with a different bundle and are not shown.")
    if record.get("stage") != stage:
        return SavedMaps(said=f"No heat maps for these images: the network in the bundle is not that of stage {stage}.")
    try:
        table = pd.read_csv(folder / INDEX, dtype=str, keep_default_na=False)
        rows = table[(table["sample"] != "") & (table["picture"] != "") & (table["class"] == table["predicted"])]
        overlays = {
            str(sample): encode_thumbnail(np.asarray(Image.open(folder / OVERLAYS / str(name)).convert("RGB")))
            for sample, name in zip(rows["sample"], rows["picture"], strict=True)
        }
    except (OSError, ValueError, KeyError) as error:
        raise PylorusError(
            f"{folder}: damaged: {error}. Compute the heat maps again: pylorus explain {run.folder / 'model'} "
            "--mistakes"
        ) from error
    return SavedMaps(overlays, _explain_maps(record))


def _explain_maps(record: dict[str, object]) -> str:
    check = record.get("randomisation_check")
    passed = check.get("passed") if isinstance(check, dict) else None
    check_text = "No randomisation check was performed."
    if passed is not None:
        check_text = PASSED if passed else FAILED
    return (
        f"Below each image: the network's input, which may be cropped, overlaid with the heat map of the predicted "
        f"class ({record.get('method')}); yellow regions support that class most. {check_text}"
    )
