"""Commands on images: draw, audit, pack."""

import argparse
import sys
from pathlib import Path

from pylorus.errors import PylorusError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds them to the command line."""
    _add_draw(commands)
    _add_audit(commands)
    _add_pack(commands)


def _add_draw(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    draw = commands.add_parser(
        "draw",
        help="write drawn gastroscopic images, in folders of three classes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    draw.add_argument("folder", type=Path, help="a folder that does not exist yet, or is empty")
    draw.add_argument("--images", type=int, default=60, help="images of each class")
    draw.add_argument("--size", type=int, default=256, help="side of the square frames, in pixels")
    draw.add_argument("--images-per-patient", type=int, default=2, help="images of each patient")
    draw.add_argument("--seed", type=int, default=0, help="the same seed draws the same images")
    draw.add_argument("--overlay", action="store_true", help="burn a console's text into the frames")
    draw.set_defaults(act=_draw)


def _draw(chosen: argparse.Namespace) -> None:
    from pylorus.data.synthetic import draw_image_set

    count = draw_image_set(
        chosen.folder,
        images=chosen.images,
        size=chosen.size,
        seed=chosen.seed,
        images_per_patient=chosen.images_per_patient,
        overlay=chosen.overlay,
    )
    print(f"{count} images in {chosen.folder}; to train on them:")
    print(f"  python train.py data=folders data.root={chosen.folder} data.group='patient_\\d+'")


def _add_audit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    audited = commands.add_parser("audit", help="what is wrong with an image set: leaks, copies, damaged files, text")
    audited.add_argument("root", type=Path, metavar="ROOT", help="ROOT/CLASS/… or ROOT/{train,val,test}/CLASS/…")
    audited.add_argument("--manifest", type=Path, metavar="FILE", help="CSV or Parquet that lists files below ROOT")
    audited.add_argument("--group", metavar="REGEX", help="finds the patient in a path below ROOT")
    audited.add_argument("--output", type=Path, default=Path("audit"), metavar="DIR", help="default: ./audit")
    audited.add_argument("--no-names", action="store_true", help="neither names nor pictures: fit for passing on")
    audited.add_argument(
        "--cache", type=Path, default=Path("outputs/cache"), metavar="DIR", help="what is known of files, by content"
    )
    audited.set_defaults(act=_audit)


def _audit(chosen: argparse.Namespace) -> None:
    from pylorus.audit import audit_folder

    try:
        code = audit_folder(
            chosen.root,
            chosen.output,
            manifest=chosen.manifest,
            group=chosen.group,
            names=not chosen.no_names,
            cache=chosen.cache,
        )
    except BrokenPipeError:
        raise
    except (PylorusError, ValueError, OSError) as error:
        # 1 says that the images have faults: a script must not take a mistyped folder for them.
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _add_pack(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    packed = commands.add_parser("pack", help="write class folders, or what a manifest lists, as shards (tar files)")
    packed.add_argument("root", type=Path, metavar="ROOT", help="class folders, or a manifest beside its images")
    packed.add_argument("output", type=Path, metavar="OUT", help="a folder that does not exist yet, or is empty")
    packed.add_argument("--group", metavar="REGEX", help="finds the patient in a path below ROOT")
    packed.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images of a shard (default: 1000)")
    packed.set_defaults(act=_pack)


def _pack(chosen: argparse.Namespace) -> None:
    from pylorus.data.shards_pack import pack

    shards = pack(chosen.root, chosen.output, group=chosen.group, per_shard=chosen.per_shard)
    print(f"{len(shards)} shards in {chosen.output}; to train on them:")
    print(f"  python train.py data=shards data.root={chosen.output}")
