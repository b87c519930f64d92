"""What a stage shows on the console: one bar at a time, and lines that say whose time is left."""

import logging
import math
import sys
from types import SimpleNamespace

import pytest

from pylorus.config.schema import StageConfig
from pylorus.launch import main
from pylorus.model.classifier import StagePlan
from pylorus.runs.console import announce_job
from pylorus.runs.folder import RunFolder
from pylorus.training import callbacks
from pylorus.training.callbacks import EpochLine, StageBar

PLAN = StagePlan("pretrain", StageConfig(learn="head", epochs=3), 0, 0)


def build_trainer(epoch=0, loss=1.0):
    metrics = {f"pretrain/{split}/{name}": loss for split in ("train", "val") for name in ("loss", "accuracy")}
    metrics |= {f"pretrain/{split}/accuracy": 0.5 for split in ("train", "val")}
    return SimpleNamespace(
        current_epoch=epoch, num_training_batches=4, num_val_batches=[2], callback_metrics=metrics, is_global_zero=True
    )


@pytest.mark.parametrize(
    ("following", "epoch", "end"),
    [
        ({}, 0, " | 00:00 left"),
        ({"finetune": 30}, 0, " | 00:00 left in pretrain, then finetune (30 epochs)"),
        ({"finetune": 30}, 2, "acc 50.0 %"),
    ],
)
def test_the_time_left_is_that_of_the_stage_if_others_follow(caplog, following, epoch, end):
    line = EpochLine(PLAN, following=following)
    with caplog.at_level(logging.INFO, logger="pylorus"):
        line.on_train_epoch_start(build_trainer(epoch), None)
        line.on_train_epoch_end(build_trainer(epoch), None)
    assert caplog.messages[0].startswith(f"pretrain epoch {epoch + 1}/3 | train: loss 1.000, acc 50.0 %")
    assert caplog.messages[0].endswith(end)


@pytest.mark.parametrize(("loss", "shown"), [(28114944.0, "2.81e+07"), (math.inf, "∞"), (999.5, "999.500")])
def test_an_exploded_loss_is_short(caplog, loss, shown):
    with caplog.at_level(logging.INFO, logger="pylorus"):
        EpochLine(PLAN).on_train_epoch_end(build_trainer(loss=loss), None)
    assert f"val: loss {shown}, " in caplog.messages[0]


def test_one_bar_at_a_time_with_our_labels(monkeypatch):
    opened = []

    class Bar:
        def __init__(self, label, total, done=0):
            assert all(bar.is_closed for bar in opened)
            self.label, self.total, self.count, self.is_closed = label, total, done, False
            opened.append(self)

        def update(self):
            self.count += 1

        def close(self):
            self.is_closed = True

    monkeypatch.setattr(callbacks, "open_progress_bar", Bar)
    bar, trainer = StageBar(PLAN), build_trainer(1)
    for batch in (2, 3):  # an epoch that is resumed after two batches
        bar.on_train_batch_start(trainer, None, None, batch)
        bar.on_train_batch_end(trainer, None, None, None, batch)
    bar.on_validation_start(trainer, None)
    for batch in (0, 1):
        bar.on_validation_batch_end(trainer, None, None, None, batch)
    bar.on_validation_end(trainer, None)
    bar.on_train_batch_start(build_trainer(2), None, None, 0)
    bar.on_exception(trainer, None, ValueError())
    found = [(each.label, each.count, each.total, each.is_closed) for each in opened]
    assert found == [
        ("pretrain epoch 2/3", 4, 4, True),
        ("pretrain epoch 2/3 validation", 2, 2, True),
        ("pretrain epoch 3/3", 0, 4, True),
    ]


def test_a_job_is_announced_by_what_varies(tmp_path, capsys):
    words = [r"data.group=patient_\d+", "model=vgg19", "seed=1"]
    announce_job(RunFolder(tmp_path / "1"), words, jobs=3, varied={"model"})
    assert capsys.readouterr().out == "\njob 1 (2 of 3) | model=vgg19\n"


@pytest.mark.parametrize(("at_once", "left"), [("1", "2 min"), ("2", "60 s")])
def test_the_time_left_in_a_sweep_counts_whole_jobs(monkeypatch, tmp_path, capsys, at_once, left):
    monkeypatch.setenv("PYLORUS_JOBS_AT_ONCE", at_once)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "status.json").write_text('{"state": "finished", "seconds": 20.5}')
    (tmp_path / "0" / "speed.json").write_text('{"seconds": 60.0}')  # with start-up and report
    announce_job(RunFolder(tmp_path / "1"), ["seed=1"], jobs=3)
    assert capsys.readouterr().out == f"\njob 1 (2 of 3) | seed=1 | about {left} left in this sweep\n"


@pytest.mark.parametrize("words", [["--version"], ["-m", "--version"]])
def test_the_version_is_ours(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert main._run_command_line() == 0
    assert capsys.readouterr().out.startswith("pylorus ")
