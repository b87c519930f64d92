"""The `pylorus` command: work with images, runs and trained models. Training itself is `python train.py`."""

import argparse
import sys

from pylorus import __version__
from pylorus.commands import evidence, images, models
from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.pipe import handle_closed_pipe


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the command; errors that a user can fix are printed without a traceback."""
    with handle_closed_pipe():
        options = build_parser().parse_args(arguments)
        try:
            options.act(options)
        except BrokenPipeError:
            raise
        except (PylorusError, ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; the reference documentation is generated from it, too."""
    parser = argparse.ArgumentParser(
        prog="pylorus",
        description="Tools for image classifiers for gastroscopy: prepare images, report on runs, use trained models. "
        "To train a model, use `python train.py`. `pylorus COMMAND --help` describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"pylorus {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (images, evidence, models):
        module.add(commands)
    return parser


if __name__ == "__main__":
    main()
