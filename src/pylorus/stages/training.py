"""Lightning's part of a stage: a trainer and its fit."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping

from pylorus.config import StageConfig
from pylorus.model.classifier import Classifier, StagePlan
from pylorus.model.freeze import Freeze
from pylorus.model.schedule import better
from pylorus.model.sharded import sharded
from pylorus.model.shared_norm import norm_of_all
from pylorus.parallel.strategy import spread
from pylorus.stages.checkpoints import Checkpoints
from pylorus.stages.curves import CurvesFile
from pylorus.stages.folder import StageFolder
from pylorus.stages.progress import EpochLine, ProgressBar
from pylorus.stages.run import Run
from pylorus.stages.speed import Speed

log = logging.getLogger(__name__)


def stage_trainer(plan: StagePlan, run: Run, place: StageFolder, speed: Speed) -> pl.Trainer:
    """What trains a stage, with all that is written, shown and decided after each epoch."""
    curves = CurvesFile(place.metrics, last_step=plan.first_epoch + place.reached.epochs)
    progress = run.config.trainer.progress and run.processes.first
    bar = [ProgressBar(plan)] if progress else []
    checkpoints = Checkpoints(place, mode=better(plan.config), processes=run.processes, stop=run.stop)
    # The dashboard first: what the file holds is known there, and is not sent again after an interruption.
    loggers = [*run.dashboard.loggers(known_step=curves.known_step), curves]
    return pl.Trainer(
        accelerator=run.engine.accelerator,
        **spread(run.processes, run.config.trainer),
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


def fit(
    trainer: pl.Trainer, classifier: Classifier, served: pl.LightningDataModule, place: StageFolder, run: Run
) -> None:
    """Fits, from the stage's beginning or from where it was saved last."""
    saved = place.last if place.last.is_file() else None
    if saved is not None:
        epochs, batches = place.reached
        log.info("%s goes on after epoch %d%s", classifier.plan.name, epochs, f", batch {batches}" * (batches > 0))
    with _interruptible(trainer), _divided(classifier, run), norm_of_all(classifier.network, classifier.processes):
        trainer.fit(classifier, served, ckpt_path=saved, weights_only=True)


@contextmanager
def _divided(classifier: Classifier, run: Run) -> Iterator[None]:
    """What learns is divided among the devices, where that is asked for."""
    if not (run.processes.several and run.config.trainer.strategy == "fsdp"):
        yield
        return
    with sharded(classifier, run.engine.accelerator, image_size=run.backbone.image_size) as (here, learning):
        name = classifier.plan.name
        log.info("%s: the first device holds %s of the %s parameters that learn", name, f"{here:,}", f"{learning:,}")
        yield


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
