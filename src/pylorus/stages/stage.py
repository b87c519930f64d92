"""Run one stage: train, load the best epoch, predict, save."""

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from pylorus.config import Config
from pylorus.data.augment import build_augmentation
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.prepare import Images
from pylorus.deploy.passing import PartAnswers, answer_part
from pylorus.errors import PylorusError
from pylorus.files import whole
from pylorus.machine.choices import channels_last
from pylorus.model.backbone import Backbone
from pylorus.model.classifier import Classifier, StagePlan
from pylorus.model.features import FeatureDataModule
from pylorus.model.freeze import apply, depth
from pylorus.model.schedule import build_optimizer
from pylorus.parallel.processes import Processes
from pylorus.predictions import prediction_table, write_predictions
from pylorus.stages.folder import PARTS, StageFolder
from pylorus.stages.run import Run
from pylorus.stages.serving import policy_of, serve_features, serve_images
from pylorus.stages.speed import Speed
from pylorus.stages.training import fit, stage_trainer

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
    stage_folder, images = run.folder.stage(plan.name), run.images
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
    if stage_folder.finished:
        log.info("%s is already finished", plan.name)
        return _finished(classifier, stage_folder)
    image_data = serve_images(plan, run.config, run.backbone, images, run.engine, run.processes)
    if stage_folder.trained is None:
        _train(classifier, image_data, run, stage_folder, speed)
    _take_best(classifier, stage_folder)
    _predict(plan, run, stage_folder, image_data)
    if run.processes.first:
        stage_folder.forget_way()  # remains if a run was killed right after training
        speed.write(stage_folder.path / "speed.json")
    run.processes.wait()
    return _result(stage_folder)


def _train(
    classifier: Classifier, image_data: ImageDataModule, run: Run, stage_folder: StageFolder, speed: Speed
) -> None:
    """Train the classifier's stage, from the start or from where it was last saved."""
    plan = classifier.plan
    trainer = stage_trainer(plan, run, stage_folder, speed)
    image_data.begun = stage_folder.reached
    classifier.sample_ids = {split: image_data.sample_ids(split) for split in ("train", "val")}
    data = serve_features(image_data, classifier, plan, run.config, run.engine)
    if isinstance(data, FeatureDataModule):
        speed.features_seconds = data.seconds
    if run.config.trainer.compile:
        classifier.compile_network()
    fit(trainer, classifier, data, stage_folder, run)


def _predict(plan: StagePlan, run: Run, stage_folder: StageFolder, image_data: ImageDataModule) -> None:
    """Save the network's predictions for validation and test; if both are the same images, compute them once."""
    outputs: dict[str, PartAnswers] = {}
    for split in PARTS:
        if split == "test" and run.images.validation == "test":
            outputs[split] = outputs["val"]
        else:
            progress = run.config.trainer.progress
            outputs[split] = answer_part(run.backbone, image_data, split, run.engine, progress=progress)
        table = prediction_table(
            image_data.parts[split], outputs[split].logits, names=run.images.catalog.short_names, split=split
        )
        if run.processes.first:
            run.dashboard.show_predictions(plan, split, table, image_data)
            run.folder.expect_there()
            with whole(stage_folder.features(split)) as temporary:
                np.save(temporary, outputs[split].features)
            write_predictions(table, stage_folder.predictions(split))


def _take_best(classifier: Classifier, stage_folder: StageFolder) -> None:
    checkpoint = torch.load(stage_folder.chosen, map_location="cpu", weights_only=True)
    classifier.take_weights(checkpoint["state_dict"])


def _finished(classifier: Classifier, stage_folder: StageFolder) -> StageResult:
    _take_best(classifier, stage_folder)
    return _result(stage_folder)


def _result(stage_folder: StageFolder) -> StageResult:
    training_result = stage_folder.trained
    assert training_result is not None
    tables = {split: pd.read_parquet(stage_folder.predictions(split)) for split in PARTS}
    return StageResult(training_result.epochs, training_result.best_epoch, tables)


def check_stages(config: Config, backbone: Backbone, images: Images, processes: Processes) -> None:
    """Build what each stage will need, so that a typo is reported now and not after the previous stage.

    Raises:
        PylorusError: Names the unknown block, augmentation or optimizer, or a split with fewer images than devices.
    """
    smallest = min(sum(images.of_class(split)) for split in ("train", images.validation, "test"))
    if smallest < processes.count:
        raise PylorusError(
            f"trainer.devices: found {processes.count} devices, but the smallest split has only {smallest} "
            f"{'image' if smallest == 1 else 'images'}."
        )
    for stage in config.stages.values():
        depth(backbone.network, stage.learn)
        build_augmentation(policy_of(stage, config.augment))
        build_optimizer(backbone.network, stage, config.optimizer)


def _headline(plan: StagePlan, backbone: Backbone) -> str:
    stage_depth = depth(backbone.network, plan.config.learn)
    parameters = dict(backbone.network.named_parameters())
    trainable_count = sum(parameters[name].numel() for name in stage_depth.learning)
    parameter_count = sum(parameter.numel() for parameter in parameters.values())
    return (
        f"{plan.name}: {backbone.name} at {backbone.image_size} px, training {plan.config.learn} "
        f"({trainable_count:,} of {parameter_count:,} parameters), "
        f"{plan.config.epochs} {'epoch' if plan.config.epochs == 1 else 'epochs'}"
    )
