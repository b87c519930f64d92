"""Run the whole pipeline: images → network → stages → a model in a folder.

`python -m pylorus.launch.train FOLDER` runs what FOLDER/config.yaml describes; `train.py` and sweeps call this module
through `pylorus.launch.main`.
"""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from timm.models import get_pretrained_cfg
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pylorus.config.checks import check_model_name, load_config
from pylorus.config.schema import Config, TrainerConfig
from pylorus.core.distributed import (
    SINGLE_PROCESS,
    Processes,
    announce_folder,
    compute_seed,
    is_launched,
    join_process_group,
    read_processes,
)
from pylorus.core.errors import INTERRUPTED, TRAIN_COMMAND, PylorusError, translate_errors
from pylorus.core.formatting import handle_closed_pipe, setup_terminal
from pylorus.core.io import read_json, write_json
from pylorus.core.system import explain_limit, format_kill, reserve_cpu_time
from pylorus.data.catalog import check_root
from pylorus.data.dataset import LoadingProcesses
from pylorus.data.input_format import InputFormat, describe_image_rules, resolve_input_format, save_input_format
from pylorus.data.prepare import prepare_images
from pylorus.data.split import RunImages
from pylorus.deploy.bundle import save_candidate, write_bundle
from pylorus.deploy.description import Weights
from pylorus.deploy.licences import ACCEPT_KEY, check_acceptance, check_passing_on
from pylorus.deploy.thresholds import resolve_deciding_class
from pylorus.hardware import (
    Engine,
    collect_environment,
    list_choices,
    log_choices,
    resolve_accelerator,
    resolve_engine,
    resolve_workers,
)
from pylorus.model.averaging import AVERAGE_BYTES
from pylorus.model.backbone import Backbone, build_backbone, build_trial_network, check_normalization
from pylorus.model.classifier import StagePlan
from pylorus.model.finetuning import (
    BlockStructure,
    can_train_on_one_image,
    extract_network_structure,
    resolve_depth,
)
from pylorus.model.hub import resolve_weights_file
from pylorus.model.objectives import build_metrics
from pylorus.runs.console import detach_streams, find_earlier_failure, open_run_log, print_results
from pylorus.runs.folder import RunFolder
from pylorus.runs.process import (
    IN_SWEEP,
    OTHER,
    STOP_TIMEOUT,
    BackgroundTask,
    StopRequest,
    Timeline,
    check_environment,
    end_after_parent,
    exit_process,
    handle_signals,
    limit_time,
    restore_trainer_config,
)
from pylorus.training.batch_size import resolve_batch_size
from pylorus.training.dashboards import Dashboard
from pylorus.training.processes import ERROR_FILE, explain_faults, train_rank
from pylorus.training.stage import (
    check_stages,
    check_user_parts,
    count_device_bytes,
    find_problems,
    log_stage_table,
    resolve_device_memory,
    run_stage,
)
from pylorus.training.trainer import Run, check_trainer_arguments

FAILURE_PREFIX = ".failure-"
"""Start of the name of the files in which the processes of a SLURM step leave their errors, in the run's folder."""
FAILURE_WINDOW = 5.0
"""Seconds after the first failure in which another process can fail by itself; later ones were stopped."""


def train_in_processes(config: Config, folder: RunFolder) -> None:
    """Train in as many processes as the configuration says, one per device.

    Raises:
        PylorusError: If a process fails; the message is that of the first to fail.
        KeyboardInterrupt: If they are interrupted.
    """
    trainer = config.trainer
    if isinstance(trainer.batch_size, int):
        check_batch_divides(trainer.batch_size, trainer.devices * trainer.nodes)
    if trainer.nodes > 1:
        check_slurm_nodes(trainer)
        failures = _run_slurm_step(trainer, folder.path)
    else:
        failures = _run_elastic(trainer.devices, folder.path)
    if failures:
        raise _build_error(failures, trainer.devices * trainer.nodes, folder.path)


def check_batch_divides(size: int, count: int) -> None:
    """Check that a batch of `size` images divides evenly among `count` processes.

    Raises:
        PylorusError: If not; the message names a size that does.
    """
    if size % count:
        raise PylorusError(
            f"trainer.batch_size: found {size} for {count} devices, expected a multiple of {count}, such as "
            f"{max(1, size // count) * count}."
        )


def check_slurm_nodes(trainer: TrainerConfig) -> None:
    """Check that SLURM allocated the configured number of machines.

    Raises:
        PylorusError: If not; the message says how to request them.
    """
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", "0"))
    if allocated != trainer.nodes or shutil.which("srun") is None:
        raise PylorusError(
            f"trainer.nodes: found {trainer.nodes}, but SLURM allocated {allocated or 'none'}. Put the same command "
            f"into a script, then run: sbatch --nodes={trainer.nodes} --ntasks-per-node={trainer.devices} SCRIPT"
        )


def _run_elastic(devices: int, folder: Path) -> list[ProcessFailure]:
    """Run one process per device of this machine by torch's elastic launch; return the failures of those that failed.

    When this process is interrupted, the launch sends SIGTERM to the others and waits for them.
    """
    # Its log repeats what the run's own error says.
    elastic_log = logging.getLogger("torch.distributed.elastic")
    elastic_log.addHandler(logging.NullHandler())
    elastic_log.propagate = False
    with tempfile.TemporaryDirectory() as error_folder:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id="pylorus",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=error_folder),
            # The others are handled by `handle_signals`: it requeues a SLURM job and ends at once at a second signal.
            signals_to_handle="SIGQUIT",
            shutdown_timeout=int(STOP_TIMEOUT),
        )
        try:
            elastic_launch(launch, sys.executable)(*(word.replace("$", "$$") for word in _list_arguments(folder)))
        except ChildFailedError as error:
            failures = list(error.failures.values())
            first = min(failure.timestamp for failure in failures)
            # A process that the launch stopped did not fail by itself.
            return [failure for failure in failures if failure.timestamp <= first + FAILURE_WINDOW]
        except SignalException as error:
            raise KeyboardInterrupt(error.sigval.name) from error
    return []


def _run_slurm_step(trainer: TrainerConfig, folder: Path) -> list[ProcessFailure]:
    """Run all processes as one step of the current SLURM job; return the failures of those that failed.

    srun starts them, not an elastic agent on each machine: it knows the machines and passes signals and output on.
    """
    # The job's own variables would be mistaken for those of one process.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(find_free_network_port())}
    srun = ["srun", f"--nodes={trainer.nodes}", f"--ntasks-per-node={trainer.devices}", "--kill-on-bad-exit=0"]
    step = subprocess.Popen([*srun, sys.executable, *_list_arguments(folder)], env=environment, start_new_session=True)
    try:
        code = step.wait()
    except BaseException:
        step.send_signal(signal.SIGUSR2)  # srun forwards this signal; SIGTERM makes it kill the processes
        try:
            step.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            step.kill()
        raise
    # srun reports 128 + the signal number.
    exit_code = code if code <= 128 or code == INTERRUPTED else 128 - code
    paths = sorted(folder.glob(f"{FAILURE_PREFIX}*"))
    failures = [ProcessFailure(index, step.pid, 1, str(path)) for index, path in enumerate(paths)]
    for path in paths:
        path.unlink(missing_ok=True)
    is_explained = not code or (failures and exit_code > 0)
    return failures if is_explained else [ProcessFailure(-1, step.pid, exit_code, ""), *failures]


def _list_arguments(folder: Path) -> list[str]:
    return ["-m", "pylorus.launch.train", "--rank", str(folder)]


def _build_error(failures: list[ProcessFailure], count: int, folder: Path) -> BaseException:
    """Return the error that ended the run: that of a killed process, else of the first that failed."""
    for failure in failures:
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:  # SIGTERM is how the launch stops a process
            label = "a process" if failure.local_rank < 0 else f"process {failure.local_rank + 1} of {count}"
            return PylorusError(
                f"{label} {format_kill(failure.exitcode)}. Most often a smaller trainer.batch_size or fewer "
                "trainer.devices help.\n"
                f"Then resume: {TRAIN_COMMAND} resume={folder}"
            )
    messages: list[Any] = [failure.message for failure in failures]  # torch declares str; with an error file, a dict
    errors = [message for message in messages if isinstance(message, dict)]
    if errors:
        first = min(errors, key=lambda error: float(error["extraInfo"]["time"]))
        message, details = str(first["message"]), first["extraInfo"]
        if details["is_user_error"]:
            return PylorusError(message)
        print(details["py_callstack"], file=sys.stderr, end="")
        return PylorusError(f"process {details['rank'] + 1} failed: {message}")
    codes = [failure.exitcode for failure in failures]
    if set(codes) <= {INTERRUPTED, -signal.SIGTERM}:
        return KeyboardInterrupt()
    return PylorusError(f"the run's processes exited with codes {', '.join(map(str, codes))}")


log = logging.getLogger(__name__)


@detach_streams()
def run(folder: RunFolder, reading: BackgroundTask | None = None, timeline: Timeline | None = None) -> None:
    """Run, or resume, what a prepared folder describes; its status.json always reports the outcome.

    Args:
        folder: The run's folder.
        reading: A process that is already reading the images; None: there is none.
        timeline: The timeline of the process; None: one that begins now.
    """
    timeline = timeline or Timeline()
    timeline.begin(OTHER)
    config = load_config(folder.config)
    report_faults = partial(explain_faults, folder, config)
    with report_faults():
        is_finished = folder.read_status()["state"] == "finished"
        if is_finished:
            print(f"already finished: {folder.path}")
        else:
            folder.remove_incomplete_files()
            with (
                _print_resume_hint(config, folder),
                handle_signals() as stop,
                open_run_log(folder.path),
                folder.update_status(),
                limit_time(config.trainer.time_limit, stop),
                report_faults(),
            ):
                for name in config.stages:
                    for sentence in folder.get_stage(name).discard_damaged_files():
                        log.warning(sentence)
                if is_launched():
                    train_launched(config, folder, stop, timeline)
                elif config.trainer.devices * config.trainer.nodes == 1:
                    train(config, folder, SINGLE_PROCESS, stop, timeline, reading)
                else:
                    if reading is not None:
                        reading.wait()
                    train_in_processes(config, folder)
                    timeline.include((read_json(folder.speed) or {}).get("timeline", {}))
        if config.report and not (folder.path / "report" / "report.html").is_file():
            # The run is finished by now: a failing report does not change that.
            with timeline.measure("report"):
                from pylorus.report.page import write_report  # here: it imports Matplotlib

                write_report([folder.path], parallel=True)
    if not is_finished:
        timeline.write(folder.speed)
        print(f"\n{timeline.format_line()}")
        timeline.begin("exit")
    print_results(folder, validated_on="test" if config.data.validation == "test" else "val")


@contextmanager
def _print_resume_hint(config: Config, folder: RunFolder) -> Iterator[None]:
    """Print how to resume a run that ends early, unless its error message or the end of its sweep does."""
    try:
        yield
    except BaseException as error:
        has_checkpoints = any((folder.path / name / "checkpoints").is_dir() for name in config.stages)
        ends_sweep = IN_SWEEP in os.environ and type(error) is KeyboardInterrupt
        if has_checkpoints and not ends_sweep and f"resume={folder.path}" not in str(error):
            print(f"\nprogress is saved; to resume: {TRAIN_COMMAND} resume={folder.path}", file=sys.stderr)
        raise


def train_launched(config: Config, folder: RunFolder, stop: StopRequest, timeline: Timeline) -> None:
    """Train in this process and in those that torchrun or srun started beside it.

    Raises:
        PylorusError: If the configuration expects another number of processes.
    """
    processes, trainer = read_processes(), config.trainer
    if trainer.devices != processes.local_count or trainer.devices * trainer.nodes != processes.count:
        raise PylorusError(
            f"trainer.devices: found {trainer.devices}, and trainer.nodes {trainer.nodes}, but {processes.count} "
            f"processes were started, {processes.local_count} on each machine. Leave both keys out."
        )
    if isinstance(trainer.batch_size, int):
        check_batch_divides(trainer.batch_size, processes.count)
    accelerator, _ = resolve_accelerator(restore_trainer_config(trainer, folder.path / "environment.json"))
    announce_folder(str(folder.path))
    with join_process_group(processes, accelerator=accelerator):
        train(config, folder, processes, stop, timeline)


def train(
    config: Config,
    folder: RunFolder,
    processes: Processes,
    stop: StopRequest,
    timeline: Timeline,
    reading: BackgroundTask | None = None,
) -> None:
    """Train all stages and write their results to the folder.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        processes: The run's processes: this one alone, or several that all call this function.
        stop: Whether the run has been asked to stop.
        timeline: What this process spends its time on.
        reading: A process that is already reading the images; None: there is none.

    Raises:
        PylorusError: If something that the user can fix is wrong; the message says what and how to fix it.
    """
    timeline.begin("setup")
    check_trainer_arguments(config.trainer.args)
    check_user_parts(config)
    record = folder.path / "environment.json"
    initial = restore_trainer_config(config.trainer, record)
    engine = processes.run_on_first(lambda: resolve_engine(initial, Path(config.cache.folder)))
    restored = [name for name in engine.reasons if getattr(initial, name) != getattr(config.trainer, name)]
    engine = replace(engine, reasons={**engine.reasons, **dict.fromkeys(restored, "as chosen when the run started")})
    engine.setup_process(local_count=processes.local_count)
    if config.data.kind == "folders":
        check_root(Path(str(config.data.root)))
    form = processes.run_on_first(lambda: check_network(config))
    with timeline.measure("reading"):
        if reading is not None:
            reading.wait()
        images, config = processes.run_on_first(lambda: prepare_images(config, folder.path, form))
    resolve_deciding_class(config.deploy, classes=images.catalog.classes, short_names=images.catalog.short_names)
    backbone = processes.run_first_then_others(lambda: _build_run_backbone(config))
    _check_licence(config, backbone)
    _check_stage_networks(config, backbone.network, image_size=backbone.image_size)
    check_stages(config, backbone, images, processes)
    config, reason = processes.run_on_first(
        lambda: _set_batch_size(initial, config, backbone, engine, images, processes)
    )
    if processes.is_first:
        resolved = {
            "batch_size": config.trainer.batch_size,
            "weights_sha256": backbone.weights_sha256,
            "image_rules": describe_image_rules(config.data),
        }
        check_environment(record, collect_environment(engine) | resolved)
        log_choices(list_choices(config, engine, backbone.network, why_batch_size=reason))
        write_json(folder.path / "network.json", _extract_structure(config, backbone))
    timeline.begin(OTHER)
    workers, _ = resolve_workers(config.data.workers, engine.accelerator)
    with (
        LoadingProcesses(workers, pin_memory=engine.accelerator == "cuda") if workers else nullcontext() as loading,
        Dashboard(config, folder, shown=processes.is_first) as dashboard,
    ):
        stage_run = Run(config, folder, images, backbone, engine, dashboard, processes, stop, timeline, loading)
        first_epoch = 0
        for name, stage in config.stages.items():
            plan = StagePlan(name, stage, first_epoch, compute_seed(config.seed, "stage", name))
            result = run_stage(plan, stage_run)
            with timeline.measure("evaluation"):
                metrics = build_metrics(config.metrics)
                log_stage_table(
                    plan,
                    result,
                    validated_on=images.validation,
                    metrics=metrics,
                    problems=find_problems(plan, result, folder, config.loss, weights=backbone.weights),
                )
            first_epoch += result.epochs
            if processes.is_first:
                with timeline.measure("bundle"):
                    save_candidate(folder, backbone.network, config, images, name)
        shipped = None
        if processes.is_first:
            with timeline.measure("bundle"):
                memory = resolve_device_memory(config.cache, engine)
                shipped = write_bundle(folder, backbone, images, config, engine, timeline, loading, memory)
            dashboard.show_results()
    if shipped is not None:
        log.info("shipped stage: %s", shipped.name)


def check_network(config: Config) -> InputFormat | None:
    """Check the network, its weights and the stages before any image is read.

    Returns:
        How a file becomes the network's input; None if only the network itself can tell.

    Raises:
        PylorusError: If the network, its weights or a block of a stage does not exist, or the network can't process
            images of that size or batches of one image.
    """
    model = config.model
    if model._target_ is not None:
        return None
    check_model_name(model.name, where="model.name")
    pretrained_cfg = get_pretrained_cfg(model.name, allow_unregistered=True)
    if pretrained_cfg is not None and (model.weights != "hub" or config.data.kind != "synthetic"):
        resolve_weights_file(model, pretrained_cfg.to_dict())  # type: ignore[no-untyped-call]
    check_normalization(model)
    size, fit, crop = config.data.image_size, config.data.fit, config.data.crop
    form = resolve_input_format(model.name, image_size=size, fit=fit, crop=crop, mask=config.data.mask)
    network = build_trial_network(model, classes=len(config.data.classes or ()) or 2, image_size=size)
    _check_stage_networks(config, network, image_size=form.size)
    save_input_format(config, form)
    return form


def _check_stage_networks(config: Config, network: nn.Module, *, image_size: int) -> None:
    """Check that the network has the blocks that the stages train, and can train on batches of one image if it has to.

    Raises:
        PylorusError: If not.
    """
    for name, stage in config.stages.items():
        with translate_errors({"learn": f"stages.{name}.learn"}):
            resolve_depth(network, stage.learn)
        if config.trainer.batch_size == 1 and not can_train_on_one_image(network, stage.learn, image_size=image_size):
            raise PylorusError(
                f"trainer.batch_size: found 1, expected 2 or more: stage {name} trains batch-norm layers of "
                f"{config.model.name}, which compute statistics over the images of a batch."
            )


def _check_licence(config: Config, backbone: Backbone) -> None:
    """Check that an accepted licence is that of the weights, and that a model that is sent away may be passed on.

    Raises:
        PylorusError: If not.
    """
    accepted = config.deploy.accept_licence
    if accepted is not None:
        check_acceptance(backbone.licence, accepted, option=ACCEPT_KEY)
    if config.logger.artifact and not config.logger.offline:
        weights = Weights(backbone.weights, backbone.weights_sha256, backbone.licence, accepted_licence=accepted)
        what = "logger.artifact=true with logger.offline=false, which sends the model away,"
        for warning in check_passing_on([weights], what=what, how=f"add {ACCEPT_KEY}={{licence}}"):
            log.warning("%s", warning)


def _build_run_backbone(config: Config) -> Backbone:
    torch.manual_seed(compute_seed(config.seed, "head"))
    return build_backbone(
        config.model,
        classes=len(config.data.classes or ()),
        image_size=config.data.image_size,
        random_if_unreachable=config.data.kind == "synthetic",
    )


def _set_batch_size(
    initial: TrainerConfig, config: Config, backbone: Backbone, engine: Engine, images: RunImages, processes: Processes
) -> tuple[Config, str]:
    """Return the configuration with the batch size resolved, and why it was chosen."""
    # Processes on a CPU share its memory; each GPU has its own.
    devices = processes.count if engine.accelerator == "cuda" else 1
    training_images = sum(images.count_by_class("train"))
    image_bytes = count_device_bytes(config.cache, engine, images=len(images.table), image_size=backbone.image_size)
    average_bytes = 0
    if config.averaging.name != "none":  # beside which validation holds the last weights
        average_bytes = 2 * AVERAGE_BYTES * sum(parameter.numel() for parameter in backbone.network.parameters())
    reserved = image_bytes + average_bytes
    size, reason = resolve_batch_size(
        initial, config, backbone, engine, images=training_images, devices=devices, reserved=reserved
    )
    check_batch_divides(size, processes.count)
    return replace(config, trainer=replace(config.trainer, batch_size=size)), reason


def _extract_structure(config: Config, backbone: Backbone) -> list[BlockStructure]:
    trainable_names = {
        name: resolve_depth(backbone.network, stage.learn).trainable for name, stage in config.stages.items()
    }
    return extract_network_structure(backbone.network, image_size=backbone.image_size, learning=trainable_names)


def main() -> None:
    """`python -m pylorus.launch.train FOLDER`: one run in its own process; --rank FOLDER: one process of a run."""
    setup_terminal()
    if sys.argv[1] == "--rank":
        folder, processes = Path(sys.argv[2]), read_processes()
        os.environ.setdefault(ERROR_FILE, str(folder / f"{FAILURE_PREFIX}{processes.index}.json"))  # srun names none
        train_rank(folder, processes, train)
        return
    run_folder, timeline, code = RunFolder(Path(sys.argv[1])), Timeline.from_process_start(), 0
    reserve_cpu_time()
    if IN_SWEEP in os.environ:
        end_after_parent(int(os.environ[IN_SWEEP]))
    try:
        with handle_closed_pipe(), run_folder.lock():
            run(run_folder, timeline=timeline)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        message = str(error) if isinstance(error, PylorusError) else explain_limit(error)
        if message is None:
            raise
        earlier = find_earlier_failure(run_folder, message) if IN_SWEEP in os.environ else None
        print(f"\nerror: {message if earlier is None else f'the same as that of job {earlier}'}", file=sys.stderr)
        code = 1
    exit_process(code)


if __name__ == "__main__":
    main()
