"""A split network equals the whole network in evaluation and in training, for any frozen prefix."""

import pytest
import timm
import torch
from torch import nn

from pylorus.model.finetuning import apply_depth, resolve_depth, set_modes
from pylorus.model.frozen_prefix import CannotCutError, cut_network
from tests.conftest import TINY

SIZES = {
    "test_resnet": 64,
    "test_efficientnet": 64,
    "inception_v3": 107,
    "vgg11_bn": 64,
    "densenet121": 64,
    "mobilenetv2_100": 64,
    "ghostnet_100": 64,
}
"""Sides of the input, where a network allows a small one."""
SLIM = {"vgg11_bn": {"mlp_ratio": 0.05}}
"""Less of what makes a network heavy and nothing else."""


def network_of(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **SLIM.get(name, {}))


def pixels_for(network, images=3):
    size = SIZES.get(network.default_cfg["architecture"], network.default_cfg["input_size"][-1])
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


DEPTHS = [
    (TINY, "head", [(96,)]),
    (TINY, "layer4", None),
    (TINY, "layer4.0.conv2", None),
    ("test_vit", "blocks.3", None),
    ("test_vit", "head", [(64,)]),
    ("test_efficientnet", "blocks.2", None),
    ("vgg11_bn", "head", [(4096,)]),
    ("vgg11_bn", "pre_logits", [(512, 2, 2)]),
    ("vgg11_bn", "features.22", None),
    ("inception_v3", "Mixed_7a", [(768, 5, 5)]),
    ("mobilenetv2_100", "conv_head", None),
    ("densenet121", "features.denseblock4", None),
    ("ghostnet_100", "head", [(1280,)]),
    ("xcit_nano_12_p16_224", "blocks.7", None),
    ("deit_tiny_distilled_patch16_224", "head", [(192,), (192,)]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "learn", "shapes"), DEPTHS)
def test_prefix_and_suffix_together_equal_the_network_in_both_modes(name, learn, shapes):
    network = network_of(name)
    pixels = pixels_for(network)
    frozen = resolve_depth(network, learn)
    found = cut_network(network, frozen, pixels)
    features = found.run_prefix(pixels)
    assert shapes is None or [tuple(tensor.shape[1:]) for tensor in features] == shapes

    network.eval()
    assert torch.allclose(found.run_suffix(found.run_prefix(pixels)), network(pixels), atol=1e-5)

    apply_depth(network, learn)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    gradients, moved, logits = [], [], []
    for step in (network, lambda images: found.run_suffix([one.detach() for one in found.run_prefix(images)])):
        network.load_state_dict(before)
        network.zero_grad()
        set_modes(network, frozen.eval_modules)
        torch.manual_seed(2)  # of dropout
        out = step(pixels)
        out.square().sum().backward()
        logits.append(out.detach())
        gradients.append({key: value.grad.clone() for key, value in network.named_parameters() if value.requires_grad})
        moved.append({key: value.clone() for key, value in network.state_dict().items()})
    assert torch.allclose(*logits, atol=1e-5, rtol=1e-4)
    assert gradients[0].keys() == gradients[1].keys() == set(frozen.trainable)
    for key, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][key], atol=1e-4, rtol=1e-3), key
    for key, value in moved[0].items():
        assert torch.allclose(value.float(), moved[1][key].float(), atol=1e-5), key


def test_dropout_before_the_head_is_active_only_in_training():
    network = network_of("ghostnet_100")  # its dropout is a call in the network's own code, no module
    assert network.drop_rate > 0
    pixels = pixels_for(network)
    found = cut_network(network, resolve_depth(network, "head"), pixels)
    features = found.run_prefix(pixels)
    network.train()
    assert not torch.equal(found.run_suffix(features), found.run_suffix(features))
    network.eval()
    assert torch.equal(found.run_suffix(features), found.run_suffix(features))


def test_features_are_the_inputs_of_the_first_trainable_layer():
    network = network_of(TINY)
    found = cut_network(network, resolve_depth(network, "head"), pixels_for(network))
    assert [node.op for node in found.evaluation_suffix.nodes] == ["placeholder", "call_module", "output"]


def test_splitting_leaves_module_modes_unchanged():
    network = network_of(TINY)
    network.train()
    network.layer1.eval()
    cut_network(network, resolve_depth(network, "layer4"), pixels_for(network))
    assert network.training
    assert not network.layer1[0].conv1.training
    assert network.layer2[0].conv1.training


@pytest.mark.parametrize("learn", ["all", "conv1"])
def test_a_fully_trainable_network_is_not_split(learn):
    network = network_of(TINY)
    with pytest.raises(CannotCutError, match="the whole network is trained"):
        cut_network(network, resolve_depth(network, learn), pixels_for(network))


def test_a_network_with_frozen_layers_parallel_to_trainable_ones_is_not_split():
    network = network_of("test_vit")  # its class token and positions come first in its list, but not in its way
    with pytest.raises(CannotCutError, match="trained from its first layer on"):
        cut_network(network, resolve_depth(network, "patch_embed"), pixels_for(network))


def test_a_network_with_data_dependent_control_flow_is_refused_with_the_reason():
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def get_classifier(self):
            return self.fc

        def forward(self, image):
            kept = self.stem(image)
            return self.fc((kept if kept.sum() > 0 else -kept).mean((2, 3)))

    network = Deciding()
    with pytest.raises(CannotCutError, match="can't be traced: symbolically traced variables cannot be used"):
        cut_network(network, resolve_depth(network, "head"), torch.randn(2, 3, 8, 8))


def test_a_network_whose_parts_give_other_logits_is_refused():
    class Counting(nn.Module):
        """Its second call is not its first: no pure function of the image, though all of it is frozen but the head."""

        def __init__(self):
            super().__init__()
            self.stem, self.fc = Drifting(), nn.Linear(4, 3)

        def get_classifier(self):
            return self.fc

        def forward(self, image):
            return self.fc(self.stem(image))

    class Drifting(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 1)
            self.calls = 0

        def forward(self, image):
            self.calls += 1
            return self.calls * super().forward(image).mean((2, 3))

    network = Counting()
    with pytest.raises(CannotCutError, match="different logits"):
        cut_network(network, resolve_depth(network, "head"), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("change", ["weight", "statistics", "depth", "hyperparameter"])
def test_the_digest_changes_with_everything_that_affects_features(change):
    def digest(changed):
        network = network_of(TINY)
        learn = "head"
        if changed == "weight":
            network.layer2[0].conv1.weight.data[0, 0, 0, 0] += 1e-6
        elif changed == "statistics":
            network.bn1.running_mean += 1e-6
        elif changed == "depth":
            learn = "layer4"
        elif changed == "hyperparameter":
            network.layer1[0].bn1.eps = 1e-3
        return cut_network(network, resolve_depth(network, learn), pixels_for(network)).compute_digest()

    assert digest(None) == digest(None)
    assert digest(change) != digest(None)


def test_the_digest_does_not_depend_on_the_head():
    network = network_of(TINY)
    found = cut_network(network, resolve_depth(network, "head"), pixels_for(network))
    before = found.compute_digest()
    network.fc.weight.data += 1
    assert found.compute_digest() == before
