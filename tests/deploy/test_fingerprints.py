"""Fingerprints in a bundle: of the training and validation images alone, verified, and used by an evaluation."""

import json
import shutil

import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from pylorus.core.errors import PylorusError
from pylorus.core.io import read_json
from pylorus.deploy.external import ValidateOptions, validate_bundle
from pylorus.deploy.fingerprints import NOT_CARRIED, compare_files
from pylorus.deploy.model import load_bundle
from pylorus.deploy.predict import PredictOptions, predict

FILE = "fingerprints.safetensors"


@pytest.fixture(scope="module")
def split(trained_run):
    return pd.read_csv(trained_run.path / "split.csv", dtype=str)


def test_development_images_are_found_and_test_images_are_not(bundle_folder, split, synthetic_root):
    bundle = load_bundle(bundle_folder)
    assert bundle.description.fingerprints.images == (split["split"] != "test").sum()
    assert len((bundle_folder / FILE).read_bytes()) < 100 * len(split) + 1000
    record = compare_files(bundle.fingerprints, [(path, synthetic_root / path) for path in split["path"]])
    assert record["compared"] == len(split)
    assert {each["path"] for each in record["files"]} == set(split.loc[split["split"] != "test", "path"])
    assert {each["match"] for each in record["files"]} == {"identical file"}


def test_the_bundle_names_no_image_and_the_card_says_what_is_revealed(bundle_folder, split):
    content = (bundle_folder / FILE).read_bytes()
    assert not any(path.encode() in content for path in split["path"])
    assert not any(bytes.fromhex(digest) in content for digest in split["sha256"])
    assert set(load_file(bundle_folder / FILE)) == {"salt", "files", "pixels", "codes"}
    card = (bundle_folder / "MODEL_CARD.md").read_text()
    assert "Whoever has the bundle and an image can find out whether that image was one of them" in card
    assert FILE in (bundle_folder / "SHA256SUMS").read_text()


def test_an_evaluation_lists_planted_copies(bundle_folder, split, synthetic_root, tmp_path, capsys):
    chosen = pd.concat([split[split["split"] == "train"].head(2), split[split["split"] == "test"].head(3)])
    for number, row in enumerate(chosen.itertuples()):
        target = tmp_path / "images" / row[3] / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(synthetic_root / row.path) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).convert("RGB").save(target, quality=80)
    output = tmp_path / "predictions.csv"
    predict(bundle_folder, [str(tmp_path / "images")], output, PredictOptions(evaluate=True, device="cpu"))
    printed = capsys.readouterr().out
    record = read_json(output.with_name(f"{output.name}.about.json"))["development_images"]
    assert {each["path"].rpartition("/")[2] for each in record["files"]} == {"0.jpg", "1.jpg"}
    assert "2 of 5 images are copies of training or validation images (2 near copies)" in printed
    assert "near copy, mirrored" in printed
    assert not any(path in printed for path in split["path"])


def test_a_validation_reports_copies_without_naming_them_on_its_page(bundle_copy, split, synthetic_root, tmp_path):
    rows = pd.concat([split[split["split"] == "val"].head(1), split[split["split"] == "test"].head(4)])
    manifest = tmp_path / "site.csv"
    rows.rename(columns={"class": "label"})[["path", "label"]].to_csv(manifest, index=False)
    page = validate_bundle(bundle_copy, manifest, tmp_path / "out", ValidateOptions(root=synthetic_root))
    record = read_json(tmp_path / "out" / "validation.json")["development_images"]
    assert record["compared"] == 5
    assert record["files"] == [{"path": rows["path"].iloc[0], "match": "identical file"}]
    text = page.read_text()
    assert "1 of 5 images is a copy of a training or validation image (1 identical file)" in text
    assert rows["path"].iloc[0] not in text


def test_a_bundle_without_fingerprints_says_so(bundle_copy, edit_model_json):
    (bundle_copy / FILE).unlink()
    bundle = load_bundle(edit_model_json(lambda content: content.pop("fingerprints")))
    assert bundle.fingerprints is None
    record = compare_files(bundle.fingerprints, [])
    assert record == {
        "compared": 0,
        "copies": 0,
        "summary": f"Copies of training or validation images were {NOT_CARRIED}.",
        "files": [],
    }


def test_fingerprints_that_do_not_fit_are_refused(bundle_copy, edit_model_json, bundle_folder, write_hashes):
    with pytest.raises(PylorusError, match=r"codes: found torch.uint8 \(\d+, 32\), expected torch.uint8 \(1, 32\)"):
        load_bundle(edit_model_json(lambda content: content["fingerprints"].update(compared=1)))
    with pytest.raises(PylorusError, match="fingerprints.version: found 99, expected at most 1. A newer bundle"):
        load_bundle(edit_model_json(lambda content: content["fingerprints"].update(version=99)))
    with pytest.raises(PylorusError, match="has fingerprints of the development images, model.json does not"):
        load_bundle(edit_model_json(lambda content: content.pop("fingerprints")))
    shutil.copy(bundle_folder / "model.json", bundle_copy)
    (bundle_copy / FILE).unlink()
    with pytest.raises(PylorusError, match=f"model.json has fingerprints of the development images, {FILE} does not"):
        load_bundle(write_hashes(bundle_copy))


def test_a_changed_fingerprint_is_detected(bundle_copy):
    path = bundle_copy / FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PylorusError, match="was changed or damaged"):
        load_bundle(bundle_copy)
    assert json.loads((bundle_copy / "model.json").read_text())["fingerprints"]["version"] == 1
