"""Run one stage: train, load the best epoch, predict, save."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pylorus.config.instantiation import check_node, get_target
from pylorus.config.schema import EXTENSIBLE, CacheConfig, Config, LossConfig
from pylorus.core.distributed import Processes
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_bytes, format_count, format_estimate, format_percent
from pylorus.core.io import write_json
from pylorus.data.augmentation import build_augmentation, resolve_augmentation
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.dataset import DeviceMemory
from pylorus.data.input_format import InputFormat, resolve_mask
from pylorus.data.split import RunImages
from pylorus.evaluation.confusion import CLASS_METRICS, ClassMetric, compute_class_metric, select_class_metrics
from pylorus.evaluation.influence import estimate_by_jackknife
from pylorus.hardware import (
    Engine,
    FullBatchForward,
    get_batch_size,
    resolve_channels_last,
    resolve_cuda_graphs,
    resolve_workers,
)
from pylorus.model.averaging import AVERAGE_BYTES
from pylorus.model.backbone import Backbone
from pylorus.model.classifier import StageClassifier, StagePlan
from pylorus.model.finetuning import apply_depth, build_optimizer, check_optimizer_name, resolve_depth, resolve_learn
from pylorus.model.frozen_features import FeatureDataModule, FrozenPrefix, build_evaluator
from pylorus.model.frozen_prefix import CannotCutError
from pylorus.model.inference import Evaluator, SplitOutputs, compute_split_outputs, prepare_network
from pylorus.model.objectives import build_loss, build_metrics
from pylorus.runs.folder import PARTS, RunFolder, StageFolder
from pylorus.runs.predictions import (
    SavedPredictions,
    build_prediction_table,
    check_predictions,
    explain_stage_problems,
    read_predictions,
    write_predictions,
)
from pylorus.runs.reading import read_curves
from pylorus.training.callbacks import SpeedMonitor, get_kept_weights
from pylorus.training.dashboards import get_logger_node
from pylorus.training.trainer import Run, build_callbacks, build_trainer, fit_stage

log = logging.getLogger(__name__)

DEVICE_SHARE = 0.25
"""Fraction of a GPU's free memory that images or features may take by default."""


def build_image_data(plan: StagePlan, run: Run) -> ImageDataModule:
    """Build the data module of a stage's images."""
    config, backbone, images, engine = run.config, run.backbone, run.images, run.engine
    return ImageDataModule.from_table(
        images.table,
        images.catalog.root,
        InputFormat(
            backbone.image_size,
            config.data.fit,
            backbone.interpolation,
            config.data.crop,
            resolve_mask(config.data.mask, crop=config.data.crop),
        ),
        batch_size=get_batch_size(config.trainer),
        workers=resolve_workers(config.data.workers, engine.accelerator)[0],
        policy=resolve_augmentation(plan.config, config.augment),
        seed=plan.seed,
        cache=config.cache,
        views=plan.config.views,
        validation=images.validation,
        pin_memory=engine.accelerator == "cuda",
        shard_window=config.data.shard_window,
        processes=run.processes,
        loading=run.loading,
        memory=resolve_device_memory(config.cache, engine),
    )


def resolve_device_memory(settings: CacheConfig, engine: Engine) -> DeviceMemory | None:
    """Return where images and features are held beside the network; None: in the main memory."""
    is_wanted = engine.accelerator == "cuda" if settings.on_device is None else settings.on_device
    share = DEVICE_SHARE if settings.on_device is None else 1.0
    return DeviceMemory(torch.device(engine.accelerator), share) if is_wanted else None


def count_device_bytes(settings: CacheConfig, engine: Engine, *, images: int, image_size: int) -> int:
    """Return how many bytes of a GPU the images of a run will take; 0 if they stay in the main memory."""
    memory, size = resolve_device_memory(settings, engine), images * 3 * image_size**2
    return size if memory is not None and engine.accelerator == "cuda" and memory.has_space(size) else 0


def build_stage_data(
    image_data: ImageDataModule, classifier: StageClassifier, plan: StagePlan, config: Config, engine: Engine
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


@dataclass(frozen=True)
class StageResult:
    """Result of a stage.

    Attributes:
        epochs: Number of epochs trained.
        best_epoch: Epoch whose weights the network now holds, from 1.
        predictions: Predictions for each split, val and test.
    """

    epochs: int
    best_epoch: int
    predictions: dict[str, SavedPredictions]


def run_stage(plan: StagePlan, run: Run) -> StageResult:
    """Train one stage, load its best epoch and save that network's fp32 predictions for validation and test.

    Whatever is in the stage's folder is not done again: a stage resumes where it was last saved.
    """
    stage_folder, images = run.folder.get_stage(plan.name), run.images
    speed = SpeedMonitor(sum(images.count_by_class("train")), run.engine.accelerator)
    classifier = StageClassifier(
        run.backbone,
        images.catalog.short_names,
        plan,
        run.config.optimizer,
        run.config.loss,
        images_of_class=images.count_by_class("train"),
        metrics=build_metrics(run.config.metrics, [plan.config.monitor]),
        channels_last=resolve_channels_last(
            run.config.trainer.channels_last, run.backbone.network, run.engine.accelerator
        )[0],
        processes=run.processes,
    )
    apply_depth(run.backbone.network, plan.config.learn)
    log.info("\n%s", _format_headline(plan, run.backbone, averaging=run.config.averaging.name))
    if stage_folder.is_finished:
        log.info("%s is already finished", plan.name)
        return _load_finished_stage(classifier, stage_folder)
    image_data, weights = build_image_data(plan, run), None
    if stage_folder.training_result is None:
        with run.timeline.measure(plan.name):
            weights = _train(classifier, image_data, run, stage_folder, speed)
    with run.timeline.measure("evaluation"):
        classifier.load_stage_weights(weights or _read_best_weights(stage_folder))
        with prepare_network(run.backbone, run.engine.accelerator) as network:
            stage_depth = resolve_depth(run.backbone.network, plan.config.learn)
            evaluator = build_evaluator(
                network, image_data, stage_depth, run.engine, run.config.cache, cut=classifier.cut
            )
            _predict(plan, run, stage_folder, image_data, evaluator)
    if run.processes.is_first:
        stage_folder.delete_training_state()  # remains if a run was killed right after training
        speed.write_speed(stage_folder.path / "speed.json")
    run.processes.wait()
    return _read_result(stage_folder)


def _train(
    classifier: StageClassifier, image_data: ImageDataModule, run: Run, stage_folder: StageFolder, speed: SpeedMonitor
) -> Mapping[str, Tensor] | None:
    """Train the classifier's stage, from the start or from where it was last saved.

    Returns:
        The weights of its best epoch; None if this process has to read them.
    """
    plan = classifier.plan
    trainer = build_trainer(plan, run, stage_folder, speed)
    image_data.begun = stage_folder.progress
    classifier.sample_ids = {split: image_data.get_sample_ids(split) for split in ("train", "val")}
    with run.timeline.measure("features"):
        data = build_stage_data(image_data, classifier, plan, run.config, run.engine)
    if isinstance(data, FeatureDataModule):
        speed.features_seconds = data.seconds
    trainer_config = run.config.trainer
    # Features of images that are augmented anew are not cached: these batches pass through the whole network.
    is_split = isinstance(data, FeatureDataModule) and data.has_training_features and classifier.cut is not None
    is_captured, _ = resolve_cuda_graphs(trainer_config, run.engine)
    if trainer_config.compile or is_captured:
        classifier.full_batch_forward = FullBatchForward(
            classifier.cut.build_training_module() if is_split and classifier.cut else classifier.network,
            get_batch_size(trainer_config) // run.processes.count,
            is_captured=is_captured,
            is_required=trainer_config.cuda_graphs is not None,
        )
    fit_stage(trainer, classifier, data, stage_folder, run)
    return get_kept_weights(trainer)


def _predict(
    plan: StagePlan, run: Run, stage_folder: StageFolder, image_data: ImageDataModule, evaluator: Evaluator
) -> None:
    """Save the network's predictions for validation and test; if both are the same images, compute them once."""
    outputs: dict[str, SplitOutputs] = {}
    for split in PARTS:
        if split == "test" and run.images.validation == "test":
            outputs[split] = outputs["val"]
        else:
            outputs[split] = compute_split_outputs(evaluator, split, progress=run.config.trainer.progress)
        table = build_prediction_table(
            image_data.parts[split], outputs[split].logits, names=run.images.catalog.short_names, split=split
        )
        if run.processes.is_first:
            saved = check_predictions(table)
            run.dashboard.show_predictions(plan, split, saved, image_data)
            run.folder.check_exists()
            stage_folder.write_features(split, outputs[split].features)
            write_predictions(table, stage_folder.get_predictions_path(split))
            _save_own_metrics(run.config.metrics, saved, stage_folder, split)


def _save_own_metrics(
    metrics: Mapping[str, Any], saved: SavedPredictions, stage_folder: StageFolder, split: str
) -> None:
    """Save the user's own metrics with their intervals, so that a report shows them without running the user's code."""
    own = [metric for metric in build_metrics(metrics) if metric.name not in CLASS_METRICS]
    if not own:
        return
    predictions = saved.predictions
    classes, names = predictions.classes, predictions.class_names
    estimates = {
        metric.name: estimate_by_jackknife(
            lambda table, metric=metric: compute_class_metric(metric, table.reshape(classes, classes)),  # type: ignore[misc]
            predictions.true * classes + predictions.predicted,
            predictions.clusters,
            width=classes**2,
        )
        for metric in own
    }
    content = stage_folder.read_own_metrics()
    for key, attribute in ((split, "value"), (f"{split}/low", "low"), (f"{split}/high", "high")):
        content[key] = _replace_nan(
            {
                metric: {name: getattr(each, attribute) for name, each in zip(names, by_class, strict=True)}
                for metric, by_class in estimates.items()
            }
        )
    write_json(stage_folder.own_metrics_path, content, sealed=True)


def _replace_nan(values: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Replace NaN, which JSON lacks, by null."""
    return {
        metric: {name: value if np.isfinite(value) else None for name, value in by_class.items()}
        for metric, by_class in values.items()
    }


def _read_best_weights(stage_folder: StageFolder) -> Mapping[str, Tensor]:
    weights: Mapping[str, Tensor] = torch.load(stage_folder.best_checkpoint, map_location="cpu", weights_only=True)[
        "state_dict"
    ]
    return weights


def _load_finished_stage(classifier: StageClassifier, stage_folder: StageFolder) -> StageResult:
    classifier.load_stage_weights(_read_best_weights(stage_folder))
    return _read_result(stage_folder)


def _read_result(stage_folder: StageFolder) -> StageResult:
    training_result = stage_folder.training_result
    assert training_result is not None
    predictions = {split: read_predictions(stage_folder.get_predictions_path(split)) for split in PARTS}
    return StageResult(training_result.epochs, training_result.best_epoch, predictions)


def check_user_parts(config: Config) -> None:
    """Import and build what does not depend on the images, so that a typo is reported before they are read.

    Raises:
        PylorusError: Names the key of the unknown metric, callback, optimizer, augmentation, `_target_` or argument.
    """
    build_callbacks(config.callbacks)
    build_metrics(config.metrics, [stage.monitor for stage in config.stages.values()])
    for key in EXTENSIBLE:
        node = get_logger_node(config) if key == "logger" else get_target(getattr(config, key))
        if node is not None:
            check_node(node, key=key)
    if get_target(config.loss) is None:
        build_loss(config.loss, classes=2, images_of_class=[1, 1])
    check_optimizer_name(config.optimizer.name, where="optimizer.name")
    for stage in config.stages.values():
        build_augmentation(resolve_augmentation(stage, config.augment))


def check_stages(config: Config, backbone: Backbone, images: RunImages, processes: Processes) -> None:
    """Build what each stage will need, so that a typo is reported now and not after the previous stage.

    Raises:
        PylorusError: Names the unknown block or wrong argument, or a split with fewer images than devices.
    """
    smallest = min(sum(images.count_by_class(split)) for split in ("train", images.validation, "test"))
    if smallest < processes.count:
        raise PylorusError(
            f"trainer.devices: found {processes.count} devices, but the smallest split has only {smallest} "
            f"{'image' if smallest == 1 else 'images'}."
        )
    build_loss(config.loss, classes=len(images.catalog.classes), images_of_class=images.count_by_class("train"))
    for stage in config.stages.values():
        resolve_depth(backbone.network, stage.learn)
        build_optimizer(backbone.network, stage, config.optimizer)


def _format_headline(plan: StagePlan, backbone: Backbone, *, averaging: str) -> str:
    stage_depth = resolve_depth(backbone.network, plan.config.learn)
    parameters = dict(backbone.network.named_parameters())
    trainable_count = sum(parameters[name].numel() for name in stage_depth.trainable)
    parameter_count = sum(parameter.numel() for parameter in parameters.values())
    learn = resolve_learn(backbone.network, plan.config.learn)
    named = plan.config.learn if learn == plan.config.learn else f"{plan.config.learn}, from {learn} on"
    trained = f"{named} ({trainable_count:,} of {parameter_count:,} parameters)"
    if trainable_count == parameter_count:
        trained = f"all {parameter_count:,} parameters"
    average = f", weights averaged ({averaging}: {format_bytes(AVERAGE_BYTES * trainable_count)})"
    return (
        f"{plan.name}: {backbone.name} at {backbone.image_size} px, training {trained}, "
        f"{format_count(plan.config.epochs, 'epoch')}{average if averaging != 'none' else ''}"
    )


def find_problems(
    plan: StagePlan, result: StageResult, folder: RunFolder, loss: LossConfig, *, weights: str
) -> tuple[str, ...]:
    """Say what makes the result of a stage degenerate; see `explain_stage_problems`."""
    return explain_stage_problems(
        plan.name,
        monitor=plan.config.monitor,
        curves=read_curves(folder.get_stage(plan.name).metrics_path),
        predictions=result.predictions,
        is_cross_entropy=loss.name == "cross_entropy",
        weights=weights,
    )


def log_stage_table(
    plan: StagePlan,
    result: StageResult,
    *,
    validated_on: str = "val",
    metrics: Sequence[ClassMetric] | None = None,
    problems: Sequence[str] = (),
) -> None:
    """Log a table of each class's metrics on validation and test images, at the stage's best epoch.

    Args:
        plan: The stage.
        result: Its result.
        validated_on: val, or test: then the test images selected the best epoch.
        metrics: The indices to show; None: those that tables show.
        problems: Sentences from `find_problems`.
    """
    metrics = select_class_metrics() if metrics is None else metrics
    images = "the test images" if validated_on == "test" else "validation images"
    title = f"{plan.name}: after its only epoch"
    if result.epochs > 1:
        title = f"{plan.name}: epoch {result.best_epoch} of {result.epochs}, best by {plan.config.monitor} on {images}"
    # Without lines between the columns, three classes fit into 80 characters.
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("%", justify="left")
    for split in result.predictions:
        for metric in metrics:
            table.add_column(f"{split}\n{metric.label}", justify="right")
    values = [
        compute_class_metric(metric, saved.confusion) for saved in result.predictions.values() for metric in metrics
    ]
    names = result.predictions["test"].predictions.class_names
    for row, name in enumerate(names):
        table.add_row(name, *(format_percent(by_class[row]) for by_class in values))
    table.add_row("average", *(format_percent(by_class.mean()) for by_class in values), style="bold")
    log.info(
        "\n%s%s",
        _render_text(table),
        "\n".join(_format_accuracy(split, saved) for split, saved in result.predictions.items()),
    )
    for sentence in problems:
        log.warning("%s: %s", plan.name, sentence)


def _render_text(table: Table) -> str:
    """Render a table as text, the same on a terminal and in a file."""
    # Names of classes are no markup.
    console = Console(width=140, color_system=None, force_terminal=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _format_accuracy(split: str, saved: SavedPredictions) -> str:
    """Return accuracy with its confidence interval, and the numbers of images and groups."""
    accuracy = saved.accuracy
    grouping = format_count(saved.groups, "group") if saved.clusters is not None else "each image its own group"
    estimate = format_estimate(accuracy.value, accuracy.low, accuracy.high, label="95 % CI ")
    return f"{split}: accuracy {estimate}, {format_count(saved.images, 'image')}, {grouping}"
