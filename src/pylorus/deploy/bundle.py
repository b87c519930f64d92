"""Write the bundle: a trained network as safetensors, with everything that must be known to use it."""

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pylorus import __version__
from pylorus.config import AugmentConfig, Config
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.image import POLICY_VERSION
from pylorus.data.look_through import FILE as AUDIT
from pylorus.data.prepare import Images
from pylorus.deploy.card import model_card
from pylorus.deploy.checks import check_description
from pylorus.deploy.description import (
    FORMAT_VERSION,
    INTENDED_USE,
    Description,
    Input,
    TrainedStage,
    Training,
    Weights,
)
from pylorus.deploy.files import CARD, DESCRIPTION, FILES, SUMS, UNLIKE, WEIGHTS
from pylorus.deploy.fixing import (
    Unlikeness,
    deciding_class,
    figures_of,
    fixed_abstention,
    fixed_decision,
    fixed_sets,
    said_calibration,
)
from pylorus.deploy.load import DIRECTIONS
from pylorus.deploy.network import unlikeness
from pylorus.deploy.passing import feature_rows, mean_directions
from pylorus.deploy.strict import plain
from pylorus.files import whole, write_json, write_text
from pylorus.machine.choices import images_a_step, workers
from pylorus.machine.engine import Engine
from pylorus.model.backbone import Backbone
from pylorus.model.weights import sha256
from pylorus.report.calibrated import calibrate
from pylorus.report.saved_json import read_json
from pylorus.report.saved_predictions import read_predictions
from pylorus.runs.folder import RunFolder
from pylorus.runs.shipped import ShippedStage, choose_stage, score_stage
from pylorus.stages.folder import PARTS

log = logging.getLogger(__name__)

PACKAGES = ("timm", "torch", "numpy", "pillow", "safetensors")


def keep_candidate(folder: RunFolder, network: nn.Module, config: Config, images: Images, stage: str) -> None:
    """Save the network of a finished stage if it is the best so far, before later stages change it.

    Args:
        folder: The run's folder.
        network: The network as the stage left it.
        config: The run's configuration.
        images: The run's images, for their classes.
        stage: Name of the stage that has just finished.
    """
    names = list(config.stages)
    finished = names[: names.index(stage) + 1]
    is_candidate = config.deploy.stage in (None, stage) and _chosen(folder, config, images, finished).name == stage
    if not is_candidate or stage == names[-1]:
        return
    if not folder.stage(stage).network.is_file():
        _save_tensors(folder.stage(stage).network, network.state_dict())
    for earlier in finished[:-1]:
        folder.stage(earlier).network.unlink(missing_ok=True)


def write_bundle(folder: RunFolder, backbone: Backbone, images: Images, config: Config, engine: Engine) -> ShippedStage:
    """Write the shipped stage of a run to its folder `model`; it contains no file names of images and no patients.

    Temperature, thresholds and performance come from the predictions of that stage's best epoch for validation and
    test images, computed in the bundle's own arithmetic; the reference directions for out-of-distribution detection
    are computed here from the training images.

    Args:
        folder: Folder of a run whose stages are finished.
        backbone: The network of the last stage and the input that it takes.
        images: The images with their classes and the split that the network was trained on.
        config: The run's configuration.
        engine: The run's compute engine.

    Returns:
        The shipped stage, and how it was chosen.
    """
    shipped = _chosen(folder, config, images, list(config.stages))
    stage = folder.stage(shipped.name)
    if shipped.name != list(config.stages)[-1]:
        backbone.network.load_state_dict(load_file(stage.network))
    input_settings = _input(backbone, config)
    datamodule = ImageDataModule(
        images.table,
        images.catalog.root,
        input_settings.form,
        batch_size=images_a_step(config.trainer),
        workers=workers(config, engine)[0],
        policy=AugmentConfig(),
        seed=0,
        cache=config.cache,
        validation=images.validation,
    )
    log.info("model    computing features of training images for out-of-distribution detection")
    directions = mean_directions(backbone, datamodule, engine, classes=len(images.catalog.classes))
    validation, test = (
        unlikeness(torch.from_numpy(np.load(stage.features(part))), directions).numpy().astype(np.float64)
        for part in PARTS
    )
    distances = Unlikeness(
        training=len(feature_rows("train", len(datamodule.parts["train"]))),
        validation=validation,
        test=test,
        test_rows=feature_rows("test", len(datamodule.parts["test"])),
    )
    description = _description(folder, backbone, images, config, engine, input_settings, distances, shipped)
    check_description(description)
    bundle = folder.path / "model"
    (bundle / SUMS).unlink(missing_ok=True)  # without it the folder is not a bundle until all files are written
    _save_tensors(bundle / WEIGHTS, backbone.network.state_dict())
    _save_tensors(bundle / UNLIKE, {DIRECTIONS: directions})
    write_json(bundle / DESCRIPTION, plain(description))
    leaks = (read_json(folder.path / AUDIT) or {}).get("accepted_leaks", {})
    write_text(bundle / CARD, model_card(description, leaks=leaks))
    write_text(bundle / SUMS, "".join(f"{sha256(bundle / name)}  {name}\n" for name in FILES))
    for name in config.stages:
        folder.stage(name).forget_candidate()
    return shipped


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _chosen(folder: RunFolder, config: Config, images: Images, stages: Sequence[str]) -> ShippedStage:
    """Return the stage to ship among some finished stages."""
    scores = {}
    for name in stages:
        validation = read_predictions(folder.predictions(name, "val"), order=images.catalog.short_names)
        scores[name] = score_stage(validation.logits, validation.predictions.true)
    return choose_stage(scores, asked=config.deploy.stage)


def _description(
    folder: RunFolder,
    backbone: Backbone,
    images: Images,
    config: Config,
    engine: Engine,
    input_settings: Input,
    distances: Unlikeness,
    shipped: ShippedStage,
) -> Description:
    names = images.catalog.short_names
    validation, test = (read_predictions(folder.predictions(shipped.name, part), order=names) for part in PARTS)
    calibration = calibrate(validation, test)
    deciding = deciding_class(config.deploy, classes=images.catalog.classes, short_names=names)
    return Description(
        format_version=FORMAT_VERSION,
        architecture=backbone.name,
        arguments=plain(config.model.args),
        classes=tuple(images.catalog.classes),
        short_names=tuple(names),
        input=input_settings,
        weights=Weights(backbone.weights, backbone.weights_sha256, backbone.licence),
        training=_training(folder, images, config, engine, shipped),
        shipped=shipped,
        calibration=said_calibration(calibration),
        decision=fixed_decision(calibration, config.deploy, class_name=deciding),
        prediction_sets=fixed_sets(calibration, config.deploy.prediction_sets),
        abstention=fixed_abstention(calibration, distances),
        test=figures_of(calibration.test),
        intended_use=INTENDED_USE,
        versions={"pylorus": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
    )


def _training(folder: RunFolder, images: Images, config: Config, engine: Engine, shipped: ShippedStage) -> Training:
    stages = []
    for name, stage in list(config.stages.items())[: list(config.stages).index(shipped.name) + 1]:
        trained = folder.stage(name).trained
        assert trained is not None
        stages.append(TrainedStage(name, stage.learn, trained.epochs, trained.best_epoch))
    return Training(
        stages=tuple(stages),
        seed=config.seed,
        precision=engine.precision,
        data=config.data.kind,
        images={part: tuple(images.of_class(part)) for part in ("train", "val", "test")},
        grouped=images.catalog.grouped,
        split_sha256=images.split_hash,
        validated_on=images.validation,
    )


def _input(backbone: Backbone, config: Config) -> Input:
    return Input(
        size=backbone.image_size,
        crop=config.data.crop,
        fit=config.data.fit,
        interpolation=backbone.interpolation,
        mean=tuple(backbone.mean),
        std=tuple(backbone.std),
        policy=POLICY_VERSION,
    )
