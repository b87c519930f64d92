"""Weight files in the layouts that people have: which part is loaded, and that nothing in them runs."""

import argparse
import collections
import logging
import pathlib
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from pylorus import Classifier
from pylorus.config.schema import ModelConfig
from pylorus.core.errors import PylorusError
from pylorus.model.backbone import build_backbone
from pylorus.model.hub import list_hub_models
from pylorus.model.weights import match_tensors
from tests.conftest import TINY

HEADS = ("fc.", "head.")


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(4)
    return {name: timm.create_model(name, num_classes=7) for name in (TINY, "test_vit")}


def backbone_of(state, prefix, *, noise=False):
    """The backbone's tensors below a prefix; with `noise` others of the same shapes."""
    return {
        prefix + name: torch.rand(tensor.shape) if noise and tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if not name.startswith(HEADS)
    }


class Options(dict):
    """A dictionary of a program that is not installed."""


def dino(state):
    student = backbone_of(state, "module.backbone.", noise=True)
    teacher = {**backbone_of(state, "backbone."), "head.mlp.0.weight": torch.zeros(8, 8)}
    options = argparse.Namespace(lr=0.1, folder=pathlib.Path("data"), best=np.float64(3))
    return {"student": student, "teacher": teacher, "epoch": 3, "args": options, "loss": {"center": torch.zeros(1, 3)}}


def moco(state):
    return {
        "state_dict": {
            **backbone_of(state, "module.encoder_k.", noise=True),
            **backbone_of(state, "module.encoder_q."),
            "module.encoder_q.fc.0.weight": torch.zeros(4, 4),
            "module.queue": torch.zeros(4, 9),
        }
    }


def lightning(state, prefix):
    return {
        "state_dict": {**{prefix + name: tensor for name, tensor in state.items()}, "criterion.weight": torch.ones(5)},
        "hyper_parameters": Options(lr=1, inner=Options(a=2)),
        "callbacks": {"checkpoint": {"best": np.float32(1), "history": collections.deque([1])}},
        "loops": collections.defaultdict(list, a=[1]),
    }


def fastai(state):
    children = [name for name, _ in timm.create_model(TINY).named_children()]
    body = {name: name.split(".") for name in state if not name.startswith(HEADS)}
    return {
        "model": {f"0.{children.index(first)}.{'.'.join(rest)}": state[name] for name, (first, *rest) in body.items()}
        | {"1.8.weight": torch.zeros(3, 3)},
        "opt": {"state": [{"mom": torch.zeros(3)}]},
    }


LAYOUTS = {
    "DINO": ("test_vit", dino),
    "DINO's backbone alone": ("test_vit", lambda state: backbone_of(state, "backbone.")),
    "DINOv2": (
        "test_vit",
        lambda state: {
            "model": {
                **backbone_of(state, "student.backbone.", noise=True),
                "student.backbone.mask_token": torch.zeros(1, 8),
                **backbone_of(state, "teacher.backbone."),
                "teacher.dino_head.weight": torch.zeros(2, 2),
            }
        },
    ),
    "DINOv2 in a module": ("test_vit", lambda state: {"state_dict": backbone_of(state, "module.backbone.")}),
    "MoCo": (TINY, moco),
    "Lightning's model": (TINY, lambda state: lightning(state, "model.")),
    "Lightning's network": (TINY, lambda state: lightning(state, "network.")),
    "a compiled network": (TINY, lambda state: lightning(state, "model._orig_mod.")),
    "fastai": (TINY, fastai),
    "fastai with timm": (TINY, lambda state: backbone_of(state, "0.model.") | {"1.2.weight": torch.zeros(3)}),
    "DataParallel": (TINY, lambda state: {f"module.{name}": tensor for name, tensor in state.items()}),
    "model_state": (TINY, lambda state: {"model_state": state, "optimizer": {0: {"exp_avg": torch.zeros(2)}}}),
    "a moving average": (
        TINY,
        lambda state: {"state_dict": backbone_of(state, "", noise=True), "state_dict_ema": state, "amp": None},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_backbone_is_found_in_the_files_of_other_programs(networks, tmp_path, layout, zipped):
    name, wrap = LAYOUTS[layout]
    state = networks[name].state_dict()
    torch.save(wrap(state), tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    loaded = build_backbone(ModelConfig(name, weights=str(tmp_path / "file.pth")), classes=3).network.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state if not key.startswith(HEADS))


def test_a_pickled_network_gives_its_tensors_without_being_built(networks, tmp_path):
    state = networks[TINY].state_dict()
    torch.save(networks[TINY], tmp_path / "whole.pth")
    loaded = build_backbone(ModelConfig(TINY, weights=str(tmp_path / "whole.pth")), classes=3).network.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state if not key.startswith(HEADS))


def test_the_log_says_which_part_of_a_file_was_loaded(networks, tmp_path, caplog):
    torch.save(dino(networks["test_vit"].state_dict()), tmp_path / "dino.pth")
    with caplog.at_level(logging.INFO):
        build_backbone(ModelConfig("test_vit", weights=str(tmp_path / "dino.pth")), classes=3)
    assert "dino.pth: loaded teacher.backbone.*; left out" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part.pop("model.conv1.0.weight"), r"1 key missing in the file:\n  conv1\.0\.weight"),
        (lambda part: part.update({"model.adapter.weight": torch.zeros(1)}), r"1 key unknown .*:\n  adapter\.weight"),
    ],
    ids=["missing", "unknown"],
)
def test_every_key_of_the_part_has_to_match(networks, tmp_path, change, message):
    part = {f"model.{name}": tensor for name, tensor in networks[TINY].state_dict().items()}
    change(part)
    torch.save({"state_dict": part}, tmp_path / "part.pth")
    with pytest.raises(
        PylorusError, match=rf"its tensors state_dict\.model\.\*\) does not match ResNet[\s\S]*{message}"
    ):
        build_backbone(ModelConfig(TINY, weights=str(tmp_path / "part.pth")), classes=3)


def test_weights_of_another_network_are_refused_by_the_names_that_differ(networks, tmp_path):
    state = {f"module.{name}": tensor for name, tensor in networks["test_vit"].state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "vit.pth")
    with pytest.raises(PylorusError, match=r"unknown to the network:\n  cls_token"):
        build_backbone(ModelConfig(TINY, weights=str(tmp_path / "vit.pth")), classes=3)


class Harm:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [print, eval, getattr, __import__], ids=["print", "eval", "getattr", "import"])
def test_a_call_in_a_checkpoint_is_not_made(networks, tmp_path, function):
    state = networks[TINY].state_dict()
    torch.save({"state_dict": state, "extra": Harm(function, "os")}, tmp_path / "harm.pth")
    loaded = build_backbone(ModelConfig(TINY, weights=str(tmp_path / "harm.pth")), classes=3).network.state_dict()
    assert torch.equal(loaded["bn1.weight"], state["bn1.weight"])


def test_a_checkpoint_that_names_the_operating_system_is_refused(networks, tmp_path):
    import os

    content = {"state_dict": networks[TINY].state_dict(), "extra": Harm(os.system, "echo harm")}
    torch.save(content, tmp_path / "harm.pth")
    with pytest.raises(PylorusError, match="can't be read as tensors"):
        build_backbone(ModelConfig(TINY, weights=str(tmp_path / "harm.pth")), classes=3)


def nest(state, *, times):
    """A dictionary that holds another one twice, which holds another one twice, and so on."""
    for _ in range(times):
        state = {"a": state, "b": state}
    return state


def hold_itself(state):
    circle = dict(state)
    circle["circle"] = circle
    return circle


def change(state, convert):
    return {name: convert(tensor) if name == "conv1.0.weight" else tensor for name, tensor in state.items()}


HOSTILE_FILES = {
    "dictionaries that would hold billions": (lambda state: nest(state, times=40), "dictionaries are nested|200,000"),
    "a dictionary within itself": (hold_itself, "64 d"),
    "a name of 10,000 characters": (lambda state: {**state, "a." * 5000: torch.zeros(1)}, "at most 500 characters"),
    "NaN": (lambda state: change(state, lambda tensor: tensor * float("nan")), "NaN or infinite values in:\n  conv1"),
    "true and false": (lambda state: change(state, torch.Tensor.bool), "bool in the file, float32 in the network"),
    "complex numbers": (lambda state: change(state, lambda tensor: tensor * 1j), "complex64 in the file"),
    "a tensor without values": (lambda state: change(state, lambda tensor: tensor.to("meta")), "without values"),
    "a sparse tensor": (lambda state: change(state, torch.Tensor.to_sparse), "sparse_coo float32 in the file"),
    "a name that clears the terminal": (lambda state: {**state, "\x1b[2J": torch.zeros(1)}, r"\\x1b\[2J"),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_a_hostile_file_is_refused_in_words(networks, tmp_path, kind):
    build, words = HOSTILE_FILES[kind]
    torch.save(build(networks[TINY].state_dict()), tmp_path / "hostile.pth")
    with pytest.raises(PylorusError, match=words) as refusal:
        build_backbone(ModelConfig(TINY, weights=str(tmp_path / "hostile.pth")), classes=3)
    assert "hostile.pth" in str(refusal.value)


def test_a_compressed_file_is_not_inflated(networks, tmp_path):
    torch.save(networks[TINY].state_dict(), tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for part in plain.infolist():
            kind = zipfile.ZIP_DEFLATED if part.filename.endswith("data.pkl") else zipfile.ZIP_STORED
            bomb.writestr(part.filename, plain.read(part), kind)
    with pytest.raises(PylorusError, match="data.pkl is compressed"):
        build_backbone(ModelConfig(TINY, weights=str(tmp_path / "bomb.pth")), classes=3)
    with pytest.raises(PylorusError, match="data.pkl is compressed"):
        Classifier.load_from_checkpoint(tmp_path / "bomb.pth")


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 1, "args": argparse.Namespace(a=1)}, tmp_path / "empty.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(PylorusError, match="holds no dictionary of tensors"):
        build_backbone(ModelConfig(TINY, weights=str(tmp_path / "empty.pth")), classes=3)
    with pytest.raises(PylorusError, match="can't be read as tensors"):
        build_backbone(ModelConfig(TINY, weights=str(tmp_path / "plain.pth")), classes=3)


def test_only_volos_own_training_uses_its_second_head():
    """A file with a head of 1,000 classes fits: both of its heads are left out."""
    from pylorus.model.weights import match_tensors

    with torch.device("meta"):
        network = timm.create_model("volo_d1_224", num_classes=3)
    state = {
        name: tensor for name, tensor in network.state_dict().items() if not name.startswith(("head.", "aux_head."))
    }
    assert "aux_head.weight" in network.state_dict()
    with pytest.MonkeyPatch.context() as patch:
        file = {**state, "head.weight": torch.zeros(1000, 384), "aux_head.weight": torch.zeros(1000, 384)}
        patch.setattr("pylorus.model.weights._read_tensors", lambda _: file)
        assert set(match_tensors(network, pathlib.Path("volo.pth"))) == set(state)


ENDOSCOPY = {
    # As users of the files load them: the tensors themselves, by torchvision's names, without a head.
    "gastronet_resnet50": lambda backbone: backbone,
    # A whole checkpoint of DINO, whose teacher is loaded.
    "gastronet_vit_small": lambda backbone: {
        "teacher": {
            **{f"backbone.{name}": tensor for name, tensor in backbone.items()},
            "head.last_layer.weight_g": torch.zeros(4, 1),
        },
        "student": {f"module.backbone.{name}": torch.rand(tensor.shape) for name, tensor in backbone.items()},
        "epoch": 100,
    },
    # A masked autoencoder, with its decoder.
    "endovit": lambda backbone: {
        "model": {**backbone, "mask_token": torch.zeros(1, 1, 512), "decoder_embed.weight": torch.zeros(512, 768)},
        "epoch": 14,
    },
}


@pytest.mark.parametrize("model", ENDOSCOPY)
def test_weights_of_endoscopy_load_in_the_layout_that_is_documented(tmp_path, model):
    config = list_hub_models()[model]
    torch.manual_seed(1)
    state = backbone_of(timm.create_model(config.name, num_classes=0).state_dict(), "")
    file = tmp_path / "file.pth"
    torch.save(ENDOSCOPY[model](state), file)
    built = build_backbone(replace(config, weights=str(file)), classes=3)
    loaded = built.network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert built.image_size == 224
    assert built.licence == config.licence
    assert list(built.mean) == config.mean


def test_weights_of_endoscopy_in_another_layout_are_refused_with_the_keys_that_differ(tmp_path):
    config = list_hub_models()["gastronet_resnet50"]
    with torch.device("meta"):
        network = timm.create_model(config.name, num_classes=3)
    state = {name: torch.empty(tensor.shape) for name, tensor in network.state_dict().items() if name != "conv1.weight"}
    torch.save({**state, "adapter.weight": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(PylorusError, match=r"1 key missing in the file:\n  conv1.weight\n1 key unknown .*:\n  adapter"):
        match_tensors(network, tmp_path / "file.pth")
