"""The doctor's second process: checks that import torch and other packages that may crash the process.

Its command line holds the question as one line of JSON. It prints a line of JSON before each step (`doing`) and for
each check.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from pylorus.doctor.check import Check, guarded
from pylorus.doctor.loading import check_loading


def main() -> None:
    """Run the checks and write them to the original standard output; what packages print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)
        _look(output, **json.loads(sys.argv[1]))


def _look(output: TextIO, *, weights: str, data: str | None, bundle: str | None) -> None:
    def tell(line: str) -> None:
        output.write(f"{line}\n")
        output.flush()

    def doing(what: str) -> None:
        tell(json.dumps({"doing": what}))

    def run(area: str, what: str, look: Callable[[], Iterable[Check]]) -> None:
        doing(what)
        for check in guarded(area, what, look):
            tell(check.to_json())

    for check in check_loading(doing):
        tell(check.to_json())
    has_torch = "torch" in sys.modules
    if has_torch:
        run("Computing", "cores, precision and GPU", _computing)
        run("Weights", "weights of the study's models", lambda: _weights(Path(weights)))
    run("Figures", "fonts", lambda: _fonts(data))
    if data is not None:
        run("Images", "images", lambda: _images(Path(data)))
    if bundle is not None and has_torch:
        run("Bundle", "bundle", lambda: _bundle(Path(bundle)))


def _computing() -> Iterable[Check]:
    from pylorus.doctor.computing import check_computing

    return check_computing()


def _weights(folder: Path) -> Iterable[Check]:
    from pylorus.doctor.weights import check_weights

    return check_weights(folder)


def _fonts(data: str | None) -> Iterable[Check]:
    from pylorus.doctor.figures import check_fonts

    if data is None:
        return check_fonts()
    from pylorus.doctor.images import class_names

    return check_fonts(class_names(Path(data)))


def _images(root: Path) -> Iterable[Check]:
    from pylorus.doctor.images import check_images

    return check_images(root)


def _bundle(folder: Path) -> Iterable[Check]:
    from pylorus.doctor.bundle import check_bundle

    return check_bundle(folder)


if __name__ == "__main__":
    main()
