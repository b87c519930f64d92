"""Further arguments of Lightning's Trainer reach it; those that Pylorus sets, or that would break a run, are refused."""

import functools
import inspect
import re

import pandas as pd
import pytest
import pytorch_lightning as pl
from omegaconf import OmegaConf

from pylorus.config.schema import AveragingConfig
from pylorus.core.errors import PylorusError
from pylorus.core.io import write_text
from pylorus.launch.main import check_overrides
from pylorus.launch.train import run
from pylorus.runs.folder import RunFolder
from pylorus.training.trainer import REFUSED_ARGUMENTS, build_averaging, build_callbacks, check_trainer_arguments
from tests.conftest import TINY

WORDS = ["data=folders", r"data.group=patient_\d+", "data.image_size=32", "data.workers=0", "trainer=cpu", "model=timm",
         f"model.name={TINY}", "model.weights=none", "trainer.progress=false", "report=false", "augment=none",
         "trainer.batch_size=4", "stages.pretrain.epochs=3", "stages.finetune.epochs=2"]  # fmt: skip


@pytest.fixture
def train(compose_config, synthetic_root, tmp_path, monkeypatch):
    """Train with additional arguments; return the run's folder and the arguments of each Trainer."""
    built = []

    initialize = pl.Trainer.__init__

    @functools.wraps(initialize)  # with its signature, by which unknown arguments are found
    def record(self, **arguments):
        built.append(arguments)
        initialize(self, **arguments)

    monkeypatch.setattr(pl.Trainer, "__init__", record)

    def train_with(*words):
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir()
        words = check_overrides([f"data.root={synthetic_root}", *WORDS, *words])
        with folder.set_starting(words):
            write_text(folder.config, OmegaConf.to_yaml(compose_config(*words)))
        run(folder)
        return folder, built

    return train_with


@pytest.mark.slow
def test_a_fast_development_run_takes_one_batch_and_one_epoch_of_each_stage(train):
    folder, built = train("trainer.args.fast_dev_run=true", "report=true")
    assert folder.read_status()["state"] == "finished"
    assert (folder.path / "report" / "report.html").is_file()
    assert len(built) == 2
    for arguments in built:
        assert (arguments["limit_train_batches"], arguments["limit_val_batches"], arguments["max_epochs"]) == (1, 1, 1)
    for stage in ("pretrain", "finetune"):
        assert len(pd.read_csv(folder.get_stage(stage).metrics_path)) == 1
    assert "trained and validated on some batches only" in (folder.path / "run.log").read_text()


@pytest.mark.slow
def test_further_arguments_reach_the_trainer_and_limits_hold(train):
    folder, built = train("trainer.args.limit_train_batches=2", "trainer.args.limit_val_batches=1",
                          "trainer.args.deterministic=true", "trainer.args.profiler=simple", "stage=pretrain")  # fmt: skip
    assert built[0]["profiler"] == "simple"
    assert built[0]["deterministic"] is True
    assert folder.get_stage("pretrain").training_result.epochs == 3
    # What decides is nevertheless measured on all images.
    table = pd.read_parquet(folder.get_predictions_path("pretrain", "val"))
    split = pd.read_csv(folder.path / "split.csv")
    assert len(table) == (split["split"] == "val").sum()


@pytest.mark.slow
def test_every_argument_that_pylorus_passes_is_refused_with_a_reason(train):
    _, built = train("stage=pretrain", "stages.pretrain.epochs=1")
    assert set(built[0]) <= set(REFUSED_ARGUMENTS)
    assert set(REFUSED_ARGUMENTS) <= set(inspect.signature(pl.Trainer).parameters)


@pytest.mark.parametrize("name", sorted(REFUSED_ARGUMENTS))
def test_an_argument_that_pylorus_sets_is_refused_with_what_to_use(name):
    with pytest.raises(
        PylorusError, match=re.escape(f"trainer.args.{name}: can't be set here: {REFUSED_ARGUMENTS[name]}")
    ):
        check_trainer_arguments({name: 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit_train_batch": 2}, 'has no such argument. Did you mean "limit_train_batches"'),
        ({"limit_train_batches": 0}, "limit_train_batches: found 0, expected a number of batches"),
        ({"limit_val_batches": 0.0}, "limit_val_batches: found 0.0, expected a number of batches"),
        ({"limit_val_batches": 1.5}, "limit_val_batches: found 1.5"),
        ({"fast_dev_run": "yes"}, "fast_dev_run: found yes, expected true, false or a number of batches"),
    ],
)
def test_an_unknown_argument_or_limit_is_refused_by_name(arguments, message):
    with pytest.raises(PylorusError, match=message):
        check_trainer_arguments(arguments)


@pytest.mark.slow
def test_a_limit_that_leaves_no_batch_is_refused_by_its_key(train):
    with pytest.raises(PylorusError, match="trainer.args: found .*limit_val_batches.* which Lightning refuses"):
        train("trainer.args.limit_val_batches=0.01", "stage=pretrain", "stages.pretrain.epochs=1")


@pytest.mark.parametrize("target", ["pytorch_lightning.callbacks.EMAWeightAveraging", "pylorus.AverageWeights"])
def test_a_callback_that_averages_weights_is_refused_with_the_key_that_does(target):
    with pytest.raises(PylorusError, match=r"callbacks\.mine: found \w+, which Pylorus adds itself.*averaging=ema"):
        build_callbacks({"mine": {"_target_": target}})


@pytest.mark.parametrize(("start", "epochs", "first"), [(None, 5, 2), (0.29, 100, 29), (0.99, 2, 1)])
def test_an_average_begins_after_its_fraction_of_the_epochs(start, epochs, first):
    assert build_averaging(AveragingConfig(name="mean", start=start), epochs=epochs).start_epoch == first
