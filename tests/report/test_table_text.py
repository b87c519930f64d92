import csv
import io
import math
import re

import pytest

from pylorus.report.table import (
    Column,
    Number,
    Table,
    convert_to_p_value_cell,
    create_rows,
    create_text_columns,
    escape_latex,
    format_cell,
    format_csv,
    format_latex,
    format_markdown,
)

TABLE = Table(
    key="demo",
    title="A title with 5 % & more",
    basis="Image-level; 36 test images, split 954c22b29479.",
    columns=(
        *create_text_columns("model"),
        Column("right"),
        Column("sensitivity", over="test", unit="%"),
        Column("p", over="test"),
    ),
    rows=create_rows(
        [
            ("a_b|c", 1234, Number(90.8888, 1, (87.9, 93.2)), convert_to_p_value_cell(0.00001)),
            ("plain", 5, Number(math.nan, 1, (math.nan, math.nan)), convert_to_p_value_cell(0.3317)),
        ]
    ),
)


def cells_of_markdown(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def cells_of_latex(text):
    back = {r"\_": "_", "$|$": "|", "--": "–", "$<$": "<", r"\%": "%", "$-$": "−"}
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    rows = [line.removesuffix(r" \\").split(" & ") for line in body.strip().splitlines() if "&" in line]
    for old, new in back.items():
        rows = [[cell.replace(old, new) for cell in row] for row in rows]
    return rows


def test_markdown_and_latex_hold_the_same_cells_as_the_page():
    wanted = [[format_cell(cell) for cell in row.cells] for row in TABLE.rows]
    assert cells_of_markdown(format_markdown(TABLE))[2:] == wanted
    assert cells_of_latex(format_latex(TABLE)) == wanted


def test_csv_rounds_to_what_the_page_shows_and_gives_intervals_their_own_columns():
    rows = list(csv.DictReader(io.StringIO(format_csv(TABLE))))
    names = ["test sensitivity, %", "test sensitivity, %, low", "test sensitivity, %, high"]
    assert [float(rows[0][name]) for name in names] == [90.8888, 87.9, 93.2]
    assert [rows[1][name] for name in names] == ["–", "–", "–"]
    assert rows[0]["right"] == "1234"
    assert float(rows[0]["test p"]) == pytest.approx(0.00001)


def test_every_row_of_the_csv_says_what_it_rests_on():
    rows = list(csv.DictReader(io.StringIO(format_csv(TABLE))))
    assert {row["basis"] for row in rows} == {TABLE.basis}


def test_caption_and_notes_go_with_markdown_and_latex():
    for text in (format_markdown(TABLE), format_latex(TABLE)):
        assert "Image-level; 36 test images, split 954c22b29479." in text
        assert "undefined" in text
    assert r"\caption{A title with 5 \% \& more. " in format_latex(TABLE)


def test_latex_is_balanced_and_uses_booktabs():
    text = format_latex(TABLE)
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert r"\multicolumn{2}{c}{test}" in text
    assert r"\cmidrule(lr){3-4}" in text


def test_a_wide_table_has_its_intervals_below_the_values():
    wide = Table(
        "wide",
        "Title",
        "",
        (*create_text_columns("model"), *(Column(f"index {n}") for n in range(10))),
        create_rows([("a", *(Number(50.0 + n, 1, (40.0 + n, 60.0 + n)) for n in range(10)))]),
    )
    lines = [line for line in format_latex(wide).splitlines() if line.endswith(r"\\") and "index" not in line]
    assert lines[0].startswith("a & 50.0 & 51.0")
    assert lines[1].startswith(r" & \scriptsize 40.0 to 60.0 & \scriptsize 41.0 to 61.0")


def test_prose_breaks_into_lines_over_several_pages():
    prose = Table("prose", "Title", "", create_text_columns("topic", "text"), create_rows([("a", "word " * 40)]))
    assert r"\begin{longtable}{lp{0.5\textwidth}}" in format_latex(prose)


@pytest.mark.parametrize("character", "&%$#_{}")
def test_what_means_something_to_latex_is_escaped(character):
    assert escape_latex(f"a{character}b") == f"a\\{character}b"


def test_a_backslash_is_escaped_once():
    assert escape_latex("a\\b_c") == r"a\textbackslash{}b\_c"
