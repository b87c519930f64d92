"""Trainable weights may be divided among processes: the model is the same, and any number of processes can resume."""

import os
import re
import signal
from pathlib import Path

import pytest
import timm
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from pylorus.config.checks import load_config, save_config
from pylorus.core.errors import PylorusError
from pylorus.launch.train import run
from pylorus.model.distributed import apply_sharding, find_called_modules
from pylorus.model.finetuning import apply_depth
from pylorus.runs.folder import RunFolder
from tests.launch.conftest import expect_alike, weights, when

FSDP = ("trainer.devices=2", "trainer.strategy=fsdp")


@pytest.fixture(scope="module")
def single_device_run(prepare_run) -> RunFolder:
    folder = prepare_run()
    run(folder)
    return folder


@pytest.fixture(scope="module")
def sharded_run(prepare_run) -> RunFolder:
    folder = prepare_run(*FSDP)
    run(folder)
    return folder


def test_sharded_training_on_two_processes_equals_one_process(single_device_run, sharded_run):
    expect_alike(sharded_run, single_device_run)


def test_each_process_holds_half_of_the_trainable_weights(sharded_run):
    log = (sharded_run.path / "run.log").read_text()
    here, learning = (
        int(number.replace(",", ""))
        for number in re.findall(
            r"finetune: the first device holds ([\d,]+) of the ([\d,]+) trainable parameters", log
        )[0]
    )
    assert 0.49 < here / learning < 0.51


def test_an_interrupted_sharded_run_resumes_to_the_same_weights(prepare_run, sharded_run):
    folder = prepare_run(*FSDP)
    when(folder.get_stage("finetune").last_checkpoint, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    run(folder)
    assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in weights(sharded_run).items())


@pytest.mark.parametrize(("begun", "gone_on"), [(FSDP, ()), ((), FSDP)], ids=["to one", "from one"])
def test_a_sharded_run_resumes_on_any_number_of_devices(prepare_run, single_device_run, begun, gone_on, monkeypatch):
    monkeypatch.setattr("pylorus.training.callbacks.MAX_SAVING_FRACTION", 1e9)  # each epoch of this short run is saved
    folder = prepare_run(*begun)
    when(folder.get_stage("finetune").last_checkpoint, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    devices = dict(word.removeprefix("trainer.").split("=") for word in gone_on)
    config = load_config(folder.config)
    config.trainer.devices, config.trainer.strategy = int(devices.get("devices", 1)), devices.get("strategy", "ddp")
    save_config(folder.config, config)
    run(folder)
    expect_alike(folder, single_device_run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.compile=true"], r"trainer.compile: found true"),
        (["trainer.batch_size=auto"], r"trainer.batch_size: found auto"),
        (["optimizer.name=lamb"], r"optimizer.name: found lamb, expected an optimiser of torch itself.*adamw"),
    ],
)
def test_options_incompatible_with_sharding_are_refused(compose_config, words, message):
    with pytest.raises(PylorusError, match=message):
        compose_config(*FSDP, *words)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "arguments", "block"),
    [
        ("resnet18", {}, "all"),
        ("resnet18", {}, "layer3.1"),
        ("test_vit2", {}, "all"),
        ("test_vit2", {}, "blocks.1"),
        ("inception_v3", {}, "Mixed_6b"),
        ("convnext_atto", {}, "stages.2.blocks.0"),
        ("efficientnet_b0", {}, "blocks.5"),
        ("densenet121", {}, "features.denseblock3"),
        ("vit_tiny_patch16_224", {"img_size": 96}, "blocks.6"),
        ("beit_base_patch16_224", {"img_size": 96, "embed_dim": 192, "num_heads": 3}, "blocks.9"),
        ("swin_tiny_patch4_window7_224", {"img_size": 96, "window_size": 3}, "layers.2"),
        ("eva02_tiny_patch14_224", {"img_size": 70}, "blocks.8"),
    ],
)
def test_any_network_gives_the_same_logits_and_gradients_when_sharded(mesh, name, arguments, block):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3, **arguments).eval()
    pixels = torch.randn(2, 3, arguments.get("img_size", 96), arguments.get("img_size", 96))
    apply_depth(network, block)
    logits = network(pixels)
    logits.square().sum().backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
    network.zero_grad()
    frozen = {parameter for parameter in network.parameters() if not parameter.requires_grad}
    blocks = apply_sharding(network, find_called_modules(network, lambda: network(pixels)), frozen, mesh)
    assert len(blocks) > 1
    divided = network(pixels)
    torch.testing.assert_close(divided, logits)
    divided.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert isinstance(parameter, DTensor) == (parameter not in frozen)
        if parameter not in frozen and gradients[name] is not None:
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-4, atol=1e-4)


def test_the_network_is_complete_after_sharding(sharded_run: RunFolder):
    assert not [name for name in weights(sharded_run) if "fsdp" in name.lower()]
    assert Path(sharded_run.path / "finetune" / "checkpoints" / "best.ckpt").is_file()
    saved = torch.load(sharded_run.path / "finetune" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(type(tensor) is torch.Tensor for tensor in saved.values())
