"""`pylorus bakeoff`: compare pretrained networks on one image set by linear heads on their frozen features.

Each network processes each image once, through the cache of features that runs use. All heads of a network are then
trained at once. Validation images choose the head of each network, and the network; the test images are used once, for
the chosen head of each network.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from timm.models import get_pretrained_cfg
from torch import nn

from pylorus.config.checks import check_model_name, check_paths
from pylorus.config.schema import CONF, AugmentConfig, Config, list_group_files
from pylorus.core.distributed import SINGLE_PROCESS, compute_seed
from pylorus.core.errors import TRAIN_COMMAND, PylorusError, explain_interrupt, format_suggestion, suggest_path
from pylorus.core.formatting import format_command, format_count, format_percent, open_progress_bar
from pylorus.core.io import LOCK, check_new_folder, convert_to_plain, lock_folder, read_json, write_json
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.input_format import InputFormat
from pylorus.data.prepare import prepare_images
from pylorus.data.split import RunImages
from pylorus.hardware import Engine, get_batch_size, resolve_engine, resolve_workers
from pylorus.launch.corrections import explain_error
from pylorus.launch.main import format_config_dir, resolve_config
from pylorus.launch.overrides import check_overrides
from pylorus.launch.train import check_network
from pylorus.model.backbone import Backbone, build_backbone, build_trial_network
from pylorus.model.finetuning import resolve_depth
from pylorus.model.frozen_features import build_evaluator
from pylorus.model.hub import find_all_weights, format_timm_name
from pylorus.model.inference import measure_cost, prepare_network
from pylorus.model.weights import list_classifier_names
from pylorus.report.bakeoff import BakeoffResult, NetworkResult, rank_networks, write_bakeoff_page
from pylorus.runs.console import open_run_log
from pylorus.runs.predictions import build_prediction_table, read_predictions, write_predictions
from pylorus.runs.process import handle_signals
from pylorus.training.heads import (
    HeadSettings,
    check_linear_head,
    choose_head,
    compute_features,
    score_heads,
    train_heads,
)
from pylorus.training.stage import resolve_device_memory

log = logging.getLogger(__name__)

RECORD, DATA, NETWORKS = "bakeoff.json", "data", "networks"
"""What was compared; folders of the image set's files (split.csv, audit.json, …) and of each network's results."""
SETTABLE = ("data", "cache", "trainer")
"""Sections of the configuration that `--set` may change."""
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
WEIGHT_DECAYS = (0.0, 0.01, 0.1, 1.0)
CLASS_WEIGHTS = ("none", "balanced")


@dataclass(frozen=True, kw_only=True)
class BakeoffOptions:
    """Options of a bake-off.

    Attributes:
        models: Networks, each a file of conf/model or a timm model with or without a tag.
        weights: hub, none, or a folder with a file NAME.safetensors for each network; None: as each model's file says.
        group: Regular expression that finds the patient in a path; None: no patients are known.
        sizes: Sides of the input in pixels; none: the size that each network was designed for.
        lrs: Learning rates of the heads.
        weight_decays: Weight decays of the heads.
        class_weights: Class weightings of the heads: none, balanced.
        losses: Losses of the heads: cross_entropy; logit_adjusted, which allows for no class weights.
        seeds: Number of seeds, from 0.
        epochs: Epochs of the heads; None: those of the stage `pretrain`.
        patience: Epochs without improvement after which a head stops; None: it never does.
        overrides: Further keys of a run, of the sections in `SETTABLE`.
        config_dir: Folder of the user's own configuration; None for none.
    """

    models: tuple[str, ...]
    weights: str | None = None
    group: str | None = None
    sizes: tuple[int, ...] = ()
    lrs: tuple[float, ...] = LRS
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS
    class_weights: tuple[str, ...] = CLASS_WEIGHTS
    losses: tuple[str, ...] = ("cross_entropy",)
    seeds: int = 3
    epochs: int | None = None
    patience: int | None = 5
    overrides: tuple[str, ...] = ()
    config_dir: Path | None = None


# --- what is compared ---


@dataclass(frozen=True)
class Candidate:
    """A network of the comparison.

    Attributes:
        label: What texts call it.
        words: Overrides that make a run use it.
        config: The configuration of a run with it, in the stage `pretrain`.
    """

    label: str
    words: tuple[str, ...]
    config: Config

    @property
    def file_stem(self) -> str:
        """Stem of the names of its files."""
        return self.label.replace(" at ", "-").replace(" px", "")


def build_candidates(root: Path, options: BakeoffOptions) -> list[Candidate]:
    """Build the configuration of each network, and check networks and weights; no image is read.

    Raises:
        PylorusError: If an option is invalid, a network is unknown, named twice or without a linear head, or its
            weights are absent; the message says what to type.
    """
    _check_options(options)
    if not any(word.startswith("data=") for word in options.overrides) and not root.is_dir():
        raise PylorusError(
            f"ROOT: found {root}, expected an existing folder of class folders.{suggest_path(str(root))}"
        )
    common = ["stage=pretrain", f"data.root={root}"]
    common += [] if options.group is None else [f"data.group={options.group}"]
    common += [] if options.epochs is None else [f"stages.pretrain.epochs={options.epochs}"]
    common += [f"stages.pretrain.patience={'null' if options.patience is None else options.patience}"]
    common += options.overrides
    words = [_select_model(name, options.config_dir) for name in options.models]
    configs = [_compose([*common, *each], options.config_dir) for each in words]
    _check_data(configs[0])
    _check_distinct(options.models, configs)
    models = {name: config.model for name, config in zip(options.models, configs, strict=True)}
    files = find_all_weights(models, options.weights)
    candidates = []
    for name, model_words, config in zip(options.models, words, configs, strict=True):
        weights = files[name]
        own_weights = [] if weights is None or weights == config.model.weights else [f"model.weights={weights}"]
        for size in options.sizes or (None,):
            size_words = [] if size is None else [f"data.image_size={size}"]
            label = name if len(options.sizes) < 2 else f"{name} at {size} px"
            candidate_words = (*model_words, *own_weights, *size_words)
            composed = _compose([*common, *candidate_words], options.config_dir)
            candidates.append(Candidate(label, candidate_words, composed))
    return candidates


def _check_options(options: BakeoffOptions) -> None:
    if not options.models:
        raise PylorusError("--models: found none, expected names, as in --models resnet50 vgg19.")
    for name, values in (("--lr", options.lrs), ("--weight-decay", options.weight_decays)):
        for value in values:
            if not (0 < value < 1e3 if name == "--lr" else 0 <= value < 1e3):
                expected = "more than 0" if name == "--lr" else "0 or more"
                raise PylorusError(f"{name}: found {value:g}, expected {expected} and less than 1,000.")
        if len(set(values)) < len(values):
            raise PylorusError(f"{name}: found a value twice in {', '.join(f'{value:g}' for value in values)}.")
    for name, number, low in (
        ("--seeds", options.seeds, 1),
        ("--epochs", options.epochs, 1),
        ("--patience", options.patience, 1),
    ):
        if number is not None and number < low:
            raise PylorusError(f"{name}: found {number}, expected at least {low}.")
    if len(set(options.sizes)) < len(options.sizes):
        raise PylorusError("--image-size: found a size twice.")
    for word in options.overrides:
        section = word.lstrip("+~").partition("=")[0].partition(".")[0]
        if section not in SETTABLE or "=" not in word:
            raise PylorusError(
                f"--set: found {word}, expected KEY=VALUE with a key that begins with {', '.join(SETTABLE)}. Learning "
                "rate, weight decay, class weights, loss, seeds and epochs have options of their own: pylorus bakeoff "
                "--help"
            )


def _select_model(name: str, config_dir: Path | None) -> tuple[str, ...]:
    """Return the overrides that select a network by the name of a file in conf/model or of a timm model."""
    own = [] if config_dir is None else [path.stem for path in (config_dir / "model").glob("*.yaml")]
    files = [*own, *(each for each in list_group_files("model") if each != "timm")]
    if name in files:
        return (f"model={name}",)
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise PylorusError(
            f"--models: timm {timm.__version__} has no {name[:100]}, nor has {CONF / 'model'}."
            f"{format_suggestion(name[:100], [*files, *known])}"
        )
    check_model_name(name, where="--models")
    return ("model=timm", f"model.name={name}")


def _compose(overrides: Sequence[str], config_dir: Path | None) -> Config:
    """Return the configuration of a run with these overrides."""
    words = [*overrides, *([] if config_dir is None else [format_config_dir(config_dir, list(overrides))])]
    try:
        return resolve_config(check_overrides(words))
    except (HydraException, OmegaConfBaseException) as error:
        raise PylorusError(explain_error(error, words)) from error


def _check_data(config: Config) -> None:
    """Check that images, batches and devices are such that heads can be trained and compared."""
    if config.data.validation == "test":
        raise PylorusError(
            "data.validation: found test, but the validation images choose among thousands of heads: the result on the "
            "same images would say nothing. Leave it out."
        )
    if config.data.kind == "synthetic":
        raise PylorusError("data: found synthetic, expected your images. To generate some: pylorus draw DIR")
    if not isinstance(config.trainer.batch_size, int):
        raise PylorusError("trainer.batch_size: found auto, expected a number: heads take no memory worth a search.")
    if config.trainer.devices * config.trainer.nodes > 1:
        raise PylorusError("trainer.devices: found several, expected 1: a bake-off computes on one device.")
    check_paths(config)


def _check_distinct(names: Sequence[str], configs: Sequence[Config]) -> None:
    """Check that the networks are timm's, and that none is compared with itself."""
    seen: dict[str, str] = {}
    for name, config in zip(names, configs, strict=True):
        model = config.model
        if model._target_ is not None:
            raise PylorusError(
                f"--models: {name} is a network of your own (model._target_), expected timm's: compare it by a sweep."
            )
        cfg: Any = get_pretrained_cfg(model.name, allow_unregistered=True)
        full = model.name if cfg is None else format_timm_name(cfg.to_dict())
        key = f"{full} {model.args} {model.mean} {model.std} {model.weights} {model.source}"
        if key in seen:
            twice = "named twice" if seen[key] == name else f"the same network as {seen[key]}"
            raise PylorusError(f"--models: {name} is {twice}. Leave one out.")
        seen[key] = name


# --- the bake-off ---


def run_bakeoff(root: Path, output: Path, options: BakeoffOptions) -> Path:
    """Compare networks on an image set, and return the path of the page.

    What an earlier, interrupted bake-off of the same images computed in `output` is not computed again.

    Args:
        root: Folder of the images.
        output: Folder to write to: new, empty, or that of an earlier bake-off of the same images.
        options: The options.

    Raises:
        PylorusError: If something that the user can fix is wrong; the message says what.
    """
    candidates = build_candidates(root, options)
    data = asdict(candidates[0].config.data) | {"image_size": None, "workers": None}
    _check_output(output, data)
    forms = [_check_candidate(candidate) for candidate in candidates]
    output.mkdir(parents=True, exist_ok=True)
    with (
        lock_folder(output, lambda: f"{output}: another process runs a bake-off in this folder. Wait for it."),
        explain_interrupt("the same command continues"),
        handle_signals(),
        open_run_log(output),
    ):
        write_json(output / RECORD, {"data": data}, sealed=True)
        engine = replace(resolve_engine(candidates[0].config.trainer), precision="32")
        engine.setup_process()
        if not (output / NETWORKS).is_dir():
            shutil.rmtree(output / DATA, ignore_errors=True)  # of an attempt that failed, perhaps with another split
        (output / DATA).mkdir(exist_ok=True)
        images, _ = prepare_images(candidates[0].config, output / DATA, forms[0])
        results, image_data = [], None
        for number, (candidate, form) in enumerate(zip(candidates, forms, strict=True), start=1):
            if image_data is None or image_data.form != form:
                image_data = _build_image_data(candidate.config, images, form, engine)
            place = f"network {number} of {len(candidates)}: {candidate.label}"
            results.append(_load_or_compare(candidate, output / NETWORKS, image_data, images, engine, options, place))
        command = _format_command(candidates, results, root, options)
        result = BakeoffResult(tuple(results), images.catalog.classes, images.catalog.grouped, command)
        page = write_bakeoff_page(result, output)
        record = {"data": data, "command": command, "winner": result.winner.label}
        write_json(
            output / RECORD, record | {"networks": [each.convert_to_plain() for each in result.ranked]}, sealed=True
        )
    print("\n".join(f"- {sentence}" for sentence in (*result.findings, *result.warnings)))
    print(f"\nreport: {page}\nnumbers: {output / 'tables'}\n\nTo fine-tune the winner:\n  {command}")
    return page


def _check_output(output: Path, data: dict[str, Any]) -> None:
    """Check that the folder is new, or that of a bake-off of the same images, or of one that computed nothing yet."""
    record = read_json(output / RECORD) if output.is_dir() else None
    if record is not None and not (output / NETWORKS).is_dir():
        return
    if output.is_dir() and {path.name for path in output.iterdir()} <= {LOCK, "run.log"}:
        return  # another process is just beginning, or was killed then
    if record is None:
        check_new_folder(output, hint="A folder with an earlier bake-off of the same images is accepted, too.")
        return
    now, before = convert_to_plain(data), record["data"]
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        lines = "\n".join(f"  data.{key}: it has {before.get(key)}, found {now[key]}" for key in changed)
        raise PylorusError(
            f"--output: {output} has a bake-off of other images:\n{lines}\nChoose another folder, or the same images."
        )


def _check_candidate(candidate: Candidate) -> InputFormat:
    """Check network and weights, before any image is read, and return how a file becomes the network's input."""
    config = candidate.config
    form = check_network(config)
    assert form is not None  # the network is timm's
    network = build_trial_network(config.model, classes=2, image_size=config.data.image_size)
    names = list_classifier_names(network)
    if len(names) != 1 or not isinstance(network.get_submodule(names[0]), nn.Linear):
        raise PylorusError(
            f"--models: {candidate.label} has no single linear layer as its head, so that its heads can't be trained "
            "at once. Leave it out, and compare it by a sweep: train.py -m model.name=A,B stage=pretrain"
        )
    if config.model.weights not in ("hub", "none"):
        build_backbone(config.model, classes=2, image_size=config.data.image_size)  # the file is read, and must match
    return form


def _build_image_data(config: Config, images: RunImages, form: InputFormat, engine: Engine) -> ImageDataModule:
    return ImageDataModule.from_table(
        images.table,
        images.catalog.root,
        form,
        batch_size=get_batch_size(config.trainer),
        workers=resolve_workers(config.data.workers, engine.accelerator)[0],
        policy=AugmentConfig(),
        seed=0,
        cache=config.cache,
        pin_memory=engine.accelerator == "cuda",
        processes=SINGLE_PROCESS,
        memory=resolve_device_memory(config.cache, engine),
    )


def _load_or_compare(
    candidate: Candidate,
    folder: Path,
    image_data: ImageDataModule,
    images: RunImages,
    engine: Engine,
    options: BakeoffOptions,
    place: str,
) -> NetworkResult:
    """Return the result of a network: from its files if they are of the same comparison, else computed and saved."""
    config, stem = candidate.config, folder / candidate.file_stem
    torch.manual_seed(compute_seed(0, "head"))  # random weights are those of a run with seed 0
    backbone = build_backbone(config.model, classes=len(images.catalog.classes), image_size=config.data.image_size)
    settings = [
        HeadSettings(lr, decay, weights, loss)
        for lr, decay, loss in product(options.lrs, options.weight_decays, options.losses)
        for weights in (options.class_weights if loss == "cross_entropy" else ("none",))
    ]
    key = convert_to_plain(
        {
            "model": asdict(config.model) | {"weights": backbone.weights, "sha256": backbone.weights_sha256},
            "input": image_data.form.get_key(),
            "split": images.split_hash,
            "stage": asdict(config.stages["pretrain"]),
            "batch_size": config.trainer.batch_size,
            "heads": [asdict(each) for each in settings],
            "seeds": options.seeds,
        }
    )
    paths = {split: stem.with_name(f"{stem.name}-{split}.parquet") for split in ("val", "test")}
    record_path = stem.with_name(f"{stem.name}.json")
    record = read_json(record_path)
    if record is not None and record["key"] == key and all(path.is_file() for path in paths.values()):
        log.info("%s: already done", place)
    else:
        folder.mkdir(exist_ok=True)
        record_path.unlink(missing_ok=True)
        record, logits = _compare_heads(candidate, backbone, image_data, engine, options, settings)
        for split, path in paths.items():
            table = build_prediction_table(
                image_data.parts[split], logits[split], names=images.catalog.short_names, split=split
            )
            write_predictions(table, path)
        write_json(record_path, {"key": key, **record}, indent=None, sealed=True)
        _log_network(place, record)
    predictions = {split: read_predictions(path) for split, path in paths.items()}
    return NetworkResult(
        label=candidate.label,
        weights_name=f"{backbone.name}, {_describe_weights(backbone)}",
        image_size=backbone.image_size,
        licence=backbone.licence,
        val=predictions["val"],
        test=predictions["test"],
        record={name: value for name, value in record.items() if name != "key"},
    )


def _describe_weights(backbone: Backbone) -> str:
    return {"hub": "from the hub", "none": "random weights"}.get(backbone.weights, backbone.weights)


def _log_network(place: str, record: dict[str, Any]) -> None:
    seconds = record["seconds"]
    log.info(
        "%s: features in %.1f s, %s in %.1f s; validation accuracy %s %%",
        place,
        seconds["features"],
        format_count(len(record["heads"]), "head"),
        seconds["heads"],
        format_percent(record["val_accuracy"]),
    )


def _compare_heads(
    candidate: Candidate,
    backbone: Backbone,
    image_data: ImageDataModule,
    engine: Engine,
    options: BakeoffOptions,
    settings: Sequence[HeadSettings],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute a network's features, train its heads, and choose one by validation.

    Returns:
        The record of the network as plain values, and the logits of the chosen head for val and test.
    """
    config, seeds = candidate.config, tuple(range(options.seeds))
    start = time.perf_counter()
    with prepare_network(backbone, engine.accelerator) as network:
        check_linear_head(candidate.label, network, image_size=backbone.image_size)
        evaluator = build_evaluator(network, image_data, resolve_depth(backbone.network, "head"), engine, config.cache)
        total = sum(len(table) for table in image_data.parts.values())
        with open_progress_bar(f"{candidate.label} features", total, shown=config.trainer.progress) as bar:
            data = {split: compute_features(evaluator, split, bar.update) for split in ("train", "val", "test")}
        feature_seconds = time.perf_counter() - start
        cost = measure_cost(network, image_size=backbone.image_size)
    start = time.perf_counter()
    on_device = {split: data[split].to(engine.accelerator) for split in data}
    heads = train_heads(
        on_device["train"],
        on_device["val"],
        settings,
        seeds=seeds,
        classes=len(image_data.parts["train"]["label"].unique()),
        stage=config.stages["pretrain"],
        optimizer=config.optimizer,
        batch_size=get_batch_size(config.trainer),
    )
    scores = score_heads(heads, on_device["val"])
    setting, seed = choose_head(candidate.label, heads, scores)
    head_seconds = time.perf_counter() - start
    logits = {
        split: heads.compute_logits(on_device[split].features, seed=seed, setting=setting).cpu().numpy()
        for split in ("val", "test")
    }
    accuracies = [scores[index][setting].accuracy for index in range(len(seeds))]
    record = {
        **cost,
        "seconds": {"features": feature_seconds, "heads": head_seconds},
        "chosen": asdict(settings[setting]) | {"seed": seeds[seed], "epoch": int(heads.best_epoch[seed, setting])},
        "val_accuracy": float(np.mean(accuracies)),
        "val_accuracy_by_seed": accuracies,
        "val_loss": float(np.mean([scores[index][setting].loss for index in range(len(seeds))])),
        "heads": [
            {
                **asdict(settings[column]),
                "seed": seeds[row],
                "epochs": int(heads.epochs[row, column]),
                "best_epoch": int(heads.best_epoch[row, column]),
                "val_accuracy": scores[row][column].accuracy,
                "val_loss": scores[row][column].loss if np.isfinite(scores[row][column].loss) else None,
            }
            for column in range(len(settings))
            for row in range(len(seeds))
        ],
    }
    return record, logits


def _format_command(
    candidates: Sequence[Candidate], results: Sequence[NetworkResult], root: Path, options: BakeoffOptions
) -> str:
    """Return the command that fine-tunes the winner: a head with the chosen settings, then the whole network."""
    winner = rank_networks(results)[0]
    candidate = next(each for each in candidates if each.label == winner.label)
    chosen = winner.record["chosen"]
    words = [f"data.root={root}"]
    words += [] if options.group is None else [f"data.group={options.group}"]
    words += [*options.overrides, *candidate.words, "stage=both", f"stages.pretrain.lr={chosen['lr']:g}"]
    words += [f"stages.pretrain.epochs={options.epochs}"] if options.epochs is not None else []
    words += [f"optimizer.weight_decay={chosen['weight_decay']:g}", f"loss={chosen['loss']}"]
    words += [f"loss.class_weights={chosen['class_weights']}"] if chosen["loss"] == "cross_entropy" else []
    words += [f"seed={chosen['seed']}"]
    config_dir = [] if options.config_dir is None else ["--config-dir", str(options.config_dir)]
    return f"{TRAIN_COMMAND} {format_command([*config_dir, *words])}"
