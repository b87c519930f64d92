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

from pylorus.doctor.check import Check, run_guarded
from pylorus.doctor.loading import check_loading


def main() -> None:
    """Run the checks and write them to the original standard output; what packages print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)
        _run_checks(output, **json.loads(sys.argv[1]))


def _run_checks(output: TextIO, *, weights: str, data: str | None, bundle: str | None) -> None:
    def write_line(line: str) -> None:
        output.write(f"{line}\n")
        output.flush()

    def report_step(what: str) -> None:
        write_line(json.dumps({"doing": what}))

    def run_check(area: str, what: str, look: Callable[[], Iterable[Check]]) -> None:
        report_step(what)
        for check in run_guarded(area, what, look):
            write_line(check.to_json())

    for check in check_loading(report_step):
        write_line(check.to_json())
    has_torch = "torch" in sys.modules
    if has_torch:
        run_check("Computing", "cores, precision and GPU", _check_computing)
        run_check("Weights", "weights of the study's models", lambda: _check_weights(Path(weights)))
    run_check("Figures", "fonts", lambda: _check_fonts(data))
    if data is not None:
        run_check("Images", "images", lambda: _check_images(Path(data)))
    if bundle is not None and has_torch:
        run_check("Bundle", "bundle", lambda: _check_bundle(Path(bundle)))


def _check_computing() -> Iterable[Check]:
    from pylorus.doctor.computing import check_computing

    return check_computing()


def _check_weights(folder: Path) -> Iterable[Check]:
    from pylorus.doctor.weights import check_weights

    return check_weights(folder)


def _check_fonts(data: str | None) -> Iterable[Check]:
    from pylorus.doctor.figures import check_fonts

    if data is None:
        return check_fonts()
    from pylorus.doctor.images import list_class_names

    return check_fonts(list_class_names(Path(data)))


def _check_images(root: Path) -> Iterable[Check]:
    from pylorus.doctor.images import check_images

    return check_images(root)


def _check_bundle(folder: Path) -> Iterable[Check]:
    from pylorus.doctor.bundle import check_bundle

    return check_bundle(folder)


if __name__ == "__main__":
    main()
