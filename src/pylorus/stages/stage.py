"""One stage of a run: train, take the best epoch, predict, write down."""

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
    """What a stage gave.

    Attributes:
        epochs: How many ran.
        best_epoch: The one whose weights the network holds now, from 1.
        predictions: The table of each part, val and test.
    """

    epochs: int
    best_epoch: int
    predictions: dict[str, pd.DataFrame]


def run_stage(plan: StagePlan, run: Run) -> StageResult:
    """Trains one stage, leaves the network at its best epoch and saves what that says of val and test, in fp32.

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
    photographs = serve_images(plan, run.config, run.backbone, images, run.engine, run.processes)
    if place.trained is None:
        _train(classifier, photographs, run, place, speed)
    _take_best(classifier, place)
    _predict(plan, run, place, photographs)
    if run.processes.first:
        place.forget_way()  # a run that was killed right after its training left it
        speed.write(place.path / "speed.json")
    run.processes.wait()
    return _result(place)


def _train(classifier: Classifier, photographs: ImageDataModule, run: Run, place: StageFolder, speed: Speed) -> None:
    """Trains the classifier's stage, from its beginning or from where it was saved last."""
    plan = classifier.plan
    trainer = stage_trainer(plan, run, place, speed)
    photographs.begun = place.reached
    classifier.sample_ids = {part: photographs.sample_ids(part) for part in ("train", "val")}
    served = serve_features(photographs, classifier, plan, run.config, run.engine)
    if isinstance(served, FeatureDataModule):
        speed.features_seconds = served.seconds
    if run.config.trainer.compile:
        classifier.compile_network()
    fit(trainer, classifier, served, place, run)


def _predict(plan: StagePlan, run: Run, place: StageFolder, photographs: ImageDataModule) -> None:
    """Saves the network's answers to val and test; where these are the same images they are computed once."""
    answers: dict[str, PartAnswers] = {}
    for part in PARTS:
        if part == "test" and run.images.validation == "test":
            answers[part] = answers["val"]
        else:
            progress = run.config.trainer.progress
            answers[part] = answer_part(run.backbone, photographs, part, run.engine, progress=progress)
        table = prediction_table(
            photographs.parts[part], answers[part].logits, names=run.images.catalog.short_names, split=part
        )
        if run.processes.first:
            run.dashboard.show_predictions(plan, part, table, photographs)
            run.folder.expect_there()
            with whole(place.features(part)) as temporary:
                np.save(temporary, answers[part].features)
            write_predictions(table, place.predictions(part))


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
    fewest = min(sum(images.of_class(part)) for part in ("train", images.validation, "test"))
    if fewest < processes.count:
        raise PylorusError(
            f"trainer.devices: found {processes.count} devices, but a part of the split has {fewest} images."
        )
    for stage in config.stages.values():
        depth(backbone.network, stage.learn)
        build_augmentation(policy_of(stage, config.augment))
        build_optimizer(backbone.network, stage, config.optimizer)


def _headline(plan: StagePlan, backbone: Backbone) -> str:
    found = depth(backbone.network, plan.config.learn)
    parameters = dict(backbone.network.named_parameters())
    learning = sum(parameters[name].numel() for name in found.learning)
    total = sum(parameter.numel() for parameter in parameters.values())
    return (
        f"{plan.name}: {backbone.name} at {backbone.image_size} px, learns {plan.config.learn} "
        f"({learning:,} of {total:,} parameters), {plan.config.epochs} epochs"
    )
