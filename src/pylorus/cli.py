"""The `pylorus` command: what is done with images and runs beside training."""

import argparse
import sys

from pylorus import __version__
from pylorus.commands import evidence, images, models
from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.pipe import ends_quietly


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and hands over; errors that a user can mend are printed without a traceback."""
    with ends_quietly():
        chosen = parser().parse_args(arguments)
        try:
            chosen.act(chosen)
        except BrokenPipeError:
            raise
        except (PylorusError, ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


def parser() -> argparse.ArgumentParser:
    """The commands with their options: what is read here is also what the reference is made from."""
    parser = argparse.ArgumentParser(
        prog="pylorus", description="Image classifiers for gastroscopy: beside `python train.py`."
    )
    parser.add_argument("--version", action="version", version=f"pylorus {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for room in (images, evidence, models):
        room.add(commands)
    return parser


if __name__ == "__main__":
    main()
