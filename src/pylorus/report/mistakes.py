"""Images in a report: the worst errors, a sample of predictions, and training images as they are augmented.

The worst errors are the misclassified test images on which the model was most confident; they are listed in any report.
Only a report that may show images has thumbnails, with the heat maps that `pylorus explain` saved; no other part of the
report reads images. They and all other parts are the items of sections, which are defined at the end.
"""

import base64
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from PIL import Image

from pylorus.config.schema import AugmentConfig, StageConfig
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_percent
from pylorus.core.io import read_json
from pylorus.data.augmentation import build_augmentation, resolve_augmentation
from pylorus.data.decode import UnreadableImageError, decode_image, resize_image
from pylorus.data.files import RGB
from pylorus.data.input_format import InputFormat
from pylorus.evaluation.predictions import Predictions
from pylorus.report.captions import format_test_basis
from pylorus.report.figure_style import Drawing
from pylorus.report.results import Result
from pylorus.report.table import Cell, Column, Number, Row, Table, create_text_columns
from pylorus.runs.reading import SavedRun

Node = TypeVar("Node")

THUMBNAIL_SIDE = 160
"""Side length of a thumbnail in pixels."""

MAPS, RECORD, INDEX, OVERLAYS = "maps", "maps.json", "maps.csv", "overlays"
"""Their folder in the run and its contents: a description, the image of each map, and the maps over the images."""
SUMS = "SHA256SUMS"
CHECK_PASSED = "Networks with randomised weights gave different maps (randomisation check passed)."
CHECK_FAILED = (
    "WARNING: networks with randomised weights gave nearly the same maps (randomisation check failed): do not "
    "interpret them as the reasons for the model's predictions."
)

MAX_MISTAKES = 12
"""Maximum number of errors shown."""
MAX_SAMPLED = 24
"""Maximum number of test images in the sample of predictions."""
MAX_AUGMENTED, VARIANTS = 4, 4
"""Maximum number of training images that are shown augmented, and how many variants of each."""


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail of an image.

    Attributes:
        sample: Id of the image.
        jpeg: The JPEG in base64, without any metadata of the file; empty if there is none.
        missing: Why there is no thumbnail; empty if there is one.
        overlay: The network's input with its heat map, encoded like `jpeg`; empty if there is no heat map.
    """

    sample: str
    jpeg: str
    missing: str
    overlay: str = ""


def create_thumbnails(
    run: SavedRun, samples: Sequence[str], overlays: Mapping[str, str] | None = None
) -> dict[str, Thumbnail]:
    """Create thumbnails of a run's images; one that is missing or has changed since the run says so instead.

    Args:
        run: The run.
        samples: Ids of its images.
        overlays: Heat maps by image id, from `pylorus.report.mistakes`.
    """
    return {sample: _create_thumbnail(run, sample, (overlays or {}).get(sample, "")) for sample in samples}


def resolve_image_file(run: SavedRun, sample: str) -> Path:
    """Return the path that an image file had at the time of the run."""
    assert run.split is not None
    root = (
        run.folder / "images"
        if run.get_setting("data.kind") == "synthetic"
        else Path(str(run.get_setting("data.root", "")))
    )
    return root / str(run.split.rows_by_sample.loc[sample, "path"])


def read_run_image(run: SavedRun, sample: str) -> RGB:
    """Read an image of a run.

    Returns:
        RGB image of shape (height, width, 3).

    Raises:
        UnreadableImageError: If it is missing, has changed since the run, or is stored in a shard.
    """
    assert run.split is not None
    if run.get_setting("data.kind") == "shards":
        raise UnreadableImageError("it is stored in a shard")
    try:
        content = resolve_image_file(run, sample).read_bytes()
    except OSError:
        raise UnreadableImageError("the file no longer exists") from None
    if hashlib.sha256(content).hexdigest() != run.split.rows_by_sample.loc[sample, "sha256"]:
        raise UnreadableImageError("the file has changed since the run")
    return decode_image(content)


def _create_thumbnail(run: SavedRun, sample: str, overlay: str) -> Thumbnail:
    try:
        return Thumbnail(sample, encode_thumbnail(read_run_image(run, sample)), "", overlay)
    except UnreadableImageError as error:
        return Thumbnail(sample, "", str(error), overlay)


def encode_thumbnail(image: RGB) -> str:
    """Encode an image as a small JPEG in base64, without any metadata of its file."""
    file = io.BytesIO()
    Image.fromarray(resize_image(image, size=THUMBNAIL_SIDE, how="pad", interpolation="lanczos")).save(
        file, format="JPEG", quality=85
    )
    return base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class SavedMaps:
    """Heat maps of a run.

    Attributes:
        overlays: Small JPEGs in base64 by image id.
        message: Explanation of the maps, or of why there are none.
    """

    overlays: dict[str, str] = field(default_factory=dict)
    message: str = ""


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
            message="To show heat maps beside these images, run `pylorus explain RUN/model --mistakes` before the "
            "report."
        )
    sums = run.folder / "model" / SUMS
    if not sums.is_file() or record.get(SUMS) != hashlib.sha256(sums.read_bytes()).hexdigest():
        return SavedMaps(message="The heat maps in this run were computed with a different bundle and are not shown.")
    if record.get("stage") != stage:
        return SavedMaps(
            message=f"No heat maps for these images: the network in the bundle is not that of stage {stage}."
        )
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
        check_text = CHECK_PASSED if passed else CHECK_FAILED
    return (
        f"Below each image: the network's input, which may be cropped, overlaid with the heat map of the predicted "
        f"class ({record.get('method')}); yellow regions support that class most. {check_text}"
    )


@dataclass(frozen=True)
class Misclassification:
    """A misclassified test image.

    Attributes:
        sample: Id of the image.
        true: Short name of the true class.
        predicted: Short name of the predicted class.
        certainty: Calibrated probability of the predicted class, in [0, 1].
        true_probability: Calibrated probability of the true class, in [0, 1].
        missed_by: Number of compared results that misclassify it, including this one.
    """

    sample: str
    true: str
    predicted: str
    certainty: float
    true_probability: float
    missed_by: int


def find_worst_mistakes(result: Result, peers: Sequence[Result]) -> tuple[Misclassification, ...]:
    """Return the misclassified images of one result, most confident first, at most `MAX_MISTAKES`.

    Args:
        result: The result whose errors are returned.
        peers: Results on the same test images, including this one.
    """
    predictions = result.test.predictions
    rows = np.arange(len(predictions.true))
    confidence, true_probability = (
        predictions.probabilities.max(axis=1),
        predictions.probabilities[rows, predictions.true],
    )
    error_counts = dict.fromkeys(predictions.sample.tolist(), 0)
    for peer in peers:
        for name in peer.test.predictions.sample[~peer.test.predictions.correct].tolist():
            error_counts[name] += 1
    return tuple(
        Misclassification(
            sample=str(predictions.sample[row]),
            true=predictions.class_names[predictions.true[row]],
            predicted=predictions.class_names[predictions.predicted[row]],
            certainty=float(confidence[row]),
            true_probability=float(true_probability[row]),
            missed_by=error_counts[str(predictions.sample[row])],
        )
        for row in find_confident_errors(predictions)
    )


def find_confident_errors(predictions: Predictions) -> list[int]:
    """Return the row indices of misclassified images, most confident first, at most `MAX_MISTAKES`."""
    confidence = predictions.probabilities.max(axis=1)
    # Ties are broken by sample id, so that the order does not depend on the order in the file.
    order = sorted(
        np.flatnonzero(~predictions.correct), key=lambda row: (-confidence[row], str(predictions.sample[row]))
    )
    return [int(row) for row in order[:MAX_MISTAKES]]


def build_mistake_table(
    result: Result, mistakes: Sequence[Misclassification], *, peers: int, names: bool, number: int = 1
) -> Table:
    """Build the table of the worst errors; with `names` also with file and group, which may identify a patient.

    Args:
        result: The result whose errors are listed.
        mistakes: From `find_worst_mistakes`.
        peers: Number of results on the same images.
        names: Whether file and group are shown.
        number: Number of the table if the report has several.
    """
    total = int((~result.test.predictions.correct).sum())
    return Table(
        key="worst-mistakes" + (f"-{number}" if number > 1 else ""),
        title=f"{result.label}: the {len(mistakes)} most confident of {total} misclassifications",
        basis=format_test_basis([result]),
        columns=(
            *create_text_columns("sample"),
            *(create_text_columns("file", "group") if names else ()),
            *create_text_columns("true", "predicted"),
            Column("predicted probability", unit="%"),
            Column("probability of the true class", unit="%"),
            *((Column(f"misclassified by, of {peers} results"),) if peers > 1 else ()),
        ),
        rows=tuple(Row(tuple(_build_mistake_cells(result, each, peers, names))) for each in mistakes),
        notes=(
            "Samples are identified by an id that does not reveal the file name; use --names to include file names.",
        )
        if not names
        else (),
    )


def _build_mistake_cells(result: Result, mistake: Misclassification, peers: int, names: bool) -> list[Cell]:
    cells: list[Cell] = [mistake.sample]
    if names:
        assert result.run.split is not None
        row = result.run.split.rows_by_sample.loc[mistake.sample]
        cells += [str(row["path"]), str(row["group"])]
    cells += [mistake.true, mistake.predicted, Number(100 * mistake.certainty), Number(100 * mistake.true_probability)]
    return [*cells, mistake.missed_by] if peers > 1 else cells


def build_mistake_pictures(
    run: SavedRun, mistakes: Sequence[Misclassification], overlays: Mapping[str, str]
) -> "Pictures":
    """Build the thumbnails of misclassified images.

    Args:
        run: The run.
        mistakes: From `find_worst_mistakes`.
        overlays: Heat maps by image id, from `read_saved_maps`.
    """
    pictures = create_thumbnails(run, [mistake.sample for mistake in mistakes], overlays)
    return Pictures(
        tuple(
            Picture(pictures[each.sample], each.sample, f"{each.true}, predicted as {each.predicted}")
            for each in mistakes
        )
    )


def build_prediction_pictures(result: Result) -> "Pictures":
    """Build the thumbnails of a random sample of test images, as many of each class as possible, with the prediction.

    The sample is the same for every model that was tested on these images.
    """
    predictions = result.test.predictions
    order = np.argsort(predictions.sample)
    shuffled = order[np.random.default_rng(0).permutation(len(order))]
    each = max(1, MAX_SAMPLED // predictions.classes)
    rows = [
        int(row) for name in range(predictions.classes) for row in shuffled[predictions.true[shuffled] == name][:each]
    ]
    rows = rows[:MAX_SAMPLED]
    thumbnails = create_thumbnails(result.run, [str(predictions.sample[row]) for row in rows])
    pictures = []
    for row in rows:
        sample = str(predictions.sample[row])
        true, predicted = (predictions.class_names[names[row]] for names in (predictions.true, predictions.predicted))
        probability = format_percent(predictions.probabilities[row].max(), digits=0)
        outcome = "correct" if true == predicted else f"wrong, {true} in truth"
        pictures.append(
            Picture(thumbnails[sample], f"{predicted} {probability} %", outcome, is_wrong=true != predicted)
        )
    return Pictures(tuple(pictures))


def build_augmentation_pictures(run: SavedRun, *, stage: str) -> "Pictures | None":
    """Build thumbnails of training images as the network gets them: one unchanged, then augmented variants of it.

    Args:
        run: The run.
        stage: Name of the stage whose augmentation is shown.

    Returns:
        One image per class, at most `MAX_AUGMENTED`; None if the stage augments nothing, or no bundle says how images
        are prepared.
    """
    if run.split is None or not run.bundle.get("input"):
        return None
    settings, default = _read_node(run, f"stages.{stage}", StageConfig), _read_node(run, "augment", AugmentConfig)
    augment = build_augmentation(resolve_augmentation(settings, default))
    if augment is None:
        return None
    names = ("size", "fit", "interpolation", "crop", "mask", "policy", "finder")
    form = InputFormat(**{name: run.bundle["input"][name] for name in names if name in run.bundle["input"]})
    rows = run.split.get_split_rows("train").sort_values("sample_id").drop_duplicates("class").head(MAX_AUGMENTED)
    pictures = []
    for sample, class_name in zip(rows["sample_id"], rows["class"], strict=True):
        short_name = run.short_names[run.class_names.index(class_name)]
        try:
            image = form.prepare_image(read_run_image(run, str(sample)))
        except UnreadableImageError as error:
            pictures.append(Picture(Thumbnail(str(sample), "", str(error)), short_name, "unchanged"))
            continue
        variants = [image, *(augment(image.copy(), seed) for seed in range(VARIANTS))]
        pictures += [
            Picture(
                Thumbnail(str(sample), encode_thumbnail(variant), ""),
                short_name,
                "unchanged" if not number else f"variant {number}",
            )
            for number, variant in enumerate(variants)
        ]
    return Pictures(tuple(pictures))


def _read_node(run: SavedRun, key: str, schema: type[Node]) -> Node:
    """Return a part of a run's configuration, with defaults for what an earlier version did not have."""
    node: Node = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), run.get_setting(key)))  # type: ignore[assignment]
    return node


@dataclass(frozen=True)
class Sentences:
    """Sentences, each in its own paragraph or, if `is_list`, as items of a list."""

    texts: tuple[str, ...]
    is_list: bool = False


@dataclass(frozen=True)
class Picture:
    """A thumbnail with two lines below it; `is_wrong` marks a wrong prediction."""

    thumbnail: Thumbnail
    heading: str
    caption: str
    is_wrong: bool = False


@dataclass(frozen=True)
class Pictures:
    """Thumbnails, in order."""

    shown: tuple[Picture, ...]


@dataclass(frozen=True)
class Listing:
    """Preformatted text, such as the content of a file."""

    title: str
    text: str


@dataclass(frozen=True)
class FileOnly:
    """A table that is written to files but not shown on the page."""

    table: Table


Item: TypeAlias = Table | Drawing | Sentences | Pictures | Listing | FileOnly


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key: Anchor of the section in the page.
        title: Heading.
        items: Content, in order; a section without items is omitted.
        is_appendix: Whether the section is folded below the short report, which is what a browser prints.
    """

    key: str
    title: str
    items: tuple[Item, ...]
    is_appendix: bool = True


def iter_tables(sections: Sequence[Section]) -> Iterator[Table]:
    """Yield the tables of sections, those that are only written to files included."""
    for item in (item for section in sections for item in section.items):
        if isinstance(item, Table | FileOnly):
            yield item if isinstance(item, Table) else item.table
