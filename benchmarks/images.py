"""Prepare the images on which all contenders are trained: {train,val,test}/CLASS, synthetic or the user's own.

`python benchmarks/images.py FOLDER --images 480 --size 320` generates them; `run.py` does so on its
first call. No patient is in two splits.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

PARTS = {"train": 0.7, "val": 0.15, "test": 0.15}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
PATIENT = r"patient_\d+"
"""Regular expression that finds the patient in the path of a synthetic image."""
FRAME = (1280, 1024)
"""Width and height in pixels of the frames of an endoscope."""
FRAME_LABELS = ("gastric_cancer", "gastric_ulcer", "chronic_gastritis")
FRAMES_PER_PATIENT = 4


def draw(folder: Path, *, images: int, size: int) -> Path:
    """Generate `images` synthetic images of three classes, each patient in one split, unless the folder exists."""
    if folder.is_dir():
        return folder
    try:
        from pylorus.data.synthetic import CLASSES, generate_image_set
    except ImportError as error:
        raise SystemExit(f"generating images needs OpenCV ({error}). Use your own images: --data DIR") from error

    drawn = folder.with_name(folder.name + ".drawn")
    shutil.rmtree(drawn, ignore_errors=True)
    generate_image_set(drawn, images=images // len(CLASSES), size=size)
    share_out({label: _images(drawn / label) for label in CLASSES}, folder, group=PATIENT)
    shutil.rmtree(drawn)
    return folder


def draw_frames(folder: Path, *, images: int, processes: int) -> Path:
    """Draw `images` large JPEG frames of about 200 kB: smooth colours and noise in a disc; unless the folder exists."""
    if folder.is_dir():
        return folder
    drawn = folder.with_name(folder.name + ".drawn")
    shutil.rmtree(drawn, ignore_errors=True)
    for label in FRAME_LABELS:
        (drawn / label).mkdir(parents=True)
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(partial(_draw_frame, drawn), range(images), chunksize=8))
    share_out({label: _images(drawn / label) for label in FRAME_LABELS}, folder, group=PATIENT)
    shutil.rmtree(drawn)
    return folder


def _draw_frame(root: Path, number: int) -> None:
    import cv2
    import numpy as np

    patient = number // FRAMES_PER_PATIENT
    label = patient % len(FRAME_LABELS)
    rng = np.random.default_rng(number)
    width, height = FRAME
    coarse = rng.integers(40, 220, (9, 9, 3), dtype=np.uint8)
    coarse[..., label] //= 2  # so that there is something to learn
    smooth = cv2.resize(coarse, FRAME, interpolation=cv2.INTER_CUBIC).astype(np.float32)
    noise = rng.normal(0, 6, (height // 4, width // 4)).astype(np.float32)
    noise = cv2.resize(noise, FRAME, interpolation=cv2.INTER_NEAREST)
    y, x = np.ogrid[:height, :width]
    field = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (0.52 * height) ** 2
    frame = np.clip(smooth + noise[..., None], 0, 255).astype(np.uint8) * field[..., None]
    path = root / FRAME_LABELS[label] / f"patient_{patient:05d}_{number:05d}.jpg"
    cv2.imwrite(str(path), frame, [cv2.IMWRITE_JPEG_QUALITY, 92])


def arrange(source: Path, folder: Path, *, group: str | None = None) -> Path:
    """Return the folder of the user's images; copy and split them unless all three splits exist.

    With {train,test}/CLASS, a seventh of the training images is used for val; CLASS folders are split into 70, 15 and
    15 %.

    Args:
        source: The user's images.
        folder: Where the copies go, unless they are there.
        group: Regular expression that finds the patient in a path, whose images stay together; None: each image is on
            its own.

    Raises:
        FileNotFoundError: If there are no class folders with images.
    """
    there = [part for part in PARTS if (source / part).is_dir()]
    if len(there) == 3 or folder.is_dir():
        return source if len(there) == 3 else folder
    root = source / "train" if there else source
    labels = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not labels:
        raise FileNotFoundError(f"{source}: found no class folders, expected DIR/{{train,val,test}}/CLASS or DIR/CLASS")
    by_label = {label: _images(root / label) for label in labels}
    tested = {label: _images(source / "test" / label) for label in labels} if there else {}
    shares = {"train": 6 / 7, "val": 1 / 7} if there else PARTS
    return share_out(by_label, folder, group=group, shares=shares, tested=tested)


def share_out(
    by_label: dict[str, list[Path]],
    folder: Path,
    *,
    group: str | None,
    shares: dict[str, float] = PARTS,
    tested: dict[str, list[Path]] | None = None,
) -> Path:
    """Copy the images of each class to the splits, so that the images of a patient are in one of them.

    Args:
        by_label: The images of each class.
        folder: Where the copies go; it appears when it is complete.
        group: Regular expression that finds the patient in a path; None: each image is on its own.
        shares: The share of the patients in each split.
        tested: Images of each class that are test images already.
    """
    parted = folder.with_name(folder.name + ".parted")
    shutil.rmtree(parted, ignore_errors=True)
    part_of_group: dict[str, str] = {}
    for label, paths in by_label.items():
        groups = _groups(label, paths, group)
        fresh = [one for one in dict.fromkeys(groups) if one not in part_of_group]  # others came with another class
        part_of_group |= dict(zip(fresh, _parts(len(fresh), shares), strict=True))
        for path, one in zip(paths, groups, strict=True):
            _copy(path, parted / part_of_group[one] / label)
    if empty := [part for part in shares if part not in part_of_group.values()]:
        shutil.rmtree(parted, ignore_errors=True)
        raise SystemExit(
            f"found {len(part_of_group)} patients, so few that none is in {' and '.join(empty)}; expected at least 7 "
            "of each class: use more images (--images, --data), or a --group that finds one patient in a path"
        )
    for label, paths in (tested or {}).items():
        for path in paths:
            _copy(path, parted / "test" / label)
    parted.rename(folder)
    return folder


def _groups(label: str, paths: Sequence[Path], group: str | None) -> list[str]:
    from pylorus.data.catalog import extract_groups

    return extract_groups([f"train/{label}/{path.name}" for path in paths], group)


def _parts(count: int, shares: dict[str, float]) -> Iterable[str]:
    """Return the split of each of `count` patients: the first 70 % train, and so on."""
    start, share = 0, 0.0
    for part, own in shares.items():
        share += own
        end = round(share * count)
        yield from [part] * (end - start)
        start = end


def counts(folder: Path) -> dict[str, int]:
    """Count the images of each split."""
    return {part: sum(len(_images(label)) for label in (folder / part).iterdir() if label.is_dir()) for part in PARTS}


def classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _copy(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=480, help="number of images")
    parser.add_argument("--size", type=int, default=320, help="side in pixels")
    parser.add_argument("--frames", action="store_true", help="large JPEG frames instead; --size is not used")
    options = parser.parse_args()
    if options.frames:
        folder = draw_frames(options.folder, images=options.images, processes=2)
    else:
        folder = draw(options.folder, images=options.images, size=options.size)
    print(counts(folder))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
    main()
