"""Lightning's part of a stage: its Trainer and its fit."""

import inspect
import logging
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.amp.grad_scaler import GradScaler

from pylorus.config.instantiation import instantiate
from pylorus.config.keys import get_averaging_start
from pylorus.config.schema import AveragingConfig, Config, StageConfig
from pylorus.core.distributed import Processes
from pylorus.core.errors import PylorusError, format_suggestion
from pylorus.data.dataset import LoadingProcesses
from pylorus.data.split import RunImages
from pylorus.hardware import Engine
from pylorus.model.averaging import AverageWeights
from pylorus.model.backbone import Backbone
from pylorus.model.classifier import StageClassifier, StagePlan
from pylorus.model.distributed import build_strategy_arguments, use_sharded_network, use_sync_batch_norm
from pylorus.model.finetuning import FreezeBackbone, get_monitor_mode
from pylorus.runs.folder import RunFolder, StageFolder
from pylorus.runs.process import StopRequest, Timeline
from pylorus.training.callbacks import (
    CheckpointFiles,
    Checkpoints,
    CurvesFile,
    EpochLine,
    LossScale,
    SpeedMonitor,
    StageBar,
)
from pylorus.training.dashboards import Dashboard


@dataclass(frozen=True)
class Run:
    """State shared by the stages of a run.

    Attributes:
        config: The run's configuration.
        folder: The run's folder.
        images: The catalog with its split.
        backbone: The network, passed from stage to stage.
        engine: The compute engine.
        dashboard: Loggers of the run's dashboards.
        processes: The run's distributed processes.
        stop: Whether the run has been asked to stop.
        timeline: What this process spends its time on.
        loading: Its processes that decode images; None: the main process decodes them.
    """

    config: Config
    folder: RunFolder
    images: RunImages
    backbone: Backbone
    engine: Engine
    dashboard: Dashboard
    processes: Processes
    stop: StopRequest
    timeline: Timeline
    loading: LoadingProcesses | None = None


log = logging.getLogger(__name__)


ONE_EPOCH = "an epoch ends with one validation, after which Pylorus saves it"
REFUSED_ARGUMENTS = {
    "accelerator": "trainer.accelerator sets it",
    "strategy": "trainer.strategy sets it",
    "devices": "trainer.devices sets it",
    "num_nodes": "trainer.nodes sets it",
    "precision": "trainer.precision sets it",
    "max_epochs": "stages.<stage>.epochs sets it",
    "callbacks": "list yours in `callbacks`, as in callbacks.mine._target_=my_package.MyCallback",
    "logger": "choose one with logger=, or your own with logger._target_",
    "default_root_dir": "everything of a run is in its folder, hydra.run.dir",
    "enable_progress_bar": "trainer.progress sets it",
    "enable_checkpointing": "Pylorus saves checkpoints itself, in the run's folder",
    "enable_model_summary": "network.json and the report have it",
    "num_sanity_val_steps": "Pylorus checks the configuration before the first stage",
    "use_distributed_sampler": "Pylorus shares out the images itself, so that any number of devices trains alike",
    "sync_batchnorm": "with several devices, Pylorus synchronizes batch norm itself",
    "gradient_clip_val": "optimizer.clip sets it",
    "gradient_clip_algorithm": "optimizer.clip limits the norm",
    "accumulate_grad_batches": "trainer.accumulate sets it",
    "max_steps": f"{ONE_EPOCH}; set stages.<stage>.epochs or limit_train_batches",
    "max_time": f"{ONE_EPOCH}; set stages.<stage>.epochs or limit_train_batches",
    "val_check_interval": ONE_EPOCH,
    "check_val_every_n_epoch": ONE_EPOCH,
    "overfit_batches": "Pylorus orders the images itself; set limit_train_batches",
    "limit_test_batches": "Pylorus predicts all test images after training, without the Trainer",
    "limit_predict_batches": "Pylorus predicts all test images after training, without the Trainer",
    "reload_dataloaders_every_n_epochs": "the order of the images is a function of seed and epoch already",
    "barebones": "it switches off the callbacks and loggers that Pylorus needs",
    "inference_mode": "trainer.strategy sets it",
    "plugins": "trainer.precision and trainer.strategy choose them",
}
"""Arguments of Lightning's Trainer that `trainer.args` may not set, and why."""
LIMIT_ARGUMENTS = ("fast_dev_run", "limit_train_batches", "limit_val_batches")


def check_trainer_arguments(arguments: Mapping[str, Any]) -> None:
    """Check `trainer.args`: further arguments of Lightning's Trainer.

    Raises:
        PylorusError: If Pylorus sets an argument itself, if the Trainer has no such argument, or if a limit leaves no
            batch.
    """
    known = [name for name in inspect.signature(pl.Trainer).parameters if name not in REFUSED_ARGUMENTS]
    for name, value in arguments.items():
        key = f"trainer.args.{name}"
        if name in REFUSED_ARGUMENTS:
            own_key = re.match(r"((?:trainer|optimizer)\.\w+) sets it", REFUSED_ARGUMENTS[name])
            hint = f"Use {own_key[1]}={value}." if own_key is not None else "Leave it out."
            raise PylorusError(f"{key}: can't be set here: {REFUSED_ARGUMENTS[name]}. {hint}")
        if name not in known:
            raise PylorusError(
                f"{key}: Lightning's Trainer has no such argument.{format_suggestion(name, known)}\n"
                f"Arguments that can be set: {', '.join(known)}."
            )
        if name == "fast_dev_run":
            if type(value) not in (bool, int) or value < 0:
                raise PylorusError(f"{key}: found {value}, expected true, false or a number of batches.")
        elif name in LIMIT_ARGUMENTS:
            is_valid = (type(value) is int and value >= 1) or (type(value) is float and 0 < value <= 1)
            if not is_valid:
                raise PylorusError(
                    f"{key}: found {value}, expected a number of batches, at least 1, or a fraction of them in (0, 1]."
                )


def _resolve_limits(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return `trainer.args` for the Trainer; a fast development run is an ordinary one of few batches and one epoch.

    Lightning's own would replace the loggers, and with them the curves that report and stages need.
    """
    resolved = dict(arguments)
    batches = int(resolved.pop("fast_dev_run", 0))
    if batches:
        resolved |= {"limit_train_batches": batches, "limit_val_batches": batches, "max_epochs": 1}
    return resolved


def build_trainer(plan: StagePlan, run: Run, stage_folder: StageFolder, speed: SpeedMonitor) -> pl.Trainer:
    """Build the Trainer of a stage, with its loggers, callbacks and `trainer.args`."""
    curves = CurvesFile(stage_folder.metrics_path, last_step=plan.first_epoch + stage_folder.progress.epochs)
    stages = run.config.stages
    names = list(stages)
    following = {name: stages[name].epochs for name in names[names.index(plan.name) + 1 :]}
    progress = run.config.trainer.progress and run.processes.is_first
    progress_bar = [StageBar(plan)] if progress else []
    check_trainer_arguments(run.config.trainer.args)
    further = _resolve_limits(run.config.trainer.args)
    averaging = build_averaging(run.config.averaging, epochs=further.get("max_epochs", plan.config.epochs))
    checkpoints = Checkpoints(
        stage_folder,
        mode=get_monitor_mode(plan.config.monitor),
        processes=run.processes,
        stop=run.stop,
        averaging=averaging,
    )
    precision = build_precision_arguments(run.engine)
    if not run.processes.is_distributed:
        # Named, since Lightning would look for one, and load and initialize MPI for that where it is installed.
        precision["plugins"].append(LightningEnvironment())
    # The dashboard first: after an interruption it is not sent again what the file already holds.
    loggers = [*run.dashboard.create_loggers(known_step=curves.known_step), curves]
    arguments: dict[str, Any] = {
        "accelerator": run.engine.accelerator,
        **build_strategy_arguments(run.processes, run.config.trainer.strategy),
        **precision,
        "accumulate_grad_batches": run.config.trainer.accumulate,
        "max_epochs": plan.config.epochs,
        "callbacks": [
            FreezeBackbone(plan.config.learn),
            *([] if averaging is None else [averaging]),
            *_build_early_stopping(plan.config),
            EpochLine(plan, following=following),
            speed,
            *([LossScale(plan)] if run.engine.precision == "16" else []),
            *progress_bar,
            *build_callbacks(run.config.callbacks),
            checkpoints,
        ],
        "logger": loggers if run.processes.is_first else False,
        "default_root_dir": stage_folder.path,
        "enable_progress_bar": progress,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    if set(LIMIT_ARGUMENTS) & set(further):
        log.warning("%s: trained and validated on some batches only (trainer.args)", plan.name)
    with _explain_refusal(further):
        return pl.Trainer(**arguments | further)


def build_averaging(config: AveragingConfig, *, epochs: int) -> AverageWeights | None:
    """Build the callback that averages the weights of a stage of so many epochs; None if they are not averaged."""
    if config.name == "none":
        return None
    method = cast(Literal["ema", "mean"], config.name)
    start_epoch = int(round(get_averaging_start(config) * epochs, 6))  # 0.29 · 100 is 28.999…
    return AverageWeights(method, decay=config.decay, every=config.every, start_epoch=start_epoch)


def build_precision_arguments(engine: Engine) -> dict[str, Any]:
    """Return the Trainer arguments for checkpoints and precision; in fp16 it scales the loss: no gradient becomes 0."""
    if engine.precision != "16":
        return {"precision": engine.lightning_precision, "plugins": [CheckpointFiles()]}
    return {
        "plugins": [CheckpointFiles(), MixedPrecision("16-mixed", engine.accelerator, GradScaler(engine.accelerator))]
    }


@contextmanager
def _explain_refusal(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Raise Lightning's refusal of `trainer.args` as an error that names the key."""
    try:
        yield
    except MisconfigurationException as error:
        if not arguments:
            raise
        raise PylorusError(f"trainer.args: found {dict(arguments)}, which Lightning refuses: {error}") from error


def build_callbacks(configured: Mapping[str, Any]) -> list[pl.Callback]:
    """Build the user's own callbacks, new ones for each stage.

    Raises:
        PylorusError: If one can't be built, is not a callback, or would write checkpoints beside ours.
    """
    callbacks = {name: instantiate(node, key=f"callbacks.{name}") for name, node in configured.items()}
    for name, callback in callbacks.items():
        if isinstance(callback, AverageWeights | WeightAveraging | StochasticWeightAveraging):
            raise PylorusError(
                f"callbacks.{name}: found {type(callback).__name__}, which Pylorus adds itself, so that a run resumes "
                "exactly and its report says so. Leave it out, and add averaging=ema or averaging=mean."
            )
        if not isinstance(callback, pl.Callback) or isinstance(callback, Checkpoint):
            raise PylorusError(
                f"callbacks.{name}: found {type(callback).__name__}, expected a pytorch_lightning.Callback other than "
                "ModelCheckpoint: Pylorus saves the checkpoints itself."
            )
    return list(callbacks.values())


def fit_stage(
    trainer: pl.Trainer, classifier: StageClassifier, data: pl.LightningDataModule, stage_folder: StageFolder, run: Run
) -> None:
    """Fit from the stage's start, or from where it was last saved."""
    checkpoint = stage_folder.last_checkpoint if stage_folder.last_checkpoint.is_file() else None
    if checkpoint is not None:
        epochs, batches = stage_folder.progress
        log.info("%s resumes after epoch %d%s", classifier.plan.name, epochs, f", batch {batches}" * (batches > 0))
    with (
        _handle_interrupts(trainer),
        use_sync_batch_norm(classifier.network, classifier.processes, accelerator=run.engine.accelerator),
        _use_sharding(classifier, run),
        _explain_refusal(run.config.trainer.args),
    ):
        trainer.fit(classifier, data, ckpt_path=checkpoint, weights_only=True)


@contextmanager
def _use_sharding(classifier: StageClassifier, run: Run) -> Iterator[None]:
    """Shard the trainable weights among the devices, if configured."""
    if not (run.processes.is_distributed and run.config.trainer.strategy == "fsdp"):
        yield
        return
    with use_sharded_network(classifier, run.engine.accelerator, image_size=run.backbone.image_size) as (
        local_count,
        trainable_count,
    ):
        name = classifier.plan.name
        log.info(
            "%s: the first device holds %s of the %s trainable parameters",
            name,
            f"{local_count:,}",
            f"{trainable_count:,}",
        )
        yield


@contextmanager
def _handle_interrupts(trainer: pl.Trainer) -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, where Lightning raises SystemExit and then ignores further signals."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        original = error.__context__
        if isinstance(original, KeyboardInterrupt):  # it may be that of a time limit
            raise type(original)(*original.args) from error
        raise KeyboardInterrupt from error


def _build_early_stopping(stage: StageConfig) -> list[pl.Callback]:
    if stage.patience is None:
        return []
    # An undefined precision is no reason to stop; a NaN or infinite loss stops the run elsewhere.
    # Checking at validation makes its decision part of what is saved at the epoch's end.
    return [
        EarlyStopping(
            "monitor",
            mode=get_monitor_mode(stage.monitor),
            patience=stage.patience,
            check_finite=False,
            check_on_train_epoch_end=False,
        )
    ]
