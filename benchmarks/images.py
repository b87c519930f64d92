"""Prepare the images on which all contenders are trained: {train,val,test}/CLASS, synthetic or the user's own.

`python benchmarks/images.py FOLDER --images 480 --size 320` generates them; `run.py` does so on its
first call.
"""

import argparse
import shutil
import sys
from pathlib import Path

PARTS = {"train": 0.7, "val": 0.15, "test": 0.15}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}


def draw(folder: Path, *, images: int, size: int) -> Path:
    """Generate `images` synthetic images of three classes, each patient in one split, unless the folder exists."""
    if folder.is_dir():
        return folder
    try:
        from pylorus.data.synthetic import CLASSES, generate_image_set
    except ImportError as error:
        raise SystemExit(f"generating images needs OpenCV ({error}). Use your own images: --data DIR") from error

    drawn, parted = folder.with_name(folder.name + ".drawn"), folder.with_name(folder.name + ".parted")
    for old in (drawn, parted):
        shutil.rmtree(old, ignore_errors=True)
    generate_image_set(drawn, images=images // len(CLASSES), size=size)
    for label in CLASSES:
        _share_out(sorted((drawn / label).iterdir()), parted, label, step=2)  # two images per patient
    parted.rename(folder)
    shutil.rmtree(drawn)
    return folder


def arrange(source: Path, folder: Path) -> Path:
    """Return the folder of the user's images; copy and split them unless all three splits exist.

    With {train,test}/CLASS, every seventh training image is used for val; CLASS folders are split into 70, 15 and 15 %.

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
    parted = folder.with_name(folder.name + ".parted")
    shutil.rmtree(parted, ignore_errors=True)
    for label in labels:
        if not there:
            _share_out(_images(source / label), parted, label, step=1)
            continue
        for number, path in enumerate(_images(source / "train" / label)):
            _copy(path, parted / ("val" if number % 7 == 6 else "train") / label)
        for path in _images(source / "test" / label):
            _copy(path, parted / "test" / label)
    parted.rename(folder)
    return folder


def counts(folder: Path) -> dict[str, int]:
    """Count the images of each split."""
    return {part: sum(len(_images(label)) for label in (folder / part).iterdir() if label.is_dir()) for part in PARTS}


def classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _share_out(paths: list[Path], root: Path, label: str, *, step: int) -> None:
    """Copy the first 70 % of the paths to train, and so on; `step` consecutive paths stay together."""
    groups = [paths[start : start + step] for start in range(0, len(paths), step)]
    start, share = 0, 0.0
    for part, own in PARTS.items():
        share += own
        end = round(share * len(groups))
        for path in (path for group in groups[start:end] for path in group):
            _copy(path, root / part / label)
        start = end


def _copy(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=480, help="number of images")
    parser.add_argument("--size", type=int, default=320, help="side in pixels")
    options = parser.parse_args()
    print(counts(draw(options.folder, images=options.images, size=options.size)))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
    main()
