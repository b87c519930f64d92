"""The machine, and the weights, images and fonts of the user, are judged and named with the command that fixes them."""

import hashlib
import re
import shutil
import time
from collections import namedtuple
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from pylorus.config.schema import ModelConfig
from pylorus.core.errors import PylorusError
from pylorus.doctor import checks, weights
from pylorus.doctor.checks import check_fonts, check_images, list_class_names
from pylorus.doctor.packages import State
from pylorus.hardware import resolve_precision
from pylorus.model import hub
from pylorus.model.hub import HubFile, find_weights, list_hub_models
from pylorus.model.weights import compute_sha256
from pylorus.report import figure_style
from tests.conftest import TINY

GIB = 2**30


def test_the_doctor_shows_the_precision_that_a_run_chooses(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no run has measured it
    for gain, precision, words in ((3.0, "bf16", "bf16 (matrix products run 3.0 times"), (0.4, "32", "fp32 (matrix")):
        monkeypatch.setattr("pylorus.hardware.measure_bf16_speedup", lambda _, gain=gain: gain)
        assert resolve_precision("cpu")[0] == precision
        found = {check.name: check.found for check in checks.check_computing()}
        assert found["CPU precision"].startswith(words)


def test_using_one_of_many_cores_is_reported():
    assert checks.check_cores(1, 8).state is State.WARNING
    assert checks.check_cores(4, 8).state is State.GOOD


def test_a_machine_without_a_gpu_is_good():
    check = checks.check_no_gpu(None, [])
    assert (check.state, check.found) == (State.GOOD, "none; runs use the CPU")


def test_a_gpu_that_torch_cannot_use_is_a_warning_with_torchs_reason(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    check = checks.check_no_gpu("470.57", ["CUDA initialization: The NVIDIA driver on your system is too old"])
    assert check.state is State.WARNING
    assert "470.57" in check.found
    assert "driver on your system is too old" in check.found
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "supports only CPUs" in checks.check_no_gpu("580.1", []).found


def test_a_gpu_hidden_by_the_user_is_not_a_problem(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check = checks.check_no_gpu("580.1", [])
    assert check.state is State.GOOD
    assert "CUDA_VISIBLE_DEVICES" in check.found


def test_the_drivers_version_is_read_where_linux_states_it(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr(checks, "DRIVER", file)
    for line in ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build"):  # fmt: skip
        file.write_text(line)
        assert checks.read_driver_version() == "580.95.05"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as torch describes it, whose products are computed on the CPU, unless `computes` is made to fail."""
    state = {"free": 20 * GIB, "error": None}
    ones = torch.ones

    def made(*shape, device):
        assert device == "cuda:0"
        if state["error"]:
            raise RuntimeError(state["error"])
        return ones(*shape)

    properties = SimpleNamespace(name="Card 9000", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (state["free"], 24 * GIB))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch, "ones", made)
    return state


def test_a_working_gpu_is_reported_with_memory_and_precision(gpu):
    check = checks.check_gpu(0)
    assert check.state is State.GOOD
    assert check.name == "GPU"
    assert "Card 9000, compute capability 9.0" in check.found
    assert "20.0 GiB free of 24.0 GiB; bf16" in check.found


def test_a_gpu_whose_memory_is_in_use_is_a_warning(gpu):
    gpu["free"] = GIB
    check = checks.check_gpu(0)
    assert check.state is State.WARNING
    assert "nvidia-smi" in check.remedy


def test_a_gpu_unsupported_by_this_torch_build_is_an_error_with_the_reason(gpu):
    gpu["error"] = "CUDA error: no kernel image is available for execution on the device\nmore"
    check = checks.check_gpu(0)
    assert check.state is State.WRONG
    assert check.found.endswith("a test computation failed: RuntimeError: CUDA error: no kernel image is available for execution on the device")  # fmt: skip
    assert "trainer=cpu" in check.remedy


GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "state"), [(8.0, State.GOOD), (2.0, State.WARNING), (0.5, State.WRONG)])
def test_low_memory_is_reported(free, state):
    assert checks.check_memory(int(free * GIB), 16 * GIB).state is state


def test_the_memory_limit_of_a_container_counts_not_that_of_its_host(tmp_path, monkeypatch):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text(f"{2 * GIB}\n")
    used.write_text(f"{GIB // 2}\n")
    monkeypatch.setattr(checks, "MEMORY_FILES", ((limit, used),))
    memory = next(iter(checks.check_space()))
    assert memory.found.endswith("of 2.0 GiB; the study's models should have 4.0 GiB free")
    limit.write_text("max\n")
    assert "of 2.0 GiB" not in next(iter(checks.check_space())).found


def test_a_containers_64_mib_of_shared_memory_are_reported_with_two_remedies():
    check = checks.check_shared_memory(64 * 2**20)
    assert check.state is State.WARNING
    assert "64.0 MiB" in check.found
    assert "--shm-size" in check.remedy
    assert "data.workers=0" in check.remedy


@pytest.mark.parametrize(("free", "state"), [(50, State.GOOD), (5, State.WARNING), (0, State.WRONG)])
def test_a_full_disk_is_reported(tmp_path, monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, free * GIB))
    assert checks.check_disk("outputs", tmp_path / "not" / "yet").state is state


def test_the_write_check_leaves_no_files(tmp_path):
    check = checks.check_writable(tmp_path / "outputs")
    assert check.state is State.GOOD
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "outputs").write_text("")
    assert checks.check_writable(tmp_path / "outputs").state is State.WRONG


def test_an_unwritable_folder_is_an_error_with_the_systems_reason(tmp_path, monkeypatch):
    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks, "write_atomically", refused)
    check = checks.check_writable(tmp_path)
    assert check.state is State.WRONG
    assert check.found == f"can't write to {tmp_path}: Permission denied"


def test_a_different_clock_of_a_file_server_is_reported(tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(checks.time, "time", lambda: now + 60)
    check = checks.check_writable(tmp_path)
    assert check.state is State.WARNING
    assert "-60 s" in check.found


def test_a_clock_earlier_than_the_installation_is_reported():
    assert checks.check_clock(1.7e9, 1.6e9).state is State.GOOD
    assert checks.check_clock(1.6e9, 1.7e9).state is State.WARNING


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
    return weights.check_model("tiny", HUB, find_weights(HUB, folder), folder)


def test_the_doctor_searches_weights_of_the_three_study_models():
    models = list_hub_models()
    assert models["vgg19"].name == "vgg19.tv_in1k"
    assert {"resnet50", "inception_v3"} <= set(models)
    assert "small" not in models
    assert "timm" not in models


def test_missing_weights_are_named_with_file_repository_location_and_key(tmp_path):
    found = {check.name: check for check in weights.check_weights(tmp_path)}
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
    monkeypatch.setattr(hub, "list_hub_models", lambda: {key: ModelConfig(name) for key, name in names.items()})
    for name in names.values():
        save_file(timm.create_model(name).state_dict(), tmp_path / f"{name}.safetensors")
    *models, sweep = weights.check_weights(tmp_path)
    assert [check.state for check in models] == [State.GOOD, State.GOOD]
    assert f"'model.weights={tmp_path}/${{model.name}}.safetensors'" in sweep.found


def test_weights_are_listed_with_licence_and_place(folder, capsys):
    weights.print_weights([TINY, "vit_small_dinov3", "endovit", "gastronet_resnet50"], folder)
    printed = capsys.readouterr().out
    assert re.search(rf"{TINY} +{TINY} +hf://timm +160 px +apache-2.0 +in {folder}", printed)
    assert re.search(r"vit_small_dinov3 +vit_small_patch16_dinov3.lvd1689m .* 256 px +dinov3-license +no\n", printed)
    assert re.search(r"endovit +EndoViT +hf://egeozsoy/EndoViT +224 px +cc-by-nc-4.0 +no\n", printed)
    assert re.search(
        r"gastronet_resnet50 +RN50_GastroNet-5M_DINOv1 +https://\S+ +224 px +cc-by-nc-nd-4.0 +no\n", printed
    )
    assert "  dinov3-license allows passing on under the same licence only" in printed
    assert "cc-by-nc-nd-4.0 forbids commercial use and forbids passing on changed versions" in printed


def test_a_check_of_weights_verifies_those_here_and_says_how_to_fetch_the_others(folder, capsys):
    assert weights.print_weight_checks([TINY], folder)
    assert "all keys match" in capsys.readouterr().out
    assert not weights.print_weight_checks([TINY, "resnet50"], folder)
    printed = capsys.readouterr().out
    assert f"curl --fail --location --create-dirs --output {folder}/resnet50.tv_in1k.safetensors https://" in printed
    assert "/timm/resnet50.tv_in1k/resolve/main/model.safetensors" in printed
    (folder / f"{TINY}.safetensors").write_bytes(b"damaged")
    assert not weights.print_weight_checks([TINY], folder)
    with pytest.raises(PylorusError, match='has no "resnet5".*Did you mean'):
        weights.print_weight_checks(["resnet5"], folder)
    assert not weights.print_weight_checks(["gastronet_vit_small"], folder)
    assert f"download VITS_GastroNet-5M_DINOv1.pth, and save it as {folder}/VITS" in capsys.readouterr().out


@pytest.fixture
def stored_hub(monkeypatch, tmp_path):
    """A hub that answers, with one network in it; counts its downloads."""
    file, downloads = tmp_path / "hub.safetensors", []
    save_file(timm.create_model(TINY).state_dict(), file)

    def download(repository, name):
        downloads.append((repository, name))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return file, downloads


def test_weights_are_fetched_into_a_folder_once_and_verified(stored_hub, tmp_path, capsys):
    file, downloads = stored_hub
    target = tmp_path / "new" / "weights"
    assert weights.print_fetched_weights([TINY], target)
    printed = capsys.readouterr().out
    assert (target / f"{TINY}.safetensors").read_bytes() == file.read_bytes()
    assert [path.name for path in target.iterdir()] == [f"{TINY}.safetensors"]
    assert f"SHA-256 {compute_sha256(file)}, all keys match" in printed
    assert "licence: apache-2.0\n" in printed
    assert f"model=timm model.name={TINY} model.weights={target}/{TINY}.safetensors" in printed
    assert weights.print_fetched_weights([TINY], target)
    assert len(downloads) == 1


def test_without_a_network_fetch_prints_the_commands_for_another_machine(monkeypatch, tmp_path, capsys):
    asked = []

    def refuse(*_, **__):
        asked.append(1)
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    assert not weights.print_fetched_weights(["resnet50", "endovit", "gastronet_resnet50"], tmp_path / "w")
    printed = capsys.readouterr().out
    assert len(asked) == 1  # the second is not waited for
    assert f"--output {tmp_path}/w/resnet50.tv_in1k.safetensors https://" in printed
    assert re.search(
        rf"--output {tmp_path}/w/EndoViT.bin https://\S+/egeozsoy/EndoViT/resolve/main/pytorch_model.bin", printed
    )
    assert "in a browser, open https://cortex.thetavision.nl/" in printed
    assert "Name or service not known" in printed
    assert not (tmp_path / "w").exists()


def test_weights_are_not_fetched_into_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        PylorusError, match=r"file: found a file, expected a folder to write to\. Choose another --weights"
    ):
        weights.print_fetched_weights(["resnet50"], tmp_path / "file")


def test_a_fetched_file_of_another_network_is_reported(stored_hub, tmp_path, capsys):
    save_file(timm.create_model("test_vit").state_dict(), stored_hub[0])
    assert not weights.print_fetched_weights([TINY], tmp_path / "w")
    assert "does not match ResNet" in capsys.readouterr().out


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
    monkeypatch.setattr(figure_style, "find_cjk_font_file", lambda: None)
    assert next(check_fonts(["gastric cancer", "Zöliakie"])).state is State.GOOD
    needed = next(check_fonts(["胃癌"]))
    assert needed.state is State.WARNING
    assert "figures show 胃癌 as boxes" in needed.found
