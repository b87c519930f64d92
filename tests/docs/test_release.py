"""The version, the changelog and the citation file agree."""

import re

import pylorus
from tests.end_to_end.documented import PROJECT


def test_the_newest_release_of_the_changelog_is_the_version_and_the_one_to_cite():
    changelog = (PROJECT / "CHANGELOG.md").read_text()
    version, date = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)[0]
    assert version == pylorus.__version__
    citation = (PROJECT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    assert f"\ndate-released: {date}\n" in citation


def test_the_changelog_begins_with_what_is_not_released():
    assert re.findall(r"^## .*", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == "## Unreleased"


def test_the_readme_is_short():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 150
