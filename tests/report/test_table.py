"""Tables: cells, columns, and the same numbers in Markdown, CSV, HTML and LaTeX."""

import csv
import io
import math
import re

import pytest

from pylorus.report.table import (
    Column,
    Number,
    Row,
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


def table(*rows):
    columns = (*create_text_columns("model", "stage"), Column("accuracy", unit="%"))
    return Table("t", "Title", "Image-level.", columns, create_rows(rows))


def test_an_undefined_value_is_a_dash_with_a_note_and_never_a_number():
    found = table(("a", "x", Number(math.nan, 1, (math.nan, math.nan))))
    assert found.numbers[0].text == "–"
    assert any(note.startswith("–: undefined") for note in found.all_notes)


def test_a_value_without_an_interval_is_shown_with_a_note():
    found = table(("a", "x", Number(100.0, 1, (math.nan, math.nan))))
    assert found.numbers[0].text == "100.0 (–)"
    assert any(note.startswith("(–): no interval") for note in found.all_notes)


def test_an_undefined_value_has_a_reason():
    nan = math.nan
    found = table(
        ("a", "x", Number(nan, 1, (nan, nan), reason="the class is never predicted")),
        ("b", "x", Number(nan, 1, (nan, nan), reason="no image is of the class")),
        ("c", "x", Number(2.5, 1, (nan, nan), reason="all images are of one group")),
    )
    assert "–: undefined, because the class is never predicted, or no image is of the class." in found.all_notes
    assert "(–): no interval, because all images are of one group." in found.all_notes


def test_a_table_without_undefined_values_has_no_such_note():
    assert table(("a", "x", Number(1.0))).all_notes == ()


def test_a_number_never_shows_a_negative_zero_and_shows_infinity():
    assert [Number(-0.0001).text, Number(math.inf).text] == ["0.0", "∞"]


def test_equal_cells_merge_only_within_equal_cells_to_their_left():
    found = table(("a", "x", 1), ("a", "x", 1), ("b", "x", 1))
    assert found.heights == [[2, 2, 1], [0, 0, 1], [1, 1, 1]]


def test_a_row_of_another_length_than_the_columns_is_refused():
    with pytest.raises(ValueError, match="a row of 2 cells, expected 3"):
        Table("t", "Title", "", create_text_columns("a", "b", "c"), (Row(("x", "y")),))


TABLE = Table(
    key="demo",
    title="A title with 5 % & more",
    basis="Image-level; 36 test images, split 954c22b29479.",
    columns=(
        *create_text_columns("model"),
        Column("right"),
        Column("sensitivity", heading="test", unit="%"),
        Column("p", heading="test"),
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


def test_every_row_of_the_csv_states_its_basis():
    rows = list(csv.DictReader(io.StringIO(format_csv(TABLE))))
    assert {row["basis"] for row in rows} == {TABLE.basis}


def test_markdown_and_latex_include_caption_and_notes():
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


def test_long_text_wraps_and_spans_pages_in_latex():
    prose = Table("prose", "Title", "", create_text_columns("topic", "text"), create_rows([("a", "word " * 40)]))
    assert r"\begin{longtable}{lp{0.5\textwidth}}" in format_latex(prose)


@pytest.mark.parametrize("character", "&%$#_{}")
def test_special_characters_of_latex_are_escaped(character):
    assert escape_latex(f"a{character}b") == f"a\\{character}b"


def test_a_backslash_is_escaped_once():
    assert escape_latex("a\\b_c") == r"a\textbackslash{}b\_c"
