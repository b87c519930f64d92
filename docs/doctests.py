"""Docstrings as the site's parser reads them: it knows `Examples:` alone as a section that holds doctests."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section `Example:` of every docstring while the site is built."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe calls it for every object once it is known."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
