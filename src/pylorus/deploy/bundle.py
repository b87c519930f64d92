"""The bundle: a trained network as safetensors, and beside it all that must be known to use it."""

import importlib.metadata

import numpy as np
from safetensors.torch import save_file

from pylorus import __version__
from pylorus.config import Config
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
from pylorus.deploy.passing import Passed, mean_directions, pass_over
from pylorus.deploy.strict import plain
from pylorus.evaluation.calibration import probabilities_of_logits
from pylorus.files import whole, write_json, write_text
from pylorus.machine.engine import Engine
from pylorus.model.backbone import Backbone
from pylorus.model.weights import sha256
from pylorus.report.calibrated import calibrate
from pylorus.report.saved_json import read_json
from pylorus.report.saved_predictions import read_predictions
from pylorus.runs.folder import RunFolder

PACKAGES = ("timm", "torch", "numpy", "pillow", "safetensors")


def write_bundle(folder: RunFolder, backbone: Backbone, images: Images, config: Config, engine: Engine) -> None:
    """Writes the folder `model` of a run; no file name of an image and no patient is in it.

    Temperature and thresholds come from what the last stage said of the validation images, the figures from what it
    said of the test images. What tells unlike images comes from one more pass over the images.

    Args:
        folder: The run's, whose stages are finished.
        backbone: The trained network and the input that it takes.
        images: Classes and the split that it was trained on.
        config: Of the run.
        engine: What the run computes on.
    """
    given = _input(backbone, config)
    parts = pass_over(backbone, given.form, images, config, engine)
    directions = mean_directions(parts["train"], len(images.catalog.classes))
    place = folder.path / "model"
    network = {name: tensor.contiguous() for name, tensor in backbone.network.state_dict().items()}
    for name, tensors in ((WEIGHTS, network), (UNLIKE, {DIRECTIONS: directions})):
        with whole(place / name) as temporary:
            save_file(tensors, temporary)
    far = {part: unlikeness(parts[part].features, directions).numpy().astype(np.float64) for part in ("val", "test")}
    found = Unlikeness(len(parts["train"].rows), far["val"], far["test"], parts["test"].rows)
    description = _description(folder, backbone, images, config, engine, given, found, parts["test"])
    check_description(description)
    write_json(place / DESCRIPTION, plain(description))
    leaks = (read_json(folder.path / AUDIT) or {}).get("accepted_leaks", {})
    write_text(place / CARD, model_card(description, leaks=leaks))
    write_text(place / SUMS, "".join(f"{sha256(place / name)}  {name}\n" for name in FILES))


def _description(
    folder: RunFolder,
    backbone: Backbone,
    images: Images,
    config: Config,
    engine: Engine,
    given: Input,
    found: Unlikeness,
    passed: Passed,
) -> Description:
    last, names = list(config.stages)[-1], images.catalog.short_names
    validation, test = (read_predictions(folder.predictions(last, part), order=names) for part in ("val", "test"))
    calibration = calibrate(validation, test)
    again = probabilities_of_logits(passed.logits.astype(np.float64))
    deciding = deciding_class(config.deploy, classes=images.catalog.classes, short_names=names)
    difference = float(np.abs(again - test.predictions.probabilities[passed.rows]).max())
    return Description(
        format_version=FORMAT_VERSION,
        architecture=backbone.name,
        arguments=plain(config.model.args),
        classes=tuple(images.catalog.classes),
        short_names=tuple(names),
        input=given,
        weights=Weights(backbone.weights, backbone.weights_sha256, backbone.licence),
        training=_training(folder, images, config, engine),
        calibration=said_calibration(calibration),
        decision=fixed_decision(calibration, config.deploy, class_name=deciding),
        prediction_sets=fixed_sets(calibration, config.deploy.prediction_sets),
        abstention=fixed_abstention(calibration, found),
        test=figures_of(calibration.test),
        largest_difference=difference,
        intended_use=INTENDED_USE,
        versions={"pylorus": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
    )


def _training(folder: RunFolder, images: Images, config: Config, engine: Engine) -> Training:
    stages = []
    for name, stage in config.stages.items():
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
