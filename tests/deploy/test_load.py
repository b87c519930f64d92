"""A bundle is loaded completely or not at all: manipulated files are refused with the reason."""

import json
import os
import pickle
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pylorus.core.errors import PylorusError
from pylorus.data.decode import POLICY_VERSION, RESAMPLING
from pylorus.deploy.card import format_threshold_guarantee
from pylorus.deploy.model import load_bundle


class Evil:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


def refused(folder, words):
    with pytest.raises(PylorusError, match=words):
        load_bundle(folder)


def test_a_pickle_in_place_of_the_bundle_is_never_loaded(tmp_path):
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Evil(mark)))
    refused(path, "found a file, which is never loaded because it could be a pickle")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "unlike.safetensors", "model.json"])
def test_a_pickle_under_a_bundles_name_is_never_loaded(bundle_copy, write_hashes, tmp_path, name):
    mark = tmp_path / "mark"
    (bundle_copy / name).write_bytes(pickle.dumps(Evil(mark)))
    refused(write_hashes(bundle_copy), f"{name}.*can't be read as (safetensors|JSON)")
    torch.save({"weight": torch.zeros(2)}, bundle_copy / name)
    refused(write_hashes(bundle_copy), f"{name}")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "unlike.safetensors", "model.json", "MODEL_CARD.md"])
def test_one_changed_byte_in_any_file_is_found(bundle_copy, name):
    content = bytearray((bundle_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_copy / name).write_bytes(content)
    refused(bundle_copy, f"{name}: its SHA-256 is .* expected .* changed or damaged")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "unlike.safetensors", "model.json", "MODEL_CARD.md", "SHA256SUMS"]
)
def test_a_missing_file_is_named(bundle_copy, name):
    (bundle_copy / name).unlink()
    refused(bundle_copy, f"{name}: No such file")


def test_a_run_given_instead_of_its_bundle_is_named(trained_run):
    refused(trained_run.path, "is a run; its bundle is .*model")
    refused(trained_run.path / "nowhere", "found nothing, expected a bundle")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "..", "a\\b", "c:d", ""])
def test_names_outside_the_folder_are_refused(bundle_copy, name):
    with (bundle_copy / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    refused(bundle_copy, "SHA256SUMS: found")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "SHA256SUMS"])
def test_symbolic_links_are_refused_even_with_correct_content(bundle_copy, tmp_path, name):
    moved = (bundle_copy / name).rename(tmp_path / name)
    (bundle_copy / name).symlink_to(moved)
    refused(bundle_copy, f"{name}: found a symbolic link")


def test_a_pipe_is_refused_without_waiting(bundle_copy):
    (bundle_copy / "model.json").unlink()
    os.mkfifo(bundle_copy / "model.json")
    refused(bundle_copy, "model.json: found something that is not a regular file")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "can't be read as JSON"),
        (b"\xff\xfe", "can't be read as JSON"),
        (b"[" * 200_000, "nested too deeply|can't be read as JSON"),
        (b"1" * 10_000, "can't be read as JSON|format_version"),
        (b'{"format_version": 1, "format_version": 1}', "it contains the same name twice"),
        (b'{"format_version": NaN}', "NaN is not a finite number"),
        (b'{"format_version": true}', "found format_version True, expected 1"),
        (b'{"format_version": 4}', "A newer bundle needs a newer Pylorus"),
        (b"[]", "found format_version None"),
        (b'{"format_version": 1}', 'the entry "architecture" is missing'),
        (b'"' + b"a" * 1_100_000 + b'"', "expected 1,000,000 at most"),
    ],
)
def test_a_malformed_or_huge_description_is_refused(bundle_copy, write_hashes, text, words):
    (bundle_copy / "model.json").write_bytes(text)
    refused(write_hashes(bundle_copy), words)


def _set(*path, to):
    def act(content):
        for part in path[:-1]:
            content = content[part]
        content[path[-1]] = to

    return act


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (_set("architecture", to="resnt50"), 'timm .* has no "resnt50".*Did you mean "resnet50"'),
        (_set("architecture", to="hf-hub:someone/model"), "timm .* has no"),
        (_set("architecture", to="local-dir:/tmp"), "timm .* has no"),
        (_set("architecture", to=["resnet50"]), "architecture: found .* expected text"),
        (_set("arguments", to={"checkpoint_path": "/tmp/evil.pt"}), '"checkpoint_path" can\'t be set'),
        (_set("arguments", to={"pretrained": True}), '"pretrained" can\'t be set'),
        (_set("arguments", to={"pretrained_cfg": {"url": "http://x"}}), "can't be set"),
        (_set("arguments", to={"act_layer": {"_target_": "os.system"}}), "arguments.act_layer: found"),
        (_set("arguments", to={"__class__": 1}), "can't be set"),
        (_set("arguments", to={"layers": [10**9] * 4}), "expected a number within"),
        (_set("arguments", to={"no_such": 1}), "timm rejected them"),
        (_set("classes", to=["one"]), "classes: found one, expected 2 to 1000 different names"),
        (_set("classes", to=["a", "b", "a"]), "different names"),
        (_set("classes", to=["a", "b", "c\nd"]), "different names"),
        (_set("classes", to=["a", "b"]), "found 2 classes but 3 short_names"),
        (_set("input", "size", to=10**9), "input.size: found 1000000000, expected 1 to 2048"),
        (_set("input", "size", to="32"), 'input.size: found "32", expected a whole number'),
        (_set("input", "mean", to=[0.5]), "input.mean: found 0.5, expected three numbers"),
        (_set("input", "std", to=[0, 0, 0]), "input.std: found"),
        (_set("input", "interpolation", to="magic"), "expected one of nearest"),
        (_set("input", "policy", to=1), "reads images by policy"),
        (_set("input", "finder", to=99), "input.finder: found 99, .* by versions 1 to"),
        (_set("input", "finder", to=0), "input.finder: found 0"),
        (_set("calibration", "temperature", to=0), "calibration.temperature: found 0.0"),
        (_set("decision", "class", to="XX"), "decision.class: found"),
        (_set("decision", "thresholds", "GC", to=1.5), "decision.thresholds.GC: found 1.5"),
        (_set("decision", "guarantees", "GC", "confidence_reached", to=95), "guarantees.GC.confidence_reached: found 95"),
        (_set("decision", "guarantees", to={}), "decision.guarantees: found nothing, expected GC, GU, CG"),
        (_set("decision", "confidence", to=90), "decision.confidence: found 90"),
        (_set("prediction_sets", "lowest", "GC", to=-0.1), "prediction_sets.lowest.GC: found -0.1"),
        (_set("prediction_sets", "lowest", to={"GC": 0.5}), "prediction_sets.lowest: found GC, expected GC, GU, CG"),
        (_set("abstention", "unlike_above", to=None), "abstention.unlike_above: found None, expected a number"),
        (_set("test", "auroc", to={}), "test.auroc: found nothing, expected GC, GU, CG"),
        (_set("surprise", to=1), 'unknown entry "surprise"'),
    ],
)  # fmt: skip
def test_an_invalid_description_is_refused_by_name(edit_model_json, act, words):
    refused(edit_model_json(act), words)


def _weights(folder, act, name="model.safetensors"):
    tensors = load_file(folder / name)
    act(tensors)
    save_file(tensors, folder / name)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda t: t["fc.weight"].view(-1)[0].fill_(float("nan")), r"NaN or infinite values in:\n  fc.weight"),
        (lambda t: t.update({"fc.weight": torch.zeros(4, 512)}), r"fc.weight: found torch.float32 \(4, 512\)"),
        (lambda t: t.update({"fc.bias": torch.zeros(3).half()}), "fc.bias: found torch.float16"),
        (lambda t: t.pop("fc.bias"), "fc.bias: found nothing"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "extra: found .* expected nothing"),
        (lambda t: t["bn1.running_var"].fill_(-1.0), "for a black image the network's output is NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(bundle_copy, write_hashes, act, words):
    _weights(bundle_copy, act)
    refused(write_hashes(bundle_copy), words)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"other": torch.zeros(3, 4)}, 'expected one float32 matrix "directions" with 3 rows'),
        ({"directions": torch.zeros(2, 4)}, "expected one float32 matrix"),
        ({"directions": torch.zeros(3, 4)}, "not unit vectors"),
        ({"directions": torch.eye(3)}, "do not fit together"),
    ],
)
def test_directions_that_do_not_fit_are_refused(bundle_copy, write_hashes, tensors, words):
    save_file(tensors, bundle_copy / "unlike.safetensors")
    refused(write_hashes(bundle_copy), words)


def test_an_inconsistent_safetensors_header_is_refused(bundle_copy, write_hashes):
    for header in (b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"{}", b""):
        (bundle_copy / "model.safetensors").write_bytes(header)
        refused(write_hashes(bundle_copy), "model.safetensors")


def test_other_files_in_the_folder_are_never_opened(bundle_copy, tmp_path):
    mark = tmp_path / "mark"
    (bundle_copy / "model.py").write_text(f"open({str(mark)!r}, 'w')")
    (bundle_copy / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    load_bundle(bundle_copy)
    assert not mark.exists()


def test_a_bundle_of_policy_2_resizes_in_one_step_as_in_its_training(edit_model_json):
    folder = edit_model_json(_set("input", "policy", to=2))
    form = load_bundle(folder).description.input.form
    frame = np.random.default_rng(0).integers(0, 256, (8 * form.size, 8 * form.size, 3), dtype=np.uint8)
    method = RESAMPLING[form.interpolation]
    expected = np.asarray(Image.fromarray(frame).resize((form.size, form.size), method))
    assert np.array_equal(form.prepare_image(frame), expected)
    assert form.get_key() != replace(form, policy=POLICY_VERSION).get_key()


def test_the_description_is_read_as_it_was_written(bundle_folder):
    from pylorus.core.io import convert_to_plain

    assert convert_to_plain(load_bundle(bundle_folder).description) == json.loads(
        (bundle_folder / "model.json").read_text()
    )


def _as_format_1(content):
    content["format_version"] = 1
    for key in ("confidence", "patients_needed", "guarantees"):
        del content["decision"][key]
    del content["prediction_sets"]


def test_a_bundle_of_format_1_is_read_and_guarantees_nothing(bundle_folder, edit_model_json, tmp_path):
    old, new = load_bundle(edit_model_json(_as_format_1)), load_bundle(bundle_folder)
    decision = old.description.decision
    assert decision.thresholds == new.description.decision.thresholds
    assert [decision.get_threshold(name) for name in ("GC", "GU", "CG")] == [None] * 3
    assert "no sensitivity is guaranteed for new patients" in format_threshold_guarantee(old.description, "GC")
    images = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    found, expected = old.predict_images(images), new.predict_images(images)
    assert (found.positive == expected.positive).all()
    assert found.sets is None
    assert expected.sets is not None


def test_a_bundle_from_before_masks_existed_covers_nothing(bundle_folder, edit_model_json):
    def remove_mask(content):
        del content["input"]["mask"]

    old = load_bundle(edit_model_json(remove_mask))
    assert old.description.input.form.mask == "none"
    with pytest.raises(PylorusError, match='input.mask: found "text", expected one of none, overlays'):
        load_bundle(edit_model_json(lambda content: content["input"].update(mask="text")))


@pytest.mark.parametrize("key", ["arguments", "weights", "input", "training", "versions", ""])
def test_a_target_in_a_bundle_is_never_honoured(bundle_copy, write_hashes, tmp_path, key):
    mark = tmp_path / "mark"
    description = json.loads((bundle_copy / "model.json").read_text())
    (description[key] if key else description)["_target_"] = f"pathlib.Path({str(mark)!r}).touch"
    (bundle_copy / "model.json").write_text(json.dumps(description))
    if key == "versions":  # a name with a text like any other
        load_bundle(write_hashes(bundle_copy))
    else:
        refused(write_hashes(bundle_copy), "_target_")
    assert not mark.exists()


def test_code_that_a_bundle_names_is_never_imported(bundle_copy, write_hashes, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('mark').touch()\ndef net(**_): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    content = json.loads((bundle_copy / "model.json").read_text())
    content |= {"network": "evil.net", "architecture": "evil_net"}
    (bundle_copy / "model.json").write_text(json.dumps(content))
    refused(
        write_hashes(bundle_copy),
        "the network evil_net was built by evil.net, which is not part of Pylorus; .*--network evil",
    )
    content["network"] = "a\nb"
    (bundle_copy / "model.json").write_text(json.dumps(content))
    refused(write_hashes(bundle_copy), "model.json: network: found .* expected a dotted path")
    assert not (tmp_path / "mark").exists()


def test_a_network_of_timm_takes_no_other_in_its_place(bundle_folder):
    with pytest.raises(PylorusError, match=r"the network is test_resnet.* of timm. Leave out --network"):
        load_bundle(bundle_folder, network=torch.nn.Identity)


def _write_sparse(path, header, size):
    """Write a safetensors file whose tensors are a hole in the disk: zeros that take no space."""
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def _measure_peak():
    """Return the most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (_set("architecture", to="vit_giant_patch14_224"), r"found nothing, expected torch.float32"),
        (_set("arguments", to={"layers": [10_000] * 4}), r"is refused: the network has more than 10,000 modules"),
        (_set("arguments", to={"channels": [10_000] * 4}), r"is refused: the network needs a tensor of 3,600,000,000 numbers"),
        (_set("arguments", to={"block": "x"}), r"arguments.block: found 'x', with which .*timm rejected them"),
        (_set("arguments", to={"act_layer": "os.system"}), r"arguments.act_layer: found 'os.system', with which"),
        (_set("arguments", to={"norm_layer": "eval"}), r"arguments.norm_layer: found 'eval', with which"),
    ],
)  # fmt: skip
def test_a_description_of_a_large_network_costs_no_memory(edit_model_json, act, words):
    folder = edit_model_json(act)
    peak = _measure_peak()
    refused(folder, words)
    assert _measure_peak() - peak < 400_000_000


@pytest.mark.parametrize("name", ["model.safetensors", "unlike.safetensors", "appearance.safetensors"])
def test_a_header_of_large_tensors_costs_no_memory(bundle_copy, write_hashes, name):
    entry = {"dtype": "F32", "shape": [3, 2**28], "data_offsets": [0, 12 * 2**28]}
    _write_sparse(bundle_copy / name, {"directions": entry}, 0)
    write_hashes(bundle_copy)
    _write_sparse(bundle_copy / name, {"directions": entry}, 12 * 2**28)  # its hash is never computed
    peak = _measure_peak()
    refused(bundle_copy, rf"{name}: (found|does not fit|needs)|needs .* of memory")
    assert _measure_peak() - peak < 400_000_000


def test_images_that_cost_too_much_are_refused(bundle_copy, monkeypatch):
    import pylorus.deploy.model as loading

    monkeypatch.setattr(loading, "MAX_FLOPS", 10**6)
    refused(bundle_copy, r"for images of 32 × 32 pixels is refused: the network needs .* operations for an image")


def test_files_that_are_exchanged_after_their_check_are_not_used(bundle_copy, monkeypatch):
    import pylorus.deploy.model as loading

    expected = load_bundle(bundle_copy).run_network(np.zeros((1, 32, 32, 3), dtype=np.uint8))
    build = loading.build_network

    def exchange(*arguments, **named):
        for path in bundle_copy.iterdir():  # the moment between check and use
            path.unlink()
            path.write_bytes(b"another")
        return build(*arguments, **named)

    monkeypatch.setattr(loading, "build_network", exchange)
    bundle = loading.load_bundle(bundle_copy)
    found = bundle.run_network(np.zeros((1, 32, 32, 3), dtype=np.uint8))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.unlikeness, expected.unlikeness)
    assert b"# " in bundle.contents["MODEL_CARD.md"]


def test_weights_that_are_written_over_while_they_are_read_are_refused(bundle_copy, monkeypatch):
    import pylorus.deploy.model as loading

    build = loading.build_network

    def overwrite(*arguments, **named):
        with (bundle_copy / "model.safetensors").open("r+b") as file:
            file.seek(-100, 2)
            file.write(b"\0" * 100)
        return build(*arguments, **named)

    monkeypatch.setattr(loading, "build_network", overwrite)
    refused(bundle_copy, "model.safetensors: its SHA-256 is")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (_set("intended_use", to="a\nb"), r"intended_use: found the control character"),
        (_set("weights", "from", to="\u202egpj"), r"weights.from: found the control character"),
        (_set("weights", "licence", to="x" * 10_001), r"weights.licence: has 10,001 characters, expected 10,000 at most"),
        (_set("versions", to={"torch\ud800": "2"}), r"the name .*contains half a character \(a lone surrogate\)"),
        (_set("classes", to=["a", "b", "\ud800"]), r"classes\[2\]: contains half a character"),
        (_set("training", "seed", to=10**30), r"training.seed: found 1000000.*expected a number of at most 64 bits"),
        (_set("training", "stages", 0, "epochs", to=-1), r"epochs: found -1, expected at least 0"),
        (_set("arguments", to={"a": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}), r"the JSON is nested more than 16 levels deep"),
    ],
)  # fmt: skip
def test_texts_and_numbers_that_nothing_can_hold_are_refused_by_name(edit_model_json, act, words):
    refused(edit_model_json(act), words)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "MODEL_CARD.md", "SHA256SUMS"])
def test_a_folder_or_a_device_in_place_of_a_file_is_refused(bundle_copy, name):
    (bundle_copy / name).unlink()
    (bundle_copy / name).mkdir()
    refused(bundle_copy, f"{name}: found something that is not a regular file")


def test_another_account_can_read_a_bundle_if_the_umask_says_so(bundle_folder):
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in bundle_folder.iterdir()}
    assert modes == dict.fromkeys(modes, oct(0o666 & ~mask))


def test_the_intended_use_is_not_what_a_bundle_says(edit_model_json, synthetic_root, tmp_path):
    from pylorus.deploy.predict import PredictOptions, predict

    folder = edit_model_json(_set("intended_use", to="Approved for diagnosis."))
    assert predict(folder, [str(synthetic_root)], tmp_path / "p.csv", PredictOptions(device="cpu")) == 0
    about = (tmp_path / "p.csv.about.json").read_text()
    assert "Research use only. Not a medical device." in about
    assert "Approved" not in about
