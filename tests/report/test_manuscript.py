"""The draft of a manuscript: its numbers are those of the written tables, and it states nothing that the run does not."""

import csv
import html
import io
import re
import sys
import zipfile
from importlib.util import find_spec

import pandas as pd
import pytest

from pylorus.core.errors import PylorusError
from pylorus.core.io import read_json, write_json
from pylorus.report.evidence import collect_evidence
from pylorus.report.manuscript import build_manuscript
from pylorus.report.manuscript_blocks import Gap, Paragraph
from pylorus.report.manuscript_files import format_latex_document, render_docx
from pylorus.report.page import build_sections, write_report
from pylorus.report.participants import build_characteristic_table, build_flow_table
from pylorus.report.results import ReportOptions
from pylorus.report.table import format_csv
from pylorus.runs.predictions import read_predictions

DRAFT = ReportOptions(resamples=20, latex=True)
BASE = {"stages": ("s",), "test_each": (8, 8, 8), "val_each": (5, 5, 5), "skill": 0.7}
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ffff3f0005fe02fea7"
    "35819e0000000049454e44ae426082"
)


def add_manifest(folder, **columns):
    """As a run writes catalog.parquet from a manifest; a column is a function of the image's group."""
    split = pd.read_csv(folder / "split.csv", dtype=str)
    values = {f"about/{name}": [of(group) for group in split["group"]] for name, of in columns.items()}
    split.assign(**values).assign(split="").to_parquet(folder / "catalog.parquet")
    for path in folder.rglob("predictions-test.parquet"):
        table = pd.read_parquet(path)
        for name, of in columns.items():
            table[f"about/{name}"] = [of(group) for group in table["group"]]
        table.to_parquet(path)


def hash_group(group):
    return sum(map(ord, group))


def add_patients(folder):
    add_manifest(
        folder,
        age=lambda group: str(30 + hash_group(group) % 50) if hash_group(group) % 9 else "",
        sex=lambda group: "mf"[hash_group(group) % 2],
    )


def change_audit(folder, **values):
    write_json(folder / "audit.json", (read_json(folder / "audit.json") or {}) | values)


def build(*folders):
    evidence = collect_evidence(list(folders), DRAFT)
    return build_manuscript(evidence, build_sections(evidence))


def read_text(*folders):
    """The text and the references, without the numbers that are taken from the tables of the report."""
    manuscript = build_manuscript(collect_evidence(list(folders), DRAFT), ())
    spans = [span for block in manuscript.blocks if isinstance(block, Paragraph) for span in block.spans]
    texts = [span.words if isinstance(span, Gap) else getattr(span, "text", span) for span in spans]
    return " ".join([*filter(lambda text: isinstance(text, str), texts), *manuscript.references.values()])


@pytest.fixture(scope="module")
def rich_run(make_shared_run):
    """A run of two stages with patients, their age and sex, and files that could not be read."""
    run = make_shared_run("rich", **(BASE | {"images_per_group": 2, "stages": ("pretrain", "finetune")}))
    add_patients(run)
    change_audit(run, readable=129, left_out=[{"class": "gastric_ulcer", "split": "not given", "files": 4}])
    return run


@pytest.fixture(scope="module")
def rich_manuscript(rich_run):
    return build(rich_run)


def read_csv_cell(text, row, column):
    """Value, low and high of a cell of a written table; a table has extra columns for the limits of intervals."""
    rows = list(csv.reader(io.StringIO(text)))
    own = [index for index, name in enumerate(rows[0]) if not name.endswith((", low", ", high"))]
    start = own[column]
    return [rows[row][index] for index in range(start, own[column + 1])]


def is_shown_as(value, shown, *, slack=1):
    """Whether a number is shown rounded to its decimals."""
    shown = shown.replace("−", "-").replace(",", "")
    if shown.startswith("<"):
        return float(value) < float(shown.removeprefix("< "))
    return abs(float(value) - float(shown)) <= slack * 0.5001 * 10.0 ** -len(shown.partition(".")[2])


NUMBER = re.compile(r"[−-]?(?:< )?\d[\d,]*(?:\.\d+)?")


def check_links(folder):
    """Compare each link of the page with the written table; return how many there were."""
    page = (folder / "manuscript.html").read_text(encoding="utf-8")
    keys = dict(re.findall(r'<table id="table_(\d+)" data-table="([^"]+)"', page))
    links = re.findall(r'<a href="#cell_(\d+)_(\d+)_(\d+)">([^<]*)</a>', page)
    for table, row, column, text in links:
        cell = read_csv_cell(
            (folder / "tables" / f"{keys[table]}.csv").read_text(encoding="utf-8"), int(row), int(column) - 1
        )
        shown = html.unescape(text)
        if re.search("[a-zA-Z]", cell[0].replace("e-", "")):
            assert shown == cell[0]
            continue
        numbers = ["< 0.001"] if shown == "< 0.001" else NUMBER.findall(shown.replace("95 % CI", ""))
        assert len(numbers) == (1 if "CI" not in shown else 3)
        for value, number in zip(cell, numbers, strict=False):
            # A threshold is rounded down, so that it still catches the image that it was fixed on.
            slack = 2 if keys[table].startswith("threshold") and "CI" not in shown else 1
            assert is_shown_as(value, number, slack=slack), (keys[table], row, column, cell, shown)
    return len(links)


def test_every_number_among_the_results_is_that_of_its_written_table(rich_run, tmp_path, skip_rendering):
    folder = write_report([rich_run], tmp_path / "report", options=DRAFT).parent
    assert check_links(folder) > 60
    page = (folder / "manuscript.html").read_text(encoding="utf-8")
    results = page.partition("<h2>Results</h2>")[2].partition("<h2>Discussion</h2>")[0]
    unlinked = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<a [^>]*>[^<]*</a>|<h\d>[^<]*</h\d>", "", results)))
    assert not re.search(r"\d", re.sub(r"resnet50|F1", "", unlinked))
    assert "Of 133 image files, 129 were included; 4 could not be read." in re.sub(r"<[^>]+>", "", results)
    # Another report in the same folder is no draft and leaves none behind.
    write_report([rich_run], folder, options=ReportOptions(resamples=20))
    assert not (folder / "manuscript.tex").exists()
    assert not (folder / "manuscript.html").exists()


def test_every_number_of_the_comparisons_with_a_margin_is_linked(rich_run, tmp_path, skip_rendering):
    options = ReportOptions(resamples=20, latex=True, margin=0.05, against=("accuracy=0.9", "auroc=0.6"))
    folder = write_report([rich_run], tmp_path / "report", options=options).parent
    assert check_links(folder) > 60
    page = (folder / "manuscript.html").read_text(encoding="utf-8")
    results = page.partition("<h2>Results</h2>")[2].partition("<h2>Discussion</h2>")[0]
    unlinked = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<a [^>]*>[^<]*</a>|<h\d>[^<]*</h\d>", "", results)))
    assert not re.search(r"\d", re.sub(r"resnet50|F1", "", unlinked))
    assert re.search(r"<a [^>]*>the given 0\.9</a>", results)


def test_replicates_are_described_by_mean_and_standard_deviation(make_run, skip_rendering):
    runs = [make_run(f"r{seed}", **(BASE | {"seed": seed, "config": {"seed": seed}})) for seed in range(2)]
    folder = write_report(runs, runs[0].parent / "out", options=DRAFT).parent
    assert check_links(folder) > 10
    page = re.sub(r"<[^>]+>", "", (folder / "manuscript.html").read_text(encoding="utf-8"))
    assert "Over 2 seeds, resnet50" in page
    assert "There were 2 runs of this training, with seeds 0 and 1." in page
    assert "and seed 0" not in page


def test_folds_are_described_as_a_whole_and_their_images_pooled(make_run, skip_rendering):
    story = BASE | {"images_per_group": 2, "config": {"data.folds": 3}}
    runs = [
        make_run(f"f{fold}", **(story | {"split_seed": fold, "config": story["config"] | {"data.fold": fold}}))
        for fold in range(3)
    ]
    folder = write_report(runs, runs[0].parent / "out", options=DRAFT).parent
    assert check_links(folder) > 10
    page = html.unescape(re.sub(r"<[^>]+>", "", (folder / "manuscript.html").read_text(encoding="utf-8")))
    tables = [pd.read_parquet(run / "s" / "predictions-test.parquet") for run in runs]
    assert f"On the {sum(map(len, tables))} test images of all folds together, resnet50" in page
    correct = sum((read_predictions(run / "s" / "predictions-test.parquet").predictions.correct.sum()) for run in runs)
    assert f"had an accuracy of {100 * correct / sum(map(len, tables)):.1f} % (95 % CI" in page
    assert "The images were divided into 3 folds, and each of them was the test images of one run" in page
    assert re.search(r"In the run of fold \d, \d+ images of \d+ patients were included", page)
    assert "There were 3 runs of this training, of folds 0, 1 and 2." in page
    assert page.count("Runs that were deleted") == page.count("Each of 3 test sets was evaluated at least once")


def test_a_tie_is_not_called_a_better_validation_accuracy(make_run):
    equal = [[12, 4, 4], [4, 12, 4], [4, 4, 12]]
    run = make_run(**(BASE | {"stages": ("a", "b"), "confusions": {"a": equal, "b": equal}, "val_each": (1, 1, 1)}))
    evidence = collect_evidence([run], DRAFT)
    (winner,) = evidence.winners
    tied = len({each.validation.mean for each in winner.pool.candidates}) == 1
    assert tied == ("others had the same accuracy" in read_text(run))
    assert "the first is taken" not in winner.choice


def test_latex_is_balanced_escaped_and_has_a_target_for_each_link(make_run):
    run = make_run(**(BASE | {"names": ("A_b & 50%", "C#1"), "test_each": (8, 8), "val_each": (5, 5)}))
    text = format_latex_document(build(run))
    bare = re.sub(r"\\[{}%&#_$\\]", "", text)
    assert bare.count("{") == bare.count("}")
    assert sorted(re.findall(r"\\begin\{(\w+)\}", text)) == sorted(re.findall(r"\\end\{(\w+)\}", text))
    links = set(re.findall(r"\\hyperlink\{([^}]+)\}", text))
    assert links
    assert links == set(re.findall(r"\\hypertarget\{([^}]+)\}", text))
    assert set(re.findall(r"\\hyperref\[([^]]+)\]", text)) <= set(re.findall(r"\\label\{([^}]+)\}", text))
    cited = {key for keys in re.findall(r"\\cite\{([^}]+)\}", text) for key in keys.split(",")}
    assert cited <= set(re.findall(r"\\bibitem\{([^}]+)\}", text))
    assert r"A\_b \& 50\%" in text
    assert not re.search(r"(?<!\\)[#%]", text.replace("% Needs", "").replace("{%\n", ""))


def test_latex_wraps_long_class_names_in_tables_that_fit_the_page(make_run):
    name = "a very long name of a class of chronic gastritis with intestinal metaplasia, antrum-predominant"
    text = format_latex_document(
        build(make_run(**(BASE | {"names": ("GC", name), "test_each": (8, 8), "val_each": (5, 5)})))
    )
    table = text.partition(r"\label{tab:confusion-matrices}")[2].partition(r"\end{table}")[0]
    assert r"\resizebox{\ifdim\width>\linewidth" in table
    assert rf"\parbox[b]{{0.2\textwidth}}{{\raggedright {name}}}" in table


@pytest.mark.skipif(find_spec("docx") is None, reason="needs the extra `docx`: pip install 'pylorus[docx]'")
def test_a_word_file_has_the_tables_and_a_bookmark_for_each_link(rich_manuscript):
    from docx import Document

    manuscript = rich_manuscript
    content = render_docx(manuscript, {drawing.key: PIXEL for drawing in manuscript.drawings})
    document = Document(io.BytesIO(content))
    assert len(document.tables) == len(manuscript.tables)
    for grid, table in zip(document.tables, manuscript.tables, strict=True):
        assert len(grid.rows) == len(table.rows) + 1 + any(column.heading for column in table.columns)
    xml = zipfile.ZipFile(io.BytesIO(content)).read("word/document.xml").decode()
    anchors = set(re.findall(r'w:anchor="([^"]+)"', xml))
    bookmarks = re.findall(r'w:name="((?:cell|table|figure|reference)_[^"]+)"', xml)
    assert anchors <= set(bookmarks)
    assert len(bookmarks) == len(set(bookmarks))
    assert "[FOR THE AUTHOR: " in xml


def test_word_without_python_docx_is_refused_before_anything_is_written(make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "docx", None)
    run = make_run(**BASE)
    with pytest.raises(PylorusError, match=re.escape("pip install 'pylorus[docx]'")):
        write_report([run], options=ReportOptions(docx=True))
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("story", "says", "never_says"),
    [
        (
            {},
            ["there was no other to select from", "their patients are not known", "records no characteristics"],
            [
                "moving average",
                "optimistic",
                "patients were included",
                "Characteristics of each part",
                "No patient is in more",
            ],
        ),
        ({"config": {"data.validation": "test"}}, ["all results are optimistic"], ["on the validation images"]),
        ({"config": {"data.kind": "synthetic"}}, [", generated by a program,", "no clinical meaning"], []),
        ({"finished": 0}, ["no stage has test predictions yet"], ["an accuracy of", "temperature scaling"]),
        ({"images_per_group": 2}, ["No patient is in more than one part"], ["their patients are not known"]),
        (
            {"config": {"averaging.name": "ema", "averaging.decay": 0.99}, "averaged": 420},
            [
                "The weights that the stage s kept are the exponential moving average of the weights over 420 updates, one a step (decay at most 0.99)"
            ],
            ["Izmailov"],
        ),
        ({"model": "my_net"}, ["my_net: [FOR THE AUTHOR: reference of this network]"], ["He K, Zhang X"]),
    ],
)
def test_a_sentence_is_written_only_where_the_run_supports_it(make_run, story, says, never_says):
    text = read_text(make_run(**(BASE | story)))
    assert [words for words in says if words not in text] == []
    assert [words for words in never_says if words in text] == []


def test_only_methods_that_were_used_are_cited(make_run, rich_manuscript):
    single = build_manuscript(collect_evidence([make_run(**BASE)], DRAFT), ()).references
    assert "mcnemar" not in single
    assert "mcnemar" in rich_manuscript.references
    assert "2.6.0" in single["software-torch"]


def test_the_flow_adds_up_and_names_the_reasons(make_run):
    run = make_run(**(BASE | {"images_per_group": 2}))
    left_out = [{"class": "gastric_ulcer", "split": "not given", "files": 4}]
    change_audit(run, readable=131, left_out=left_out, excluded={"polyp": 7})
    (saved,) = collect_evidence([run], DRAFT).runs
    table = {row.cells[0]: row.cells[1:] for row in build_flow_table(saved).rows}
    assert table["image files"] == (142, "")
    assert table["left out: could not be read"] == (4, "")
    assert table['left out: of class "polyp", left out on purpose (data.exclude)'] == (7, "")
    assert table["left out: not assigned to a part"] == (2, "")
    assert table["included"] == (129, 66)
    assert sum(table[part][0] for part in ("training", "validation", "test")) == 129
    assert sum(table[f"test: {name}"][0] for name in ("GC", "GU", "CG")) == table["test"][0] == 24


def test_characteristics_show_no_patient(make_run):
    run = make_run(**(BASE | {"images_per_group": 2}))
    names = ["Weber, Anna", "Klein, Max", "Koch, Eva", "Wolf, Jan", "Mustermann, Erika", "Schmidt, Paul"]
    add_manifest(
        run,
        age=lambda group: str(40 + hash_group(group) % 30) if group.startswith("train") else "",
        name=lambda group: names[hash_group(group) % 6],
        site=lambda group: "AB"[hash_group(group) % 2],
    )
    (saved,) = collect_evidence([run], DRAFT).runs
    table = build_characteristic_table(saved)
    rows = {row.cells[:2]: row.cells[2:] for row in table.rows}
    assert rows["age", "median"][0].value_text != "–"
    assert rows["age", "median"][2].value_text == rows["age", "median"][4].value_text == "–"
    assert rows["age", "missing"][4] == 12
    assert rows["site", "A"][0] + rows["site", "B"][0] == rows["patients", "all"][0] == 45
    assert "Not shown: name, because its values look like personal names." in table.notes
    assert "Weber" not in read_text(run) + format_csv(table)


def test_characteristics_equal_those_counted_by_hand(rich_run):
    (saved,) = collect_evidence([rich_run], DRAFT).runs
    rows = {row.cells[:2]: row.cells[2:] for row in build_characteristic_table(saved).rows}
    patients = pd.read_csv(rich_run / "split.csv").drop_duplicates("group")
    training = patients[patients["split"] == "train"]["group"]
    ages = pd.Series([30 + hash_group(group) % 50 for group in training if hash_group(group) % 9])
    assert rows["age", "median"][0].value == ages.median()
    assert rows["age", "upper quartile"][0].value == ages.quantile(0.75)
    assert rows["age", "missing"][0] == len(training) - len(ages)
    women = sum(hash_group(group) % 2 for group in training)
    assert rows["sex", "f"][:1] == (women,)
    assert rows["sex", "f"][1].value == pytest.approx(100 * women / len(training))
