"""`pylorus recalibrate` writes a bundle with other probabilities, and leaves its parent as it is."""

import hashlib
import json
import shutil
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest

from pylorus.cli import main
from pylorus.core.errors import PylorusError
from pylorus.data.synthetic import generate_image_set
from pylorus.deploy.external import ValidateOptions, validate_bundle
from pylorus.deploy.model import load_bundle
from pylorus.deploy.onnx import write_onnx
from pylorus.deploy.predict import load_model
from pylorus.deploy.recalibrate import RecalibrateOptions, recalibrate

CLASSES = {"gastric_cancer": 3, "gastric_ulcer": 1, "chronic_gastritis": 1}


@pytest.fixture
def local_images(synthetic_root, tmp_path):
    """Images of a clinic that sees three times as many cancers, whose folders have names of their own."""
    for name, copies in CLASSES.items():
        (tmp_path / "local" / f"local_{name}").mkdir(parents=True)
        for number, path in enumerate(sorted((synthetic_root / name).iterdir())):
            for copy in range(copies):
                shutil.copy(path, tmp_path / "local" / f"local_{name}" / f"p{number}{copy}_{path.name}")
    return tmp_path / "local"


@pytest.fixture
def plain_bundle(bundle_folder, tmp_path, write_hashes):
    """A bundle without fingerprints, which accepts the images that it was trained on."""
    folder = shutil.copytree(bundle_folder, tmp_path / "plain")
    (folder / "fingerprints.safetensors").unlink()
    content = json.loads((folder / "model.json").read_text())
    content.pop("fingerprints")
    (folder / "model.json").write_text(json.dumps(content))
    return write_hashes(folder)


def hash_files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_new_bundle_has_other_probabilities_and_records_its_parent(plain_bundle, local_images, tmp_path, capsys):
    before = hash_files(plain_bundle)
    names = [word for name in CLASSES for word in ("--map", f"local_{name}={name}")]
    main(["recalibrate", str(plain_bundle), str(local_images), "--output", str(tmp_path / "new"), *names])
    said = capsys.readouterr().out
    assert "Copies of training or validation images were not compared: the bundle carries no fingerprints" in said
    assert "GC  30 images; observed/expected" in said
    assert "It was carried over, not fitted on these images" in " ".join(said.split())
    assert hash_files(plain_bundle) == before
    parent, new = load_bundle(plain_bundle), load_model(tmp_path / "new", "cpu")
    record = new.description.recalibration
    assert (record.parent, record.images, record.groups) == (parent.identity, (30, 10, 10), 50)
    assert record.log_loss["after"] < record.log_loss["before"]
    assert record.observed_over_expected["before"]["GC"] > 1.2 > record.observed_over_expected["after"]["GC"]
    assert new.identity != parent.identity
    assert "## Recalibrated on" in (tmp_path / "new" / "MODEL_CARD.md").read_text()

    images = parent.input.load_images(sorted(local_images.rglob("*.*")))
    first, second = parent.predict_images(images), new.predict_images(images)
    assert second.probabilities[:, 0].mean() == pytest.approx(0.6, abs=0.1)
    assert (second.unlikeness == first.unlikeness).all()
    assert (second.positive | ~first.positive).all()
    assert (second.sets | ~first.sets).all()
    weights = np.exp(np.asarray(new.description.calibration.bias))
    scale = parent.description.calibration.temperature / new.description.calibration.temperature
    expected = first.probabilities**scale * weights
    assert second.probabilities == pytest.approx(expected / expected.sum(axis=1, keepdims=True), abs=1e-6)
    assert new.description.reference.split == "recalibration"
    assert new.description.reference.images == 50


def test_an_onnx_file_of_it_has_the_same_probabilities(edit_model_json, synthetic_root, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    bundle = load_bundle(edit_model_json(lambda content: content["calibration"].update(bias=[0.9, -0.5, -0.4])))
    write_onnx(bundle, tmp_path / "model.onnx")
    images = bundle.input.load_images(sorted((synthetic_root / "gastric_ulcer").iterdir()))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (probabilities,) = session.run(["probabilities"], {"image": images})
    assert probabilities == pytest.approx(bundle.predict_images(images).probabilities, abs=1e-5)


def test_what_can_not_be_recalibrated_is_refused_and_nothing_is_written(plain_bundle, local_images, tmp_path):
    names = {f"local_{name}": name for name in CLASSES}

    def refuse(words, **options):
        with pytest.raises(PylorusError, match=words):
            recalibrate(
                plain_bundle,
                local_images,
                RecalibrateOptions(**{"output": tmp_path / "new", "names": names, **options}),
            )
        assert not (tmp_path / "new").exists()

    refuse("3 classes that the model does not have", names={})
    refuse('--map: "cancer" is no class of the model', names={"local_gastric_cancer": "cancer"})
    refuse("is only read. Name a folder outside of it", output=local_images)
    refuse("patient_", group="patient_(x)")
    next(iter((local_images / "local_gastric_ulcer").iterdir())).unlink()
    refuse("GU has 9 images of 9 patients. Expected at least 10")


@pytest.mark.parametrize("bias", [[0.1, 0.2], [0.1, 0.2, 1000.0]])
def test_an_invalid_bias_in_a_bundle_is_refused(edit_model_json, bias):
    with pytest.raises(PylorusError, match=r"calibration\.bias"):
        load_bundle(edit_model_json(lambda content: content["calibration"].update(bias=bias)))


@pytest.fixture(scope="module")
def new_site(trained_run, synthetic_root, tmp_path_factory):
    """Class folders of 30 images a class by another seed, two a patient; and the run's training and test images."""
    root = tmp_path_factory.mktemp("new") / "site"
    generate_image_set(root, images=30, size=48, seed=17)
    split = pd.read_csv(trained_run.path / "split.csv", dtype=str)
    return root, {name: [synthetic_root / path for path in rows["path"]] for name, rows in split.groupby("split")}


def test_images_of_the_development_and_their_patients_are_left_out_in_words(bundle_folder, new_site, tmp_path, capsys):
    root, images = new_site
    shutil.copytree(root, tmp_path / "site")
    patient = min((tmp_path / "site" / images["train"][0].parent.name).iterdir()).name[: len("patient_0001")]
    chosen = [*images["train"][:2], images["val"][0]]
    for number, path in enumerate(chosen):
        name = f"{patient}_planted{path.suffix}" if not number else f"own_{number}{path.suffix}"
        shutil.copy(path, tmp_path / "site" / path.parent.name / name)
    options = RecalibrateOptions(output=tmp_path / "out", names={}, group=r"patient_\d+|own_\d+")
    with suppress(PylorusError):  # whether it helps does not matter here
        recalibrate(bundle_folder, tmp_path / "site", options)
    said = capsys.readouterr().out
    assert "note: 3 of 93 images left out as copies of training or validation images" in " ".join(said.split())
    assert "other images of the same patients" in " ".join(said.split())
    assert "own_1" in said


def test_a_bundle_is_not_recalibrated_on_its_training_images_alone(bundle_folder, new_site, tmp_path):
    for path in new_site[1]["train"]:
        (tmp_path / "site" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "site" / path.parent.name)
    with pytest.raises(PylorusError, match=r"trained or validated on all \d+ images"):
        recalibrate(bundle_folder, tmp_path / "site", RecalibrateOptions(output=tmp_path / "out", names={}))
    assert not (tmp_path / "out").exists()


def test_a_validation_says_on_how_many_of_its_images_the_model_was_recalibrated(
    plain_bundle, local_images, tmp_path, capsys
):
    names = {f"local_{name}": name for name in CLASSES}
    recalibrate(plain_bundle, local_images, RecalibrateOptions(output=tmp_path / "new", names=names))
    capsys.readouterr()
    options = ValidateOptions(names=names)
    page = validate_bundle(tmp_path / "new", local_images, tmp_path / "out", options)
    said = " ".join(capsys.readouterr().out.split())
    assert "This model was recalibrated on 50 of these 50 images: figures on them are optimistic." in said
    assert "This model was recalibrated on 50 of these 50 images" in page.read_text().replace("\u00a0", " ")
    assert "was evaluated on" not in said
    validate_bundle(plain_bundle, local_images, tmp_path / "parent", options)
    assert "was recalibrated on" not in capsys.readouterr().out
