"""Commands for images: draw, audit, pack."""

import argparse
import sys
from pathlib import Path

from pylorus.errors import PylorusError


def add_image_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `draw`, `audit` and `pack_shards` to the command line."""
    _add_draw(commands)
    _add_audit(commands)
    _add_pack(commands)


def _add_draw(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "draw",
        help="generate synthetic gastroscopy images to try Pylorus with",
        description="Generate synthetic gastroscopy images in three class folders, to try Pylorus without real data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("folder", type=Path, help="a new or empty folder")
    command.add_argument("--images", type=int, default=60, help="images per class")
    command.add_argument("--size", type=int, default=256, help="side of the square images, in pixels")
    command.add_argument("--images-per-patient", type=int, default=2, help="images per patient")
    command.add_argument("--seed", type=int, default=0, help="the same seed generates the same images")
    command.add_argument(
        "--overlay", action="store_true", help="add burned-in text to the images, as endoscopy consoles do"
    )
    command.set_defaults(act=_run_draw)


def _run_draw(arguments: argparse.Namespace) -> None:
    from pylorus.data.synthetic import generate_image_set

    count = generate_image_set(
        arguments.folder,
        images=arguments.images,
        size=arguments.size,
        seed=arguments.seed,
        images_per_patient=arguments.images_per_patient,
        overlay=arguments.overlay,
    )
    print(f"Wrote {count} images to {arguments.folder}. To train on them:")
    print(f"  python train.py data=folders data.root={arguments.folder} data.group='patient_\\d+'")


def _add_audit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "audit",
        help="check an image set for leaks, copies, damaged files and burned-in text",
        description="Check an image set for leaks between splits, near copies, damaged files, burned-in text and other "
        "problems. Exit code 1 if there is a leak or an error, 2 if the audit itself fails, else 0.",
    )
    command.add_argument("root", type=Path, metavar="ROOT", help="ROOT/CLASS/… or ROOT/{train,val,test}/CLASS/…")
    command.add_argument(
        "--manifest", type=Path, metavar="FILE", help="CSV or Parquet file that lists the images below ROOT"
    )
    command.add_argument(
        "--group", metavar="REGEX", help="regular expression that finds the patient in a path below ROOT"
    )
    command.add_argument(
        "--output", type=Path, default=Path("audit"), metavar="DIR", help="folder to write to (default: ./audit)"
    )
    command.add_argument(
        "--no-names", action="store_true", help="show neither file names nor pictures, so that the result can be shared"
    )
    command.add_argument(
        "--cache",
        type=Path,
        default=Path("outputs/cache"),
        metavar="DIR",
        help="cache of facts about files, by content (default: outputs/cache)",
    )
    command.set_defaults(act=_run_audit)


def _run_audit(arguments: argparse.Namespace) -> None:
    from pylorus.audit import audit_folder

    try:
        code = audit_folder(
            arguments.root,
            arguments.output,
            manifest=arguments.manifest,
            group=arguments.group,
            names=not arguments.no_names,
            cache=arguments.cache,
        )
    except BrokenPipeError:
        raise
    except (PylorusError, ValueError, OSError) as error:
        # Exit code 1 means that the images have faults; a script must not mistake a mistyped folder for that.
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _add_pack(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "pack",
        help="pack an image set into shards (tar files)",
        description="Pack class folders, or the images that a manifest lists, into shards (tar files) for data=shards.",
    )
    command.add_argument("root", type=Path, metavar="ROOT", help="class folders, or a manifest next to its images")
    command.add_argument("output", type=Path, metavar="OUT", help="a new or empty folder")
    command.add_argument(
        "--group", metavar="REGEX", help="regular expression that finds the patient in a path below ROOT"
    )
    command.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images per shard (default: 1000)")
    command.set_defaults(act=_run_pack)


def _run_pack(arguments: argparse.Namespace) -> None:
    from pylorus.data.shards_pack import pack_shards

    shards = pack_shards(arguments.root, arguments.output, group=arguments.group, per_shard=arguments.per_shard)
    count = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
    print(f"Wrote {count} to {arguments.output}. To train on them:")
    print(f"  python train.py data=shards data.root={arguments.output}")
