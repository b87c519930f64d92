"""Losses give one value per image, registered and from outside; epoch metrics sum over batches and processes."""

import math

import pytest
import torch
from torch.nn import functional

from pylorus.config.keys import list_loss_details
from pylorus.config.schema import LossConfig
from pylorus.core.distributed import SINGLE_PROCESS
from pylorus.core.errors import PylorusError
from pylorus.model.objectives import LOSSES, EpochMetrics, build_loss

LOGITS = torch.tensor([[2.0, -1.0, 0.3], [0.1, 0.2, 0.3], [-3.0, 4.0, 0.0]])
LABELS = torch.tensor([0, 2, 0])


def average_cross_entropy(logits, labels):
    return functional.cross_entropy(logits, labels)


def double(logits, labels):
    return 2 * logits


class Weighted(torch.nn.Module):
    def __init__(self, class_weights):
        super().__init__()
        self.weights = class_weights

    def forward(self, logits, labels):
        return functional.cross_entropy(logits, labels, weight=self.weights, reduction="none")


def own(target: str, **options) -> LossConfig:
    return LossConfig(_target_=f"{__name__}.{target}", **options)


def test_focal_loss_follows_its_formula():
    losses = build_loss(LossConfig(name="focal", args={"gamma": 1.5}), classes=3)(LOGITS, LABELS)
    true = LOGITS.softmax(1).gather(1, LABELS[:, None])[:, 0]
    assert torch.allclose(losses, -((1 - true) ** 1.5) * true.log(), atol=1e-6)


def test_focal_loss_with_gamma_0_is_cross_entropy_and_has_a_finite_gradient():
    focal = build_loss(LossConfig(name="focal", args={"gamma": 0}, class_weights="balanced"), classes=3,
                       images_of_class=[1, 2, 3])  # fmt: skip
    plain = build_loss(LossConfig(class_weights="balanced"), classes=3, images_of_class=[1, 2, 3])
    assert torch.allclose(focal(LOGITS, LABELS), plain(LOGITS, LABELS))
    sure = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True)
    build_loss(LossConfig(name="focal", args={"gamma": 0.5}), classes=3)(sure, torch.tensor([0])).sum().backward()
    assert torch.isfinite(sure.grad).all()


def test_logit_adjusted_loss_is_balanced_softmax_with_tau_1_and_cross_entropy_with_tau_0():
    counts = torch.tensor([5.0, 30.0, 65.0])
    balanced_softmax = counts * LOGITS.exp() / (counts * LOGITS.exp()).sum(1, keepdim=True)
    expected = -balanced_softmax.gather(1, LABELS[:, None])[:, 0].log()
    built = [
        build_loss(LossConfig(name="logit_adjusted", args=args), classes=3, images_of_class=[5, 30, 65])
        for args in ({}, {"tau": 1}, {"tau": 0}, {"tau": 0.5})
    ]
    values = [loss(LOGITS, LABELS) for loss in built]
    assert torch.allclose(values[0], expected, atol=1e-6)
    assert torch.equal(values[0], values[1])
    assert torch.allclose(values[2], functional.cross_entropy(LOGITS, LABELS, reduction="none"), atol=1e-6)
    half = functional.cross_entropy(LOGITS + 0.5 * counts.log(), LABELS, reduction="none")
    assert torch.allclose(values[3], half, atol=1e-6)
    assert built[0].compute_weights(LABELS).tolist() == [1, 1, 1]


def test_logit_adjusted_loss_of_equally_frequent_classes_is_cross_entropy():
    plain = functional.cross_entropy(LOGITS, LABELS, reduction="none")
    for counts in ([7, 7, 7], None):  # None: not known yet
        loss = build_loss(LossConfig(name="logit_adjusted"), classes=3, images_of_class=counts)
        assert torch.allclose(loss(LOGITS, LABELS), plain, atol=1e-6)


def test_the_logits_of_a_logit_adjusted_loss_do_not_contain_the_frequencies():
    """Of images without information the best logits are equal, where cross-entropy learns the frequencies."""
    labels = torch.tensor([0] * 2 + [1] * 6 + [2] * 12)
    learnt = {}
    for name in ("cross_entropy", "logit_adjusted"):
        loss = build_loss(LossConfig(name=name), classes=3, images_of_class=[2, 6, 12])
        logits = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=100)

        def step(loss=loss, logits=logits, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(logits.expand(20, 3), labels).mean()
            value.backward()
            return value

        optimizer.step(step)
        learnt[name] = logits.detach().softmax(0)
    assert torch.allclose(learnt["logit_adjusted"], torch.full((3,), 1 / 3), atol=1e-3)
    assert torch.allclose(learnt["cross_entropy"], torch.tensor([0.1, 0.3, 0.6]), atol=1e-3)


def test_a_custom_mean_loss_is_weighted_by_images():
    loss = build_loss(own("average_cross_entropy"), classes=3)
    total = loss(LOGITS, LABELS).sum() / loss.compute_weights(LABELS).sum()
    assert torch.allclose(total, functional.cross_entropy(LOGITS, LABELS))


def test_a_custom_loss_class_receives_class_weights():
    loss = build_loss(own("Weighted", class_weights="balanced"), classes=3, images_of_class=[1, 2, 3])
    plain = build_loss(LossConfig(class_weights="balanced"), classes=3, images_of_class=[1, 2, 3])
    assert torch.allclose(loss(LOGITS, LABELS), plain(LOGITS, LABELS))
    with pytest.raises(PylorusError, match=r"loss.class_weights: found balanced, but .*average_cross_entropy"):
        build_loss(own("average_cross_entropy", class_weights="balanced"), classes=3, images_of_class=[1, 2, 3])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig(name="focl"), 'no loss "focl".*Did you mean "focal"'),
        (LossConfig(name="focal", args={"gamma": -1}), "loss.args.gamma: found -1, expected 0 or more"),
        (LossConfig(name="focal", args={"gama": 1}), 'loss.args.gama: focal loss has no such.*Did you mean "gamma"'),
        (LossConfig(name="logit_adjusted", args={"tau": -1}), "loss.args.tau: found -1, expected 0 or more"),
        (LossConfig(name="logit_adjusted", args={"tau": math.inf}), "loss.args.tau: found inf, expected 0 or more"),
        (LossConfig(name="focal", args={"gamma": "two"}), "loss.args.gamma: found two, expected 0 or more"),
        (
            LossConfig(args={"tau": 1}),
            "loss.args.tau: cross-entropy has no such.* Add loss=logit_adjusted, or leave it",
        ),
        (LossConfig(name="logit_adjusted", args={"beta": 1}), "loss.args.beta: logit-adjusted loss has no such"),
        (own("double"), "gave .*expected a tensor of shape"),
    ],
)
def test_an_invalid_loss_is_refused_with_the_reason(config, message):
    with pytest.raises((PylorusError, TypeError), match=message):
        build_loss(config, classes=3)(LOGITS, LABELS)


def test_every_loss_has_a_label_and_a_file():
    assert {name: kind.label for name, kind in LOSSES.items()} == {
        "cross_entropy": "cross-entropy",
        "focal": "focal loss",
        "logit_adjusted": "logit-adjusted loss",
    }
    assert list_loss_details({"_target_": "a.B", "args": {"k": 1}}) == ["the loss a.B", "k 1"]


def test_class_weights_and_logit_adjustment_together_are_refused():
    config = LossConfig(name="logit_adjusted", class_weights="balanced")
    with pytest.raises(
        PylorusError, match=r"class_weights: found balanced, but the logit-adjusted.*class_weights=none"
    ):
        build_loss(config, classes=3, images_of_class=[1, 2, 3])


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
