"""Metrics of an epoch do not depend on how its images were divided into batches."""

import math

import pytest
import torch
from torch.nn import functional

from pylorus.core.distributed import SINGLE_PROCESS
from pylorus.model.metrics import EpochMetrics

NAMES = ("A", "B", "C")


@pytest.fixture
def epoch():
    """Logits and labels of 11 images, and the weights of three classes."""
    chance = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(11, 3, generator=chance), torch.randint(3, (11,), generator=chance)
    return logits, labels, torch.tensor([0.5, 1.0, 4.0])


def add(tally: EpochMetrics, logits, labels, class_weights) -> None:
    loss = functional.cross_entropy(logits, labels, weight=class_weights)
    tally.add_batch(loss, class_weights[labels].sum(), logits, labels)


@pytest.mark.parametrize("sizes", [(11,), (4, 4, 3), (8, 2, 1), (1,) * 11])
def test_the_loss_of_an_epoch_is_that_of_its_images_whatever_the_batches(epoch, sizes):
    logits, labels, class_weights = epoch
    tally = EpochMetrics(3)
    for part in zip(logits.split(sizes), labels.split(sizes), strict=True):
        add(tally, *part, class_weights)
    found = tally.compute_and_reset("train", NAMES)
    expected = functional.cross_entropy(logits, labels, weight=class_weights)
    assert found["train/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["train/accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_metrics_are_reset_at_each_epoch(epoch):
    logits, labels, class_weights = epoch
    tally = EpochMetrics(3)
    add(tally, logits, labels, class_weights)
    tally.compute_and_reset("train", NAMES)
    add(tally, logits[:4], labels[:4], class_weights)
    expected = functional.cross_entropy(logits[:4], labels[:4], weight=class_weights)
    assert tally.compute_and_reset("train", NAMES)["train/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_metrics_of_an_interrupted_epoch_are_restored(epoch):
    logits, labels, class_weights = epoch
    before, after = EpochMetrics(3), EpochMetrics(3)
    add(before, logits[:8], labels[:8], class_weights)
    after.restore_sums(before.gather_sums(SINGLE_PROCESS))
    add(after, logits[8:], labels[8:], class_weights)
    expected = functional.cross_entropy(logits, labels, weight=class_weights)
    assert after.compute_and_reset("train", NAMES)["train/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_nan_loss_is_not_hidden_by_averaging(epoch):
    logits, labels, class_weights = epoch
    tally = EpochMetrics(3)
    add(tally, logits, labels, class_weights)
    tally.add_batch(torch.tensor(float("nan")), torch.tensor(1.0), logits[:1], labels[:1])
    assert math.isnan(tally.compute_and_reset("train", NAMES)["train/loss"])
