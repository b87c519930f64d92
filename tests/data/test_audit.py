"""An audit finds every planted fault, and nothing else beyond a stated rate."""

import json
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pylorus.core.errors import PylorusError
from pylorus.data.audit import Audit, audit
from pylorus.data.audit_findings import Thresholds
from pylorus.data.audit_image_checks import sample_fields
from pylorus.data.image_facts import load_or_compute_facts
from pylorus.data.sources import list_folder_files, list_manifest_files
from pylorus.data.synthetic import generate_image_set
from pylorus.report.audit_page import audit_folder

from .device_frames import draw_frame
from .planted import Planted, plant

SHARED = Path(__file__).parents[3] / "shared" / "data" / "bloodcells"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real images in {SHARED}")


def audited(root: Path, group: str | None = None) -> Audit:
    images = list_folder_files(root, group=group)
    facts = load_or_compute_facts(root, list(images.table["path"]), store=None)
    return audit(images, facts, Thresholds(), fields=sample_fields(images, facts))


def found_in(result: Audit) -> dict[str, set[tuple[str, ...]]]:
    """The files of each finding's cases, by code."""
    paths = result.images.table["path"]
    return {
        finding.code: {tuple(sorted(paths.iloc[index] for index in item.files)) for item in finding.items}
        for finding in result.findings
    }


def assert_all_found(found: dict[str, set[tuple[str, ...]]], planted: Planted) -> None:
    near = {tuple(sorted(pair)) for pair in (planted.encoded_anew, planted.rotated, planted.mirrored)}
    assert found["copy-across-splits"] == {tuple(sorted(planted.copied))}
    assert found["near-copy-across-splits"] == near
    assert found["unreadable"] == {(planted.truncated,)}
    assert found["wrong-suffix"] == {(planted.renamed,)}
    assert found["personal-tags"] == {(planted.personal,)}
    assert any(planted.moved in files for files in found["group-across-splits"])


@pytest.fixture(scope="module")
def synthetic_set(tmp_path_factory) -> Path:
    """Drawn class folders in train and test, three patients of two images a class in each."""
    root = tmp_path_factory.mktemp("set")
    for number, part in enumerate(("train", "test")):
        generate_image_set(root / part, images=8, size=160, seed=number)
        for path in (root / part).rglob("*.jpg"):
            path.rename(path.with_name(f"{part}_{path.name}"))
    return root


GROUP = r"(train|test)_patient_\d+"


def test_every_planted_fault_is_found_and_nothing_else_reported(synthetic_set, tmp_path):
    planted = plant(synthetic_set, tmp_path / "set")
    result = audited(planted.root, r"((?:train|test)_patient_\d+)")
    found = found_in(result)
    assert_all_found(found, planted)
    harmless = {"black-border", "field-of-view"}
    assert set(found) - harmless == {
        "copy-across-splits", "near-copy-across-splits", "group-across-splits", "unreadable", "wrong-suffix",
        "personal-tags",
    }  # fmt: skip
    assert result.exit_code == 1


def test_rotated_copies_are_found_in_a_very_large_set(synthetic_set, tmp_path):
    planted = plant(synthetic_set, tmp_path / "set")
    images = list_folder_files(planted.root)
    facts = load_or_compute_facts(planted.root, list(images.table["path"]), store=None)
    found = found_in(audit(images, facts, replace(Thresholds(), many=0)))
    assert {tuple(sorted(planted.rotated)), tuple(sorted(planted.mirrored))} <= found["near-copy-across-splits"]


@real
@pytest.mark.slow
def test_every_fault_planted_in_real_images_is_found_and_nothing_else_reported(tmp_path):
    clean = audited(SHARED, r"BloodImage_\d+")
    assert set(found_in(clean)) == {"group-with-several-labels"}
    assert clean.exit_code == 0
    planted = plant(SHARED, tmp_path / "set")
    found = found_in(audited(planted.root, r"BloodImage_\d+"))
    assert_all_found(found, planted)
    # The four smears whose images were copied or moved, and no other.
    assert len(found["group-across-splits"]) == 4
    assert "near-copy-across-groups" not in found
    assert "near-copy" not in found


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [False, True])
def test_no_pair_of_different_synthetic_images_is_reported_as_a_copy(tmp_path, overlay):
    generate_image_set(tmp_path / "set", images=60, size=96, seed=11, overlay=overlay)
    assert not [code for code in found_in(audited(tmp_path / "set", r"patient_\d+")) if "copy" in code]


def test_two_labels_for_one_content_are_an_error(class_folders, tmp_path):
    root = class_folders({"a": 4, "b": 4})
    source = next((root / "a").iterdir())
    (root / "b" / "again.png").write_bytes(source.read_bytes())
    result = audited(root, r"patient_\d+|again")
    [finding] = [each for each in result.findings if each.code == "copy-across-classes"]
    assert finding.severity == "error"


def test_dark_blank_and_blurred_images_are_found_relative_to_their_set(synthetic_set, tmp_path):
    generate_image_set(tmp_path / "set", images=14, size=128, seed=2)
    first, second, third, *_ = sorted((tmp_path / "set").rglob("*.jpg"))
    with Image.open(first) as image:
        small = image.resize((12, 12)).resize(image.size, Image.Resampling.BICUBIC)
    small.save(first, quality=95)
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(second)
    with Image.open(third) as image:
        dark = image.point(lambda value: value // 16)
    dark.save(third)
    found = found_in(audited(tmp_path / "set"))
    names = [path.relative_to(tmp_path / "set").as_posix() for path in (first, second, third)]
    assert (names[0],) in found["blurred"]
    assert {(names[1],), (names[2],)} <= found["dark"]


def test_a_class_identifiable_by_its_overlay_is_reported(tmp_path):
    generate_image_set(tmp_path / "set", images=12, size=320, seed=4)
    generate_image_set(tmp_path / "other", images=12, size=320, seed=4, overlay=True)
    for path in sorted((tmp_path / "set" / "gastric_ulcer").iterdir()):
        path.write_bytes((tmp_path / "other" / "gastric_ulcer" / path.name).read_bytes())
    result = audited(tmp_path / "set", r"patient_\d+")
    [finding] = [each for each in result.findings if each.code == "text-tells-the-class"]
    assert "gastric_ulcer 100 %" in finding.sentence


def test_a_few_letters_are_text_if_other_images_have_them_at_the_same_place(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(24):
        frame = draw_frame("whole", 5 * index, device=0, longest=640).image.copy()
        frame = np.ascontiguousarray(cv2.resize(frame, (640, 480)))
        if index < 18:  # three letters: in a single image too few to be certain
            place = (24 + int(rng.integers(0, 6)), 120 + int(rng.integers(0, 6)))
            cv2.putText(frame, "A5:", place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 1, cv2.LINE_AA)
        (tmp_path / "set" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "set" / "ab"[index % 2] / f"{index:02}.png")
    found = found_in(audited(tmp_path / "set"))
    with_letters = {(f"{'ab'[index % 2]}/{index:02}.png",) for index in range(18)}
    assert len(found["burned-in-text"] & with_letters) >= 15
    assert len(found["burned-in-text"] - with_letters) <= 1


def test_the_audit_says_what_masking_would_cover(tmp_path):
    for index in range(4):
        frame = draw_frame("octagon, cropped, scope map", 5 * index, longest=640).image
        (tmp_path / "set" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "set" / "ab"[index % 2] / f"{index}.png")
    result = audited(tmp_path / "set")
    [finding] = [each for each in result.findings if each.code == "overlays"]
    assert "in 4 images of 4" in finding.sentence
    assert all(field.covered > 0.05 for field in result.fields)
    assert any("overlays cover" in item.detail for each in result.findings for item in each.items)


def test_a_manifest_lists_files_that_are_gone(class_folders, tmp_path):
    root = class_folders({"a": 3, "b": 3})
    rows = [f"{path.relative_to(root).as_posix()},{path.parent.name}" for path in sorted(root.rglob("*.png"))]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows, "a/gone.png,a"]) + "\n")
    images = list_manifest_files(tmp_path / "list.csv", root)
    result = audit(images, load_or_compute_facts(root, list(images.table["path"]), store=None), Thresholds())
    assert found_in(result)["missing-file"] == {("a/gone.png",)}
    assert "unreadable" not in found_in(result)


@pytest.mark.parametrize(("classes", "code"), [({"images": 3}, "single-class"), ({"nan": 2, "a": 2}, "class-name")])  # fmt: skip
def test_the_audit_reports_classes_that_training_would_refuse(class_folders, code, classes):
    result = audited(class_folders(classes))
    assert code in {finding.code for finding in result.findings}
    assert result.exit_code == 1


def test_the_audit_reports_file_names_that_training_would_refuse(class_folders):
    root = class_folders({"a": 2, "b": 2})
    first = sorted((root / "a").iterdir())[0]
    first.rename(root / "a" / os.fsdecode(b"\xe4.png"))
    assert found_in(audited(root))["name-not-utf-8"] == {("a/\udce4.png",)}


def test_the_audit_command_writes_page_and_json_and_sets_the_exit_code(synthetic_set, tmp_path, capsys):
    planted = plant(synthetic_set, tmp_path / "set")
    options = {"manifest": None, "group": GROUP, "cache": tmp_path / "cache"}
    assert audit_folder(planted.root, tmp_path / "named", names=True, **options) == 1
    assert "in more than one split" in " ".join(capsys.readouterr().out.split()).replace(" │ │ ", " ")
    page, said = (
        (tmp_path / "named" / "audit.html").read_text(),
        json.loads((tmp_path / "named/audit.json").read_text()),
    )
    assert planted.truncated in page
    assert page.count("data:image/jpeg;base64,") > 8
    assert said["counts"]["leak"] == 3
    assert said["thresholds"]["likeness"] == Thresholds().likeness
    assert audit_folder(planted.root, tmp_path / "bare", names=False, **options) == 1
    for name in ("audit.html", "audit.json"):
        bare = (tmp_path / "bare" / name).read_text()
        for secret in ("patient_", "MUSTERMANN", str(tmp_path), "data:image"):
            assert secret not in bare
    assert "MUSTERMANN" not in page


def test_a_clean_set_has_exit_code_zero_and_a_second_audit_decodes_nothing(synthetic_set, tmp_path, monkeypatch):
    options = {"manifest": None, "group": None, "names": True, "cache": tmp_path / "cache"}
    assert audit_folder(synthetic_set / "train", tmp_path / "one", **options) == 0
    monkeypatch.setattr("pylorus.data.image_facts.decode_image", lambda content: pytest.fail("decoded again"))
    assert audit_folder(synthetic_set / "train", tmp_path / "two", **options) == 0


@pytest.mark.parametrize(
    ("make", "group", "says"),
    [
        (lambda root: None, None, "is not a folder"),
        (lambda root: root.mkdir(), None, "found no class folder"),
        (lambda root: (root / "a").mkdir(parents=True), None, "there is no image in this class folder"),
    ],
)
def test_what_is_no_image_set_is_refused(tmp_path, make, group, says):
    make(tmp_path / "set")
    with pytest.raises(PylorusError, match=says):
        list_folder_files(tmp_path / "set", group=group)


def test_an_invalid_regular_expression_is_refused(class_folders):
    with pytest.raises(PylorusError, match=r"--group: '\(' is not a regular expression"):
        list_folder_files(class_folders({"a": 2, "b": 2}), group="(")
