"""An image set with faults that an audit must find."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Planted:
    """Paths below the root of what was planted, by what it is."""

    root: Path
    copied: tuple[str, str]
    encoded_anew: tuple[str, str]
    rotated: tuple[str, str]
    mirrored: tuple[str, str]
    truncated: str
    moved: str
    personal: str
    renamed: str


def plant(source: Path, root: Path) -> Planted:
    """Copies an image set ROOT/{train,test}/CLASS and plants one fault of each kind."""
    shutil.copytree(source, root, ignore=shutil.ignore_patterns("*.md", "LICENSE"))
    train, test = root / "train", root / "test"
    first = sorted(path for path in train.iterdir() if path.is_dir())[0].name
    tested = sorted((test / first).iterdir())
    trained = sorted((train / first).iterdir())

    def here(path: Path) -> str:
        return path.relative_to(root).as_posix()

    def derived(source: Path, name: str, change, **options) -> tuple[str, str]:
        path = train / first / name
        with Image.open(source) as image:
            change(image).save(path, **options)
        return here(source), here(path)

    copy = train / first / f"copy_{tested[0].name}"
    shutil.copyfile(tested[0], copy)
    truncated, renamed = trained[1], trained[3].with_suffix(".png")
    truncated.write_bytes(truncated.read_bytes()[:-200])
    other = trained[4]
    smear = test / first / other.name
    shutil.move(other, smear)
    trained[3].rename(renamed)
    personal = trained[5]
    with Image.open(personal) as image:
        exif = image.getexif()
        exif[0x013B] = "MUSTERMANN"
        pixels = image.copy()
    pixels.save(personal, quality=95, exif=exif)
    return Planted(
        root,
        (here(tested[0]), here(copy)),
        derived(
            tested[1],
            f"again_{tested[1].name}",
            lambda image: image.resize((round(image.width * 0.95), round(image.height * 0.95))),
            quality=60,
        ),
        derived(tested[2], f"turned_{tested[2].name}", lambda image: image.rotate(90, expand=True), quality=90),
        derived(tested[3], f"mirror_{tested[3].name}", lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        here(truncated),
        here(smear),
        here(personal),
        here(renamed),
    )
