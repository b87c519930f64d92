"""A bundle: whether it is whole and can be predicted with on this machine."""

from collections.abc import Iterator
from pathlib import Path

from pylorus.doctor.check import Check, State
from pylorus.errors import PylorusError

AREA = "Bundle"


def check_bundle(folder: Path) -> Iterator[Check]:
    """Loads a bundle as prediction does: hashes, description, classes, weights."""
    from pylorus.deploy.load import load_bundle

    try:
        bundle = load_bundle(folder)
    except (PylorusError, OSError) as error:
        mend = "Copy the whole folder model/ of the run again; sha256sum -c SHA256SUMS in it names what has changed."
        yield Check(AREA, "bundle", State.WRONG, " ".join(str(error).split()), mend)
        return
    description = bundle.description
    found = f"{folder}: {description.architecture}, classes {', '.join(description.classes)}; whole, and it loads"
    yield Check(AREA, "bundle", State.GOOD, found)
