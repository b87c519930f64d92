"""Learning rates: each stage's own, by layer, over its steps."""

import pytest
import timm
import torch

from pylorus.config.schema import OptimizerConfig, StageConfig
from pylorus.core.errors import PylorusError
from pylorus.model.freeze import apply_depth
from pylorus.model.losses import build_optimizer, build_schedule, compute_peak_lr
from tests.conftest import TINY


@pytest.fixture
def network():
    return timm.create_model(TINY, num_classes=3)


def test_a_stage_uses_a_fraction_of_the_runs_learning_rate_or_its_own():
    assert compute_peak_lr(StageConfig(lr_factor=0.1), OptimizerConfig(lr=1e-2)) == pytest.approx(1e-3)
    assert compute_peak_lr(StageConfig(lr=5e-4, lr_factor=0.1), OptimizerConfig(lr=1e-2)) == 5e-4


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_the_optimizer_gets_only_trainable_parameters(network, name):
    learning = set(apply_depth(network, "layer4").trainable)
    optimizer = build_optimizer(network, StageConfig(), OptimizerConfig(name=name))
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert given == {id(p) for n, p in network.named_parameters() if n in learning}


def test_biases_and_norms_have_no_weight_decay(network):
    optimizer = build_optimizer(network, StageConfig(), OptimizerConfig(weight_decay=0.3))
    for group in optimizer.param_groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] == 0.3) for parameter in group["params"])


def test_layer_decay_lowers_the_learning_rate_of_early_layers(network):
    optimizer = build_optimizer(network, StageConfig(layer_decay=0.5), OptimizerConfig(lr=1e-2))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(network.named_parameters())
    rate = {name: rates[id(named[name])] for name in ("conv1.0.weight", "layer2.0.conv1.weight", "fc.weight")}
    assert rate["conv1.0.weight"] < rate["layer2.0.conv1.weight"] < rate["fc.weight"] == pytest.approx(1e-2)


def rates(network, stage, steps=20):
    optimizer = build_optimizer(network, stage, OptimizerConfig(name="sgd", lr=1.0))
    scheduler = build_schedule(optimizer, stage, steps=steps)["scheduler"]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_schedule_warms_up_and_decays_to_zero(network):
    found = rates(network, StageConfig(schedule="cosine", warmup=0.2))
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[-1] < 0.01


def test_constant_schedule_warms_up_and_stays(network):
    found = rates(network, StageConfig(schedule="constant", warmup=0.1))
    assert found[1:] == pytest.approx([1.0] * 19)


def test_plateau_schedule_divides_by_ten_without_improvement(network):
    stage = StageConfig(schedule="plateau", monitor="accuracy")
    optimizer = build_optimizer(network, stage, OptimizerConfig(lr=1.0))
    found = build_schedule(optimizer, stage, steps=20)
    assert found["interval"] == "epoch"
    for accuracy in (0.5, 0.6, 0.6, 0.6, 0.6, 0.6):
        found["scheduler"].step(accuracy)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_an_unknown_optimizer_is_refused_with_a_suggestion(network):
    with pytest.raises(PylorusError, match='timm has no "adamww".*Did you mean "adamw"'):
        build_optimizer(network, StageConfig(), OptimizerConfig(name="adamww"))
    assert torch.is_grad_enabled()
