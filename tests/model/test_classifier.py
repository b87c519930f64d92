"""A step of one stage: input, loss, metrics, randomness."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from pylorus.config.schema import LossConfig, ModelConfig, OptimizerConfig, StageConfig
from pylorus.data.dataset import Batch
from pylorus.model.backbone import build_backbone
from pylorus.model.classifier import EpochMetrics, StageClassifier, StagePlan
from tests.conftest import TINY

NAMES = ("GC", "GU", "CG")


def classifier(*, loss=None, **options):
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(TINY, weights="none"), classes=3)
    plan = StagePlan("pretrain", StageConfig(), first_epoch=0, seed=5)
    return StageClassifier(backbone, NAMES, plan, OptimizerConfig(), loss or LossConfig(), **options)


def batch(labels=(0, 1, 2, 2)):
    pixels = torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8)
    return Batch(pixels, torch.tensor(labels), torch.arange(len(labels)))


def test_pixels_are_normalised_as_the_weights_were_trained():
    model = classifier().eval()
    seen = []
    model.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.full((1, 3, 32, 32), 51, dtype=torch.uint8)
    model(pixels)
    expected = (0.2 - torch.tensor(model.network.pretrained_cfg["mean"])) / torch.tensor(
        model.network.pretrained_cfg["std"]
    )
    assert torch.allclose(seen[0][0, :, 0, 0], expected, atol=1e-5)


def test_single_channel_batches_are_refused():
    with pytest.raises(ValueError, match="found 1-channel images, expected RGB"):
        classifier()(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


def test_channels_last_changes_memory_layout_but_not_outputs():
    pixels = batch().image
    first, second = (classifier(channels_last=last).eval()(pixels) for last in (True, False))
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_cross_entropy_with_weights_and_smoothing(smoothing):
    model = classifier(
        loss=LossConfig(class_weights="balanced", label_smoothing=smoothing), images_of_class=[10, 20, 70]
    ).eval()
    drawn = batch()
    weights = 100 / (3 * torch.tensor([10.0, 20.0, 70.0]))
    expected = functional.cross_entropy(model(drawn.image), drawn.label, weight=weights, label_smoothing=smoothing)
    assert torch.isclose(model._compute_batch_loss(drawn, "val_part"), expected, rtol=1e-5)


def test_balanced_weights_give_each_class_the_same_weight():
    weights = classifier(loss=LossConfig(class_weights="balanced"), images_of_class=[10, 20, 70]).loss.class_weights
    assert torch.allclose(weights * torch.tensor([10.0, 20.0, 70.0]), torch.full((3,), 100 / 3))


def test_dropout_depends_only_on_seed_and_step():
    model = classifier()
    drawn = []
    for noise in (0, 17):
        torch.rand(noise)
        model.on_train_batch_start(batch(), 3)
        drawn.append(torch.rand(4))
    model.on_train_batch_start(batch(), 4)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], torch.rand(4))


def test_an_epochs_metrics_are_those_of_all_its_images():
    tally = EpochMetrics(3)
    truth, decisions = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0])
    for part in (slice(0, 3), slice(3, 5)):
        tally.add_batch(
            torch.tensor(2.0),
            torch.tensor(float(len(truth[part]))),
            functional.one_hot(decisions[part], 3) * 1.0,
            truth[part],
        )
    found = tally.compute_and_reset("pretrain/val", NAMES)
    assert found["pretrain/val/accuracy"] == pytest.approx(3 / 5)
    assert found["pretrain/val/sensitivity/GC"] == pytest.approx(1 / 2)
    assert found["pretrain/val/precision/GU"] == pytest.approx(2 / 3)
    assert found["pretrain/val/f1/GU"] == pytest.approx(4 / 5)
    assert found["pretrain/val/loss"] == pytest.approx(2.0)


def test_an_undefined_metric_is_nan_and_so_is_its_average():
    tally = EpochMetrics(3)
    truth = torch.tensor([0, 1, 2])
    tally.add_batch(torch.tensor(1.0), torch.tensor(3.0), functional.one_hot(torch.tensor([0, 0, 0]), 3) * 1.0, truth)
    found = tally.compute_and_reset("val", NAMES)
    assert np.isnan(found["val/precision/GU"])
    assert np.isnan(found["val/precision/average"])
    assert found["val/sensitivity/GU"] == 0


def test_metrics_are_reset_after_they_are_computed():
    tally = EpochMetrics(3)
    for _ in range(2):
        tally.add_batch(torch.tensor(1.0), torch.tensor(1.0), torch.eye(3)[:1], torch.tensor([0]))
        assert tally.compute_and_reset("val", NAMES)["val/accuracy"] == 1
        assert int(tally.confusion.confmat.sum()) == 0
