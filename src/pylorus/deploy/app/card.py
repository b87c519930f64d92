"""The model card as HTML: whatever a bundle's card holds, nothing of it is run and nothing fetched."""

from pathlib import Path

from markdown_it import MarkdownIt
from markupsafe import Markup

MOST_BYTES = 1_000_000
SUNK = 2
"""Levels by which its headings are sunk: they stand below the page's own."""
WRAPPED = {
    "table_open": '<div class="scroll" role="region" aria-label="Table" tabindex="0"><table>\n',
    "table_close": "</table></div>\n",
}
"""A wide table is scrolled, by keyboard too, without the page around it."""


def card_as_html(path: Path) -> Markup:
    """The Markdown file as HTML: paragraphs, headings, lists and tables; no HTML of its own, no links, no images."""
    with path.open("rb") as file:
        text = file.read(MOST_BYTES).decode("utf-8", errors="replace")
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.disable(["html_block", "html_inline", "link", "image", "autolink", "reference"])
    tokens = reader.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + SUNK)}"
        if token.type in WRAPPED:
            token.type, token.content = "html_block", WRAPPED[token.type]
    return Markup(reader.renderer.render(tokens, reader.options, {}))
