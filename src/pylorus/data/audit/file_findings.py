"""Check single files: damage, wrong suffix, unusual format or size, EXIF rotation, tags that may identify a person."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from pylorus.data.audit.findings import Finding, Item, Severity, format_quantity
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.facts import Facts
from pylorus.data.metadata import SUFFIXES_OF

USUAL_MODES = ("RGB",)


def check_files(images: ImageSet, facts: Sequence[Facts], thresholds: Thresholds) -> list[Finding]:
    """Return findings about single files; see the module docstring."""
    unreadable: list[Item] = []
    kinds: dict[str, list[Item]] = {name: [] for name in ("suffix", "mode", "tiny", "huge", "aspect", "exif", "tags")}
    for index, (path, each) in enumerate(zip(images.table["path"], facts, strict=True)):
        if not each.readable:
            reason, _, content = each.problem.partition(": it begins with ")
            unreadable.append(Item((index,), reason, content=f"it begins with {content}" if content else ""))
            continue
        for name, detail in _find_file_problems(path, each, thresholds):
            kinds[name].append(Item((index,), detail))
    findings = [_build_unreadable_finding(unreadable)]
    findings += [_build_file_finding(name, items, each) for name, items in kinds.items() for each in [_WORDS[name]]]
    return [finding for finding in findings if finding.items]


def _find_file_problems(path: str, facts: Facts, thresholds: Thresholds) -> list[tuple[str, str]]:
    """Return the problems of one readable image: keys of `_WORDS`, each with its detail."""
    problems = []
    suffix = PurePosixPath(path).suffix.lower()
    if facts.format and suffix not in SUFFIXES_OF.get(facts.format, (suffix,)):
        problems.append(("suffix", f"contains {facts.format}, named {suffix}"))
    if facts.mode and facts.mode not in USUAL_MODES:
        problems.append(("mode", facts.mode))
    size, (shorter, longer) = f"{facts.width} × {facts.height} pixels", sorted((facts.width, facts.height))
    if shorter < thresholds.shortest:
        problems.append(("tiny", size))
    if longer > thresholds.longest:
        problems.append(("huge", size))
    if longer > thresholds.aspect * shorter:
        problems.append(("aspect", size))
    if facts.orientation != 1:
        problems.append(("exif", f"orientation {facts.orientation}"))
    if facts.personal:
        problems.append(("tags", facts.personal))
    return problems


def _build_unreadable_finding(items: list[Item]) -> Finding:
    return Finding(
        "unreadable",
        "error",
        f"{format_quantity(len(items), 'file')} can't be read as an image: damaged, truncated or not an image at all.",
        "Copy them again from their source, or move them out of the class folders.",
        tuple(items),
    )


_WORDS: dict[str, tuple[str, Severity, str, str]] = {
    "suffix": (
        "wrong-suffix",
        "warning",
        "in a different format than the file name says.",
        "Pylorus reads them by content; rename them, since other programs rely on the name.",
    ),
    "mode": (
        "colour-mode",
        "note",
        "not plain RGB",
        "They are converted to RGB (src/pylorus/data/image.py documents how). Check whether they come from "
        "another source.",
    ),
    "tiny": (
        "tiny",
        "warning",
        "with a very short side: there is little to see, and sharpness and text can't be assessed.",
        "Check whether they are previews; replace them by the originals.",
    ),
    "huge": (
        "very-large",
        "note",
        "with a very long side.",
        "Check whether they are single frames; reduce their size if no detail is lost.",
    ),
    "aspect": (
        "odd-proportions",
        "warning",
        "much wider than high or much higher than wide.",
        "Check whether they are strips, scale bars or several frames side by side, and remove these.",
    ),
    "exif": (
        "exif-orientation",
        "note",
        "rotated by an EXIF tag.",
        "Pylorus reads them upright. Programs that ignore the tag show them rotated: save them upright.",
    ),
    "tags": (
        "personal-tags",
        "warning",
        "with tags that may identify a person, a place, a time or a device; their values are neither shown nor stored.",
        "Remove the tags before you share the files, for example with `exiftool -all= -overwrite_original FILES`.",
    ),
}


def _build_file_finding(name: str, items: list[Item], template: tuple[str, Severity, str, str]) -> Finding:
    code, severity, sentence, remedy = template
    if name == "mode":
        modes = ", ".join(f"{count:,} {mode}" for mode, count in Counter(item.detail for item in items).most_common())
        sentence = f"{sentence} but {modes}."
    are = "is" if len(items) == 1 else "are"
    verb = "" if sentence.startswith("with ") else f" {are}"
    return Finding(code, severity, f"{format_quantity(len(items), 'image')}{verb} {sentence}", remedy, tuple(items))
