"""`pylorus explain`: write a heat map per image, and check that networks with other weights give other maps."""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pylorus.core.errors import PylorusError, UnreadableImageError, format_path, format_suggestion
from pylorus.core.formatting import defuse_formulas, format_count, format_percent, open_progress_bar
from pylorus.core.io import check_new_folder, write_atomically, write_json
from pylorus.data.files import RGB
from pylorus.deploy.description import INTENDED_USE
from pylorus.deploy.explain import (
    COLORMAP,
    MAX_IMAGES,
    Sanity,
    compute_heat_maps,
    format_heat_map_method,
    render_overlay,
    run_randomization_check,
)
from pylorus.deploy.inputs import Item, Sources
from pylorus.deploy.model import Bundle, load_bundle
from pylorus.deploy.predict import FIRST_CODE, MAX_COUNTED, NO_IMAGES, read_ahead, resolve_device
from pylorus.deploy.verified_files import SUMS
from pylorus.report.figure_style import select_font
from pylorus.report.mistakes import (
    INDEX,
    MAPS,
    OVERLAYS,
    RECORD,
    find_confident_errors,
    read_run_image,
    resolve_image_file,
)
from pylorus.report.results import calibrate_predictions
from pylorus.runs.reading import SavedRun, read_run

MIN_PICTURE_SIDE, GAP, LINE, TEXT_SIZE = 336, 16, 20, 14
"""In pixels: minimum side of an image, gap between elements, line height, font size."""
INK, PAPER = (33, 33, 33), (255, 255, 255)


def draw_explanation(image: RGB, heat: NDArray[np.float64], lines: tuple[str, ...]) -> Image.Image:
    """Draw the input, the heat map over it, a color scale and lines of text.

    Args:
        image: uint8 RGB of shape (size, size, 3).
        heat: Heat map of shape (size, size), in [0, 1].
        lines: The caption; long lines are wrapped.
    """
    side = max(MIN_PICTURE_SIDE, len(image))
    width = 2 * side + 3 * GAP
    # Lines are wrapped by their measured width: CJK characters are wider than Latin ones.
    wrapped = [part for line in lines for part in _wrap_line(line, width - 2 * GAP)]
    page = Image.new("RGB", (width, side + 4 * GAP + LINE + LINE * len(wrapped)), PAPER)
    for column, content in enumerate((image, render_overlay(image, heat))):
        square = Image.fromarray(content).resize((side, side), Image.Resampling.BICUBIC)
        page.paste(square, (GAP + column * (side + GAP), GAP))
    draw = ImageDraw.Draw(page)
    top = side + 2 * GAP
    color_bar = np.tile(matplotlib.colormaps[COLORMAP](np.linspace(0, 1, side // 2))[:, :3] * 255, (LINE // 2, 1, 1))
    left = 2 * GAP + side
    page.paste(Image.fromarray(color_bar.astype(np.uint8)), (left, top + LINE // 4))
    draw.text((left + side // 2 + GAP // 2, top), "0 to maximum", INK, _get_font("0"))
    draw.text((GAP, top), "input of the network", INK, _get_font("w"))
    for number, line in enumerate(wrapped):
        draw.text((GAP, top + LINE + GAP + number * LINE), line, INK, _get_font(line))
    return page


def _wrap_line(line: str, width: int) -> list[str]:
    line = select_font(line)[1]
    characters = int(width / max(_get_font(line).getlength(line) / max(len(line), 1), 1))
    return textwrap.wrap(line, max(20, characters - 3)) or [""]


def _get_font(text: str) -> ImageFont.FreeTypeFont:
    return _load_font(select_font(text)[0])


@cache
def _load_font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), TEXT_SIZE)


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


EMPTY_MAP = "nothing in the image supports the class"
COLUMNS = (
    *("number", "picture", "path", "second", "sample", "true", "class", "probability"),
    *("predicted", "abstain", "why", "remark", "error"),
)


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Options of `pylorus explain`.

    Attributes:
        class_name: Short name of the class to explain; None for the most probable class of each image.
        mistakes: Whether to explain the most confident mistakes of the bundle's own run, too.
        sanity: Whether to compare with the maps of networks with random weights.
        frames_every: Seconds between two frames of a video; None for no videos.
        batch: Images per batch.
        device: auto, cpu, cuda or mps.
        network: Class or function that builds a network of the user's own; None for a model of timm.
        trust: Files with public keys of which one must have signed the bundle; empty to accept any.
    """

    class_name: str | None = None
    mistakes: bool = False
    sanity: bool = True
    frames_every: float | None = None
    batch: int = 8
    device: str = "auto"
    network: Callable[..., Any] | None = None
    trust: tuple[Path, ...] = ()


@dataclass
class _Explanations:
    """Results so far; holds only as many images as the randomisation check needs."""

    rows: list[dict[str, object]] = field(default_factory=list)
    images: list[RGB] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)


def explain(folder: Path, inputs: Sequence[str], output: Path | None, options: ExplainOptions) -> int:
    """Write one picture per image, maps.csv with the image of each, and maps.json with the randomisation check.

    Args:
        folder: Folder of the bundle.
        inputs: Files, folders and patterns.
        output: A new or empty folder, or one with earlier maps, which are deleted; None is allowed only for mistakes
            without inputs: `maps` in the bundle's run.
        options: Options of the explanation.

    Returns:
        The exit code, as that of `pylorus predict`.

    Raises:
        PylorusError: If the bundle, an input or an option is invalid.
    """
    if not inputs and not options.mistakes:
        raise PylorusError("explain: found no INPUT, expected images, folders or --mistakes.")
    if output is None and (inputs or not options.mistakes):
        raise PylorusError("--output: expected a folder for the heat maps, such as --output maps.")
    bundle = load_bundle(folder, device=resolve_device(options.device), network=options.network, trust=options.trust)
    names = bundle.description.short_names
    if options.class_name is not None and options.class_name not in names:
        raise PylorusError(
            f'--class: found "{options.class_name}".{format_suggestion(options.class_name, names)} '
            f"Expected one of {', '.join(names)}."
        )
    method = format_heat_map_method(bundle)
    stage, items = find_confident_mistakes(folder) if options.mistakes else (None, {})
    if options.mistakes and not items:
        print(f"{stage} classifies all test images of its run correctly: there are no mistakes to explain")
        if not inputs:
            return 0
    sources = Sources(tuple(inputs), tuple(zip(bundle.description.classes, names, strict=True)), options.frames_every)
    sources.check_inputs()
    maps_folder = output or folder.resolve().parent / MAPS
    _prepare_folder(maps_folder)
    results = _Explanations()
    for group, samples in ((items.values(), list(items)), (sources.iter_items(), None)):
        _explain_all(bundle, method, group, samples, maps_folder, options, results)
    if not results.rows:
        raise PylorusError(NO_IMAGES)
    sanity = _run_sanity_check(bundle, results) if options.sanity else None
    _write_record(bundle, method, results, sanity, maps_folder, stage)
    return _report_outcome(results, sanity, maps_folder)


def _explain_all(
    bundle: Bundle,
    method: str,
    items: Iterable[Item],
    samples: list[str] | None,
    folder: Path,
    options: ExplainOptions,
    results: _Explanations,
) -> None:
    names = bundle.description.short_names
    sample_ids = iter(samples or [])
    with open_progress_bar("drawing heat maps", None) as bar:
        for batch, images in read_ahead(items, bundle.input, options.batch):
            rows = [
                _create_row(item, image, next(sample_ids, ""), names) for item, image in zip(batch, images, strict=True)
            ]
            readable = [(row, image) for row, image in zip(rows, images, strict=True) if not isinstance(image, str)]
            if readable:
                _explain_batch(bundle, readable, options, results)
            for number, row in enumerate(rows, start=len(results.rows) + 1):
                row["number"] = number
                drawing = row.pop("drawn", None)
                if drawing is not None:
                    row["picture"] = _write_picture(folder, number, drawing, _format_caption(bundle, row, method))
            results.rows += rows
            bar.update(len(rows))


def _create_row(item: Item, image: RGB | str, sample: str, names: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"path": item.path, "second": item.second, "sample": sample, "probability": None}
    row["true"] = "" if item.label is None else names[item.label]
    row["error"] = image if isinstance(image, str) else ""
    return row


def _explain_batch(
    bundle: Bundle, readable: list[tuple[dict[str, Any], RGB]], options: ExplainOptions, results: _Explanations
) -> None:
    names = bundle.description.short_names
    images = np.stack([image for _, image in readable])
    answers = bundle.predict_images(images)
    labels = answers.predicted if options.class_name is None else [names.index(options.class_name)] * len(readable)
    classes = [int(label) for label in labels]
    for index, ((row, image), heat) in enumerate(
        zip(readable, compute_heat_maps(bundle, images, classes), strict=True)
    ):
        label = classes[index]
        row["class"], row["probability"] = names[label], float(answers.probabilities[index, label])
        row["predicted"] = names[answers.predicted[index]]
        row["abstain"], row["why"] = bool(answers.why[index]), str(answers.why[index])
        row["remark"] = "" if heat.any() else EMPTY_MAP
        row["drawn"] = (bundle.input.get_square(image), heat)
        if len(results.images) < MAX_IMAGES:
            results.images.append(image)
            results.classes.append(label)


def _write_picture(folder: Path, number: int, drawing: tuple[RGB, NDArray[np.float64]], lines: tuple[str, ...]) -> str:
    """Write the captioned picture and the plain overlay, named by a number since a file name may identify a patient."""
    name = f"{number:04d}.png"
    for path, image in (
        (folder / name, draw_explanation(*drawing, lines)),
        (folder / OVERLAYS / name, Image.fromarray(render_overlay(*drawing))),
    ):
        with write_atomically(path) as temporary:
            image.save(temporary)
    return name


def _format_caption(bundle: Bundle, row: dict[str, Any], method: str) -> tuple[str, ...]:
    description, input_format = bundle.description, bundle.input
    full_names = dict(zip(description.short_names, description.classes, strict=True))
    class_name = full_names[row["class"]] + ("" if full_names[row["class"]] == row["class"] else f" ({row['class']})")
    probability = f"calibrated probability {format_percent(row['probability'])} %"
    answer = (
        "the most probable class"
        if row["class"] == row["predicted"]
        else f"the most probable class is {row['predicted']}"
    )
    true_class = f"; the true class is {row['true']}" if row["true"] else ""
    abstention = f"; the model abstains: {row['why']}" if row["abstain"] else ""
    masked = "text and plates of the console covered, " if input_format.mask == "overlays" else ""
    cropped = "cropped to the field of view, " if input_format.crop == "auto" else ""
    return (
        f"{row['number']}: heat map for {class_name}, {probability}, {answer}{true_class}{abstention}.",
        *((f"Empty map: {EMPTY_MAP}.",) if row["remark"] else ()),
        f"{method}. Shown on the network's input: {masked}{cropped}{input_format.size} × {input_format.size} pixels "
        f"({input_format.fit}).",
        f"It shows where, not why, and does not prove that the model is right. {INTENDED_USE}",
    )


def _run_sanity_check(bundle: Bundle, results: _Explanations) -> Sanity | None:
    return run_randomization_check(bundle, np.stack(results.images), results.classes) if results.images else None


def _write_record(
    bundle: Bundle, method: str, results: _Explanations, sanity: Sanity | None, folder: Path, stage: str | None
) -> None:
    table = pd.DataFrame(results.rows, columns=list(COLUMNS))
    empty_columns = [name for name in ("second", "sample", "true") if not table[name].replace("", None).notna().any()]
    with write_atomically(folder / INDEX) as temporary:
        rows = defuse_formulas(table.drop(columns=empty_columns))
        rows.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")
    record = {
        "finished": True,
        "method": method,
        "input": f"{bundle.input.size} x {bundle.input.size} pixels, as the network sees them",
        "architecture": bundle.description.architecture,
        SUMS: bundle.identity,
        "stage": stage,
        "images": len(results.rows),
        "empty": sum(row["remark"] == EMPTY_MAP for row in results.rows),
        "unreadable": sum(bool(row["error"]) for row in results.rows),
        "randomisation_check": None if sanity is None else sanity.to_dict(),
        "intended_use": INTENDED_USE,
    }
    write_json(folder / RECORD, record)


def _report_outcome(results: _Explanations, sanity: Sanity | None, folder: Path) -> int:
    unreadable = [row for row in results.rows if row["error"]]
    count = len(results.rows)
    print(f"{format_count(count, 'image')}, {len(unreadable):,} of them unreadable")
    for row in unreadable[:5]:
        print(f"  {row['path']}: {row['error']}")
    if sanity is not None:
        print(f"\n{sanity.summary}")
    print(f"\nheat maps: {folder}\n{INDEX} in it lists the file of each picture; the pictures themselves name no file.")
    return FIRST_CODE + min(len(unreadable), MAX_COUNTED) if unreadable else 0


def _prepare_folder(folder: Path) -> None:
    """Prepare the folder for maps; delete only those of an earlier explanation, whether finished or not."""
    check_new_folder(folder, own=(RECORD,), hint="A folder with earlier heat maps is accepted, too.")
    write_json(folder / RECORD, {"finished": False})
    for path in (folder / INDEX, *folder.glob("*.png"), *(folder / OVERLAYS).glob("*.png")):
        if path.suffix != ".png" or re.fullmatch(r"\d{4,}", path.stem):
            path.unlink(missing_ok=True)
