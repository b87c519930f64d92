"""`pylorus export` writes an ONNX file only if it agrees with PyTorch; it is checked as strictly as a bundle."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pylorus.cli import main
from pylorus.core.errors import PylorusError
from pylorus.deploy import export as export_module
from pylorus.deploy import onnx as onnx_module
from pylorus.deploy import parity
from pylorus.deploy.bundle_files import read_description
from pylorus.deploy.description import Weights
from pylorus.deploy.export import ExportOptions, export
from pylorus.deploy.licences import accept_licences, check_passing_on
from pylorus.deploy.model import load_bundle
from pylorus.deploy.parity import find_run_images, find_user_images
from pylorus.deploy.predict import PredictOptions, predict

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from pylorus.deploy.onnx import load_export, open_session  # noqa: E402

SHARES = ["probability/GC", "probability/GU", "probability/CG"]
FILES = ["MODEL_CARD.md", "README.md", "SHA256SUMS", "export.json", "model.json", "model.onnx"]


@pytest.fixture(scope="session")
def export_folder(bundle_folder, tmp_path_factory) -> Path:
    """An export in 32 bits, tried on the run's own images; to be read only."""
    return export(bundle_folder, ExportOptions(output=tmp_path_factory.mktemp("exported") / "onnx"))


@pytest.fixture
def reuse_export(export_folder, monkeypatch):
    """Spares the tests that need another graph the export itself: that of `exported` is taken, changed or as it is."""

    def install(act=lambda model: None):
        def write(bundle, path):
            model = onnx.load(str(export_folder / "model.onnx"))
            act(model)
            onnx.save(model, str(path))

        monkeypatch.setattr(export_module, "write_onnx", write)

    return install


@pytest.fixture
def edit_graph(export_folder, tmp_path, write_hashes):
    """A copy of the export whose graph was changed by a function, with hashes that fit."""

    def change(act) -> Path:
        folder = Path(shutil.copytree(export_folder, tmp_path / "changed"))
        model = onnx.load(str(folder / "model.onnx"))
        act(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return write_hashes(folder)

    return change


def state_licence(licence):
    """Change what model.json says of the weights."""
    return lambda content: content.update(weights={"from": "EndoViT.bin", "sha256": "0" * 64, "licence": licence})


def test_a_licence_that_limits_passing_on_is_refused_until_it_is_accepted(edit_model_json, synthetic_root, tmp_path):
    folder = edit_model_json(state_licence("cc-by-nc-nd-4.0"))
    options = ExportOptions(output=tmp_path / "out", images=synthetic_root)
    with pytest.raises(PylorusError) as caught:
        export(folder, options)
    assert "the weights EndoViT.bin that the training started from are under cc-by-nc-nd-4.0" in str(caught.value)
    assert "forbids commercial use and forbids passing on changed versions" in str(caught.value)
    assert "type --accept-licence cc-by-nc-nd-4.0" in str(caught.value)
    with pytest.raises(PylorusError, match="found mit, but the licence of the weights is cc-by-nc-nd-4.0"):
        export(folder, replace(options, accept_licences=("mit",)))
    assert not options.output.exists()
    bundle = load_bundle(folder)
    description, contents = accept_licences(bundle.description, bundle.contents, ["CC BY-NC-ND 4.0"])
    assert description.weights.accepted_licence == "cc-by-nc-nd-4.0"
    assert read_description(contents["model.json"]) == description
    card = contents["MODEL_CARD.md"].decode()
    assert "forbids passing on changed versions. Whoever made this model or its export accepted this licence" in card
    assert check_passing_on([description.weights], what="the export", how="") == []
    with pytest.raises(PylorusError, match="are under mit: there is nothing to accept"):
        export(edit_model_json(state_licence("mit")), replace(options, accept_licences=("mit",)))
    assert not options.output.exists()


def test_an_unknown_licence_is_a_warning():
    for licence, words in ((None, "state no licence"), ("seer-license", "seer-license, which Pylorus does not know")):
        weights = Weights("weights.pth", "0" * 64, licence)
        (warning,) = check_passing_on([weights], what="the export", how="")
        assert words in warning
    assert check_passing_on([Weights("none", None, None), Weights("hub", "0" * 64, "mit")], what="x", how="") == []


def perturb(model):
    """Moves one weight of the first convolution by a hundredth."""
    tensor = next(each for each in model.graph.initializer if len(each.dims) == 4 and each.dims[1] == 3)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] += 0.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def test_an_export_is_compared_on_the_runs_images_in_batches_of_1_and_7(export_folder):
    assert sorted(path.name for path in export_folder.iterdir()) == FILES
    found = json.loads((export_folder / "export.json").read_text())["parity"]
    assert found["batches"] == [1, 7]
    assert (found["images"], found["source"]) == (30, "the run's own images")
    assert max(found["logits"]) < 1e-4
    assert max(found["probabilities"] + found["unlikeness"]) < 1e-4
    assert found["other_class"] == 0
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=export_folder, check=True)


def test_the_onnx_file_is_self_contained_and_describes_its_input_and_output(export_folder, bundle_folder):
    session = onnxruntime.InferenceSession(str(export_folder / "model.onnx"), providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["pylorus.classes"]) == ["gastric_cancer", "gastric_ulcer", "chronic_gastritis"]
    assert said["pylorus.model.json"] == (bundle_folder / "model.json").read_text()
    assert "uint8 RGB of shape (n, 32, 32, 3)" in said["pylorus.input"]
    assert said["pylorus.intended_use"] == "Research use only. Not a medical device."
    for count in (1, 2, 5):
        images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        found = dict(zip(("logits", "probabilities", "unlikeness"), session.run(None, {"image": images}), strict=True))
        answers = load_bundle(bundle_folder).predict_images(images)
        assert np.abs(found["probabilities"] - answers.probabilities).max() < 1e-5
        assert np.abs(found["unlikeness"] - answers.unlikeness).max() < 1e-5


def test_an_export_finds_covered_lenses_as_unlike_as_its_bundle(export_folder, bundle_folder):
    images = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    images[1], images[2], images[3, :16] = 255, (200, 100, 90), 20
    expected = load_bundle(bundle_folder).predict_images(images).unlikeness
    # torch's exporter once dropped a constant of 1e-8 that only images of one color need.
    assert load_export(export_folder).predict_images(images).unlikeness == pytest.approx(expected, abs=1e-5)


def test_the_readmes_program_runs(export_folder):
    text = (export_folder / "README.md").read_text()
    program = text.split("```python\n")[1].split("```")[0] + "print(classes, probabilities.shape)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=export_folder, capture_output=True, text=True, check=True
    )
    assert done.stdout == "['gastric_cancer', 'gastric_ulcer', 'chronic_gastritis'] (2, 3)\n"


def test_an_export_contains_no_paths(export_folder, synthetic_root):
    source = str(Path(export_module.__file__).parents[2])
    for path in export_folder.iterdir():
        content = path.read_bytes()
        assert source.encode() not in content
        assert str(synthetic_root).encode() not in content
        assert b"site-packages" not in content


@pytest.mark.parametrize("batch", [1, 7])
def test_predictions_of_the_export_are_those_of_the_bundle(
    export_folder, bundle_folder, synthetic_root, tmp_path, batch
):
    tables = []
    for folder in (export_folder, bundle_folder):
        output = tmp_path / f"{folder.name}.csv"
        assert predict(folder, [str(synthetic_root)], output, PredictOptions(batch=batch, device="cpu")) == 0
        tables.append(pd.read_csv(output, keep_default_na=False))
    ours, theirs = tables
    numbers = [*SHARES, "unlikeness"]
    assert np.abs(ours[numbers].to_numpy() - theirs[numbers].to_numpy()).max() < 1e-4
    # What lies on a threshold may fall on either side by rounding.
    said, rounding = load_bundle(bundle_folder).description, 5e-6
    shares, far = theirs[SHARES].to_numpy(), theirs["unlikeness"]
    clear = (theirs["probability/GC"] - said.decision.thresholds["GC"]).abs() > rounding
    clear &= np.abs(shares.max(axis=1) - said.abstention.unsure_below) > rounding
    clear &= (far - said.abstention.unlike_above).abs() > rounding
    for name, lowest in said.prediction_sets.lowest.items():
        clear &= (theirs[f"probability/{name}"] - lowest).abs() > rounding
    assert clear.sum() >= 25
    assert ours[clear].drop(columns=numbers).equals(theirs[clear].drop(columns=numbers))
    assert ours["predicted"].equals(theirs["predicted"])


def test_an_export_is_not_computed_on_a_gpu(export_folder, synthetic_root, tmp_path):
    with pytest.raises(PylorusError, match=r"--device: found cuda, but an export runs on the CPU only"):
        predict(export_folder, [str(synthetic_root)], tmp_path / "p.csv", PredictOptions(device="cuda"))


def test_one_wrong_weight_fails_the_parity_check_and_nothing_is_written(bundle_folder, tmp_path, reuse_export):
    reuse_export(perturb)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(bundle_folder), "--output", str(tmp_path / "onnx")])
    assert str(ended.value.code).startswith("error: ")  # text: the process ends with 1
    assert "REFUSED, nothing was written" in str(ended.value.code)
    assert "logits differ from PyTorch's by up to" in str(ended.value.code)
    assert f"Predict with the bundle itself: pylorus predict {bundle_folder} IMAGES" in str(ended.value.code)
    assert list(tmp_path.iterdir()) == []


def test_an_export_wrong_only_for_batches_fails_the_parity_check(export_folder, bundle_folder):
    class Wrong:
        def __init__(self, session):
            self.session = session

        def run(self, names, feed):
            logits, *others = self.session.run(names, feed)
            return [logits + 1e-3 * (len(logits) > 1), *others]

    bundle = load_bundle(bundle_folder)
    images = find_run_images(bundle_folder, bundle.description)
    right = parity.check_parity(bundle, open_session(export_folder / "model.onnx"), images)
    wrong = parity.check_parity(bundle, Wrong(open_session(export_folder / "model.onnx")), images)
    assert right.has_passed
    assert not wrong.has_passed
    assert wrong.logits[0] == right.logits[0]
    assert wrong.logits[1] == pytest.approx(1e-3, rel=0.1)


def test_large_rounding_in_32_bits_is_compared_with_64_bits(export_folder, bundle_folder, monkeypatch):
    class Off:
        def run(self, names, feed):
            logits, *others = open_session(export_folder / "model.onnx").run(names, feed)
            return [logits + 3e-6, *others]

    bundle = load_bundle(bundle_folder)
    images = find_run_images(bundle_folder, bundle.description)
    exact = parity.compute_fp64_outputs
    strict = parity.check_parity(bundle, Off(), images)
    assert not strict.has_passed
    assert strict.rounding < 1e-6  # so this network gives no excuse
    monkeypatch.setattr(parity, "MAX_ROUNDING", 1.0)
    monkeypatch.setattr(parity, "compute_fp64_outputs", lambda *given: [each + 2e-6 for each in exact(*given)])
    rough = parity.check_parity(bundle, Off(), images)
    assert rough.has_passed
    assert rough.tolerance == pytest.approx(4e-6, rel=0.1)


@pytest.fixture
def compare_unlikeness(export_folder, bundle_folder, monkeypatch):
    """Compare an export whose unlikeness is moved, for a PyTorch that rounds unlikeness by a given amount."""
    session = open_session(export_folder / "model.onnx")
    bundle = load_bundle(bundle_folder)
    images = find_run_images(bundle_folder, bundle.description)

    def compare(move, *, rounding, change=lambda bundle, unlikeness: bundle):
        class Moved:
            def run(self, names, feed):
                *others, unlikeness = session.run(names, feed)
                return [*others, (unlikeness + move).astype(np.float32)]

        exact = parity.compute_fp64_outputs

        def compute(*given):
            logits, unlikeness = exact(*given)
            return logits, unlikeness + rounding

        monkeypatch.setattr(parity, "compute_fp64_outputs", compute)
        _, pixels = next(images.read_blocks(bundle.input))
        return parity.check_parity(change(bundle, bundle.predict_images(pixels).unlikeness), Moved(), images)

    return compare


def test_unlikeness_may_differ_by_twice_the_rounding_of_pytorch(compare_unlikeness):
    assert compare_unlikeness(0.00005, rounding=0).has_passed
    rough = compare_unlikeness(0.00015, rounding=0.0001)
    assert rough.has_passed
    assert rough.unlikeness_tolerance == pytest.approx(0.0002, rel=0.1)
    assert rough.unlikeness_rounding == pytest.approx(0.0001, rel=0.1)


@pytest.mark.parametrize(("move", "rounding"), [(0.00015, 0.0), (0.0015, 0.01), (0.1, 0.1)])
def test_wrong_unlikeness_is_refused_and_nothing_else_is_named(compare_unlikeness, move, rounding):
    wrong = compare_unlikeness(move, rounding=rounding)
    (failure,) = [each for each in wrong.failures if "abstain" not in each]
    assert failure.startswith(f"the export's unlikeness differs from PyTorch's by up to {move:.2g}")
    assert f"(allowed: {0.001 if rounding else 0.0001:g})" in failure


def test_rounding_never_excuses_another_abstention(compare_unlikeness):
    def move_threshold(bundle, unlikeness):
        abstention = replace(bundle.description.abstention, unlike_above=float(unlikeness[0]) + 0.0003)
        return replace(bundle, description=replace(bundle.description, abstention=abstention))

    wrong = compare_unlikeness(0.0004, rounding=0.0005, change=move_threshold)
    assert max(wrong.unlikeness) < wrong.unlikeness_tolerance
    assert wrong.other_abstention >= 1
    (failure,) = wrong.failures
    assert failure.startswith("the export and PyTorch do not both abstain")


def test_nan_outputs_fail_the_parity_check(bundle_folder, tmp_path, reuse_export):
    def spoil(model):
        tensor = next(each for each in model.graph.initializer if len(each.dims) == 4)
        values = np.full(tuple(tensor.dims), np.nan, dtype=np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    reuse_export(spoil)
    with pytest.raises(PylorusError, match="REFUSED.*differ from PyTorch's by up to inf"):
        export(bundle_folder, ExportOptions(output=tmp_path / "onnx"))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_its_run_requires_images(bundle_copy, tmp_path):
    with pytest.raises(PylorusError, match=r"is not in a run with images\. Choose images with --images DIR"):
        export(bundle_copy, ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_too_few_readable_images_are_refused(bundle_folder, synthetic_root, tmp_path, reuse_export):
    reuse_export()
    (tmp_path / "few").mkdir()
    for path in sorted((synthetic_root / "gastric_ulcer").iterdir())[:6]:
        shutil.copy(path, tmp_path / "few")
    (tmp_path / "few" / "broken.jpg").write_text("no image")
    with pytest.raises(PylorusError, match="--images: 6 images can be read, expected at least 7"):
        export(bundle_folder, ExportOptions(output=tmp_path / "onnx", images=tmp_path / "few"))
    assert not (tmp_path / "onnx").exists()


def test_existing_files_are_not_overwritten(bundle_folder, tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine.txt").write_text("mine")
    with pytest.raises(PylorusError, match=r"onnx: already exists, expected a new or empty folder"):
        export(bundle_folder, ExportOptions(output=tmp_path / "onnx"))
    assert (tmp_path / "onnx" / "mine.txt").read_text() == "mine"


def test_8_bits_are_evaluated_on_other_images_than_the_calibration_images(
    bundle_copy, synthetic_root, tmp_path, reuse_export, monkeypatch, capsys
):
    reuse_export()
    monkeypatch.setattr(parity, "REPEATS", 2)
    options = ExportOptions(images=synthetic_root, group=r"patient_\d+", int8=True, speed=True)
    folder = export(bundle_copy, options)
    assert folder == tmp_path / "copy-onnx-int8"
    record = json.loads((folder / "export.json").read_text())
    found = record["int8"]
    assert record["precision"] == "int8"
    assert found["images"] + found["calibration_images"] == 30
    assert found["right_8"] - found["right_32"] == found["only_8"] - found["only_32"]
    assert found["accuracy_difference"]["value"] == pytest.approx(
        (found["right_8"] - found["right_32"]) / found["images"]
    )
    assert 0 < found["largest_difference"] < 0.5
    assert [each["batch"] for each in record["speed"]["measured"]] == [1, 16]
    assert (folder / "model.onnx").stat().st_size < 0.5 * (bundle_copy / "model.safetensors").stat().st_size
    said = capsys.readouterr().out
    assert "int8 compared with fp32" in said
    assert "times as fast" in said
    output = tmp_path / "p.csv"
    assert predict(folder, [str(synthetic_root)], output, PredictOptions()) == 0
    right = pd.read_csv(output).pipe(lambda rows: (rows["true"] == rows["predicted"]).sum())
    assert right >= found["right_8"]


def test_calibration_and_evaluation_images_share_no_group(bundle_folder, synthetic_root):
    from pylorus.deploy.export import split_for_calibration

    images = find_user_images(synthetic_root, load_bundle(bundle_folder).description, group=r"patient_\d+")
    ranges, measured = split_for_calibration(images)
    assert len(ranges) + len(measured) == 30
    assert not set(ranges.groups) & set(measured.groups)


def test_8_bits_without_labelled_images_are_refused(bundle_folder, synthetic_root, tmp_path, reuse_export):
    reuse_export()
    for number, path in enumerate(sorted(synthetic_root.rglob("*.*"))):
        (tmp_path / "flat").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "flat" / f"{number}{path.suffix}")
    with pytest.raises(PylorusError, match=r"--int8: 0 of 30 images \(--images\) of 0 groups are in a folder"):
        export(bundle_folder, ExportOptions(output=tmp_path / "onnx", images=tmp_path / "flat", int8=True))
    assert not (tmp_path / "onnx").exists()


def test_one_changed_byte_is_found(export_folder, tmp_path):
    folder = Path(shutil.copytree(export_folder, tmp_path / "changed"))
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(PylorusError, match=r"model\.onnx: its SHA-256 is .* changed or damaged"):
        load_export(folder)


def outside(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/hostname"


def foreign(model):
    model.graph.node[-1].domain = "somebody.else"


def endless(model):
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], ["never"], body=body))


def renamed(model):
    model.graph.output[0].name = "scores"
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
        node.input[:] = ["scores" if name == "logits" else name for name in node.input]


def random_numbers(model):
    model.graph.node.append(onnx.helper.make_node("RandomNormal", [], ["never"], shape=[1]))


def context(model):
    model.graph.node.append(onnx.helper.make_node("EPContext", [], ["never"], domain="com.microsoft"))


def hollow(model):
    tensor = model.graph.initializer.add()
    tensor.name, tensor.data_type, tensor.raw_data = "hollow", onnx.TensorProto.FLOAT, b"1234"
    tensor.dims.extend([2**20, 2**20])


def bomb(model):
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2**20, 2**20]), "sides"))
    model.graph.node.append(onnx.helper.make_node("ConstantOfShape", ["sides"], ["never"]))


def configured(model):
    entry = model.metadata_props.add()
    entry.key, entry.value = "ort_config", "{}"


def other_classes(model):
    entry = next(each for each in model.metadata_props if each.key == "pylorus.model.json")
    entry.value = entry.value.replace("gastric_cancer", "healthy")


def divide(model):
    """The lowest number of 64 bits by -1, which is no number of 64 bits: the processor stops the process."""
    model.graph.initializer.extend(
        onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1], [value])
        for name, value in (("lowest", -(2**63)), ("minus one", -1))
    )
    for node in model.graph.node:
        node.output[:] = ["own logits" if name == "logits" else name for name in node.output]
        node.input[:] = ["own logits" if name == "logits" else name for name in node.input]
    model.graph.node.extend(
        [
            onnx.helper.make_node("Div", ["lowest", "minus one"], ["quotient"]),
            onnx.helper.make_node("Cast", ["quotient"], ["number"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Add", ["own logits", "number"], ["logits"]),
        ]
    )


def search(model):
    model.graph.node.append(onnx.helper.make_node("RegexFullMatch", ["text"], ["match"], pattern="(a*)*$"))


def sum_letters(model):
    equation = "....->" + "a" * 10_000
    model.graph.node.append(onnx.helper.make_node("Einsum", ["image"], ["sums"], equation=equation))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (divide, "crashes the process that checks it"),
        (search, "contains operators that no export has: RegexFullMatch"),
        (sum_letters, "a text of over 200 characters"),
        (outside, "stores weights outside this file"),
        (foreign, "contains operators that no export has"),
        (endless, "contains operators that no export has: Loop"),
        (random_numbers, "contains operators that no export has: RandomNormal"),
        (context, "contains operators that no export has: EPContext"),
        (hollow, r"the tensor 'hollow' has the shape \[1048576, 1048576\], but only 4 numbers or bytes"),
        (bomb, "computes a tensor of 1,099,511,627,776 numbers for an image"),
        (configured, "has metadata that no export has: ort_config"),
        (renamed, "inputs and outputs are .*scores.* expected"),
        (other_classes, r"was not exported with the model\.json next to it"),
    ],
)
def test_a_foreign_onnx_graph_is_refused(edit_graph, act, words):
    with pytest.raises(PylorusError, match=words):
        load_export(edit_graph(act))


def test_an_invalid_onnx_file_is_refused(export_folder, tmp_path, write_hashes):
    folder = Path(shutil.copytree(export_folder, tmp_path / "changed"))
    (folder / "model.onnx").write_bytes(b"\x80\x04no graph")
    with pytest.raises(PylorusError, match=r"model\.onnx: can't be read as ONNX"):
        load_export(write_hashes(folder))


def test_commands_that_need_pytorch_refuse_an_export(export_folder):
    with pytest.raises(PylorusError, match="is an export, but this command needs the bundle"):
        load_bundle(export_folder)


def test_a_missing_package_is_named_with_the_command_that_installs_it(bundle_folder, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(onnx_module.importlib, "import_module", missing)
    with pytest.raises(PylorusError, match=r"ONNX needs onnx, .*Type: pip install 'pylorus\[onnx\]'"):
        export(bundle_folder, ExportOptions(output=tmp_path / "onnx"))
