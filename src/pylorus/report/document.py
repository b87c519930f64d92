"""Building blocks of a report: sections of tables, figures, sentences, pictures and listings."""

from dataclasses import dataclass
from typing import TypeAlias

from pylorus.report.figure_style import Drawing
from pylorus.report.mistakes import Misclassification, Thumbnail
from pylorus.report.table import Table


@dataclass(frozen=True)
class Sentences:
    """Sentences, each in its own paragraph or, if `is_list`, as items of a list."""

    texts: tuple[str, ...]
    is_list: bool = False


@dataclass(frozen=True)
class Pictures:
    """Thumbnails of misclassified images, in order."""

    shown: tuple[tuple[Misclassification, Thumbnail], ...]


@dataclass(frozen=True)
class Listing:
    """Preformatted text, such as the content of a file."""

    title: str
    text: str


@dataclass(frozen=True)
class FileOnly:
    """A table that is written to files but not shown on the page."""

    table: Table


Item: TypeAlias = Table | Drawing | Sentences | Pictures | Listing | FileOnly


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key: Anchor of the section in the page.
        title: Heading.
        items: Content, in order; a section without items is omitted.
    """

    key: str
    title: str
    items: tuple[Item, ...]
