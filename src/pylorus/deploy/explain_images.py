"""`pylorus explain`: a heat map an image, with the check that other weights give other maps."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pylorus.data.image import RGB
from pylorus.deploy.explain import heat_maps, method_of, overlay
from pylorus.deploy.explain_drawing import picture
from pylorus.deploy.files import SUMS
from pylorus.deploy.load import Bundle, load_bundle
from pylorus.deploy.mistaken import mistaken
from pylorus.deploy.predict import FIRST_CODE, MOST_COUNTED, read_ahead, settled_device
from pylorus.deploy.sanity import MOST_IMAGES, Sanity, randomisation_check
from pylorus.deploy.sources import Item, Sources
from pylorus.errors import PylorusError, did_you_mean
from pylorus.files import whole, write_json
from pylorus.model.weights import sha256
from pylorus.percent import percent
from pylorus.report.maps import INDEX, MAPS, OVERLAYS, RECORD

NOTHING = "nothing speaks for the class"
COLUMNS = (
    *("number", "picture", "path", "second", "sample", "true", "class", "probability"),
    *("predicted", "abstain", "why", "remark", "error"),
)


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Choices of an explanation.

    Attributes:
        class_name: Short name of the class whose map is drawn; None: of each image the likeliest.
        mistakes: Whether the worst mistakes of the bundle's own run are explained too.
        sanity: Whether maps of networks with other weights are compared.
        frames_every: Seconds between two frames of a video; None: no videos.
        batch: Images that the network takes at once.
        device: auto, cpu, cuda or mps.
    """

    class_name: str | None = None
    mistakes: bool = False
    sanity: bool = True
    frames_every: float | None = None
    batch: int = 8
    device: str = "auto"


@dataclass
class _Explained:
    """What came of it so far; images for the check only as many as that takes."""

    rows: list[dict[str, object]] = field(default_factory=list)
    images: list[RGB] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)


def explain(folder: Path, inputs: Sequence[str], output: Path | None, options: ExplainOptions) -> int:
    """Writes a picture an image, maps.csv that says which image each is of, and maps.json with the check.

    Args:
        folder: The bundle's.
        inputs: Files, folders and patterns.
        output: A folder that is not there yet, is empty, or holds earlier maps, which go; None, with mistakes alone:
            `maps` in the bundle's run.
        options: See there.

    Returns:
        The exit code, as `pylorus predict` gives it.

    Raises:
        PylorusError: If the bundle, an input or an option is not what it should be.
    """
    if not inputs and not options.mistakes:
        raise PylorusError("explain: found no INPUT, expected images, folders, or --mistakes.")
    if output is None and (inputs or not options.mistakes):
        raise PylorusError("--output: expected a folder for the maps.")
    bundle = load_bundle(folder, device=settled_device(options.device))
    names = bundle.description.short_names
    if options.class_name is not None and options.class_name not in names:
        raise PylorusError(
            f'--class: found "{options.class_name}".{did_you_mean(options.class_name, names)} '
            f"Expected one of {', '.join(names)}."
        )
    method = method_of(bundle)
    stage, items = mistaken(folder) if options.mistakes else (None, {})
    if options.mistakes and not items:
        print(f"{stage} recognises all test images of its run: there is no mistake to explain")
        if not inputs:
            return 0
    sources = Sources(tuple(inputs), tuple(zip(bundle.description.classes, names, strict=True)), options.frames_every)
    sources.check()
    place = output or folder.resolve().parent / MAPS
    _cleared(place)
    found = _Explained()
    for wanted, samples in ((items.values(), list(items)), (sources.items(), None)):
        _explain_all(bundle, method, wanted, samples, place, options, found)
    if not found.rows:
        raise PylorusError("there is no image in what was given; of a folder, only files with an image's suffix count.")
    checked = _checked(bundle, found) if options.sanity else None
    _write_record(bundle, method, found, checked, place, stage)
    return _told(found, checked, place)


def _explain_all(
    bundle: Bundle,
    method: str,
    items: Iterable[Item],
    samples: list[str] | None,
    place: Path,
    options: ExplainOptions,
    found: _Explained,
) -> None:
    names = bundle.description.short_names
    remaining = iter(samples or [])
    with tqdm(desc="heat maps", unit="", disable=not sys.stderr.isatty()) as bar:
        for batch, images in read_ahead(items, bundle.input, options.batch):
            rows = [_row(item, image, next(remaining, ""), names) for item, image in zip(batch, images, strict=True)]
            kept = [(row, image) for row, image in zip(rows, images, strict=True) if not isinstance(image, str)]
            if kept:
                _explain_batch(bundle, kept, options, found)
            for number, row in enumerate(rows, start=len(found.rows) + 1):
                row["number"] = number
                drawn = row.pop("drawn", None)
                if drawn is not None:
                    row["picture"] = _write(place, number, drawn, _lines(bundle, row, method))
            found.rows += rows
            bar.update(len(rows))


def _row(item: Item, image: RGB | str, sample: str, names: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"path": item.path, "second": item.second, "sample": sample, "probability": None}
    row["true"] = "" if item.label is None else names[item.label]
    row["error"] = image if isinstance(image, str) else ""
    return row


def _explain_batch(
    bundle: Bundle, kept: list[tuple[dict[str, Any], RGB]], options: ExplainOptions, found: _Explained
) -> None:
    names = bundle.description.short_names
    images = np.stack([image for _, image in kept])
    said = bundle.answer(images)
    wanted = said.predicted if options.class_name is None else [names.index(options.class_name)] * len(kept)
    classes = [int(label) for label in wanted]
    for place, ((row, image), heat) in enumerate(zip(kept, heat_maps(bundle, images, classes), strict=True)):
        label = classes[place]
        row["class"], row["probability"] = names[label], float(said.probabilities[place, label])
        row["predicted"] = names[said.predicted[place]]
        row["abstain"], row["why"] = bool(said.why[place]), str(said.why[place])
        row["remark"] = "" if heat.any() else NOTHING
        row["drawn"] = (image, heat)
        if len(found.images) < MOST_IMAGES:
            found.images.append(image)
            found.classes.append(label)


def _write(place: Path, number: int, drawn: tuple[RGB, NDArray[np.float64]], lines: tuple[str, ...]) -> str:
    """The picture with its words, and the overlay alone, named by a number: a file's name may be a patient's."""
    name = f"{number:04d}.png"
    for path, image in (
        (place / name, picture(*drawn, lines)),
        (place / OVERLAYS / name, Image.fromarray(overlay(*drawn))),
    ):
        with whole(path) as temporary:
            image.save(temporary)
    return name


def _lines(bundle: Bundle, row: dict[str, Any], method: str) -> tuple[str, ...]:
    said, form = bundle.description, bundle.input
    full = dict(zip(said.short_names, said.classes, strict=True))
    shown = full[row["class"]] + ("" if full[row["class"]] == row["class"] else f" ({row['class']})")
    share = f"calibrated probability {percent(row['probability'])} %"
    answer = "the likeliest class" if row["class"] == row["predicted"] else f"the likeliest class is {row['predicted']}"
    true = f"; the true class is {row['true']}" if row["true"] else ""
    abstains = f"; the model abstains: {row['why']}" if row["abstain"] else ""
    cropped = "cropped to the field of view, " if form.crop == "auto" else ""
    return (
        f"{row['number']}: map for {shown}, {share}, {answer}{true}{abstains}.",
        *((f"Empty map: {NOTHING}.",) if row["remark"] else ()),
        f"{method}. Drawn over the network's own input: {cropped}{form.size} × {form.size} pixels ({form.fit}).",
        f"It shows where, not why, and does not say that the model is right. {said.intended_use}",
    )


def _checked(bundle: Bundle, found: _Explained) -> Sanity | None:
    return randomisation_check(bundle, np.stack(found.images), found.classes) if found.images else None


def _write_record(
    bundle: Bundle, method: str, found: _Explained, checked: Sanity | None, place: Path, stage: str | None
) -> None:
    table = pd.DataFrame(found.rows, columns=list(COLUMNS))
    empty = [name for name in ("second", "sample", "true") if not table[name].replace("", None).notna().any()]
    with whole(place / INDEX) as temporary:
        table.drop(columns=empty).to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")
    record = {
        "finished": True,
        "method": method,
        "input": f"{bundle.input.size} x {bundle.input.size} pixels, as the network sees them",
        "architecture": bundle.description.architecture,
        SUMS: sha256(bundle.folder / SUMS),
        "stage": stage,
        "images": len(found.rows),
        "empty": sum(row["remark"] == NOTHING for row in found.rows),
        "unreadable": sum(bool(row["error"]) for row in found.rows),
        "randomisation_check": None if checked is None else checked.plain(),
        "intended_use": bundle.description.intended_use,
    }
    write_json(place / RECORD, record)


def _told(found: _Explained, checked: Sanity | None, place: Path) -> int:
    unreadable = [row for row in found.rows if row["error"]]
    print(f"{len(found.rows):,} images, {len(unreadable):,} of them unreadable")
    for row in unreadable[:5]:
        print(f"  {row['path']}: {row['error']}")
    if checked is not None:
        print(f"\n{checked.said}")
    print(f"\nheat maps: {place}\n{INDEX} there names the files; the pictures name none.")
    return FIRST_CODE + min(len(unreadable), MOST_COUNTED) if unreadable else 0


def _cleared(place: Path) -> None:
    """Makes room for maps; only those of an earlier explanation, finished or not, are ever deleted."""
    if place.exists() and (not place.is_dir() or (any(place.iterdir()) and not (place / RECORD).is_file())):
        raise PylorusError(f"--output: {place} holds other things; expected a new or empty folder, or earlier maps.")
    write_json(place / RECORD, {"finished": False})
    for path in (place / INDEX, *place.glob("*.png"), *(place / OVERLAYS).glob("*.png")):
        if path.suffix != ".png" or re.fullmatch(r"\d{4,}", path.stem):
            path.unlink(missing_ok=True)
