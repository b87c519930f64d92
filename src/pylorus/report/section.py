"""What a report consists of: sections of tables, figures, sentences, pictures and listings."""

from dataclasses import dataclass
from typing import TypeAlias

from pylorus.report.drawing import Drawing
from pylorus.report.mistakes import Mistake
from pylorus.report.table import Table
from pylorus.report.thumbnails import Thumbnail


@dataclass(frozen=True)
class Sentences:
    """Sentences below each other; as a list where there are several of one kind."""

    texts: tuple[str, ...]
    listed: bool = False


@dataclass(frozen=True)
class Pictures:
    """Thumbnails of mistakes, in their order."""

    shown: tuple[tuple[Mistake, Thumbnail], ...]

    @property
    def paired(self) -> bool:
        """Whether heat maps stand beside the images."""
        return any(picture.overlay for _, picture in self.shown)


@dataclass(frozen=True)
class Listing:
    """Text as a file holds it."""

    title: str
    text: str


@dataclass(frozen=True)
class FileOnly:
    """A table that is written to its files and does not stand on the page, where a figure shows the same."""

    table: Table


Item: TypeAlias = Table | Drawing | Sentences | Pictures | Listing | FileOnly


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key: Its anchor.
        title: Its head.
        items: What stands in it, in order; a section without items is left out.
    """

    key: str
    title: str
    items: tuple[Item, ...]
