"""One stage of a run: fit, take the best epoch, predict, write down."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import EarlyStopping

from pylorus.checkpoints import Checkpoints
from pylorus.choices import channels_last
from pylorus.config import Config, StageConfig
from pylorus.curves import CurvesFile
from pylorus.dashboard import Dashboard
from pylorus.data.augment import build_augmentation
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.prepare import Images
from pylorus.data.split import SPLITS
from pylorus.errors import PylorusError
from pylorus.machine import Engine
from pylorus.model.backbone import Backbone
from pylorus.model.classifier import Classifier, StagePlan
from pylorus.model.features import FeatureDataModule
from pylorus.model.freeze import Freeze, apply, depth
from pylorus.model.schedule import better, build_optimizer
from pylorus.model.shared_norm import norm_of_all
from pylorus.parallel.processes import Processes
from pylorus.parallel.strategy import spread
from pylorus.predictions import prediction_table, write_predictions
from pylorus.progress import EpochLine, ProgressBar
from pylorus.run_folder import RunFolder
from pylorus.serving import policy_of, serve_features, serve_images
from pylorus.signals import Stop
from pylorus.speed import Speed
from pylorus.stage_folder import PARTS, StageFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """What a stage gave.

    Attributes:
        epochs: How many ran.
        best_epoch: The one whose weights the network holds now, from 1.
        predictions: The table of each part, val and test.
    """

    epochs: int
    best_epoch: int
    predictions: dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Run:
    """What the stages of a run share.

    Attributes:
        config: All of it.
        folder: Where it is written down.
        images: Split.
        backbone: Whose network goes from stage to stage.
        engine: What it computes on.
        dashboard: Where it is shown.
        processes: Who computes it.
        stop: Whether it is asked to end.
    """

    config: Config
    folder: RunFolder
    images: Images
    backbone: Backbone
    engine: Engine
    dashboard: Dashboard
    processes: Processes
    stop: Stop


def run_stage(plan: StagePlan, run: Run) -> StageResult:
    """Trains one stage, leaves the network at its best epoch and saves what that says of val and test.

    What lies in the stage's folder already is not done again: a stage goes on where it was saved last.
    """
    place, images = run.folder.stage(plan.name), run.images
    speed = Speed(sum(images.of_class("train")), run.engine.accelerator)
    classifier = Classifier(
        run.backbone,
        images.catalog.short_names,
        plan,
        run.config.optimizer,
        run.config.loss,
        images_of_class=images.of_class("train"),
        channels_last=channels_last(run.config, run.engine, run.backbone.network)[0],
        processes=run.processes,
    )
    apply(run.backbone.network, plan.config.learn)
    log.info("\n%s", _headline(plan, run.backbone))
    if place.finished:
        log.info("%s was finished before", plan.name)
        return _finished(classifier, place)
    trainer = _trainer(plan, run, place, speed)
    photographs = serve_images(plan, run.config, run.backbone, images, run.engine, run.processes)
    photographs.begun = place.reached
    classifier.sample_ids = {part: photographs.sample_ids(part) for part in ("train", "val")}
    served = serve_features(photographs, classifier, plan, run.config, run.engine)
    if isinstance(served, FeatureDataModule):
        speed.features_seconds = served.seconds
    if run.config.trainer.compile:
        classifier.compile_network()
    if place.trained is None:
        _fit(trainer, classifier, served, place)
    _take_best(classifier, place)
    for part in PARTS:
        table = prediction_table(
            photographs.parts[part],
            _logits(trainer, classifier, served, part),
            names=images.catalog.short_names,
            split=part,
        )
        if run.config.logger.images:
            photographs.dataset(part)  # all processes decode, the first one shows
        if run.processes.first:
            run.dashboard.show_predictions(plan, part, table, photographs)
            run.folder.expect_there()
            write_predictions(table, place.predictions(part))
    if run.processes.first:
        place.forget_way()  # a run that was killed right after its training left it
        speed.write(place.path / "speed.json")
    run.processes.wait()
    return _result(place)


def _trainer(plan: StagePlan, run: Run, place: StageFolder, speed: Speed) -> pl.Trainer:
    curves = CurvesFile(place.metrics, last_step=plan.first_epoch + place.reached.epochs)
    progress = run.config.trainer.progress and run.processes.first
    bar = [ProgressBar(plan)] if progress else []
    checkpoints = Checkpoints(place, mode=better(plan.config), processes=run.processes, stop=run.stop)
    # The dashboard first: what the file holds is known there, and is not sent again after an interruption.
    loggers = [*run.dashboard.loggers(known_step=curves.known_step), curves]
    return pl.Trainer(
        accelerator=run.engine.accelerator,
        **spread(run.processes),
        precision=run.engine.lightning_precision,
        max_epochs=plan.config.epochs,
        callbacks=[Freeze(plan.config.learn), *_patience(plan.config), EpochLine(plan), speed, *bar, checkpoints],
        logger=loggers if run.processes.first else False,
        default_root_dir=place.path,
        enable_progress_bar=progress,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _take_best(classifier: Classifier, place: StageFolder) -> None:
    saved = torch.load(place.chosen, map_location="cpu", weights_only=True)
    classifier.take_weights(saved["state_dict"])


def _finished(classifier: Classifier, place: StageFolder) -> StageResult:
    _take_best(classifier, place)
    return _result(place)


def _result(place: StageFolder) -> StageResult:
    trained = place.trained
    assert trained is not None
    tables = {part: pd.read_parquet(place.predictions(part)) for part in PARTS}
    return StageResult(trained.epochs, trained.best_epoch, tables)


def check_stages(config: Config, backbone: Backbone, images: Images, processes: Processes) -> None:
    """Builds what each stage will need, so that a misspelt word is told now and not after the stage before.

    Raises:
        PylorusError: Names the block, the augmentation or the optimiser that there is not, or what can't be shared out.
    """
    fewest = min(sum(images.of_class(part)) for part in SPLITS)
    if fewest < processes.count:
        raise PylorusError(
            f"trainer.devices: found {processes.count} devices, but a part of the split has {fewest} images."
        )
    for stage in config.stages.values():
        depth(backbone.network, stage.learn)
        build_augmentation(policy_of(stage, config.augment))
        build_optimizer(backbone.network, stage, config.optimizer)


def _fit(trainer: pl.Trainer, classifier: Classifier, served: pl.LightningDataModule, place: StageFolder) -> None:
    """Fits, from the stage's beginning or from its last saved epoch on."""
    saved = place.last if place.last.is_file() else None
    if saved is not None:
        epochs, batches = place.reached
        log.info("%s goes on after epoch %d%s", classifier.plan.name, epochs, f", batch {batches}" * (batches > 0))
    with _interruptible(trainer), norm_of_all(classifier.network, classifier.processes):
        trainer.fit(classifier, served, ckpt_path=saved, weights_only=True)


def _logits(
    trainer: pl.Trainer, classifier: Classifier, served: ImageDataModule | FeatureDataModule, part: str
) -> NDArray[np.float32]:
    """Logits (rows, classes) of a part, in the order of its rows; each process computes its share."""
    with _interruptible(trainer):
        mine = trainer.predict(classifier, served.loader(part))
    batches = [batch for share in classifier.processes.gathered(mine) for batch in share or []]
    rows = torch.cat([batch[0].cpu() for batch in batches])
    logits = torch.cat([batch[1].cpu() for batch in batches])
    ordered: NDArray[np.float32] = logits[torch.argsort(rows)].float().cpu().numpy()
    return ordered


@contextmanager
def _interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """A Ctrl-C stays one, where Lightning would make an error of it and ignore all that follow."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def _patience(stage: StageConfig) -> list[pl.Callback]:
    if stage.patience is None:
        return []
    # An undefined precision is no reason to stop; a loss that is no number stops the run elsewhere.
    # It decides at validation, so that what is saved at the epoch's end knows of it.
    return [
        EarlyStopping(
            "monitor",
            mode=better(stage),
            patience=stage.patience,
            check_finite=False,
            check_on_train_epoch_end=False,
        )
    ]


def _headline(plan: StagePlan, backbone: Backbone) -> str:
    found = depth(backbone.network, plan.config.learn)
    parameters = dict(backbone.network.named_parameters())
    learning = sum(parameters[name].numel() for name in found.learning)
    total = sum(parameter.numel() for parameter in parameters.values())
    return (
        f"{plan.name}: {backbone.name} at {backbone.image_size} px, learns {plan.config.learn} "
        f"({learning:,} of {total:,} parameters), {plan.config.epochs} epochs"
    )
