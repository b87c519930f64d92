"""`import pylorus` is lazy, typed, usable with an ordinary Trainer, resumable, and safe to load."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

import pylorus
from pylorus.cli import main
from pylorus.evaluation import confusion_matrix
from pylorus.launch.main import resume
from pylorus.model.backbone import build_backbone
from pylorus.runs.folder import RunFolder
from tests.conftest import TINY

PROJECT = Path(__file__).parents[1]
QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "num_sanity_val_steps": 0,
}


def build_data(folder, **options):
    return pylorus.ImageDataModule(
        folder, **{"image_size": 32, "group": r"patient_\d+", "batch_size": 8, "val_fraction": 0.2} | options
    )


def build_classifier(**options):
    return pylorus.Classifier(TINY, ["GC", "GU", "CG"], weights="none", **{"lr": 1e-2} | options)


def run_python(*arguments, cwd, **options):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, **options
    )


def test_importing_pylorus_loads_nothing_heavy(tmp_path):
    code = (
        "import sys, pylorus; pylorus.load_model, pylorus.audit; "
        "print(sorted({'torch', 'numpy', 'pandas', 'hydra', 'pytorch_lightning', 'matplotlib'} & set(sys.modules)))"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert result.stdout.strip() == "[]", result.stderr


def test_every_public_name_can_be_imported_and_is_typed():
    assert all(getattr(pylorus, name) is not None for name in pylorus.__all__)
    assert (Path(pylorus.__file__).parent / "py.typed").is_file()
    assert {"Classifier", "ImageDataModule", "FreezeBackbone", "train", "load_model", "audit", "report"} <= set(
        pylorus.__all__
    )


def test_python_m_pylorus_is_the_command_line(tmp_path):
    result = run_python("-m", "pylorus", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "predict" in result.stdout


def test_folders_become_grouped_splits_in_the_order_of_the_classes(synthetic_root):
    data = build_data(synthetic_root)
    groups = {split: set(data.parts[split]["group"]) for split in ("train", "val", "test")}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))
    folders = [Path(path).parts[0] for path in data.parts["test"]["path"]]
    assert [data.classes[label] for label in data.get_labels("test")] == folders


@pytest.mark.parametrize("name", [TINY, "resnet50.tv_in1k", "inception_v3.tv_in1k", "vit_small_patch16_224"])
def test_images_get_the_size_and_interpolation_of_the_model(synthetic_root, name):
    from pylorus.config.schema import ModelConfig

    with torch.device("meta") if name != TINY else torch.device("cpu"):
        backbone = build_backbone(ModelConfig(name=name, weights="none"), classes=3)
    form = build_data(synthetic_root, image_size=None, model=name).form
    assert (form.size, form.interpolation) == (backbone.image_size, backbone.interpolation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": None}, "image_size: found neither"),
        ({"model": "resnet5O", "image_size": None}, 'model: timm .* has no "resnet5O".*Did you mean "resnet'),
        ({"augment": "lihgt"}, 'augment: found "lihgt".*Did you mean "light"'),
        ({"fit": "squeeze"}, "ImageDataModule: fit: found 'squeeze', expected 'pad', 'stretch' or 'crop'"),
        ({"val_fraction": 2.0}, "^val_fraction: found 2.0"),
        ({"image_size": "32"}, "image_size: found '32', expected a whole number"),
        ({"batch_size": 0}, "batch_size: found 0, expected a whole number of at least 1"),
        ({"workers": -1}, "workers: found -1"),
        ({"seed": 1.5}, "seed: found 1.5"),
        ({"augment": None}, "augment: found None"),
        ({"group": "("}, "^group: "),
    ],
)
def test_a_data_module_refuses_invalid_arguments(synthetic_root, options, message):
    with pytest.raises(pylorus.PylorusError, match=message):
        build_data(synthetic_root, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosinus"}, "schedule: found"),
        ({"lr": -1.0}, "lr: found -1.0"),
        ({"class_weights": [1.0]}, "class_weights: found 1 weights for 3 classes"),
        ({"loss": torch.nn.CrossEntropyLoss(), "label_smoothing": 0.1}, "your own loss applies them itself"),
    ],
)
def test_a_classifier_refuses_invalid_arguments(options, message):
    with pytest.raises(pylorus.PylorusError, match=message):
        build_classifier(**options)


@pytest.mark.parametrize("folder", ["", "missing", "~/missing"])
def test_a_data_module_names_a_missing_folder_first(folder):
    with pytest.raises(pylorus.PylorusError, match=r"^folder: found (an empty path|missing|/.*missing)[ ,.]"):
        pylorus.ImageDataModule(folder)


def test_a_data_module_names_its_splits(synthetic_root):
    with pytest.raises(pylorus.PylorusError, match="split: found 'tests'.*Did you mean \"test\""):
        build_data(synthetic_root).get_labels("tests")


def test_a_misspelt_public_name_is_suggested():
    with pytest.raises(AttributeError, match='Did you mean "ImageDataModule"'):
        pylorus.ImageDataModul  # noqa: B018
    assert "__version__" in dir(pylorus)
    assert all(name in pylorus.__doc__ for name in pylorus.__all__)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data=folders", "overrides: found 'data=folders', expected a list"),
        (["--help"], 'found "--help", an option of the command line'),
        (["folders"], 'found "folders", expected KEY=VALUE.*Did you mean data=folders'),
        (["seed=1,2"], "seed: found several values"),
        (["data.image_size=abc"], '^data.image_size: found "abc", expected a whole number of at least 32.$'),
        (["trainer.compile=abc"], '^trainer.compile: found "abc", expected true or false.$'),
        (["data=folders", "data.root=~/missing"], "/missing"),
    ],
)
def test_train_explains_an_invalid_override_in_one_sentence(overrides, message, tmp_path):
    with pytest.raises(pylorus.PylorusError, match=message):
        pylorus.train(overrides, folder=tmp_path / "run")


def mean_loss(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "Classifier: model: found 3, expected text, or a Backbone."),
        ({"model": "resnet50.tv_in2k"}, 'has no weights "resnet50.tv_in2k". Did you mean "resnet50.tv_in1k"?'),
        ({"model_args": 3}, "model_args: found 3, expected a dictionary, or None."),
        ({"classes": 3}, "classes: found 3, expected a list of text."),
        ({"classes": "ABC"}, "classes: found 'ABC', expected a list of text."),
        ({"classes": ["A", "A"]}, 'classes: found "A" twice'),
        ({"classes": ["", "B"]}, "classes: found an empty name"),
        ({"weights": "nope.pth"}, "weights: found nope.pth, expected hub, none, or an existing file."),
        ({"image_size": 0}, "image_size: found 0, expected a whole number of at least 32, or None."),
        ({"image_size": "32"}, "image_size: found '32', expected a whole number"),
        ({"seed": -1}, "seed: found -1, expected a whole number of at least 0."),
        ({"seed": "x"}, "seed: found 'x', expected a whole number"),
        ({"seed": 1.5}, "seed: found 1.5, expected a whole number"),
        ({"loss": None}, "loss: found None, expected text, or a function."),
        ({"loss": "focall"}, "loss: found 'focall', expected one of cross_entropy, focal, logit_adjusted, or your own"),
        ({"loss": "logit_adjusted", "class_weights": [1, 2, 3]}, "Type class_weights=None, or another loss."),
        ({"loss": torch.nn.CrossEntropyLoss}, "found the class CrossEntropyLoss, expected an object. Write"),
        ({"loss": lambda logits: logits.mean()}, "has the arguments (logits), expected two: logits"),
        ({"loss": mean_loss, "class_weights": [1, 2, 3]}, "your own loss applies them itself"),
        ({"class_weights": [1, -2, 3]}, "class_weights: found [1, -2, 3], expected"),
        ({"class_weights": [0, 0, 0]}, "a list of numbers above 0"),
        ({"class_weights": [1, 2, float("nan")]}, "class_weights: found [1, 2, nan], expected"),
        ({"class_weights": "balance"}, 'Did you mean "balanced"?'),
        ({"class_weights": {"A": 1}}, "class_weights: found 'A', which is not among the classes GC, GU, CG."),
        ({"class_weights": {"GC": 1, "GU": 2}}, "class_weights: found none for CG"),
        ({"label_smoothing": -1.0}, "label_smoothing: found -1.0, expected 0 to 0.5."),
        ({"label_smoothing": "a"}, "label_smoothing: found 'a', expected a number."),
        ({"optimizer": "adamm"}, 'optimizer: timm has no "adamm". Did you mean "adam"?'),
        ({"schedule": "cosin"}, "expected 'cosine', 'plateau' or 'constant'. Did you mean \"cosine\"?"),
        ({"lr": "1e-3"}, "lr: found '1e-3', expected a number."),
    ],
)
def test_a_classifier_names_the_argument_what_was_found_and_what_is_expected(options, message):
    with pytest.raises(pylorus.PylorusError) as error:
        pylorus.Classifier(**{"model": TINY, "classes": ["GC", "GU", "CG"], "weights": "none"} | options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options", [{"learn": 3}, {"unfreeze_at_epoch": "a"}, {"unfreeze_at_epoch": 1.5}, {"unfreeze_at_epoch": True}]
)
def test_freezing_names_an_argument_of_another_type(options):
    with pytest.raises(pylorus.PylorusError, match=f"FreezeBackbone: {next(iter(options))}: found .*, expected"):
        pylorus.FreezeBackbone(**options)


@pytest.mark.parametrize("classes", [["GU", "GC", "CG"], ["GC", "GU"]])
@pytest.mark.parametrize("run", ["fit", "test"])
def test_classes_in_another_order_than_the_images_are_refused(synthetic_root, classes, run):
    data = build_data(synthetic_root)
    names = [data.classes[["GC", "GU", "CG"].index(name)] for name in classes]
    classifier = pylorus.Classifier(TINY, names, weights="none")
    trainer = pl.Trainer(max_epochs=1, **QUIET)
    with pytest.raises(pylorus.PylorusError) as error:
        getattr(trainer, run)(classifier, data)
    assert f"the classifier has {', '.join(names)}, but the data module has {', '.join(data.classes)}" in str(
        error.value
    )


def test_another_image_size_than_the_images_have_is_reported_once(synthetic_root, tmp_path):
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, default_root_dir=tmp_path, **QUIET)
    with pytest.warns(UserWarning, match=r"image_size: .* images of 64 px, but the data module gives 32 px") as record:
        trainer.fit(build_classifier(image_size=64), build_data(synthetic_root))
    assert sum("64 px" in str(each.message) for each in record) == 1


def test_balanced_class_weights_follow_the_training_images(synthetic_root, tmp_path):
    data, classifier = build_data(synthetic_root), build_classifier(class_weights="balanced")
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(classifier, data)
    counts = np.bincount(data.get_labels("train"))
    assert np.allclose(classifier.loss.class_weights, counts.sum() / (3 * counts))
    with pytest.raises(pylorus.PylorusError, match=r"class_weights: found 'balanced', which needs .*ImageDataModule"):
        pl.Trainer(max_epochs=1, **QUIET).fit(build_classifier(class_weights="balanced"), data.train_dataloader())


def test_the_logit_adjusted_loss_follows_the_training_images(synthetic_root, tmp_path):
    data, classifier = build_data(synthetic_root), build_classifier(loss="logit_adjusted")
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(classifier, data)
    counts = np.bincount(data.get_labels("train"))
    assert np.allclose(classifier.loss.offset, np.log(counts / counts.sum()))
    with pytest.raises(pylorus.PylorusError, match=r"loss: found the logit-adjusted loss, which needs .*DataModule"):
        pl.Trainer(max_epochs=1, **QUIET).fit(build_classifier(loss="logit_adjusted"), data.train_dataloader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert pylorus.Classifier.load_from_checkpoint(tmp_path / "last.ckpt").loss.label == "logit-adjusted loss"


def test_class_weights_by_name_are_those_by_position():
    named = build_classifier(class_weights={"CG": 3, "GC": 1, "GU": 2})
    assert named.loss.class_weights.tolist() == build_classifier(class_weights=[1, 2, 3]).loss.class_weights.tolist()


def test_a_loss_that_becomes_nan_ends_the_training(synthetic_root, tmp_path):
    classifier = build_classifier(loss=lambda logits, labels: logits.mean() * float("nan"))
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(pylorus.PylorusError, match=r"loss became NaN or infinite in epoch 1.*Lower lr"):
        trainer.fit(classifier, build_data(synthetic_root))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 32, 32), np.uint8), "found an array of shape (1, 3, 32, 32), expected a uint8 tensor"),
        (torch.zeros(1, 32, 32, 3, dtype=torch.uint8), "found a Tensor of shape (1, 32, 32, 3), expected"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "found a Tensor of shape (3, 32, 32), expected"),
        (torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32), "found pixels from 0 to 1, expected 0 to 255"),
        (torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32), "found pixels from -2 to 2, expected 0 to 255"),
    ],
)
def test_images_in_another_form_are_refused(images, message):
    with pytest.raises(pylorus.PylorusError) as error:
        build_classifier()(images)
    assert message in str(error.value)


def test_a_checkpoint_trained_with_an_own_loss_asks_for_it(synthetic_root, tmp_path):
    classifier = build_classifier(loss=mean_loss)
    assert classifier.hparams["loss"] == "own: mean_loss"
    path = save_checkpoint(classifier, synthetic_root, tmp_path)
    with pytest.raises(pylorus.PylorusError, match=r"trained with a loss of your own, mean_loss, .*Pass loss=…"):
        pylorus.Classifier.load_from_checkpoint(path)
    assert pylorus.Classifier.load_from_checkpoint(path, loss=mean_loss).hparams["loss"] == "own: mean_loss"
    assert pylorus.Classifier.load_from_checkpoint(path, loss="focal").hparams["loss"] == "focal"


def test_an_ordinary_trainer_trains_validates_tests_and_predicts(synthetic_root, tmp_path):
    data, classifier = build_data(synthetic_root), build_classifier()
    trainer = pl.Trainer(max_epochs=2, default_root_dir=tmp_path, **QUIET)
    trainer.fit(classifier, data)
    assert {"train/loss", "val/loss", "val/accuracy", "val/sensitivity/GC", "val/f1/average"} <= set(
        trainer.callback_metrics
    )
    accuracy = trainer.test(classifier, data, verbose=False)[0]["test/accuracy"]
    probabilities = torch.cat(trainer.predict(classifier, data)).numpy()
    labels = data.get_labels("test")
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    counts = confusion_matrix(labels, probabilities.argmax(axis=1), 3)
    assert np.trace(counts) / counts.sum() == pytest.approx(accuracy)


def test_the_seed_gives_the_same_head_and_leaves_torchs_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = build_classifier(seed=3), build_classifier(seed=3), build_classifier(seed=4)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.network.fc.weight, second.network.fc.weight)
    assert not torch.equal(first.network.fc.weight, other.network.fc.weight)


class StopError(Exception):
    """An interruption, such as a power cut."""


class StopAt(pl.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise StopError


def fit(folder, synthetic_root, *callbacks, checkpoint=None, workers=0, average=None):
    classifier = build_classifier(model_args={"drop_rate": 0.3})
    checkpoints = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    freeze = pylorus.FreezeBackbone("head", unfreeze_at_epoch=2)
    averaging = [] if average is None else [pylorus.AverageWeights(average, start_epoch=1)]
    trainer = pl.Trainer(max_epochs=4, callbacks=[freeze, *averaging, checkpoints, *callbacks], **QUIET)
    try:
        trainer.fit(classifier, build_data(synthetic_root, workers=workers), ckpt_path=checkpoint)
    except StopError:
        return None
    return classifier.state_dict()


@pytest.mark.parametrize(
    ("stop", "options"), [(1, {}), (2, {"average": "ema"}), (3, {"average": "mean"}), (3, {"workers": 1})]
)
def test_an_interrupted_training_gives_the_weights_of_an_uninterrupted_one(synthetic_root, tmp_path, stop, options):
    whole = fit(tmp_path / "whole", synthetic_root, average=options.get("average"))
    assert fit(tmp_path / "cut", synthetic_root, StopAt(stop), **options) is None
    resumed = fit(tmp_path / "rest", synthetic_root, checkpoint=tmp_path / "cut" / "last.ckpt", **options)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_the_backbone_does_not_change_until_it_is_unfrozen(synthetic_root, tmp_path):
    states = {}

    class Record(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states[trainer.current_epoch] = {n: t.clone() for n, t in pl_module.state_dict().items()}

    fit(tmp_path, synthetic_root, Record())
    changed = [
        {name for name in states[0] if not torch.equal(states[epoch][name], states[epoch + 1][name])}
        for epoch in range(3)
    ]
    assert changed[0] == {"network.fc.weight", "network.fc.bias"}
    assert {"network.conv1.0.weight", "network.layer1.0.bn1.running_mean"} & changed[1]
    assert len(changed[2]) > 20


def test_freezing_names_what_it_cannot_freeze():
    class Other(pl.LightningModule):
        pass

    with pytest.raises(pylorus.PylorusError, match=r"Other.network is not a timm model.*attribute="):
        pylorus.FreezeBackbone("head").setup(None, Other(), "fit")
    with pytest.raises(pylorus.PylorusError, match="unfreeze_at_epoch: found -1"):
        pylorus.FreezeBackbone("head", unfreeze_at_epoch=-1)


def save_checkpoint(classifier, synthetic_root, folder):
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, default_root_dir=folder, **QUIET)
    trainer.fit(classifier, build_data(synthetic_root))
    trainer.save_checkpoint(folder / "own.ckpt")
    return folder / "own.ckpt"


@pytest.mark.parametrize("loss", ["focal", torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))])
def test_a_checkpoint_restores_the_classifier_without_a_download_or_a_pickle(
    synthetic_root, tmp_path, loss, monkeypatch
):
    classifier = build_classifier(loss=loss, model_args={"drop_rate": np.float64(0.25)})
    path = save_checkpoint(classifier, synthetic_root, tmp_path)
    plain = torch.load(path, weights_only=True)["hyper_parameters"]
    assert json.loads(json.dumps(plain)) == plain
    own_loss = {} if loss == "focal" else {"loss": loss}
    loaded = pylorus.Classifier.load_from_checkpoint(path, **own_loss)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(classifier.cpu().eval()(images), loaded(images))
    assert loaded.names == ("GC", "GU", "CG")


@pytest.fixture(scope="module")
def saved_checkpoint(synthetic_root, tmp_path_factory):
    """A checkpoint of a classifier with default arguments. Read it only."""
    return save_checkpoint(build_classifier(), synthetic_root, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(
    "planted",
    [
        {"_instantiator": "os.system"},
        {"_class_path": "os.system"},
        {"model": {"_target_": "os.mkdir", "path": "planted"}},
        {"loss": {"_target_": "os.mkdir", "path": "planted"}},
        {"model_args": {"_target_": "os.mkdir", "path": "planted"}},
        {"model_args": {"checkpoint_path": "weights.pth"}},
    ],
)
def test_a_planted_hyperparameter_runs_no_code(saved_checkpoint, tmp_path, planted, monkeypatch):
    checkpoint = torch.load(saved_checkpoint, weights_only=True)
    path = tmp_path / "planted.ckpt"
    checkpoint["hyper_parameters"] |= planted
    torch.save(checkpoint, path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pylorus.PylorusError):
        pylorus.Classifier.load_from_checkpoint(path)
    assert not Path("planted").exists()


class Planted:
    def __reduce__(self):
        return (os.mkdir, ("planted",))


def test_a_pickle_of_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.ckpt").write_bytes(pickle.dumps({"state_dict": {}, "hyper_parameters": Planted()}))
    torch.save({"state_dict": {}, "hyper_parameters": Planted()}, "worse.ckpt")
    for name in ("bad.ckpt", "worse.ckpt", "missing.ckpt"):
        with pytest.raises(pylorus.PylorusError, match=name) as error:
            pylorus.Classifier.load_from_checkpoint(name)
        assert "weights_only" not in str(error.value)
    assert not Path("planted").exists()


SCRIPT = """
import sys, torch, pylorus, pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger

class Hinge(torch.nn.Module):
    def forward(self, logits, labels):
        return torch.nn.functional.multi_margin_loss(logits, labels)

data = pylorus.ImageDataModule(sys.argv[1], image_size=32, group=r"patient_\\\\d+", batch_size=8)
model = pylorus.Classifier("test_resnet.r160_in1k", data.classes, weights="none", loss=Hinge(), lr=3e-3)
trainer = pl.Trainer(
    max_epochs=2, accelerator="cpu", logger=CSVLogger("logs"), log_every_n_steps=1,
    callbacks=[pylorus.FreezeBackbone("layer4", unfreeze_at_epoch=1)],
)
trainer.fit(model, data)
trainer.test(model, data)
"""


def test_a_users_own_script_has_its_own_trainer_loss_and_logger(synthetic_root, tmp_path, fork_server):
    assert len(SCRIPT.strip().splitlines()) <= 15
    (tmp_path / "own.py").write_text(SCRIPT.replace("\\\\", "\\"))
    result = fork_server.run([sys.executable, "own.py", str(synthetic_root)], cwd=tmp_path, timeout=280)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(next(tmp_path.rglob("metrics.csv")))
    assert {"train/loss", "val/loss", "val/accuracy", "test/accuracy"} <= set(table.columns)


SMALL = [
    "data=folders",
    r"data.group='patient_\d+'",
    "model=timm",
    f"model.name={TINY}",
    "model.weights=none",
    "data.image_size=32",
    "stage=pretrain",
    "stages.pretrain.epochs=1",
    "report=false",
    "trainer.progress=false",
    "data.workers=0",
]


@pytest.fixture(scope="module")
def training_result(synthetic_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    return pylorus.train(
        [f"data.root={synthetic_root}", *SMALL, f"cache.folder={folder / 'cache'}"],
        folder=folder / "run",
    )


def test_train_runs_in_this_process_and_returns_what_it_wrote(training_result):
    assert (training_result.model / "model.safetensors").is_file()
    assert training_result.stage == "pretrain"
    predictions = pd.read_parquet(training_result.folder / "pretrain" / "predictions-test.parquet")
    assert 0 <= training_result.metrics["test/accuracy"] <= 1
    assert any(name.startswith("test/sensitivity/") for name in training_result.metrics)
    assert len(predictions) > 0


def test_train_raises_the_errors_of_the_command_line():
    with pytest.raises(pylorus.PylorusError, match='optimizer.lrr.*Did you mean "lr"'):
        pylorus.train(["optimizer.lrr=1"])
    with pytest.raises(pylorus.PylorusError, match="optimizer.lr"):
        pylorus.train(["optimizer.lr=fast"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss._target_=torch.nn.CrossEntropyLoss", "loss.reductionn=none"], 'loss.reductionn: .*mean "reduction"'),
        (["metrics.mean._target_=numpy.mean"], r"metrics.mean: numpy.mean gave shape \(\) for three classes"),
        (["loss=focal", "loss.args.gama=1"], 'loss.args.gama: .*Did you mean "gamma"'),
        (["loss.name=null"], "loss.name: found null without loss._target_"),
    ],
)
def test_train_finds_a_wrong_part_before_it_reads_images(synthetic_root, tmp_path, overrides, message):
    words = [f"data.root={synthetic_root}", *SMALL, f"cache.folder={tmp_path / 'cache'}", *overrides]
    with pytest.raises(pylorus.PylorusError, match=message):
        pylorus.train(words, folder=tmp_path / "run")
    assert not list((tmp_path / "run").rglob("split.csv"))


def test_train_reads_a_folder_of_ones_own_configuration(synthetic_root, tmp_path):
    own = tmp_path / "Klinik Süd"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\noptimizer: {lr: 0.5}\n")
    words = [f"data.root={synthetic_root}", *SMALL, f"cache.folder={tmp_path / 'cache'}", "experiment=mine"]
    run = pylorus.train(words, folder=tmp_path / "run", config_dir=own)
    assert "seed: 7" in (run.folder / "config.yaml").read_text()
    assert "lr: 0.5" in (run.folder / "config.yaml").read_text()
    resume(RunFolder(run.folder), ["data.workers=0"])  # finds the folder again


@pytest.mark.parametrize(
    ("overrides", "folder", "message"),
    [
        ([], "nowhere", "config_dir: nowhere is not a folder"),
        (["experiment=mien"], ".", 'experiment=mien: there is no experiment/mien.yaml. Did you mean "mine"'),
        (["hydra.searchpath=[/tmp]"], ".", "config_dir: found hydra.searchpath among the overrides too"),
    ],
)
def test_train_says_what_is_wrong_with_a_folder_of_ones_own(tmp_path, monkeypatch, overrides, folder, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    with pytest.raises(pylorus.PylorusError, match=message):
        pylorus.train(overrides, config_dir=folder)


def test_a_loaded_model_predicts_what_the_command_writes(training_result, synthetic_root, tmp_path):
    output = tmp_path / "predictions.parquet"
    with pytest.raises(SystemExit, match="^0$"):
        main(["predict", str(training_result.model), str(synthetic_root), "--output", str(output)])
    table = pylorus.load_model(training_result.folder).predict(synthetic_root)
    pd.testing.assert_frame_equal(table, pd.read_parquet(output), check_dtype=False)
    some = list(table["path"][:2])
    assert list(pylorus.load_model(training_result.model).predict(some)["predicted"]) == list(table["predicted"][:2])


def test_validate_evaluates_on_labelled_folders(training_result, synthetic_root):
    result = pylorus.validate(training_result.model, synthetic_root, group=r"patient_\d+")
    right = (result.predictions["true"] == result.predictions["predicted"]).mean()
    assert result.metrics["accuracy"]["value"] == pytest.approx(right)
    assert result.confusion.to_numpy().tolist() == result.metrics["confusion"]
    with pytest.raises(pylorus.PylorusError, match="no image is in a folder named after a class"):
        pylorus.validate(training_result.model, next(path for path in Path(synthetic_root).iterdir() if path.is_dir()))


def test_each_file_counts_once(training_result, synthetic_root):
    inner = next(path for path in sorted(Path(synthetic_root).iterdir()) if path.is_dir())
    model = pylorus.load_model(training_result.model)
    once = model.validate(synthetic_root)
    for folders in ([synthetic_root, synthetic_root], [inner, synthetic_root], [f"{synthetic_root}/*", synthetic_root]):
        several = model.validate(folders)
        assert several.metrics == once.metrics
        assert sorted(several.predictions["path"]) == sorted(once.predictions["path"])


def test_decoded_images_are_predicted_like_their_files(training_result, synthetic_root):
    from PIL import Image

    files = sorted(Path(synthetic_root).rglob("*.jpg"))[:2]
    model = pylorus.load_model(training_result.model)
    expected = model.predict(files)
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    predicted = model.predict(images)
    assert list(predicted["path"]) == ["image 0", "image 1"]
    columns = [name for name in expected if name.startswith("probability/")]
    assert np.allclose(predicted[columns], expected[columns], atol=0.02)  # two JPEG decoders
    assert len(model.predict(np.stack(images))) == 2
    for wrong in (images[0] / 255, images[0][..., 0], Image.open(files[0]), b"", None, 3, ""):
        with pytest.raises(pylorus.PylorusError, match="^images: found"):
            model.predict(wrong)


def test_functions_name_their_arguments_in_errors(training_result, synthetic_root, tmp_path):
    model = pylorus.load_model(training_result.folder)
    assert repr(model).startswith("<Model ")
    (tmp_path / "file").write_text("text")
    for call, message in (
        (lambda: pylorus.load_model(None), "path: found None, expected a path"),
        (lambda: pylorus.load_model(""), "path: found an empty path"),
        (lambda: pylorus.load_model(training_result.model / "model.safetensors"), "is a file, expected a folder"),
        (lambda: pylorus.load_model(training_result.folder / "pretrain"), "Use the run: load_model"),
        (lambda: pylorus.load_model(training_result.folder, device="gpu"), "device: found 'gpu'"),
        (lambda: model.predict(synthetic_root, class_name="XX"), '^class_name: found "XX"'),
        (lambda: model.predict(synthetic_root, batch=0), "batch: found 0"),
        (lambda: model.validate(synthetic_root, group="zzz"), "^group: 'zzz' finds no patient"),
        (lambda: pylorus.validate(None, synthetic_root), "model: found None"),
        (lambda: pylorus.audit(None), "folder: found None"),
        (lambda: pylorus.audit(synthetic_root, group="("), "^group: "),
        (lambda: pylorus.report(3), "paths: found 3"),
        (lambda: pylorus.report(training_result.folder, tmp_path / "file"), "found a file, expected a folder"),
        (lambda: pylorus.report(training_result.folder, sensitivity=2.0), "^sensitivity: found 2"),
        (lambda: pylorus.train([], folder=tmp_path / "file"), "file is a file, expected"),
    ):
        with pytest.raises(pylorus.PylorusError, match=message):
            call()


def test_audit_returns_findings_and_report_writes_a_page(training_result, synthetic_root, tmp_path, skip_rendering):
    result = pylorus.audit(synthetic_root, group=r"patient_\d+")
    assert result.readable == len(result.samples) == 30
    assert repr(result).startswith("<Audit of 30 files in ")
    page = pylorus.report(training_result.folder, tmp_path / "first")
    assert page.is_file()
    # By now the package of this name is imported, and still can be called.
    assert pylorus.report([training_result.folder], tmp_path / "second").is_file()


def test_the_notebook_goes_from_folders_to_a_confusion_matrix(tmp_path, monkeypatch, capsys):
    notebook = json.loads((PROJECT / "docs" / "library.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum(len(cell.strip().splitlines()) for cell in cells) < 25
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, "library.ipynb", "exec"), namespace)
    counts = namespace["counts"]
    assert counts.shape == (3, 3)
    assert counts.sum() == len(namespace["data"].get_labels("test"))
