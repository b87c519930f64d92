"""Check that a bundle is complete and can be used for prediction on this machine."""

from collections.abc import Iterator
from pathlib import Path

from pylorus.doctor.check import Check, State
from pylorus.errors import PylorusError

BUNDLE = "Bundle"


def check_bundle(folder: Path) -> Iterator[Check]:
    """Load a bundle as `pylorus predict` does: file hashes, description, classes, weights."""
    from pylorus.deploy.load import load_bundle

    try:
        bundle = load_bundle(folder)
    except (PylorusError, OSError) as error:
        fix = "Copy the run's whole model/ folder again; `sha256sum -c SHA256SUMS` in it lists the files that changed."
        yield Check(BUNDLE, "bundle", State.WRONG, " ".join(str(error).split()), fix)
        return
    description = bundle.description
    summary = f"{folder}: {description.architecture}, classes {', '.join(description.classes)}; complete and loadable"
    yield Check(BUNDLE, "bundle", State.GOOD, summary)
