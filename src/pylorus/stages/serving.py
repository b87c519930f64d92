"""What a stage is served: its images, or the features of its frozen part where they can be kept."""

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
    """The augmentation of a stage: the run's, or the one of conf/augment that it names.

    Raises:
        PylorusError: If there is no such file.
    """
    if stage.augment is None or stage.augment == default.name:
        return default
    files = {path.stem: path for path in (CONF / "augment").glob("*.yaml")}
    if stage.augment not in files:
        raise PylorusError(
            f"stages: augment: there is no augment/{stage.augment}.yaml.{did_you_mean(stage.augment, files)} "
            f"Known: {', '.join(sorted(files))}."
        )
    merged = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(AugmentConfig), OmegaConf.load(files[stage.augment]))
    )
    assert isinstance(merged, AugmentConfig)
    return merged


def serve_images(
    plan: StagePlan, config: Config, backbone: Backbone, images: Images, engine: Engine, processes: Processes
) -> ImageDataModule:
    """The images of a stage."""
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
    served: ImageDataModule, classifier: Classifier, plan: StagePlan, config: Config, engine: Engine
) -> ImageDataModule | FeatureDataModule:
    """Features in the images' place, where the network can be cut at the stage's depth; else the images.

    The classifier is told of the cut.
    """
    found = depth(classifier.network, plan.config.learn)
    if not config.cache.prefix or not found.frozen:
        return served
    try:
        prefix = Prefix(classifier, found, engine, image_size=served.form.size)
    except UncuttableError as error:
        log.warning("%s: what is frozen is computed again in every epoch: %s", plan.name, error)
        return served
    classifier.cut = prefix.cut
    return FeatureDataModule(
        served,
        prefix,
        name=plan.name,
        epochs=plan.config.epochs,
        settings=config.cache,
        progress=config.trainer.progress,
    )
