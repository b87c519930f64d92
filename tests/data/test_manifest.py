"""Manifests as people and programs save them: read, or refused with what mends them."""

import io
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pylorus.core.errors import PylorusError
from pylorus.data.sources import list_manifest_files, read_manifest

ROWS = [(f"{name}/p{n}_{k}.png", name, f"p{n}") for name, first in (("a", 0), ("b", 4)) for n in range(first, first + 4)
        for k in range(2)]  # fmt: skip
TABLE = "path,label,group\n" + "".join(",".join(row) + "\n" for row in ROWS)


@pytest.fixture
def read(class_folders):
    """Reads the catalog of a manifest with the given content, beside 16 images of two classes."""
    root = class_folders({"a": 8, "b": 8})
    for name in "ab":
        files = sorted((root / name).iterdir())
        for file, (path, _, _) in zip(files, [row for row in ROWS if row[1] == name], strict=True):
            file.rename(root / path)

    def read_content(content, *, name="table.csv", **options):
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_manifest(root / name, **options)

    return read_content


SAVED = {
    "semicolons, CRLF and a BOM": b"\xef\xbb\xbf" + TABLE.replace(",", ";").replace("\n", "\r\n").encode(),
    "tabs in UTF-16": TABLE.replace(",", "\t").encode("utf-16"),
    "UTF-16 without a BOM": TABLE.encode("utf-16-le"),
    "a declared delimiter": "sep=;\n" + TABLE.replace(",", ";"),
    "bars": TABLE.replace(",", "|"),
    "line ends of an old Mac": TABLE.replace("\n", "\r"),
    "a delimiter at the end of rows": TABLE.replace("\n", ",\n").replace("group,", "group"),
    "a delimiter at the end of all lines": TABLE.replace("\n", ",,\n"),
    "empty lines": "\n" + TABLE.replace("\n", "\n\n") + ",,\n",
    "spaces": TABLE.replace(",", " , "),
    "capitals in the header": TABLE.replace("path,label,group", "Path,LABEL,Group"),
    "an index without a name": ",path,label,group\n"
    + "".join(f"{n}," + ",".join(row) + "\n" for n, row in enumerate(ROWS)),
    "quotation marks around lines": "\n".join(f'"{line}"' for line in TABLE.splitlines()),
    "backslashes": TABLE.replace("/", "\\"),
    "no suffixes": TABLE.replace(".png", ""),
    "other capitals": TABLE.replace(".png", ".PNG"),
    "dots in paths": TABLE.replace("\na/", "\n./a/").replace("\nb/", "\nb//"),
    "formulas": TABLE.replace(",p", ',"=""p').replace("\n", '"""\n').replace('group"""', "group"),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_table_is_read_as_programs_save_it(read, name):
    table = read(SAVED[name]).table
    assert list(table["path"]) == [row[0] for row in ROWS]
    assert list(table["label"]) == [0] * 8 + [1] * 8
    assert list(table["group"]) == [row[2] for row in ROWS]


def test_windows_1252_is_read_with_a_warning_that_shows_its_words(read, caplog):
    catalog = read(TABLE.replace(",a,", ",ulcère,").encode("cp1252"))
    assert catalog.classes == ("b", "ulcère")
    assert 'read as Windows-1252; check "ulcère"' in caplog.text


def test_decimal_commas_become_points_and_quoted_line_breaks_stay(read):
    lines = ["path;label;size;note", *(f'{path};{label};{n},5;"x\ny"' for n, (path, label, _) in enumerate(ROWS))]
    table = read("\n".join(lines)).table
    assert list(table["about/size"])[:2] == ["0.5", "1.5"]
    assert set(table["about/note"]) == {"x\ny"}


LONG = "path,label,group\n" + "".join(f"{path},{label},1.2E+11\n" for path, label, _ in ROWS)
REFUSED = {
    "more fields than the header has": (TABLE.replace(",p2\n", ",p2,A\n"), "row 6 has 4 fields, the header 3"),
    "decimal commas between commas": (TABLE.replace(",p0\n", ",p0,5\n"), "row 2 has 4 fields, the header 3"),
    "a column twice": (TABLE.replace("group", "label"), 'columns 2 and 3 are both called "label"'),
    "a column without a name": (TABLE.replace("group", ""), "has 3 fields, the header 2"),
    "no header": (TABLE.split("\n", 1)[1], "The first row must contain the names of the columns"),
    "a title": ("Images\n" + TABLE, "The first row must contain the names of the columns"),
    "other names": (TABLE.replace("path,label", "file,diagnosis"), 'Rename "file" to "path"'),
    "a web page": ("<html><table>", "is a web page or XML"),
    "a spreadsheet": (b"PK\3\4", 'is a spreadsheet .* save it as "CSV UTF-8"'),
    "another alphabet": (TABLE.replace(",a,", ",胃癌,").encode("gbk"), "neither UTF-8 nor Windows-1252"),
    "an open quotation mark": (TABLE + '"a/x.png,a,p\n', "row 18 can't be read .* quotation mark"),
    "an empty file": ("", "the table is empty"),
    "a pointer": ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "rounded numbers": (LONG, "has rounded a long number"),
    "groups that are missing": (TABLE.replace(",p2\n", ",NaN\n"), '"group" is "NaN" in row 6'),
    "labels that are missing": (TABLE.replace(",a,p2", ",nan,p2"), r"data.exclude=\['nan'\]"),
    "labels that differ in capitals": (TABLE.replace(",a,p2", ",A,p2"), '"A" and "a" differ only in capitals'),
    "labels that differ in a space": (TABLE.replace(",a,p2", ",a\u200b,p2"), r'"a" and "a\\u200b" differ only'),
    "paths of a Windows disk": (TABLE.replace("\na", "\nC:\\x\\a"), r'Without "C:\\x\\" at the beginning'),
    "names of files alone": (TABLE.replace("\na/", "\n"), "write a/p0_0.png in its row"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_can_be_read_in_two_ways_is_refused_with_what_mends_it(read, name):
    content, message = REFUSED[name]
    with pytest.raises(PylorusError, match=message):
        read(content)


def write_parquet(table):
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def repeat(value, *, times):
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int8)), pa.array([value]))


MANY = [f"column {number}" for number in range(20_000)]
HOSTILE = {
    "columns.csv": (
        lambda: TABLE.replace("\n", "," + ",".join(MANY) + "\n", 1),
        r"columns\.csv: has 20,003 columns, expected 1,000 at most",
    ),
    "columns.parquet": (
        lambda: write_parquet(pa.table({"path": ["a"], "label": ["a"], **{name: ["x"] for name in MANY[:2000]}})),
        r"columns\.parquet: has 2,002 columns, expected 1,000 at most",
    ),
    "rows.parquet": (
        lambda: write_parquet(pa.table({name: repeat("a", times=20_000_001) for name in ("path", "label")})),
        r"rows\.parquet: has 20,000,001 rows, expected 20,000,000 at most",
    ),
    "bytes.parquet": (
        lambda: write_parquet(pa.table({"path": [b"a\xff.jpg"], "label": ["a"]})),
        r"bytes\.parquet: can't be read as a table",
    ),
    "field.csv": (lambda: "path,label," + "x" * 140_000 + "\na/p0_0.png,a,\n", r"field\.csv: .*can't be read"),
    "terminal.csv": (
        lambda: TABLE.replace("group", "group,\x1b[2J").replace("\n", ",x\n").replace("[2J,x", "[2J"),
        r'terminal\.csv: column 4 is called "\\x1b\[2J", with a control character',
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_table_is_refused_in_words_before_it_fills_the_memory(read, name):
    build, words = HOSTILE[name]
    with pytest.raises(PylorusError, match=words):
        read(build(), name=name)


def test_numbers_that_are_equal_are_one_label_with_two_spellings(read):
    with pytest.raises(PylorusError, match=r'"1" and "1.0" differ only'):
        read(TABLE.replace(",a,", ",1,").replace(",1,p0", ",1.0,p0"))


def test_decomposed_names_and_labels_are_the_composed_ones(read):
    composed, decomposed = "gastrite érosive", unicodedata.normalize("NFD", "gastrite érosive")
    root = read(TABLE).root
    (root / "a").rename(root / decomposed)
    catalog = read(TABLE.replace("\na/", f"\n{composed}/").replace(",a,", f",{decomposed},"), classes=[composed, "b"])
    assert catalog.classes == (composed, "b")
    assert len(catalog.table) == 16


def test_a_class_is_left_out_on_purpose(read):
    content = TABLE.replace(",a,p0", ",basophil,p0")
    catalog = read(content, exclude=["basophil"])
    assert catalog.classes == ("a", "b")
    assert len(catalog.table) == 14
    assert catalog.excluded == {"basophil": 2}
    with pytest.raises(PylorusError, match='data.exclude names "basophils".* Did you mean "basophil"'):
        read(content, exclude=["basophils"])


def test_the_audit_reads_a_table_as_a_run_does(read):
    root = read(TABLE).root
    (root / "other.csv").write_text(SAVED["backslashes"].replace(".png", "").replace(",", ";"))
    assert list(list_manifest_files(root / "other.csv", root).table["path"]) == [row[0] for row in ROWS]


def test_a_column_that_seems_to_name_the_patients_is_not_ignored_silently(read, caplog):
    read(TABLE.replace("group", "Patient_ID"))
    assert 'column "Patient_ID" is not used' in caplog.text


def test_folders_called_train_and_test_in_paths_are_not_ignored_silently(read, caplog):
    root = read(TABLE).root
    for name, folder in (("a", "train"), ("b", "test")):
        (root / folder).mkdir()
        (root / name).rename(root / folder / name)
    read(TABLE.replace("\na/", "\ntrain/a/").replace("\nb/", "\ntest/b/"))
    assert 'there is no column "split", so a split is drawn' in caplog.text


RENAMED = TABLE.replace("path,label,group", "file,finding,patient")


def test_a_table_with_other_names_is_read_with_the_keys_that_its_refusal_shows(read):
    with pytest.raises(PylorusError) as error:
        read(RENAMED)
    message = str(error.value)
    assert 'there is no column "path" and no column "label". Rename "file" to "path". Rename "finding" to' in message
    assert "Or leave the table as it is, and add data.columns.path=file data.columns.label=finding" in message
    catalog = read(RENAMED, columns={"path": "file", "label": "finding", "group": "patient"})
    plain = read(TABLE)
    assert list(catalog.table["path"]) == list(plain.table["path"])
    assert list(catalog.table["group"]) == list(plain.table["group"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": "fiel"}, 'data.columns.path: found fiel, but .* has no such column. Did you mean "file"'),
        ({"lable": "finding"}, 'data.columns.lable: found lable, expected one of path, .* Did you mean "label"'),
    ],
)
def test_a_wrong_name_of_a_column_is_named(read, columns, message):
    with pytest.raises(PylorusError, match=message):
        read(RENAMED, columns=columns)


def test_a_column_that_is_named_takes_the_place_of_the_one_with_that_name(read):
    lines = TABLE.strip().splitlines()
    content = "\n".join([f"{lines[0]},verdict", *(f"{line},{'xy'[index % 2]}" for index, line in enumerate(lines[1:]))])
    assert read(content, columns={"label": "verdict"}).classes == ("x", "y")
