"""What a reader must know before any number: marks that go with a run into every caption."""

from collections.abc import Sequence
from dataclasses import dataclass

from pylorus.report.saved_run import SavedRun


@dataclass(frozen=True)
class Mark:
    """Something that limits what a run can show.

    Attributes:
        word: In a caption, in capitals where it warns.
        meaning: One sentence on the page.
    """

    word: str
    meaning: str


OPTIMISTIC = Mark(
    "OPTIMISTIC: validated on the test images",
    "Every epoch was validated on the test images (data.validation=test), as in the published study: the best epoch, "
    "the temperature and the threshold were chosen on the images that they are tested on. All figures are optimistic.",
)
DRAWN = Mark(
    "DRAWN IMAGES: no clinical meaning",
    "The images are drawn by a program (data=synthetic). They show that everything works, and nothing about patients: "
    "drawn images have no clinical meaning.",
)
LEAKING = Mark(
    "LEAKING: parts of the split share patients or images",
    "Groups (patients), identical images or near copies lie in two parts of the split: the model may have seen what it "
    "is tested on. All figures are optimistic.",
)


def accepted_leaks(run: SavedRun) -> dict[str, int]:
    """What lies in two parts of a run's split, by kind and with its count; empty where nothing does."""
    said = run.audit.get("accepted_leaks", {})
    return {str(kind): int(count) for kind, count in said.items() if count}


def marks_of(run: SavedRun) -> tuple[Mark, ...]:
    """The marks of one run."""
    found = []
    if run.setting("data.validation") == "test":
        found.append(OPTIMISTIC)
    if run.setting("data.kind") == "synthetic":
        found.append(DRAWN)
    shared = run.split is not None and (run.split.shared_groups or run.split.shared_images)
    if shared or accepted_leaks(run):
        found.append(LEAKING)
    return tuple(found)


def mark_words(runs: Sequence[SavedRun]) -> str:
    """The marks of several runs as a caption says them; runs are named where a mark is not everybody's.

    Returns:
        Sentences, each with its full stop, or nothing.
    """
    unique = list(dict.fromkeys(runs))
    marks = dict.fromkeys(mark for run in unique for mark in marks_of(run))
    said = []
    for mark in marks:
        marked = [run.label for run in unique if mark in marks_of(run)]
        whose = "" if len(marked) == len(unique) else f" ({', '.join(marked)})"
        said.append(f"{mark.word}{whose}.")
    return " ".join(said)
