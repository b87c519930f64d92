"""Averaged weights follow their formula, are what validation and checkpoints have, and leave the training as it is."""

import copy
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import pylorus
from pylorus.data.dataset import Batch
from tests.conftest import TINY

IMAGES, BATCH, EPOCHS = 10, 4, 3
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
FROZEN = "network.layer1.0.bn1.running_mean"


def build_loader(*, seed: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(IMAGES) % 3

    def collate(rows: list[int]) -> Batch:
        return Batch(images[rows], labels[rows], torch.tensor(rows))

    return DataLoader(range(IMAGES), batch_size=BATCH, collate_fn=collate)


def build_classifier() -> pylorus.Classifier:
    return pylorus.Classifier(TINY, ["GC", "GU", "CG"], weights="none", lr=1e-2, model_args={"drop_rate": 0.2})


class Record(pl.Callback):
    """The weights after each step, and those that validation sees."""

    def __init__(self):
        self.steps, self.epoch_ends, self.validated = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *batch):
        if trainer.global_step > len(self.steps):
            self.steps.append(copy.deepcopy(pl_module.state_dict()))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epoch_ends.append(copy.deepcopy(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *batch):
        self.validated.append(copy.deepcopy(pl_module.state_dict()))


def fit(averaging: pl.Callback | None, *, learn: str = "layer3", epochs: int = EPOCHS, folder=None, **options):
    """Train; return the classifier, the Trainer and what was recorded."""
    classifier, record = build_classifier(), Record()
    callbacks = [pylorus.FreezeBackbone(learn), record, *([averaging] if averaging else [])]
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=False, **QUIET, **options)
    checkpoint = None if folder is None else folder / "last.ckpt"
    trainer.fit(classifier, build_loader(), build_loader(seed=1), ckpt_path=checkpoint)
    return classifier, trainer, record


def is_average(name: str) -> bool:
    """Whether a tensor of the state is trained from layer3 on; integers are not averaged."""
    return name.startswith(("network.layer3", "network.layer4", "network.fc")) and "num_batches" not in name


def list_differences(one, other, **tolerance) -> list[str]:
    return [name for name, tensor in one.items() if not torch.allclose(tensor, other[name], **tolerance)]


@pytest.mark.parametrize(("every", "start_epoch", "accumulate"), [(None, 0, 1), (2, 1, 1), (None, 0, 2)])
def test_an_ema_follows_its_formula_over_the_steps_of_the_optimizer(every, start_epoch, accumulate):
    averaging = pylorus.AverageWeights("ema", decay=0.3, every=every, start_epoch=start_epoch)
    classifier, _, record = fit(averaging, accumulate_grad_batches=accumulate)
    steps_of_epoch = -(-3 // accumulate)  # of three batches
    assert len(record.steps) == EPOCHS * steps_of_epoch
    used = [
        step
        for number, step in enumerate(record.steps)
        if (number + 1) % (every or 1) == 0 and number // steps_of_epoch >= start_epoch
    ]
    assert averaging.updates == len(used) > 1
    expected = {name: tensor.double() for name, tensor in used[0].items()}
    for updates, step in enumerate(used[1:], 1):
        decay = min(0.3, (1 + updates) / (10 + updates))
        expected = {name: decay * expected[name] + (1 - decay) * step[name].double() for name in expected}
    last = record.steps[-1]
    state = classifier.state_dict()
    for name, tensor in state.items():
        assert torch.allclose(tensor.double(), expected[name] if is_average(name) else last[name].double(), atol=1e-6)
    assert any(not torch.equal(tensor, last[name]) for name, tensor in state.items())


def estimate_statistics(classifier: pylorus.Classifier) -> dict[str, torch.Tensor]:
    """Return running statistics of the trained layers, the means over the batches of training images."""
    norms = {
        name: module
        for name, module in classifier.named_modules()
        if isinstance(module, nn.BatchNorm2d) and is_average(name)
    }
    classifier.eval()
    for norm in norms.values():
        norm.momentum, norm.training = 1.0, True  # the statistics of the last batch
    batches: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for batch in build_loader():
            classifier(batch.image)
            batches.append(
                {
                    f"{name}.{kind}": getattr(norms[name], kind).clone()
                    for name in norms
                    for kind in ("running_mean", "running_var")
                }
            )
    return {name: torch.stack([each[name] for each in batches]).mean(dim=0) for name in batches[0]}


def test_a_mean_has_the_weights_of_torchs_and_statistics_of_its_own():
    averaging = pylorus.AverageWeights("mean", start_epoch=1)
    classifier, _, record = fit(averaging, epochs=4)
    reference = AveragedModel(record.epoch_ends[1])
    for module in record.epoch_ends[1:]:
        reference.update_parameters(module)
    statistics = estimate_statistics(reference.module)
    assert (averaging.updates, averaging.estimated_norms) == (3, len(statistics) // 2)
    expected = record.epoch_ends[-1].state_dict() | dict(reference.module.named_parameters()) | statistics
    state = classifier.state_dict()
    assert list_differences(state, expected, atol=1e-6) == []
    assert list_differences(statistics, record.epoch_ends[-1].state_dict(), rtol=1e-2)  # those of the last weights
    assert torch.equal(state[FROZEN], build_classifier().state_dict()[FROZEN])


@pytest.mark.parametrize("method", ["ema", "mean"])
def test_validation_sees_the_average_and_the_training_goes_on_without(method):
    averaging = pylorus.AverageWeights(method)
    classifier, _, record = fit(averaging)
    _, _, plain = fit(None)
    for step, other in zip(record.steps, plain.steps, strict=True):
        assert list_differences(step, other, rtol=0, atol=0) == []
    assert list_differences(record.validated[-1], classifier.state_dict(), rtol=0, atol=0) == []
    assert "network.fc.weight" in list_differences(record.validated[-1], plain.validated[-1])
    # The first validation checks the code before there is anything to average.
    assert list_differences(record.validated[0], plain.validated[0], rtol=0, atol=0) == []


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_holds_the_average_as_its_weights_and_the_last_ones_beside_them(tmp_path, weights_only):
    classifier, trainer, record = fit(pylorus.AverageWeights())
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list_differences(checkpoint["state_dict"], classifier.state_dict(), rtol=0, atol=0) == []
    last = checkpoint["averaging"]["last"]
    assert {name for name in classifier.state_dict() if is_average(name)} == set(last)  # no copy of what is frozen
    assert list_differences(last, record.steps[-1], rtol=0, atol=0) == []
    loaded = pylorus.Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    image = next(iter(build_loader(seed=1))).image
    assert torch.equal(loaded(image), classifier.eval()(image))
    [tested] = trainer.test(build_classifier(), build_loader(seed=1), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert tested["test/loss"] == pytest.approx(float(trainer.callback_metrics["test/loss"]))


def test_an_averaged_training_is_not_resumed_without_its_average(tmp_path):
    _, trainer, _ = fit(pylorus.AverageWeights(), epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(
        pylorus.PylorusError, match=r"^ckpt_path: .* Add its callback .*pylorus.AverageWeights\('ema'\)"
    ):
        fit(None, folder=tmp_path)
    with pytest.raises(pylorus.PylorusError, match="method: found mean, but the checkpoint has ema"):
        fit(pylorus.AverageWeights("mean"), folder=tmp_path)


def test_a_frozen_layer_takes_no_memory_and_a_head_has_no_batch_norm():
    averaging = pylorus.AverageWeights("mean", every=100)  # an epoch has an average even if it has fewer steps
    classifier, _, _ = fit(averaging, learn="head", epochs=1)
    checkpoint = {"state_dict": classifier.state_dict()}
    averaging.save_average(checkpoint)
    assert set(checkpoint["averaging"]["last"]) == {"network.fc.weight", "network.fc.bias"}
    assert (averaging.updates, averaging.estimated_norms) == (1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "swa"}, "AverageWeights: method: found 'swa', expected 'ema' or 'mean'"),
        ({"decay": 1.0}, "AverageWeights: decay: found 1.0"),
        ({"every": 0}, "AverageWeights: every: found 0"),
        ({"start_epoch": -1}, "AverageWeights: start_epoch: found -1"),
    ],
)
def test_an_argument_that_is_not_allowed_is_named(options, message):
    with pytest.raises(pylorus.PylorusError, match=message):
        pylorus.AverageWeights(**options)


def test_what_cannot_be_averaged_is_refused():
    class Other(pl.LightningModule):
        pass

    with pytest.raises(pylorus.PylorusError, match="found Other, expected a pylorus.Classifier"):
        pylorus.AverageWeights().setup(pl.Trainer(**QUIET), Other(), "fit")
    with pytest.raises(
        pylorus.PylorusError, match="start_epoch: found 2, expected less than the Trainer's max_epochs, 2"
    ):
        pylorus.AverageWeights("mean", start_epoch=2).setup(
            pl.Trainer(max_epochs=2, **QUIET), build_classifier(), "fit"
        )
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(pylorus.PylorusError, match=r"found FSDPStrategy, expected a single device or strategy='ddp'"):
        pylorus.AverageWeights().setup(trainer, build_classifier(), "fit")
