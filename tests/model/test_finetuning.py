"""What a stage freezes stays unchanged, whatever the trainer; learning rates by layer and their schedules."""

import pytest
import pytorch_lightning as pl
import timm
import torch
from timm.models.vgg import VGG
from torch import nn

from pylorus.config.schema import OptimizerConfig, StageConfig
from pylorus.core.errors import PylorusError
from pylorus.model.finetuning import (
    FreezeBackbone,
    apply_depth,
    build_optimizer,
    build_schedule,
    compute_peak_lr,
    list_blocks,
    resolve_depth,
    resolve_learn,
)
from tests.conftest import TINY


class Plain(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def trained(network, learn, epochs=2):
    """Trains for a few steps at a depth; gives the state before and after."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    data = torch.utils.data.TensorDataset(torch.randn(12, 3, 32, 32), torch.arange(12) % 3)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[FreezeBackbone(learn)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Plain(network), torch.utils.data.DataLoader(data, batch_size=6))
    return before, network.state_dict()


def begin(network, learn):
    """Brings a network to where an epoch of training at this depth begins."""
    module, freeze = Plain(network), FreezeBackbone(learn)
    freeze.setup(None, module, "fit")
    freeze.on_train_epoch_start(None, module)


def small_vgg(**options):
    return VGG(cfg=[8, "M", 8, "M"], num_classes=3, **options)


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_training_the_head_changes_no_other_weight_and_no_running_statistic():
    before, after = trained(timm.create_model(TINY, num_classes=3), "head")
    assert changed(before, after) == {"fc.weight", "fc.bias"}


def test_training_from_a_block_changes_that_block_and_later_ones_only():
    before, after = trained(timm.create_model(TINY, num_classes=3), "layer3")
    moved = changed(before, after)
    assert {name.split(".")[0] for name in moved} == {"layer3", "layer4", "fc"}
    assert {"layer3.0.bn1.running_mean", "layer4.0.bn2.running_var", "layer3.0.conv1.weight"} <= moved


def test_training_all_changes_every_weight():
    before, after = trained(timm.create_model(TINY, num_classes=3), "all")
    assert changed(before, after) == set(before)


def test_a_later_stage_trains_layers_that_an_earlier_one_froze():
    network = timm.create_model(TINY, num_classes=3)
    trained(network, "head")
    before, after = trained(network, "all")
    assert changed(before, after) == set(before)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_a_frozen_backbone_gives_the_same_features_every_time(name):
    """Drop path in it is still, though the network around it trains."""
    network = timm.create_model(name, num_classes=3, drop_path_rate=0.5)
    begin(network, "head")
    size = network.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(network.forward_features(images), network.forward_features(images))


def test_dropout_right_before_the_classifier_belongs_to_the_head():
    network = small_vgg(drop_rate=0.5)
    begin(network, "head")
    assert network.head.drop.training
    assert not network.pre_logits.drop.training


def test_vggs_wide_layers_are_frozen_with_the_backbone_unless_named():
    network = small_vgg()
    assert {name.split(".")[0] for name in resolve_depth(network, "head").trainable} == {"head"}
    assert {name.split(".")[0] for name in resolve_depth(network, "pre_logits").trainable} == {"pre_logits", "head"}


def test_a_block_within_a_sequence_can_be_named():
    network = timm.create_model("test_efficientnet", num_classes=3)
    learning = apply_depth(network, "blocks.2").trainable
    assert learning[0].startswith("blocks.2.")
    assert not any(name.startswith(("blocks.0.", "blocks.1.", "conv_stem")) for name in learning)
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == set(learning)


@pytest.mark.parametrize(
    ("name", "learn"),
    [("vgg19.tv_in1k", "features.28"), ("resnet50.tv_in1k", "layer4"), ("inception_v3.tv_in1k", "Mixed_7a")],
)
def test_the_studys_models_have_the_blocks_that_users_name(name, learn):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=3)
    assert learn in list_blocks(network)
    assert resolve_depth(network, learn).trainable[0].startswith(learn)


def test_an_unknown_block_is_refused_with_a_list_of_blocks():
    network = timm.create_model(TINY, num_classes=3)
    with pytest.raises(PylorusError, match=r'has no block "layer5"\..*Did you mean "layer\d"') as caught:
        resolve_depth(network, "layer5")
    assert "Available: head, all, last:1, last:50%, conv1" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "last", "half"),
    [
        ("resnet50.tv_in1k", "layer4.2", "layer3.0"),
        ("vgg19.tv_in1k", "pre_logits", "features.19"),
        ("inception_v3.tv_in1k", "Mixed_7c", "Mixed_6a"),
        ("vit_small_patch16_224", "blocks.11", "blocks.5"),
        ("convnext_tiny", "stages.3", "stages.1"),
        ("mobilenetv2_100", "conv_head", "blocks.3"),
    ],
)
def test_the_last_blocks_of_any_network_are_found_by_number_and_share(name, last, half):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=3)
    assert resolve_depth(network, "last:1") == resolve_depth(network, last)
    assert resolve_learn(network, "last:50%") == half
    shares = [len(resolve_depth(network, learn).trainable) for learn in ("head", "last:1", "last:50%", "all")]
    assert shares == sorted(set(shares))  # each stage of stage=gradual trains more than the one before


@pytest.mark.parametrize("learn", ["last:0", "last:99", "last:0%", "last:101%", "last:", "last:two", "last:-1"])
def test_a_number_of_blocks_that_a_network_does_not_have_is_refused(learn):
    network = timm.create_model(TINY, num_classes=3)
    with pytest.raises(PylorusError, match=rf'learn: found "{learn}", expected last:1 to last:\d+, as ResNet has'):
        resolve_depth(network, learn)


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
