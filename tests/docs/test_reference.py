"""The generated reference is complete, and the site's navigation lists every page."""

import re

import pytest

from docs.generated import (
    build_pages,
    collect_commands,
    iter_schema_keys,
    render_commands_page,
    render_groups_page,
    render_keys_page,
)
from pylorus.config.schema import CONF, GROUPS
from tests.end_to_end.documented import PROJECT


def test_every_key_of_the_schema_has_its_line():
    rows = re.findall(r"^\| `([^`]+)` \|", render_keys_page(), re.MULTILINE)
    assert rows == [*dict.fromkeys(rows)]
    assert set(rows) == set(iter_schema_keys())
    assert {"seed", "data.drawn.images", "stages.<stage>.learn", "optimizer.lr"} <= set(rows)


def test_a_key_is_given_with_type_default_values_and_meaning():
    line = next(line for line in render_keys_page().splitlines() if line.startswith("| `stages.<stage>.schedule`"))
    assert line.startswith("| `stages.<stage>.schedule` | learning rate schedule; cosine: down to zero")
    assert line.endswith(" | text | `cosine` | `cosine`, `plateau`, `constant` |")


def test_every_file_of_every_group_is_shown():
    page = render_groups_page()
    for group in GROUPS:
        for path in (CONF / group).glob("*.yaml"):
            assert f"### {group}={path.stem}\n" in page
            assert path.read_text().rstrip() in page


def test_every_command_and_every_option_is_described():
    page = render_commands_page()
    assert {"draw", "audit", "pack", "report"} <= set(collect_commands())
    for name, command in collect_commands().items():
        section = page.split(f"## pylorus {name}\n")[1].split("\n## ")[0]
        for action in command._actions:
            if action.dest != "help":
                assert (action.option_strings or [action.metavar or action.dest])[0] in section
    assert "| `--seed SEED` | the same seed generates the same images | `0` |" in page


@pytest.mark.parametrize("place", sorted(build_pages()))
def test_a_generated_page_has_a_title(place):
    assert build_pages()[place].startswith("# ")


def test_the_navigation_names_every_page_and_no_other():
    named = set(re.findall(r"[\w./-]+\.md\b", (PROJECT / "mkdocs.yml").read_text().split("\nexclude_docs")[0]))
    written = {str(path.relative_to(PROJECT / "docs")) for path in (PROJECT / "docs").rglob("*.md")}
    assert named == written | set(build_pages())
