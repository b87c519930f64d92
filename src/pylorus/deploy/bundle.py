"""Write the bundle: a trained network as safetensors, with everything that must be known to use it."""

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pylorus import __version__
from pylorus.config.keys import describe_averaging, list_loss_details
from pylorus.config.schema import AugmentConfig, Config
from pylorus.core.errors import format_path
from pylorus.core.io import convert_to_plain, read_json, write_atomically, write_digest, write_json, write_text
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.dataset import DeviceMemory, LoadingProcesses
from pylorus.data.decode import POLICY_VERSION
from pylorus.data.field_of_view import FINDER
from pylorus.data.input_format import measure_quality, resolve_mask
from pylorus.data.prepare import AUDIT_FILE as AUDIT
from pylorus.data.split import RunImages
from pylorus.deploy.bundle_files import DIRECTIONS, build_description
from pylorus.deploy.card import format_answered_images, render_model_card
from pylorus.deploy.description import (
    FORMAT_VERSION,
    INTENDED_USE,
    Description,
    InputSpecification,
    StageSummary,
    Training,
    Weights,
)
from pylorus.deploy.fingerprints import build_fingerprints, convert_fingerprints, derive_salt, summarize_fingerprints
from pylorus.deploy.thresholds import (
    TrainingDistances,
    build_usage_reference,
    collect_answers,
    compute_classification_metrics,
    convert_calibration,
    estimate_class_metrics,
    fit_abstention,
    fit_decision,
    fit_prediction_sets,
    resolve_deciding_class,
)
from pylorus.deploy.verified_files import (
    CARD,
    DESCRIPTION,
    FILES,
    FINGERPRINTS,
    LOOKS,
    SIGNATURE,
    SUMS,
    UNLIKE,
    WEIGHTS,
)
from pylorus.hardware import Engine, get_batch_size, resolve_workers
from pylorus.model.backbone import Backbone
from pylorus.model.finetuning import resolve_depth, resolve_learn
from pylorus.model.frozen_features import build_evaluator
from pylorus.model.inference import (
    APPEARANCE_LENGTH,
    AppearanceModel,
    combine_distances,
    compute_appearance,
    compute_mean_directions,
    compute_split_appearance,
    compute_unlikeness,
    fit_appearance,
    fit_scales,
    prepare_network,
    select_feature_rows,
    select_training_rows,
)
from pylorus.model.weights import compute_sha256
from pylorus.report.results import calibrate_predictions
from pylorus.runs.folder import PARTS, RunFolder, ShippedStage, score_stage, select_stage
from pylorus.runs.predictions import read_predictions
from pylorus.runs.process import Timeline

log = logging.getLogger(__name__)

PACKAGES = ("timm", "torch", "numpy", "pillow", "safetensors")


def save_candidate(folder: RunFolder, network: nn.Module, config: Config, images: RunImages, stage: str) -> None:
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
    is_candidate = (
        config.deploy.stage in (None, stage) and _select_shipped_stage(folder, config, images, finished).name == stage
    )
    if not is_candidate or stage == names[-1]:
        return
    if not folder.get_stage(stage).network_path.is_file():
        save_tensors(folder.get_stage(stage).network_path, network.state_dict())
        write_digest(folder.get_stage(stage).network_path)
    for earlier in finished[:-1]:
        folder.get_stage(earlier).network_path.unlink(missing_ok=True)


def write_bundle(
    folder: RunFolder,
    backbone: Backbone,
    images: RunImages,
    config: Config,
    engine: Engine,
    timeline: Timeline,
    loading: LoadingProcesses | None = None,
    memory: DeviceMemory | None = None,
) -> ShippedStage:
    """Write the shipped stage of a run to its folder `model`; it contains no file names of images and no patients.

    Temperature, thresholds and performance come from the predictions of that stage's best epoch for validation and
    test images, computed in the bundle's own arithmetic; the reference directions and the appearance for
    out-of-distribution detection are computed here from the training images.

    Args:
        folder: Folder of a run whose stages are finished.
        backbone: The network of the last stage and the input that it takes.
        images: The images with their classes and the split that the network was trained on.
        config: The run's configuration.
        engine: The run's compute engine.
        timeline: What this process spends its time on: features, distances and thresholds count as evaluation.
        loading: The run's processes that decode images; None: there are none.
        memory: Where the images are held beside the network; None: in the main memory.

    Returns:
        The shipped stage, and how it was chosen.
    """
    shipped = _select_shipped_stage(folder, config, images, list(config.stages))
    stage = folder.get_stage(shipped.name)
    if shipped.name != list(config.stages)[-1]:
        backbone.network.load_state_dict(load_file(stage.network_path))
    input_settings = _build_input(backbone, config)
    datamodule = ImageDataModule.from_table(
        images.table,
        images.catalog.root,
        input_settings.form,
        batch_size=get_batch_size(config.trainer),
        workers=resolve_workers(config.data.workers, engine.accelerator)[0],
        policy=AugmentConfig(),
        seed=0,
        cache=config.cache,
        validation=images.validation,
        loading=loading,
        memory=memory,
    )
    log.info("model    computing features of training images for out-of-distribution detection")
    classes = len(images.catalog.classes)
    stage_depth = resolve_depth(backbone.network, config.stages[shipped.name].learn)
    with timeline.measure("evaluation"), prepare_network(backbone, engine.accelerator) as network:
        evaluator = build_evaluator(network, datamodule, stage_depth, engine, config.cache)
        directions = compute_mean_directions(evaluator, classes=classes)
    by_feature = {part: compute_unlikeness(torch.from_numpy(stage.read_features(part)), directions) for part in PARTS}
    with timeline.measure("evaluation"):
        appearance, distances = _measure_distances(datamodule, by_feature, classes=classes)
    with timeline.measure("evaluation"):
        description = _build_description(folder, backbone, images, config, engine, input_settings, distances, shipped)
    log.info("model    %s", format_answered_images(description.abstention))
    fingerprints = None
    if config.deploy.fingerprints:
        development = images.table[images.table["split"].isin(["train", images.validation])]
        fingerprints = build_fingerprints(
            images.catalog.root,
            development,
            store=Path(config.cache.folder) / "facts",
            salt=derive_salt(backbone.network.state_dict()),
        )
        description = replace(description, fingerprints=summarize_fingerprints(fingerprints))
    content = convert_to_plain(description)
    build_description(content)  # checks what whoever loads the bundle will check
    bundle = folder.path / "model"
    for name in (SUMS, SIGNATURE):  # without them the folder is not a bundle until all files are written
        (bundle / name).unlink(missing_ok=True)
    save_tensors(bundle / WEIGHTS, backbone.network.state_dict())
    save_tensors(bundle / UNLIKE, {DIRECTIONS: directions})
    save_tensors(bundle / LOOKS, appearance.tensors)
    (bundle / FINGERPRINTS).unlink(missing_ok=True)  # of an attempt with another configuration
    if fingerprints is not None:
        save_tensors(bundle / FINGERPRINTS, convert_fingerprints(fingerprints))
    write_json(bundle / DESCRIPTION, content)
    leaks = (read_json(folder.path / AUDIT) or {}).get("accepted_leaks", {})
    saved = read_predictions(folder.get_predictions_path(shipped.name, "test"), order=images.catalog.short_names)
    class_metrics = estimate_class_metrics(saved.predictions, config.metrics, stage.read_own_metrics())
    write_text(bundle / CARD, render_model_card(description, leaks=leaks, class_metrics=class_metrics))
    listed = (*FILES, LOOKS, *(() if fingerprints is None else (FINGERPRINTS,)))
    write_text(bundle / SUMS, "".join(f"{compute_sha256(bundle / name)}  {name}\n" for name in listed))
    for name in config.stages:
        folder.get_stage(name).delete_candidate()
    return shipped


def _measure_distances(
    datamodule: ImageDataModule, by_feature: Mapping[str, Tensor], *, classes: int
) -> tuple[AppearanceModel, TrainingDistances]:
    """Fit how the training images look, and compute the distances of validation and test images from them.

    Args:
        datamodule: The images, as the bundle reads them.
        by_feature: Distances of features of the validation and test images whose features are saved, by split.
        classes: Number of classes.
    """
    labels = datamodule.parts["train"]["label"].to_numpy(dtype=np.int64)
    training_rows = select_training_rows(labels, classes=classes)
    statistics = compute_split_appearance(datamodule, "train", training_rows)
    appearance = fit_appearance(statistics, torch.from_numpy(labels[training_rows]), classes=classes)
    rows = {part: select_feature_rows(len(datamodule.parts[part])) for part in PARTS}
    looks = {part: compute_split_appearance(datamodule, part, rows[part], _measure_looks) for part in PARTS}
    by_appearance = {part: appearance(looks[part][:, :APPEARANCE_LENGTH]) for part in PARTS}
    appearance.scales = fit_scales(torch.stack([by_feature["val"], by_appearance["val"]], dim=1))
    combined = {
        part: combine_distances(by_feature[part], by_appearance[part], appearance.scales).numpy().astype(np.float64)
        for part in PARTS
    }
    return appearance, TrainingDistances(
        training=len(training_rows),
        validation=combined["val"],
        validation_rows=rows["val"],
        test=combined["test"],
        test_rows=rows["test"],
        test_quality=looks["test"][:, APPEARANCE_LENGTH:].numpy().astype(np.float64),
    )


def _measure_looks(image: Tensor) -> Tensor:
    """Compute appearance and quality of a batch, one row for each image, reading the images once."""
    quality = measure_quality(np.ascontiguousarray(image.cpu().numpy().transpose(0, 2, 3, 1)))
    return torch.cat([compute_appearance(image).cpu(), torch.from_numpy(quality.astype(np.float32))], dim=1)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors: completely, or not at all."""
    with write_atomically(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says; safetensors lets nobody but the owner read its files
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.chmod(mode)


def _select_shipped_stage(folder: RunFolder, config: Config, images: RunImages, stages: Sequence[str]) -> ShippedStage:
    """Return the stage to ship among some finished stages."""
    scores = {}
    for name in stages:
        validation = read_predictions(folder.get_predictions_path(name, "val"), order=images.catalog.short_names)
        scores[name] = score_stage(validation.logits, validation.predictions.true)
    return select_stage(scores, asked=config.deploy.stage)


def _build_description(
    folder: RunFolder,
    backbone: Backbone,
    images: RunImages,
    config: Config,
    engine: Engine,
    input_settings: InputSpecification,
    distances: TrainingDistances,
    shipped: ShippedStage,
) -> Description:
    names = images.catalog.short_names
    validation, test = (
        read_predictions(folder.get_predictions_path(shipped.name, part), order=names) for part in PARTS
    )
    calibration = calibrate_predictions(validation, test)
    deciding = resolve_deciding_class(config.deploy, classes=images.catalog.classes, short_names=names)
    decision = fit_decision(calibration, config.deploy, class_name=deciding)
    abstention = fit_abstention(calibration, distances, confidence=config.deploy.confidence)
    rows, clusters = distances.test_rows, calibration.test.clusters
    answers = collect_answers(
        calibration.test.probabilities[rows],
        distances.test,
        distances.test_quality,
        None if clusters is None else clusters[rows],
        names=names,
        decision=decision,
        abstention=abstention,
    )
    return Description(
        format_version=FORMAT_VERSION,
        architecture=backbone.name,
        arguments=convert_to_plain(config.model.args),
        classes=tuple(images.catalog.classes),
        short_names=tuple(names),
        input=input_settings,
        weights=Weights(
            format_path(backbone.weights),
            backbone.weights_sha256,
            backbone.licence,
            accepted_licence=None if config.deploy.accept_licence is None else backbone.licence,
        ),
        training=_build_training(folder, backbone, images, config, engine, shipped),
        shipped=shipped,
        calibration=convert_calibration(calibration),
        decision=decision,
        prediction_sets=fit_prediction_sets(calibration, config.deploy.prediction_sets),
        abstention=abstention,
        test=compute_classification_metrics(calibration.test),
        intended_use=INTENDED_USE,
        versions={"pylorus": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        network=config.model._target_,
        reference=build_usage_reference(answers, split="test") if len(rows) else None,
    )


def _build_training(
    folder: RunFolder, backbone: Backbone, images: RunImages, config: Config, engine: Engine, shipped: ShippedStage
) -> Training:
    stages = []
    for name, stage in list(config.stages.items())[: list(config.stages).index(shipped.name) + 1]:
        trained = folder.get_stage(name).training_result
        assert trained is not None
        learn = resolve_learn(backbone.network, stage.learn)
        averaging = describe_averaging(
            config.averaging, weights=trained.averaged_weights, norms=trained.estimated_norms
        )
        stages.append(StageSummary(name, learn, trained.epochs, trained.best_epoch, averaging))
    return Training(
        stages=tuple(stages),
        seed=config.seed,
        precision=engine.precision,
        data=config.data.kind,
        images={part: tuple(images.count_by_class(part)) for part in ("train", "val", "test")},
        grouped=images.catalog.grouped,
        split_sha256=images.split_hash,
        validated_on=images.validation,
        loss=", ".join(list_loss_details(config.loss)),
    )


def _build_input(backbone: Backbone, config: Config) -> InputSpecification:
    return InputSpecification(
        size=backbone.image_size,
        crop=config.data.crop,
        fit=config.data.fit,
        interpolation=backbone.interpolation,
        mean=tuple(backbone.mean),
        std=tuple(backbone.std),
        policy=POLICY_VERSION,
        mask=resolve_mask(config.data.mask, crop=config.data.crop),
        finder=FINDER,
    )
