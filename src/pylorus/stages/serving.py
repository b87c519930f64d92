"""The data of a stage: its images, or cached features of its frozen prefix where possible."""

import logging

from omegaconf import OmegaConf

from pylorus.config import CONF, AugmentConfig, Config, StageConfig
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.input import InputFormat
from pylorus.data.prepare import RunImages
from pylorus.errors import PylorusError, format_suggestion
from pylorus.machine.choices import get_batch_size, resolve_workers
from pylorus.machine.engine import Engine
from pylorus.model.backbone import Backbone
from pylorus.model.classifier import Classifier, StagePlan
from pylorus.model.cut import CannotCutError
from pylorus.model.features import FeatureDataModule
from pylorus.model.freeze import resolve_depth
from pylorus.model.prefix import FrozenPrefix
from pylorus.parallel.processes import Processes

log = logging.getLogger(__name__)


def resolve_augmentation(stage: StageConfig, default: AugmentConfig) -> AugmentConfig:
    """Return the augmentation of a stage: the run's, or the one of conf/augment that it names.

    Raises:
        PylorusError: If there is no such file.
    """
    if stage.augment is None or stage.augment == default.name:
        return default
    files = {path.stem: path for path in (CONF / "augment").glob("*.yaml")}
    if stage.augment not in files:
        raise PylorusError(
            f"stages: augment: there is no augment/{stage.augment}.yaml.{format_suggestion(stage.augment, files)} "
            f"Available: {', '.join(sorted(files))}."
        )
    merged = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(AugmentConfig), OmegaConf.load(files[stage.augment]))
    )
    assert isinstance(merged, AugmentConfig)
    return merged


def build_image_data(
    plan: StagePlan, config: Config, backbone: Backbone, images: RunImages, engine: Engine, processes: Processes
) -> ImageDataModule:
    """Build the data module of a stage's images."""
    return ImageDataModule(
        images.table,
        images.catalog.root,
        InputFormat(backbone.image_size, config.data.fit, backbone.interpolation, config.data.crop),
        batch_size=get_batch_size(config.trainer),
        workers=resolve_workers(config, engine)[0],
        policy=resolve_augmentation(plan.config, config.augment),
        seed=plan.seed,
        cache=config.cache,
        views=plan.config.views,
        validation=images.validation,
        pin_memory=engine.accelerator == "cuda",
        shard_window=config.data.shard_window,
        processes=processes,
    )


def build_stage_data(
    image_data: ImageDataModule, classifier: Classifier, plan: StagePlan, config: Config, engine: Engine
) -> ImageDataModule | FeatureDataModule:
    """Build a data module of features if the network can be split at the stage's depth; else return the images'.

    Sets `classifier.cut` if features are used.
    """
    stage_depth = resolve_depth(classifier.network, plan.config.learn)
    if not config.cache.prefix or not stage_depth.frozen:
        return image_data
    try:
        prefix = FrozenPrefix(classifier, stage_depth, engine, image_size=image_data.form.size)
    except CannotCutError as error:
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
