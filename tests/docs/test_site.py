"""The documentation site, where the extra `docs` is installed: it builds without a warning and opens without a network."""

import re
import subprocess
import sys

import pytest

from tests.end_to_end.documented import PROJECT

pytest.importorskip("mkdocs", reason="needs the extra `docs`")

FETCHED = r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
"""What a browser would fetch from elsewhere on opening a page; a link that a reader may follow is none."""


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    words = ["build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run([sys.executable, "-m", "mkdocs", *words], cwd=PROJECT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    assert [page.name for page in pages if re.search(FETCHED, page.read_text())] == []
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", style.read_text())
    assert "var __index" in (tmp_path / "search" / "search_index.js").read_text()[:20]
