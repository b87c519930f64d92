"""Heads that are trained at once are the heads that would be trained one by one."""

import numpy as np
import pytest
import torch
from torch import nn

from pylorus.config.schema import LossConfig, OptimizerConfig, StageConfig
from pylorus.core.distributed import compute_seed
from pylorus.data.dataset import EpochBatchSampler, EpochSampler
from pylorus.model.finetuning import build_optimizer, build_schedule
from pylorus.model.objectives import build_loss
from pylorus.training import heads as heads_module
from pylorus.training.heads import HeadSettings, LabelledFeatures, draw_initial_weight, train_heads

CLASSES, LENGTH = 3, 20
SETTINGS = [
    HeadSettings(lr, decay, weights, loss)
    for lr in (1e-3, 3e-2)
    for decay in (0.0, 0.5)
    for weights, loss in (("none", "cross_entropy"), ("balanced", "cross_entropy"), ("none", "logit_adjusted"))
]
STAGE = StageConfig(learn="head", epochs=4, warmup=0.1)


def draw_features(images: int, seed: int) -> LabelledFeatures:
    """Draw features of unequal classes that a head can learn."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), images, replacement=True, generator=generator)
    label[:CLASSES] = torch.arange(CLASSES)
    centers = torch.randn(CLASSES, LENGTH, generator=torch.Generator().manual_seed(9))
    return LabelledFeatures(centers[label] + 2 * torch.randn(images, LENGTH, generator=generator), label)


TRAIN, VAL = draw_features(61, 0), draw_features(30, 1)


def train(settings, *, seeds=(0, 1), stage=STAGE, clip=1.0, val=VAL):
    options = {"stage": stage, "optimizer": OptimizerConfig(clip=clip), "batch_size": 8}
    return train_heads(TRAIN, val, settings, seeds=seeds, classes=CLASSES, **options)


class OneHead(nn.Module):
    """What timm's optimizer factory needs of a network."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.fc = nn.Linear(LENGTH, CLASSES)
        with torch.no_grad():
            self.fc.weight.copy_(draw_initial_weight(seed, CLASSES, LENGTH))
            self.fc.bias.zero_()


def train_alone(settings: HeadSettings, seed: int, *, clip: float | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Train one linear layer by the optimizer, schedule, loss, order and clipping of the stage `pretrain`."""
    network = OneHead(seed)
    counts = torch.bincount(TRAIN.label).tolist()
    loss = build_loss(
        LossConfig(name=settings.loss, class_weights=settings.class_weights), classes=CLASSES, images_of_class=counts
    )
    config = OptimizerConfig(lr=settings.lr, weight_decay=settings.weight_decay, clip=clip)
    optimizer = build_optimizer(network, STAGE, config)
    sampler = EpochBatchSampler(EpochSampler(len(TRAIN.label), seed=compute_seed(seed, "stage", "pretrain")), 8)
    schedule = build_schedule(optimizer, STAGE, steps=STAGE.epochs * len(sampler))["scheduler"]
    best = (float("inf"), torch.empty(0), torch.empty(0), 0)
    for epoch in range(STAGE.epochs):
        sampler.sampler.set_epoch(epoch)
        for draws in sampler:
            rows = torch.tensor([draw.row for draw in draws])
            label = TRAIN.label[rows]
            optimizer.zero_grad()
            (loss(network.fc(TRAIN.features[rows]), label).sum() / loss.compute_weights(label).sum()).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            value = loss(network.fc(VAL.features), VAL.label).sum() / loss.compute_weights(VAL.label).sum()
        if float(value) < best[0]:
            best = (float(value), network.fc.weight.detach().clone(), network.fc.bias.detach().clone(), epoch + 1)
    return best[1:]


@pytest.mark.parametrize("clip", [1.0, 0.05, None])
def test_each_of_many_heads_is_the_one_that_the_stage_would_train_alone(clip):
    together = train(SETTINGS, clip=clip)
    for row, seed in enumerate((0, 1)):
        for column, settings in enumerate(SETTINGS):
            weight, bias, epoch = train_alone(settings, seed, clip=clip)
            assert together.best_epoch[row, column] == epoch
            torch.testing.assert_close(together.weight[row, column], weight, rtol=1e-4, atol=2e-6)
            torch.testing.assert_close(together.bias[row, column], bias, rtol=1e-4, atol=2e-6)


def test_a_head_does_not_depend_on_its_company(monkeypatch):
    together, alone = train(SETTINGS), train(SETTINGS[3:4], seeds=(1,))
    torch.testing.assert_close(together.weight[1, 3], alone.weight[0, 0], rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(heads_module, "MAX_BYTES", 3 * 4 * 2 * CLASSES * LENGTH)  # three settings at a time
    monkeypatch.setattr(heads_module, "BLOCK_BYTES", 2000)
    in_parts = train(SETTINGS)
    torch.testing.assert_close(in_parts.weight, together.weight, rtol=1e-5, atol=1e-7)
    assert np.array_equal(in_parts.best_epoch, together.best_epoch)


def test_a_head_that_diverges_leaves_the_others_as_they_are():
    finite, mixed = train(SETTINGS[:2]), train([*SETTINGS[:2], HeadSettings(1e38, 0.0, "none")])
    torch.testing.assert_close(mixed.weight[:, :2], finite.weight, rtol=1e-5, atol=1e-7)
    assert (mixed.best_epoch[:, 2] == 0).all()


def test_a_head_stops_when_its_patience_ends_and_is_taken_at_its_best_epoch():
    stage = StageConfig(learn="head", epochs=40, warmup=0, patience=3, schedule="constant")
    stopped = train([HeadSettings(0.3, 0.0, "none"), HeadSettings(1e-4, 0.0, "none")], stage=stage)
    assert (stopped.epochs[:, 0] == stopped.best_epoch[:, 0] + 3).all()
    assert (stopped.epochs[:, 1] == 40).all()  # it still improves
    longer = train([HeadSettings(0.3, 0.0, "none")], stage=StageConfig(epochs=40, warmup=0, schedule="constant"))
    assert (longer.epochs == 40).all()


def test_the_logits_are_those_of_the_head_at_its_positions():
    trained = train(SETTINGS[:3])
    expected = VAL.features @ trained.weight[1, 2].T + trained.bias[1, 2]
    torch.testing.assert_close(trained.compute_logits(VAL.features, seed=1, setting=2), expected)


def test_a_class_without_training_images_is_refused():
    with pytest.raises(ValueError, match="expected at least one each"):
        train_heads(
            LabelledFeatures(TRAIN.features[:2], torch.tensor([0, 1])), VAL, SETTINGS, seeds=(0,), classes=CLASSES,
            stage=STAGE, optimizer=OptimizerConfig(), batch_size=8,
        )  # fmt: skip
