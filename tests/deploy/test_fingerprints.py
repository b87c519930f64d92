"""Fingerprints find copies of images among others, hold no image, and travel with a bundle if a key asks for them."""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from pylorus.core.errors import PylorusError
from pylorus.core.io import read_json
from pylorus.data.image_facts import compute_facts
from pylorus.data.image_measures import THUMBNAIL_SIDE
from pylorus.data.synthetic import generate_image_set
from pylorus.deploy.external import ValidateOptions, validate_bundle
from pylorus.deploy.fingerprints import (
    BITS,
    LEAST_AGREEMENT,
    NOT_CARRIED,
    compare_files,
    create_fingerprints,
    find_matches,
    measure_agreements,
    measure_reconstruction,
)
from pylorus.deploy.model import load_bundle
from pylorus.deploy.predict import PredictOptions, predict

SALT = bytes(range(32))


def columns(contents):
    facts = [compute_facts(content) for content in contents]
    thumbnails = [np.frombuffer(each.thumbnail, np.uint8).reshape(THUMBNAIL_SIDE, THUMBNAIL_SIDE) for each in facts]
    return [each.sha256 for each in facts], [each.pixels for each in facts], np.stack(thumbnails)


def encode(image, format="JPEG", **options):
    held = io.BytesIO()
    image.save(held, format=format, **options)
    return held.getvalue()


def crop(image, share):
    width, height = image.size
    box = (round(width * share), round(height * share), round(width * (1 - share)), round(height * (1 - share)))
    return image.crop(box)


def mirror(image):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


CHANGES = {
    "re-encoded": lambda image: encode(image, quality=60),
    "scaled": lambda image: encode(image.resize((image.width // 2, image.height // 2)), quality=75),
    "mirrored": lambda image: encode(mirror(image), quality=75),
    "cropped": lambda image: encode(crop(image, 0.05), quality=90),
    "cropped, mirrored, scaled": lambda image: encode(mirror(crop(image, 0.05)).resize((180, 180)), quality=60),
    "rotated": lambda image: encode(image.transpose(Image.Transpose.ROTATE_90), quality=90),
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    root = tmp_path_factory.mktemp("frames")
    generate_image_set(root, images=10, size=192, images_per_patient=1, seed=3)
    contents = [path.read_bytes() for path in sorted(root.rglob("*.*")) if path.suffix in (".jpg", ".png")]
    return contents, columns(contents)


@pytest.fixture(scope="module")
def development(frames):
    contents, (files, pixels, thumbnails) = frames
    return contents[:20], create_fingerprints(files[:20], pixels[:20], thumbnails[:20], salt=SALT)


@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_found(development, change):
    contents, fingerprints = development
    copies = [CHANGES[change](Image.open(io.BytesIO(each)).convert("RGB")) for each in contents[:4]]
    matches = find_matches(fingerprints, *columns(copies))
    assert [match.index for match in matches] == list(range(4))
    assert all(match.level == "near" and LEAST_AGREEMENT <= match.agreement <= BITS for match in matches)
    words = {"mirrored": "mirrored", "cropped, mirrored, scaled": "mirrored", "rotated": "rotated by"}
    assert all(words.get(change, "near copy") in match.description for match in matches)


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_whole_images_are_found_if_those_in_training_were_cropped(frames, share):
    contents, _ = frames
    cropped = [encode(crop(Image.open(io.BytesIO(each)).convert("RGB"), share), quality=90) for each in contents[:4]]
    fingerprints = create_fingerprints(*columns(cropped), salt=SALT)
    mirrored = [encode(mirror(Image.open(io.BytesIO(each)).convert("RGB"))) for each in contents[:4]]
    assert len(find_matches(fingerprints, *columns(contents[:4]))) == 4
    assert len(find_matches(fingerprints, *columns(mirrored))) == 4


def test_different_images_are_not_accused(frames, development):
    _, fingerprints = development
    files, pixels, thumbnails = frames[1]
    assert len(files) > 25
    assert not find_matches(fingerprints, files[20:], pixels[20:], thumbnails[20:])
    own = [measure_agreements(fingerprints, each) for each in thumbnails[:20]]
    assert all(sum(bits >= LEAST_AGREEMENT for bits in each.values()) == 1 for each in own)


def test_identical_files_and_pixels_are_told_apart(development):
    contents, fingerprints = development
    image = Image.open(io.BytesIO(contents[3])).convert("RGB")
    matches = find_matches(fingerprints, *columns([contents[5], encode(image, format="PNG")]))
    assert [(match.index, match.level) for match in matches] == [(0, "file"), (1, "pixels")]
    assert matches[0].description == "identical file"


def test_blank_images_match_only_as_identical_files(development):
    contents, _ = development
    blank = [encode(Image.new("RGB", (120, 120), (90, 60, 50)), quality=quality) for quality in (95, 50)]
    fingerprints = create_fingerprints(*columns([contents[0], blank[0]]), salt=SALT)
    assert len(fingerprints.files) == 2
    assert len(fingerprints.codes) == 1
    grey = encode(Image.new("RGB", (90, 120), (91, 61, 50)))
    assert [match.index for match in find_matches(fingerprints, *columns([grey, blank[0]]))] == [1]


def test_the_salt_changes_every_part_and_the_order_says_nothing(frames, development):
    contents, fingerprints = development
    table = [each[:20] for each in frames[1]]
    other = create_fingerprints(*table)
    assert other.salt != fingerprints.salt
    for name in ("files", "pixels", "codes"):
        rows = {row.tobytes() for row in getattr(fingerprints, name)}
        assert len(rows) == len(contents)
        assert not rows & {row.tobytes() for row in getattr(other, name)}
    backward = create_fingerprints(*(each[::-1] for each in table), salt=SALT)
    assert np.array_equal(backward.codes, fingerprints.codes)
    assert np.array_equal(backward.files, fingerprints.files)


def test_no_thumbnail_can_be_rebuilt_linearly(frames):
    middle, whole = measure_reconstruction(frames[1][2], salt=SALT)
    assert np.median(middle) < 0.8
    assert np.median(whole) < 0.5


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
