"""Run one stage: train, load the best epoch, predict, save."""

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from pylorus.config import Config
from pylorus.data.augment import build_augmentation
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.prepare import RunImages
from pylorus.deploy.passing import SplitOutputs, compute_split_outputs
from pylorus.errors import PylorusError
from pylorus.files import write_atomically
from pylorus.machine.choices import resolve_channels_last
from pylorus.model.backbone import Backbone
from pylorus.model.classifier import Classifier, StagePlan
from pylorus.model.features import FeatureDataModule
from pylorus.model.freeze import apply_depth, resolve_depth
from pylorus.model.schedule import build_optimizer
from pylorus.parallel.processes import Processes
from pylorus.predictions import build_prediction_table, write_predictions
from pylorus.stages.folder import PARTS, StageFolder
from pylorus.stages.run import Run
from pylorus.stages.serving import build_image_data, build_stage_data, resolve_augmentation
from pylorus.stages.speed import SpeedMonitor
from pylorus.stages.training import build_trainer, fit_stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """Result of a stage.

    Attributes:
        epochs: Number of epochs trained.
        best_epoch: Epoch whose weights the network now holds, from 1.
        predictions: Prediction table of each split, val and test.
    """

    epochs: int
    best_epoch: int
    predictions: dict[str, pd.DataFrame]


def run_stage(plan: StagePlan, run: Run) -> StageResult:
    """Train one stage, load its best epoch and save that network's fp32 predictions for validation and test.

    Whatever is in the stage's folder is not done again: a stage resumes where it was last saved.
    """
    stage_folder, images = run.folder.get_stage(plan.name), run.images
    speed = SpeedMonitor(sum(images.count_by_class("train")), run.engine.accelerator)
    classifier = Classifier(
        run.backbone,
        images.catalog.short_names,
        plan,
        run.config.optimizer,
        run.config.loss,
        images_of_class=images.count_by_class("train"),
        channels_last=resolve_channels_last(run.config, run.engine, run.backbone.network)[0],
        processes=run.processes,
    )
    apply_depth(run.backbone.network, plan.config.learn)
    log.info("\n%s", _format_headline(plan, run.backbone))
    if stage_folder.is_finished:
        log.info("%s is already finished", plan.name)
        return _load_finished_stage(classifier, stage_folder)
    image_data = build_image_data(plan, run.config, run.backbone, images, run.engine, run.processes)
    if stage_folder.training_result is None:
        _train(classifier, image_data, run, stage_folder, speed)
    _load_best_weights(classifier, stage_folder)
    _predict(plan, run, stage_folder, image_data)
    if run.processes.is_first:
        stage_folder.delete_training_state()  # remains if a run was killed right after training
        speed.write_speed(stage_folder.path / "speed.json")
    run.processes.wait()
    return _read_result(stage_folder)


def _train(
    classifier: Classifier, image_data: ImageDataModule, run: Run, stage_folder: StageFolder, speed: SpeedMonitor
) -> None:
    """Train the classifier's stage, from the start or from where it was last saved."""
    plan = classifier.plan
    trainer = build_trainer(plan, run, stage_folder, speed)
    image_data.begun = stage_folder.progress
    classifier.sample_ids = {split: image_data.get_sample_ids(split) for split in ("train", "val")}
    data = build_stage_data(image_data, classifier, plan, run.config, run.engine)
    if isinstance(data, FeatureDataModule):
        speed.features_seconds = data.seconds
    if run.config.trainer.compile:
        classifier.compile_network()
    fit_stage(trainer, classifier, data, stage_folder, run)


def _predict(plan: StagePlan, run: Run, stage_folder: StageFolder, image_data: ImageDataModule) -> None:
    """Save the network's predictions for validation and test; if both are the same images, compute them once."""
    outputs: dict[str, SplitOutputs] = {}
    for split in PARTS:
        if split == "test" and run.images.validation == "test":
            outputs[split] = outputs["val"]
        else:
            progress = run.config.trainer.progress
            outputs[split] = compute_split_outputs(run.backbone, image_data, split, run.engine, progress=progress)
        table = build_prediction_table(
            image_data.parts[split], outputs[split].logits, names=run.images.catalog.short_names, split=split
        )
        if run.processes.is_first:
            run.dashboard.show_predictions(plan, split, table, image_data)
            run.folder.check_exists()
            with write_atomically(stage_folder.get_features_path(split)) as temporary:
                np.save(temporary, outputs[split].features)
            write_predictions(table, stage_folder.get_predictions_path(split))


def _load_best_weights(classifier: Classifier, stage_folder: StageFolder) -> None:
    checkpoint = torch.load(stage_folder.best_checkpoint, map_location="cpu", weights_only=True)
    classifier.load_stage_weights(checkpoint["state_dict"])


def _load_finished_stage(classifier: Classifier, stage_folder: StageFolder) -> StageResult:
    _load_best_weights(classifier, stage_folder)
    return _read_result(stage_folder)


def _read_result(stage_folder: StageFolder) -> StageResult:
    training_result = stage_folder.training_result
    assert training_result is not None
    tables = {split: pd.read_parquet(stage_folder.get_predictions_path(split)) for split in PARTS}
    return StageResult(training_result.epochs, training_result.best_epoch, tables)


def check_stages(config: Config, backbone: Backbone, images: RunImages, processes: Processes) -> None:
    """Build what each stage will need, so that a typo is reported now and not after the previous stage.

    Raises:
        PylorusError: Names the unknown block, augmentation or optimizer, or a split with fewer images than devices.
    """
    smallest = min(sum(images.count_by_class(split)) for split in ("train", images.validation, "test"))
    if smallest < processes.count:
        raise PylorusError(
            f"trainer.devices: found {processes.count} devices, but the smallest split has only {smallest} "
            f"{'image' if smallest == 1 else 'images'}."
        )
    for stage in config.stages.values():
        resolve_depth(backbone.network, stage.learn)
        build_augmentation(resolve_augmentation(stage, config.augment))
        build_optimizer(backbone.network, stage, config.optimizer)


def _format_headline(plan: StagePlan, backbone: Backbone) -> str:
    stage_depth = resolve_depth(backbone.network, plan.config.learn)
    parameters = dict(backbone.network.named_parameters())
    trainable_count = sum(parameters[name].numel() for name in stage_depth.learning)
    parameter_count = sum(parameter.numel() for parameter in parameters.values())
    return (
        f"{plan.name}: {backbone.name} at {backbone.image_size} px, training {plan.config.learn} "
        f"({trainable_count:,} of {parameter_count:,} parameters), "
        f"{plan.config.epochs} {'epoch' if plan.config.epochs == 1 else 'epochs'}"
    )
