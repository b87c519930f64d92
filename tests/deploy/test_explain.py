"""Heat maps: correct where theory defines them, for every network family, anonymous, and checked by randomization."""

import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from pylorus.cli import main
from pylorus.core.errors import PylorusError
from pylorus.data.input_format import InputFormat
from pylorus.deploy.explain import (
    FeatureTap,
    MapSimilarity,
    Sanity,
    compute_coarse_maps,
    compute_heat_map,
    compute_heat_maps,
    find_last_map,
    format_heat_map_method,
    render_overlay,
    run_randomization_check,
)
from pylorus.deploy.explain_command import draw_explanation
from pylorus.deploy.model import Bundle, load_bundle
from pylorus.deploy.verified_files import SUMS
from pylorus.model.inference import BundleClassifier
from pylorus.model.weights import compute_sha256
from pylorus.report.mistakes import read_saved_maps
from pylorus.runs.reading import read_run

pytest.importorskip("captum")

CONVOLUTIONAL, TOKENS = (
    "Grad-CAM on the last feature map before pooling",
    "Grad-CAM on the tokens that enter the last block, as a square grid",
)
FAMILIES = [
    ("vgg19", 64, {"mlp_ratio": 0.01}, 4, "Grad-CAM on the last feature map before the last pooling"),
    ("resnet50", 64, {}, 2, CONVOLUTIONAL),
    ("inception_v3", 139, {}, 3, CONVOLUTIONAL),
    ("mobilenetv2_100", 64, {}, 2, CONVOLUTIONAL),
    ("convnext_atto", 64, {}, 2, CONVOLUTIONAL),
    ("swin_tiny_patch4_window7_224", 64, {"img_size": 64}, 2, CONVOLUTIONAL),
    ("vit_tiny_patch16_224", 64, {"img_size": 64}, 4, TOKENS),
    ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64}, 4, TOKENS),
    ("cait_xxs24_224", 64, {"img_size": 64}, 4, TOKENS),
]


@pytest.fixture(scope="module")
def bundle(bundle_folder, tmp_path_factory):
    """The tiny run's bundle at a size that leaves a map of 4 × 4; to be read only."""
    return load_bundle(enlarged(shutil.copytree(bundle_folder, tmp_path_factory.mktemp("large") / "model")))


def enlarged(folder):
    path = folder / "model.json"
    said = json.loads(path.read_text())
    said["input"]["size"] = 128
    path.write_text(json.dumps(said))
    names = sorted(each.name for each in folder.iterdir() if each.name != SUMS)
    (folder / SUMS).write_text("".join(f"{compute_sha256(folder / name)}  {name}\n" for name in names))
    return folder


@pytest.fixture(scope="module")
def images(bundle, synthetic_root):
    return np.stack([bundle.input.load_image(path) for path in sorted(synthetic_root.glob("*/*.jpg"))[::6]])


def bundle_of(name, size, arguments):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3, **arguments).eval().requires_grad_(False)
    classifier = BundleClassifier(network, mean=(0.5,) * 3, std=(0.25,) * 3, directions=torch.eye(3))
    form = InputFormat(size, "pad", "bilinear")
    said = SimpleNamespace(classes=("a", "b", "c"), architecture=name, form=form, list_networks=lambda: (said,))
    return Bundle(Path("model"), said, {}, {}, classifier, torch.device("cpu"))


@pytest.mark.parametrize(("name", "size", "arguments", "side", "method"), FAMILIES, ids=[each[0] for each in FAMILIES])
def test_every_network_family_gives_a_map_when_frozen_and_is_unchanged(name, size, arguments, side, method):
    made = bundle_of(name, size, arguments)
    network = made.classifier.network
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    opened = find_last_map(network)
    pixels = made.classifier.normalize_images(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()))
    with torch.inference_mode():
        assert torch.equal(opened.network(pixels), network(pixels))
    found = [compute_heat_map(made, image, label) for label in range(3)]
    assert all(each.shape == (size, size) and each.min() >= 0 and each.max() in (0, 1) for each in found)
    assert max(each.max() for each in found) == 1
    assert compute_coarse_maps(made, image[None], [0]).shape == (1, side, side)
    assert format_heat_map_method(made) == f"{method} ({side} × {side} cells)"
    assert not any(
        isinstance(part, FeatureTap) or part._forward_hooks or part._backward_hooks for part in network.modules()
    )


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_the_map_is_aligned_with_the_image(name):
    made = bundle_of(name, 128, {} if name == "convnext_atto" else {"img_size": 128})
    opened = find_last_map(made.classifier.network)
    seen = []
    opened.layer.register_forward_hook(lambda module, given, found: seen.append(found))
    image = np.random.default_rng(0).integers(0, 256, (3, 128, 128), dtype=np.uint8)
    changed = image.copy()
    changed[:, 8:24, 104:120] = 255 - changed[:, 8:24, 104:120]  # above, on the right
    with torch.inference_mode():
        opened.network(made.classifier.normalize_images(torch.from_numpy(np.stack([image, changed]))))
    moved = (seen[0][0] - seen[0][1]).abs().sum(dim=0)
    row, column = divmod(int(moved.argmax()), moved.shape[1])
    assert row < moved.shape[0] / 2
    assert column >= moved.shape[1] / 2


def test_with_average_pooling_and_a_linear_head_the_map_is_the_weighted_sum(bundle, images):
    network = bundle.classifier.network
    with torch.inference_mode():
        features = network.forward_features(
            bundle.classifier.normalize_images(torch.from_numpy(images.transpose(0, 3, 1, 2)))
        )
        for label in range(3):
            expected = torch.einsum("nchw,c->nhw", features, network.get_classifier().weight[label]).clamp(min=0)
            found = compute_coarse_maps(bundle, images, [label] * len(images))
            torch.testing.assert_close(found * features.shape[2] * features.shape[3], expected, rtol=1e-4, atol=1e-5)


def test_a_map_does_not_depend_on_the_batch_or_on_other_threads(bundle, images):
    alone = [compute_heat_map(bundle, image, place % 3) for place, image in enumerate(images)]
    with torch.no_grad():
        together = compute_heat_maps(bundle, images, [place % 3 for place in range(len(images))])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: bundle.predict_images(images), range(2)))
        beside = list(pool.map(lambda place: compute_heat_map(bundle, images[place], place % 3), range(len(images))))
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(beside, alone, atol=1e-5)


def test_invalid_input_for_a_heat_map_is_refused(bundle, bundle_folder, images, monkeypatch):
    with pytest.raises(ValueError, match=re.escape("found float64 of shape")):
        compute_heat_map(bundle, images[0] / 255, 0)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        compute_heat_map(bundle, images[0], 3)
    small = load_bundle(bundle_folder)
    with pytest.raises(PylorusError, match=r"has only 1 × 1 cells for images of 32 pixels: too few to localize"):
        format_heat_map_method(small)
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(PylorusError, match=re.escape('pip install "pylorus[explain]"')):
        compute_heat_map(bundle, images[0], 0)


def test_an_overlay_hides_the_image_only_where_the_map_is():
    image = np.full((8, 8, 3), 200, dtype=np.uint8)
    heat = np.zeros((8, 8))
    heat[:, 4:] = 1
    found = render_overlay(image, heat)
    assert (found[:, :4] == 200).all()
    assert (found[:, 4:, 2] < 100).all()  # yellow
    assert found.dtype == np.uint8


def test_the_text_of_a_picture_is_not_cut_off():
    page = np.asarray(
        draw_explanation(np.zeros((64, 64, 3), dtype=np.uint8), np.zeros((64, 64)), ("word " * 60, "慢性胃炎" * 30))
    )
    assert (page[:, -8:] == 255).all()
    assert (page[-8:] == 255).all()
    assert (page[400:] < 100).any()


def test_an_explanation_independent_of_the_network_fails_the_randomization_check(bundle, images):
    def edges(bundle, images, labels, network):
        grey = torch.from_numpy(images.mean(axis=3))
        return (grey[:, :-1, :-1] - grey[:, 1:, 1:]).abs()

    found = run_randomization_check(bundle, images, [0] * len(images), maps=edges)
    assert found.has_passed is False
    assert [each.mean for each in found.found] == [1, 1]
    assert "WARNING" in found.summary


def test_an_explanation_determined_by_the_network_passes_the_randomization_check(bundle, images):
    def weights(bundle, images, labels, network):
        return network.get_classifier().weight.detach().flatten()[:64].reshape(1, 8, 8).repeat(len(images), 1, 1)

    found = run_randomization_check(bundle, images, [0] * len(images), maps=weights)
    assert found.has_passed is True
    assert "WARNING" not in found.summary


def test_the_randomization_check_is_repeatable_and_changes_no_state(bundle, images):
    before = {name: tensor.clone() for name, tensor in bundle.classifier.network.state_dict().items()}
    torch.manual_seed(5)
    first = run_randomization_check(bundle, images, [1] * len(images))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert run_randomization_check(bundle, images, [1] * len(images)) == first
    assert all(torch.equal(before[name], tensor) for name, tensor in bundle.classifier.network.state_dict().items())


def test_without_any_map_the_randomization_check_is_not_possible(bundle, images):
    found = run_randomization_check(
        bundle, images, [0] * len(images), maps=lambda b, i, c, n: torch.zeros(len(i), 4, 4)
    )
    assert found == Sanity(0, ())
    assert found.has_passed is None
    assert "not possible" in found.summary
    assert not MapSimilarity("all weights", 0.49, 0.9, 0.0).is_alike


def test_a_folder_gives_anonymous_pictures_and_a_table_with_file_names(bundle, synthetic_root, tmp_path, capsys):
    given = tmp_path / "Jane Doe 1970"
    (given / "gastric_cancer").mkdir(parents=True)
    for path in sorted((synthetic_root / "gastric_cancer").iterdir())[:3]:
        shutil.copy(path, given / "gastric_cancer")
    (given / "damaged.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(SystemExit) as ended:
        main(["explain", str(bundle.folder), str(given), "--output", str(tmp_path / "maps"), "--class", "GC"])
    assert ended.value.code == 3
    said = capsys.readouterr().out
    assert "4 images, 1 of them unreadable" in said
    assert "Randomisation check" in said
    table = pd.read_csv(tmp_path / "maps" / "maps.csv", keep_default_na=False)
    assert table["number"].tolist() == list(range(1, 5))
    bad = table[table["error"] != ""]
    assert len(bad) == 1
    assert bad["path"].item().endswith("damaged.png")
    assert bad["picture"].item() == ""
    good = table[table["error"] == ""]
    assert set(good["class"]) == set(good["true"]) == {"GC"}
    record = json.loads((tmp_path / "maps" / "maps.json").read_text())
    assert (record["images"], record["unreadable"]) == (4, 1)
    assert set(record["randomisation_check"]["rank_correlation"]) == {"the last layer", "all weights"}
    pictures = sorted((tmp_path / "maps").rglob("*.png"))
    assert {path.name for path in pictures} == set(good["picture"]) == {f"{n:04d}.png" for n in good["number"]}
    assert not any(b"Jane" in path.read_bytes() or Image.open(path).info for path in pictures)
    first = good.iloc[0]
    image = bundle.input.load_image(given / "gastric_cancer" / first["path"].rsplit("/", 1)[1])
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "maps" / "overlays" / first["picture"])),
        render_overlay(image, compute_heat_map(bundle, image, 0)),
    )
    probability = bundle.predict_images(image[None]).probabilities[0, 0]
    assert float(first["probability"]) == pytest.approx(probability, abs=1e-5)


def test_only_earlier_maps_are_ever_replaced(bundle, synthetic_root, tmp_path):
    some, output = sorted(synthetic_root.glob("*/*.jpg"))[:3], tmp_path / "maps"

    def explain(*paths):
        with pytest.raises(SystemExit) as ended:
            main(["explain", str(bundle.folder), *map(str, paths), "--output", str(output), "--no-sanity"])
        return ended.value.code

    assert explain(*some) == 0
    assert json.loads((output / "maps.json").read_text())["randomisation_check"] is None
    (output / "mine.png").write_bytes(b"kept")
    assert explain(some[0]) == 0
    assert sorted(path.name for path in output.rglob("*.png")) == ["0001.png", "0001.png", "mine.png"]
    (output / "maps.json").unlink()
    assert "already exists, expected a new or empty folder" in str(explain(some[0]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "found no INPUT"),
        (["images"], "--output: expected a folder"),
        (["images", "--output", "maps", "--class", "GUU"], 'Did you mean "GU"?'),
        (["nowhere", "--output", "maps"], "no such file or folder"),
        (["--mistakes"], "is not in a run"),
    ],
)
def test_an_invalid_option_is_refused_before_anything_is_written(
    words, said, bundle, synthetic_root, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(synthetic_root, tmp_path / "images")
    with pytest.raises(SystemExit) as ended:
        main(["explain", str(bundle.folder), *words])
    assert said in str(ended.value.code)
    assert not (tmp_path / "maps").exists()


def test_the_worst_mistakes_are_in_the_report_with_their_maps(trained_run, tmp_path, skip_rendering):
    run = shutil.copytree(trained_run.path, tmp_path / "run")
    enlarged(run / "model")
    with pytest.raises(SystemExit) as ended:
        main(["explain", str(run / "model"), "--mistakes", "--no-sanity"])
    assert ended.value.code == 0
    table = pd.read_csv(run / "maps" / "maps.csv", keep_default_na=False)
    assert (table["true"] != "").all()
    assert len(set(table["sample"])) == len(table)
    main(["report", str(run), "--thumbnails"])
    page = (run / "report" / "report.html").read_text()
    assert page.count("the heat map for ") == (table["class"] == table["predicted"]).sum() > 0
    assert "No randomisation check was performed." in page
    stage = trained_run.shipped.name
    assert read_saved_maps(read_run(run), stage=stage).overlays
    assert not read_saved_maps(read_run(run), stage="another").overlays
    (run / "model" / "SHA256SUMS").write_text("another")
    assert "were computed with a different bundle" in read_saved_maps(read_run(run), stage=stage).message
    assert not read_saved_maps(read_run(run), stage=stage).overlays
    shutil.rmtree(run / "maps")
    assert "pylorus explain RUN/model --mistakes" in read_saved_maps(read_run(run), stage=stage).message


def test_a_run_without_a_mistake_has_none_to_explain(trained_run, monkeypatch, capsys):
    monkeypatch.setattr("pylorus.deploy.explain_command.find_confident_errors", lambda said: [])
    run = trained_run.path
    monkeypatch.setattr(
        "pylorus.deploy.explain_command.format_heat_map_method", lambda bundle: "at 32 pixels there is no map"
    )
    with pytest.raises(SystemExit) as ended:
        main(["explain", str(run / "model"), "--mistakes"])
    assert ended.value.code == 0
    assert f"{trained_run.shipped.name} classifies all test images of its run correctly" in capsys.readouterr().out
    assert not (run / "maps").exists()
