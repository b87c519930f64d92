"""Render the model card as HTML; whatever the card contains, none of it is run and nothing is fetched."""

from pathlib import Path

from markdown_it import MarkdownIt
from markupsafe import Markup

MOST_BYTES = 1_000_000
SUNK = 2
"""Levels by which its headings are lowered, since they come below the page's own."""
WRAPPED = {
    "table_open": '<div class="scroll" role="region" aria-label="Table" tabindex="0"><table>\n',
    "table_close": "</table></div>\n",
}
"""Markup around a table, so that a wide one scrolls by itself, by keyboard too."""


def render_card_html(path: Path) -> Markup:
    """Render a Markdown file as HTML: paragraphs, headings, lists and tables, but no embedded HTML, links or images."""
    with path.open("rb") as file:
        text = file.read(MOST_BYTES).decode("utf-8", errors="replace")
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    renderer.disable(["html_block", "html_inline", "link", "image", "autolink", "reference"])
    tokens = renderer.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + SUNK)}"
        if token.type in WRAPPED:
            token.type, token.content = "html_block", WRAPPED[token.type]
    return Markup(renderer.renderer.render(tokens, renderer.options, {}))
