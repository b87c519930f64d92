"""A timm network with a new head: the sources of its weights, and what is refused."""

import pickle
import re
import socket
import time

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

import pylorus
from pylorus.config.schema import ModelConfig
from pylorus.core.errors import PylorusError
from pylorus.model import hub as hub_module
from pylorus.model.backbone import build_backbone, build_trial_network, find_fault
from pylorus.model.finetuning import can_train_on_one_image
from pylorus.model.hub import HubUnreachableError
from pylorus.model.weights import list_classifier_names
from tests.conftest import TINY


@pytest.fixture
def weights(tmp_path):
    """A weight file as a user has it: the whole network, with a head for other classes."""
    torch.manual_seed(4)
    network = timm.create_model(TINY, num_classes=7)
    file = tmp_path / "tiny.safetensors"
    save_file(network.state_dict(), file)
    return file, network.state_dict()


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine without a network, and nothing fetched before."""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)

    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)


def test_weights_of_a_file_fill_all_but_the_head(weights):
    file, given = weights
    found = build_backbone(ModelConfig(TINY, weights=str(file)), classes=3)
    state = found.network.state_dict()
    assert all(torch.equal(state[name], given[name]) for name in given if not name.startswith("fc."))
    assert state["fc.weight"].shape[0] == 3
    assert found.weights == "tiny.safetensors"
    assert re.fullmatch("[0-9a-f]{64}", found.weights_sha256)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_a_pickle_of_tensors_gives_the_same_weights(weights, tmp_path, wrap):
    file, given = weights
    torch.save(wrap({f"module.{name}": tensor for name, tensor in given.items()}), tmp_path / "tiny.pth")
    first, second = (
        build_backbone(ModelConfig(TINY, weights=str(path)), classes=3).network.state_dict()
        for path in (file, tmp_path / "tiny.pth")
    )
    assert all(torch.equal(first[name], second[name]) for name in first if not name.startswith("fc."))


class Harm:
    def __reduce__(self):
        return (pytest.fail, ("a pickle ran code",))


def test_a_pickle_that_holds_code_is_refused_and_runs_nothing(tmp_path):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"conv1.weight": Harm()}))
    with pytest.raises(PylorusError, match="can't be read as tensors"):
        build_backbone(ModelConfig(TINY, weights=str(tmp_path / "bad.pth")), classes=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), r"1 key missing in the file:\n  layer1.0.conv1.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 key unknown to the network:\n  extra"),
        (
            lambda state: state.update({"bn1.weight": torch.zeros(5)}),
            r"with a different shape:\n  bn1.weight: \(5,\) in the file",
        ),
    ],
    ids=["missing", "unknown", "reshaped"],
)
def test_every_key_of_a_weight_file_must_match(weights, tmp_path, change, message):
    _, given = weights
    change(given)
    save_file(given, tmp_path / "changed.safetensors")
    with pytest.raises(PylorusError, match=message):
        build_backbone(ModelConfig(TINY, weights=str(tmp_path / "changed.safetensors")), classes=3)


def test_a_weight_file_of_another_format_is_refused_by_name(tmp_path):
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(PylorusError, match=r"text\.safetensors can't be read as tensors"):
        build_backbone(ModelConfig(TINY, weights=str(tmp_path / "text.safetensors")), classes=3)


def test_the_licence_of_a_file_is_stated_only_if_it_has_the_name_of_the_weights(tmp_path):
    network = timm.create_model(TINY)
    for name, licence in ((TINY, "apache-2.0"), ("ours", None)):
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
        config = ModelConfig(TINY, weights=str(tmp_path / f"{name}.safetensors"))
        assert build_backbone(config, classes=3).licence == licence
    assert build_backbone(ModelConfig(TINY, weights="none"), classes=3).licence is None


def test_a_missing_weight_file_is_refused_by_name():
    with pytest.raises(
        PylorusError, match=r"model.weights: found /no/such.pth, expected hub, none, or an existing file"
    ):
        build_backbone(ModelConfig(TINY, weights="/no/such.pth"), classes=3)


def test_without_a_network_the_error_says_which_file_to_bring_and_how_to_name_it(no_hub):
    with pytest.raises(HubUnreachableError) as caught:
        build_backbone(ModelConfig("resnet50.tv_in1k"), classes=3)
    message = str(caught.value)
    assert "download model.safetensors from the Hugging Face repository timm/resnet50.tv_in1k" in message
    assert "save it as resnet50.tv_in1k.safetensors" in message
    assert "model.weights=PATH/resnet50.tv_in1k.safetensors" in message


def test_a_hanging_download_times_out(monkeypatch, no_hub):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: time.sleep(30))
    monkeypatch.setattr(hub_module, "HUB_TIMEOUT", 0.2)
    start = time.monotonic()
    with pytest.raises(HubUnreachableError, match="no answer within"):
        build_backbone(ModelConfig(TINY), classes=3)
    assert time.monotonic() - start < 10
    assert hub_module.HUB_TIMEOUT < 15


def test_synthetic_images_without_weights_train_from_random_weights_with_a_warning(no_hub, caplog):
    found = build_backbone(ModelConfig(TINY), classes=3, random_if_unreachable=True)
    assert found.weights == "none"
    assert found.weights_sha256 is None
    assert "RANDOM WEIGHTS" in caplog.text


def test_downloaded_weights_need_no_network(weights, monkeypatch):
    file, _ = weights
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(file))
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a network call"))
    assert build_backbone(ModelConfig(TINY), classes=3).weights == "hub"


@pytest.mark.parametrize(
    ("name", "size", "mean", "interpolation"),
    [
        ("vgg19.tv_in1k", 224, 0.485, "bilinear"),
        ("resnet50.tv_in1k", 224, 0.485, "bilinear"),
        ("inception_v3.tv_in1k", 299, 0.5, "bicubic"),
    ],
)
def test_the_studys_models_get_their_original_input_size(name, size, mean, interpolation):
    cfg = timm.models.get_pretrained_cfg(name)
    assert (cfg.input_size[-1], cfg.mean[0], cfg.interpolation) == (size, mean, interpolation)


def test_the_input_size_is_that_of_the_weights_unless_configured():
    found = build_backbone(ModelConfig(TINY, weights="none"), classes=3)
    assert found.image_size == 160
    assert build_backbone(ModelConfig(TINY, weights="none"), classes=3, image_size=96).image_size == 96


def test_a_transformer_is_built_for_the_size_that_is_asked_for():
    found = build_backbone(ModelConfig("test_vit", weights="none"), classes=3, image_size=64)
    assert found.network(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_additional_arguments_reach_timm():
    plain, same = (
        build_backbone(ModelConfig("test_efficientnet", weights="none", args=args), classes=3).network
        for args in ({}, {"pad_type": "same"})
    )
    assert type(plain.conv_stem) is not type(same.conv_stem)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig("resnet5000", weights="none"), 'timm .* has no "resnet5000".*Did you mean "resnet50'),
        (ModelConfig(TINY, weights="none", args={"no_such": 1}), "timm rejected them: .*no_such"),
    ],
)
def test_an_unknown_timm_model_is_refused_by_name(config, message):
    with pytest.raises(PylorusError, match=message):
        build_backbone(config, classes=3)


def test_the_head_starts_with_nearly_equal_probabilities_and_depends_on_the_seed():
    torch.manual_seed(1)
    first = build_backbone(ModelConfig(TINY, weights="none"), classes=3).network
    torch.manual_seed(1)
    again = build_backbone(ModelConfig(TINY, weights="none"), classes=3).network
    assert torch.equal(first.fc.weight, again.fc.weight)
    assert torch.equal(first.fc.bias, torch.zeros(3))
    assert 0.005 < float(first.fc.weight.detach().std()) < 0.02


def test_the_classifier_is_timms_last_layer():
    """For VGG that leaves the two 4096-wide layers in the backbone."""
    with torch.device("meta"):
        names = {name: list_classifier_names(timm.create_model(name)) for name in ("vgg19", "inception_v3", "test_vit")}
    assert names == {"vgg19": ("head.fc",), "inception_v3": ("fc",), "test_vit": ("head",)}


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (
            ModelConfig("efficientformer_l1", weights="none"),
            256,
            r"data\.image_size: found 256, expected 224: efficientformer_l1 is made for one size .*Leave .* out\.",
        ),
        (
            ModelConfig("halonet26t", weights="none"),
            224,
            r"data\.image_size: found 224, which halonet26t can't process .* it works with 256 and 512",
        ),
        (
            ModelConfig("vit_tiny_patch16_224", weights="none", args={"img_size": 96}),
            None,
            r"model\.args\.img_size: found 96, but the images have 224 × 224 pixels. Use data\.image_size=96",
        ),
        (
            ModelConfig(TINY, weights="none", args={"global_pool": ""}),
            64,
            r"model\.args\.global_pool: found '', with which test_resnet.* does not compute one logit per class",
        ),
        (
            ModelConfig("test_vit", weights="none", args={"class_token": False, "global_pool": ""}),
            None,
            r"model\.args: found \{'class_token': False, 'global_pool': ''\}, with which test_vit does not compute",
        ),
    ],
    ids=["one size", "some sizes", "img_size", "no pooling", "tokens"],
)
def test_a_network_that_can_not_process_the_images_is_refused_in_one_sentence(config, size, message):
    for build in (build_backbone, build_trial_network) if size == 64 else (build_trial_network,):
        with pytest.raises(PylorusError, match=message) as caught:
            build(config, classes=3, image_size=size)
        assert "\n" not in str(caught.value)


def test_in_python_the_message_names_the_argument():
    with pytest.raises(PylorusError, match=r"^model_args\.img_size: found 96, .* Use image_size=96 in place of"):
        pylorus.Classifier("vit_tiny_patch16_224", ["a", "b"], weights="none", model_args={"img_size": 96})


def test_the_trial_draws_no_random_numbers_and_changes_nothing():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_trial_network(ModelConfig(TINY, weights="none"), classes=3, image_size=64)
    network = timm.create_model(TINY)
    torch.set_rng_state(before)
    again = timm.create_model(TINY)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in network.state_dict().items())
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert find_fault(network, classes=1000, image_size=64) is None
    assert network.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


class OwnTensor(torch.nn.Module):
    """A network that can't be run without values: it holds a tensor that torch does not know of, and compares values."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.fc = torch.nn.Linear(3, 2)
        self.offset = torch.zeros(3)

    def forward(self, image):
        features = image.mean(dim=(2, 3)) + self.offset
        assert float(features.sum()) == 0
        return self.fc(features).reshape(self.shape)


def test_a_network_that_needs_values_is_tried_on_its_own_device():
    assert find_fault(OwnTensor((2, 2)), classes=2, image_size=32) is None
    assert find_fault(OwnTensor((4,)), classes=2, image_size=32) == "for 2 images it returns (4,) in place of (2, 2)"


@pytest.mark.parametrize(
    ("name", "learn", "size", "expected"),
    [
        ("resnet18", "all", 32, False),
        ("resnet18", "all", 64, True),
        ("resnet18", "head", 32, True),
        ("levit_128s", "head", 224, False),
        ("test_vit", "all", 160, True),
    ],
)
def test_batch_norm_needs_more_than_one_value_a_channel(name, learn, size, expected):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=3)
    assert can_train_on_one_image(network, learn, image_size=size) == expected


def test_mean_and_standard_deviation_can_be_those_of_other_images():
    found = build_backbone(ModelConfig(TINY, weights="none", mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1]), classes=3)
    assert (found.mean, found.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    classifier = pylorus.Classifier(TINY, ["a", "b"], weights="none", mean=(0.5, 0.4, 0.3))
    assert classifier.mean.flatten().tolist() == pytest.approx([127.5, 102, 76.5])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(TINY, mean=[123.7, 116.3, 103.5]), r"model\.mean: found \[123.7.*Divide values .* by 255\."),
        (ModelConfig(TINY, std=[0.2]), r"model\.std: found \[0.2\], expected three numbers from 0.001 to 1"),
        (ModelConfig(TINY, std=[0.2, 0.2, 0.0]), r"model\.std: found"),
    ],
)
def test_a_wrong_mean_or_standard_deviation_is_refused(config, message):
    with pytest.raises(PylorusError, match=message):
        build_backbone(config, classes=3)


def test_the_last_layer_of_a_head_of_several_starts_with_small_weights():
    network = build_backbone(ModelConfig("levit_128s", weights="none"), classes=3).network
    heads = [network.get_submodule(name) for name in list_classifier_names(network)]
    assert [0.005 < float(head.linear.weight.detach().std()) < 0.02 for head in heads] == [True, True]


def test_features_of_a_random_inception_do_not_explode():
    config = ModelConfig(name="inception_v3.tv_in1k", weights="none")
    network = build_backbone(config, classes=2, image_size=96).network.eval()
    with torch.no_grad():
        features = network.forward_head(network.forward_features(torch.rand(1, 3, 96, 96)), pre_logits=True)
    assert float(features.abs().max()) < 10
