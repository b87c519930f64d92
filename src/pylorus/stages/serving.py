"""The data of a stage: its images, or cached features of its frozen prefix where possible."""

import logging

from omegaconf import OmegaConf

from pylorus.config import CONF, AugmentConfig, Config, StageConfig
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.input import InputFormat
from pylorus.data.prepare import Images
from pylorus.errors import PylorusError, did_you_mean
from pylorus.machine.choices import images_a_step, workers
from pylorus.machine.engine import Engine
from pylorus.model.backbone import Backbone
from pylorus.model.classifier import Classifier, StagePlan
from pylorus.model.cut import UncuttableError
from pylorus.model.features import FeatureDataModule
from pylorus.model.freeze import depth
from pylorus.model.prefix import Prefix
from pylorus.parallel.processes import Processes

log = logging.getLogger(__name__)


def policy_of(stage: StageConfig, default: AugmentConfig) -> AugmentConfig:
    """Return the augmentation of a stage: the run's, or the one of conf/augment that it names.

    Raises:
        PylorusError: If there is no such file.
    """
    if stage.augment is None or stage.augment == default.name:
        return default
    files = {path.stem: path for path in (CONF / "augment").glob("*.yaml")}
    if stage.augment not in files:
        raise PylorusError(
            f"stages: augment: there is no augment/{stage.augment}.yaml.{did_you_mean(stage.augment, files)} "
            f"Available: {', '.join(sorted(files))}."
        )
    merged = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(AugmentConfig), OmegaConf.load(files[stage.augment]))
    )
    assert isinstance(merged, AugmentConfig)
    return merged


def serve_images(
    plan: StagePlan, config: Config, backbone: Backbone, images: Images, engine: Engine, processes: Processes
) -> ImageDataModule:
    """Build the data module of a stage's images."""
    return ImageDataModule(
        images.table,
        images.catalog.root,
        InputFormat(backbone.image_size, config.data.fit, backbone.interpolation, config.data.crop),
        batch_size=images_a_step(config.trainer),
        workers=workers(config, engine)[0],
        policy=policy_of(plan.config, config.augment),
        seed=plan.seed,
        cache=config.cache,
        views=plan.config.views,
        validation=images.validation,
        pin_memory=engine.accelerator == "cuda",
        shard_window=config.data.shard_window,
        processes=processes,
    )


def serve_features(
    image_data: ImageDataModule, classifier: Classifier, plan: StagePlan, config: Config, engine: Engine
) -> ImageDataModule | FeatureDataModule:
    """Build a data module of features if the network can be split at the stage's depth; else return the images'.

    Sets `classifier.cut` if features are used.
    """
    stage_depth = depth(classifier.network, plan.config.learn)
    if not config.cache.prefix or not stage_depth.frozen:
        return image_data
    try:
        prefix = Prefix(classifier, stage_depth, engine, image_size=image_data.form.size)
    except UncuttableError as error:
        log.warning("%s: frozen layers are recomputed in every epoch: %s", plan.name, error)
        return image_data
    classifier.cut = prefix.cut
    return FeatureDataModule(
        image_data,
        prefix,
        name=plan.name,
        epochs=plan.config.epochs,
        settings=config.cache,
        progress=config.trainer.progress,
    )
