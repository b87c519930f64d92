"""The user's weights and images are found, complete and compatible, or named with the command that fixes them."""

import hashlib
import re

import huggingface_hub
import pytest
import timm
from safetensors.torch import save_file

from pylorus.core.errors import PylorusError
from pylorus.doctor import user_files
from pylorus.doctor.packages import State
from pylorus.doctor.user_files import check_fonts, check_images, list_class_names
from pylorus.model.hub import HubFile
from tests.conftest import TINY

HUB = HubFile(TINY, f"timm/{TINY}", "model.safetensors")


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """The hub's cache: empty, unless `cache` is given a file."""
    kept = {}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, _: kept.get(repository))
    return kept


@pytest.fixture
def folder(tmp_path):
    """A folder with the weights that a user carried in."""
    save_file(timm.create_model(TINY).state_dict(), tmp_path / f"{TINY}.safetensors")
    return tmp_path


def looked_at(folder):
    return user_files.check_model("tiny", HUB, user_files.find_weights(HUB, folder), folder)


def test_the_doctor_searches_weights_of_the_three_study_models():
    models = user_files.list_hub_models()
    assert models["vgg19"] == "vgg19.tv_in1k"
    assert {"resnet50", "inception_v3"} <= set(models)
    assert "small" not in models
    assert "timm" not in models


def test_missing_weights_are_named_with_file_repository_location_and_key(tmp_path):
    found = {check.name: check for check in user_files.check_weights(tmp_path)}
    assert {check.state for check in found.values()} == {State.WARNING}
    assert set(found) == {"vgg19", "resnet50", "inception_v3"}  # other models are not missed
    remedy = found["resnet50"].remedy
    assert "download model.safetensors from the Hugging Face repository timm/resnet50.tv_in1k" in remedy
    assert "save it as resnet50.tv_in1k.safetensors" in remedy
    assert f"model.weights={tmp_path}/resnet50.tv_in1k.safetensors" in remedy
    assert "97.7 MiB" in found["resnet50"].found
    assert "548" in found["vgg19"].found


def test_a_local_weight_file_is_listed_with_its_hash_and_key(folder):
    check = looked_at(folder)
    file = folder / f"{TINY}.safetensors"
    assert check.state is State.GOOD
    assert hashlib.sha256(file.read_bytes()).hexdigest() in check.found
    assert check.found.endswith(f"all keys match; use it with model.weights={file}")


def test_a_truncated_weight_file_is_an_error(folder):
    file = folder / f"{TINY}.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    check = looked_at(folder)
    assert check.state is State.WRONG
    assert "can't be read as tensors" in check.found
    assert check.remedy.startswith(f"Remove {file}")


def test_weights_of_another_model_are_detected_by_their_keys(tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / f"{TINY}.safetensors")
    check = looked_at(tmp_path)
    assert check.state is State.WRONG
    assert "does not match" in check.found


def test_the_hubs_cache_takes_precedence_and_a_blob_with_a_wrong_hash_is_an_error(folder, tmp_path, cache):
    content = (folder / f"{TINY}.safetensors").read_bytes()
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(content)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    cache[HUB.repository] = str(link)
    good = looked_at(folder)
    assert good.state is State.GOOD
    assert "in the hub's cache" in good.found
    assert good.found.endswith("model.weights=hub")
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = looked_at(folder)
    assert damaged.state is State.WRONG
    assert f"the hub's cache expects {blob.name}: the file is damaged" in damaged.found


def test_local_files_of_all_models_are_listed_with_one_key_for_a_sweep(tmp_path, monkeypatch):
    names = {"one": TINY, "two": "test_efficientnet.r160_in1k"}
    monkeypatch.setattr(user_files, "list_hub_models", lambda: names)
    for name in names.values():
        save_file(timm.create_model(name).state_dict(), tmp_path / f"{name}.safetensors")
    *models, sweep = user_files.check_weights(tmp_path)
    assert [check.state for check in models] == [State.GOOD, State.GOOD]
    assert f"'model.weights={tmp_path}/${{model.name}}.safetensors'" in sweep.found


def test_weights_are_listed_with_licence_and_place(folder, capsys):
    user_files.print_weights([TINY, "vit_small_dinov3"], folder)
    printed = capsys.readouterr().out
    assert re.search(rf"{TINY} +{TINY} +160 px +apache-2.0 +in {folder}", printed)
    assert re.search(r"vit_small_dinov3 +vit_small_patch16_dinov3.lvd1689m +256 px +dinov3-license +no\n", printed)


def test_a_check_of_weights_verifies_those_here_and_says_how_to_fetch_the_others(folder, capsys):
    assert user_files.print_weight_checks([TINY], folder)
    assert "all keys match" in capsys.readouterr().out
    assert not user_files.print_weight_checks([TINY, "resnet50"], folder)
    printed = capsys.readouterr().out
    assert f"curl --fail --location --create-dirs --output {folder}/resnet50.tv_in1k.safetensors https://" in printed
    assert "/timm/resnet50.tv_in1k/resolve/main/model.safetensors" in printed
    (folder / f"{TINY}.safetensors").write_bytes(b"damaged")
    assert not user_files.print_weight_checks([TINY], folder)
    with pytest.raises(PylorusError, match='has no "resnet5".*Did you mean'):
        user_files.print_weight_checks(["resnet5"], folder)


def test_classes_are_counted_and_a_sample_is_read(synthetic_root):
    folder, reading = check_images(synthetic_root)
    assert folder.state is reading.state is State.GOOD
    assert folder.found.startswith("30 images in ")
    assert all(f"{name} 10" in folder.found for name in list_class_names(synthetic_root))
    assert reading.found.startswith("all 24 sampled images can be read")


def test_a_damaged_image_is_named(class_folders):
    root = class_folders({"a": 3, "b": 3})
    damaged = next((root / "a").iterdir())
    damaged.write_bytes(b"no image")
    _, reading = check_images(root)
    assert reading.state is State.WARNING
    assert f"1 of 6 sampled images can't be read, e.g. {damaged}" in reading.found


def test_a_folder_without_an_image_set_is_an_error_with_the_reason(tmp_path):
    (missing,) = check_images(tmp_path / "none")
    assert missing.state is State.WRONG
    (tmp_path / "train").mkdir()
    (halves,) = check_images(tmp_path)
    assert halves.state is State.WRONG
    assert "there is no folder test next to train" in halves.found
    assert list_class_names(tmp_path) == list_class_names(tmp_path / "none") == []


def test_shards_are_reported_with_the_arguments_to_train_on_them(tmp_path):
    (tmp_path / "shard-000.tar").write_bytes(b"")
    (check,) = check_images(tmp_path)
    assert check.state is State.GOOD
    assert "1 shard in " in check.found
    assert "data=shards" in check.remedy


def test_a_missing_font_matters_only_where_a_class_needs_it(monkeypatch):
    monkeypatch.setattr(user_files, "find_cjk_font_file", lambda: None)
    assert next(check_fonts(["gastric cancer", "Zöliakie"])).state is State.GOOD
    needed = next(check_fonts(["胃癌"]))
    assert needed.state is State.WARNING
    assert "figures show 胃癌 as boxes" in needed.found
