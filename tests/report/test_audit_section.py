"""The data audit in a report: counts of findings, accepted leaks and left-out files, without names."""

import pandas as pd
import pytest

from pylorus.core.io import write_json
from pylorus.report.captions import LEAKING, collect_caveats
from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions
from pylorus.runs.reading import read_run

FAST = ReportOptions(resamples=20)
AUDIT = {
    "accepted_leaks": {"patient": 0, "file": 0, "pixels": 0, "near": 0},
    "left_out": [],
    "root": "/hospital/mustermann",
    "findings": [
        {
            "code": "near-copy-across-groups",
            "severity": "warning",
            "sentence": "2 pairs of near copies lie in different groups.",
            "mend": "Look at them.",
            "items": [{"samples": ["a", "b"], "paths": ["mustermann.jpg", "b.jpg"]}] * 2,
        }
    ],
}


@pytest.fixture
def make_audited_run(make_run):
    """Makes a run with an audit.json that says something else in some places."""

    def make(**changes):
        folder = make_run(stages=("finetune",), curves=False, network=False)
        write_json(folder / "audit.json", AUDIT | changes)
        return folder

    return make


def test_findings_are_counted_and_no_file_is_named(make_audited_run, skip_rendering):
    folder = make_audited_run()
    text = write_report([folder], options=FAST).read_text()
    assert "Data audit" in text
    assert "2 pairs of near copies lie in different groups." in text
    assert "No copies or near copies of an image were found in more than one split (train, val, test)." in text
    assert not [path for path in (folder / "report").rglob("*.*") if b"mustermann" in path.read_bytes()]
    table = pd.read_csv(folder / "report" / "tables" / "audit.csv")
    assert table["cases"].tolist() == [2]


def test_accepted_leaks_are_stated_at_the_top_and_in_every_caption(make_audited_run, skip_rendering):
    folder = make_audited_run(accepted_leaks={"patient": 0, "file": 1, "pixels": 0, "near": 3})
    assert collect_caveats(read_run(folder)) == (LEAKING,)
    text = write_report([folder], options=FAST).read_text()
    assert LEAKING.meaning in text
    assert (
        "LEAKS ACCEPTED (data.accept_leaks=true): in more than one split (train, val, test): 1 file, 3 near copies."
        in text
    )
    assert LEAKING.word in (folder / "report" / "tables" / "accuracy.md").read_text()


def test_files_that_were_left_out_are_counted_by_class_and_part(make_audited_run, skip_rendering):
    folder = make_audited_run(left_out=[{"class": "gastric_ulcer", "split": "train", "files": 4}])
    assert "4 files could not be read and were excluded" in write_report([folder], options=FAST).read_text()
    table = pd.read_csv(folder / "report" / "tables" / "left-out.csv")
    assert table[["class", "part", "files"]].to_numpy().tolist() == [["gastric_ulcer", "train", 4]]


def test_a_run_without_an_audit_has_no_audit_section(make_run, skip_rendering):
    folder = make_run(stages=("finetune",), curves=False, network=False)
    assert "Data audit" not in write_report([folder], options=FAST).read_text()
