import math

import pytest

from pylorus.report.table import Column, Number, Row, Table, create_rows, create_text_columns


def table(*rows):
    columns = (*create_text_columns("model", "stage"), Column("accuracy", unit="%"))
    return Table("t", "Title", "Image-level.", columns, create_rows(rows))


def test_an_undefined_value_is_a_dash_with_a_note_and_never_a_number():
    found = table(("a", "x", Number(math.nan, 1, (math.nan, math.nan))))
    assert found.numbers[0].text == "–"
    assert any(note.startswith("–: undefined") for note in found.all_notes)


def test_a_value_whose_interval_is_unknown_stands_and_says_so():
    found = table(("a", "x", Number(100.0, 1, (math.nan, math.nan))))
    assert found.numbers[0].text == "100.0 (–)"
    assert any(note.startswith("(–): no interval") for note in found.all_notes)


def test_what_is_undefined_says_why():
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


def test_equal_words_below_each_other_unite_only_within_what_is_left_of_them():
    found = table(("a", "x", 1), ("a", "x", 1), ("b", "x", 1))
    assert found.heights == [[2, 2, 1], [0, 0, 1], [1, 1, 1]]


def test_a_row_of_another_length_than_the_columns_is_refused():
    with pytest.raises(ValueError, match="a row of 2 cells, expected 3"):
        Table("t", "Title", "", create_text_columns("a", "b", "c"), (Row(("x", "y")),))
