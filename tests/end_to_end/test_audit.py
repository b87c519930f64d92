"""`pylorus audit` as a real process: what a script and a person at a terminal rely on."""

import json
import os
import sys
from pathlib import Path

import pytest

from pylorus.data.synthetic import generate_image_set
from tests.data.planted import plant

SHARED = Path(__file__).parents[3] / "shared" / "data" / "bloodcells"
PYLORUS = (str(Path(sys.executable).with_name("pylorus")),)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real images in {SHARED}")
def test_planted_faults_give_exit_code_1_and_clean_images_0(train, tmp_path):
    clean = train("audit", str(SHARED), "--group", r"BloodImage_\d+", "--output", "clean", program=PYLORUS)
    assert clean.returncode == 0, clean.stderr
    planted = plant(SHARED, tmp_path / "set")
    found = train("audit", "set", "--group", r"BloodImage_\d+", program=PYLORUS)
    assert found.returncode == 1, found.stderr
    assert "audit/audit.html" in found.stdout
    said = json.loads((tmp_path / "audit" / "audit.json").read_text())
    cases = {each["code"]: [set(item["paths"]) for item in each["items"]] for each in said["findings"]}
    assert cases["copy-across-splits"] == [set(planted.copied)]
    assert len(cases["near-copy-across-splits"]) == 3
    assert cases["unreadable"] == [{planted.truncated}]
    assert planted.truncated in (tmp_path / "audit" / "audit.html").read_text()


def test_usage_errors_exit_with_2_and_write_nothing(train, tmp_path):
    (tmp_path / "empty").mkdir()
    generate_image_set(tmp_path / "set", images=2, size=48)
    for words in (["nowhere"], ["empty"], ["set", "--group", "("], ["set", "--manifest", "none.csv"]):
        found = train("audit", *words, program=PYLORUS)
        assert found.returncode == 2, words
        assert found.stderr.startswith("error: ")
        assert "Traceback" not in found.stderr
    assert not (tmp_path / "audit").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only there a file's name may be any bytes")
def test_a_file_name_that_is_not_utf_8_does_not_stop_the_audit(train, tmp_path):
    generate_image_set(tmp_path / "set", images=4, size=48)
    source = next((tmp_path / "set" / "gastric_ulcer").iterdir())
    odd = source.with_name(os.fsdecode(b"patient_\xff.jpg"))
    odd.write_bytes(source.read_bytes()[:-60])
    found = train("audit", "set", program=PYLORUS)
    assert found.returncode == 1, found.stderr
    said = json.loads((tmp_path / "audit" / "audit.json").read_text())
    [unreadable] = [each for each in said["findings"] if each["code"] == "unreadable"]
    assert unreadable["items"][0]["paths"] == [r"gastric_ulcer/patient_\udcff.jpg"]
    assert r"gastric_ulcer/patient_\udcff.jpg" in (tmp_path / "audit" / "audit.html").read_text()
