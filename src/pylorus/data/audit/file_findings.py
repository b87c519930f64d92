"""What is wrong with single files: damaged, misnamed, of an odd kind or size, turned, or with a person in its tags."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from pylorus.data.audit.findings import Finding, Item, Severity, counted
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.facts import Facts
from pylorus.data.metadata import SUFFIXES_OF

USUAL_MODES = ("RGB",)


def file_findings(images: ImageSet, facts: Sequence[Facts], thresholds: Thresholds) -> list[Finding]:
    """Everything that is wrong with single files; see the module."""
    unreadable: list[Item] = []
    kinds: dict[str, list[Item]] = {name: [] for name in ("suffix", "mode", "tiny", "huge", "aspect", "exif", "tags")}
    for index, (path, each) in enumerate(zip(images.table["path"], facts, strict=True)):
        if not each.readable:
            reason, _, content = each.problem.partition(": it begins with ")
            unreadable.append(Item((index,), reason, content=f"it begins with {content}" if content else ""))
            continue
        for name, detail in _oddities(path, each, thresholds):
            kinds[name].append(Item((index,), detail))
    findings = [_unreadable(unreadable)]
    findings += [_finding(name, items, each) for name, items in kinds.items() for each in [_WORDS[name]]]
    return [finding for finding in findings if finding.items]


def _oddities(path: str, facts: Facts, thresholds: Thresholds) -> list[tuple[str, str]]:
    """Kinds of oddity of one readable image, each with its detail."""
    found = []
    suffix = PurePosixPath(path).suffix.lower()
    if facts.format and suffix not in SUFFIXES_OF.get(facts.format, (suffix,)):
        found.append(("suffix", f"holds {facts.format}, is named {suffix}"))
    if facts.mode and facts.mode not in USUAL_MODES:
        found.append(("mode", facts.mode))
    size, (short, long) = f"{facts.width} × {facts.height} pixels", sorted((facts.width, facts.height))
    if short < thresholds.shortest:
        found.append(("tiny", size))
    if long > thresholds.longest:
        found.append(("huge", size))
    if long > thresholds.aspect * short:
        found.append(("aspect", size))
    if facts.orientation != 1:
        found.append(("exif", f"orientation {facts.orientation}"))
    if facts.personal:
        found.append(("tags", facts.personal))
    return found


def _unreadable(items: list[Item]) -> Finding:
    return Finding(
        "unreadable",
        "error",
        f"{counted(len(items), 'file')} can't be read as an image: damaged, cut short or no image at all.",
        "Copy them anew from where they came from, or move them out of the class folders.",
        tuple(items),
    )


_WORDS: dict[str, tuple[str, Severity, str, str]] = {
    "suffix": (
        "wrong-suffix",
        "warning",
        "of another format than the name says.",
        "They are read by their content; rename them, since other programs go by the name.",
    ),
    "mode": (
        "colour-mode",
        "note",
        "not plain RGB",
        "They are turned into RGB (src/pylorus/data/image.py says how). See whether they come from another source.",
    ),
    "tiny": (
        "tiny",
        "warning",
        "with a very short side: there is little to see, and sharpness and text can't be judged.",
        "Look whether they are previews; put the originals in their place.",
    ),
    "huge": (
        "very-large",
        "note",
        "with a very long side.",
        "Look whether they are single frames; make them smaller where that is no loss.",
    ),
    "aspect": (
        "odd-proportions",
        "warning",
        "much longer than wide or wider than long.",
        "Look whether they are strips, scale bars or several frames side by side, and move these away.",
    ),
    "exif": (
        "exif-orientation",
        "note",
        "turned by an EXIF tag.",
        "They are read upright here. Programs that ignore the tag see them turned: save them upright.",
    ),
    "tags": (
        "personal-tags",
        "warning",
        "with tags that may name a person, a place, a time or a device; their values are not shown or kept.",
        "Take the tags away before files are passed on, such as with `exiftool -all= -overwrite_original FILES`.",
    ),
}


def _finding(name: str, items: list[Item], words: tuple[str, Severity, str, str]) -> Finding:
    code, severity, sentence, mend = words
    if name == "mode":
        modes = ", ".join(f"{count:,} {mode}" for mode, count in Counter(item.detail for item in items).most_common())
        sentence = f"{sentence} but {modes}."
    are = "is" if len(items) == 1 else "are"
    verb = "" if sentence.startswith("with ") else f" {are}"
    return Finding(code, severity, f"{counted(len(items), 'image')}{verb} {sentence}", mend, tuple(items))
