import json

import pytest
import timm
import torch
from torch import nn

from pylorus.model.finetuning import NETWORK_BLOCK, extract_network_structure, list_blocks, resolve_depth

CASES = {
    "test_resnet": 64,
    "test_vit": 160,
    "test_efficientnet": 64,
    "test_convnext": 64,
    "test_mambaout": 64,
}
"""timm's own small networks, and a side that they take."""


def created(name):
    return timm.create_model(name, pretrained=False, num_classes=3)


def structure_of(network, size):
    learning = {
        "pretrain": resolve_depth(network, "head").trainable,
        "finetune": resolve_depth(network, "all").trainable,
    }
    return extract_network_structure(network, image_size=size, learning=learning)


@pytest.mark.parametrize(("name", "size"), CASES.items())
def test_every_parameter_of_any_timm_model_is_in_one_block(name, size):
    network = created(name)
    structure = structure_of(network, size)
    total = sum(parameter.numel() for parameter in network.parameters())
    assert sum(block["parameters"] for block in structure) == total
    assert sum(block["learning"]["finetune"] for block in structure) == total
    head = sum(dict(network.named_parameters())[each].numel() for each in resolve_depth(network, "head").trainable)
    assert sum(block["learning"]["pretrain"] for block in structure) == head > 0


@pytest.mark.parametrize(("name", "size"), CASES.items())
def test_blocks_have_the_names_that_learn_accepts_and_end_with_the_classes(name, size):
    network = created(name)
    structure = structure_of(network, size)
    assert {block["name"] for block in structure} - {NETWORK_BLOCK} <= set(list_blocks(network))
    assert structure[-1]["output"] == [3]


def test_layers_are_convolutions_and_linear_layers():
    network = created("test_resnet")
    structure = structure_of(network, 64)
    counted = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())
    assert sum(block["layers"] for block in structure) == counted


def test_parameters_of_the_network_itself_have_an_entry_of_their_own():
    structure = structure_of(created("test_vit"), 160)
    assert structure[0]["name"] == NETWORK_BLOCK
    assert structure[0]["type"] == "cls_token, pos_embed"
    assert structure[0]["output"] is None


def test_the_network_and_the_random_state_are_unchanged():
    network = created("test_resnet").train()
    network.layer1.eval()
    modes = [module.training for module in network.modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    chance = torch.get_rng_state()
    structure_of(network, 64)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert not any(module._forward_hooks for module in network.modules())


def test_hooks_and_modes_are_restored_if_the_network_fails():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 2)).train()
    with pytest.raises(RuntimeError):
        extract_network_structure(network, image_size=8, learning={})
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())


def test_the_result_is_plain_json():
    structure = structure_of(created("test_convnext"), 64)
    assert json.loads(json.dumps(structure, allow_nan=False)) == structure


def test_a_stage_with_an_unknown_trainable_parameter_is_refused():
    with pytest.raises(ValueError, match='learning of stage "s": the network has no parameter "nothing"'):
        extract_network_structure(created("test_resnet"), image_size=64, learning={"s": ["nothing"]})
