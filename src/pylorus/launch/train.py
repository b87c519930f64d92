"""Run the whole pipeline: images → network → stages → a model in a folder.

`python -m pylorus.launch.train FOLDER` runs what FOLDER/config.yaml describes; `train.py` and sweeps call this module
through `pylorus.launch.main`.
"""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from pylorus.config.checks import load_config
from pylorus.config.schema import Config, TrainerConfig
from pylorus.core.distributed import ALONE, Processes
from pylorus.core.errors import INTERRUPTED, PylorusError
from pylorus.core.io import handle_closed_pipe, write_json
from pylorus.core.seeding import compute_seed
from pylorus.data.prepare import RunImages, prepare_images
from pylorus.deploy.bundle import save_candidate, write_bundle
from pylorus.deploy.thresholds import resolve_deciding_class
from pylorus.hardware.choices import list_choices, log_choices
from pylorus.hardware.engine import Engine, collect_environment, resolve_engine
from pylorus.model.backbone import Backbone, build_backbone
from pylorus.model.classifier import StagePlan
from pylorus.model.freeze import resolve_depth
from pylorus.model.metrics import build_metrics
from pylorus.model.summary import BlockStructure, extract_network_structure
from pylorus.report.page import write_report
from pylorus.runs.folder import RunFolder, explain_choice
from pylorus.runs.process import (
    PATIENCE,
    StopRequest,
    check_environment,
    handle_signals,
    open_run_log,
    restore_trainer_config,
)
from pylorus.training.batch_size import resolve_batch_size
from pylorus.training.dashboards import Dashboard
from pylorus.training.faults import explain_faults
from pylorus.training.stage import check_stages, check_user_parts, log_stage_table, run_stage
from pylorus.training.trainer import Run, check_trainer_arguments

AFTER_FAILURE = 5.0
"""Seconds to wait after a failure before the remaining processes are stopped."""


@dataclass(frozen=True)
class Failure:
    """Why a process failed.

    Attributes:
        index: Rank of the process.
        message: Error message.
        trace: Traceback; empty if the message says all that the user needs.
        at: Time in seconds since 1970.
    """

    index: int
    message: str
    trace: str
    at: float

    def write(self, folder: Path) -> None:
        """Write the failure to the run's folder, where the parent process reads it."""
        write_json(folder / f".failure-{self.index}.json", asdict(self))


def train_in_processes(config: Config, folder: RunFolder) -> None:
    """Train in as many processes as the configuration says, one per device.

    Raises:
        PylorusError: If a process fails; the message is that of the first to fail.
        KeyboardInterrupt: If they are interrupted.
    """
    if isinstance(config.trainer.batch_size, int):
        check_batch_divides(config.trainer.batch_size, config.trainer.devices * config.trainer.nodes)
    if config.trainer.nodes > 1:
        check_slurm_nodes(config.trainer)
        children = [_start_slurm_step(config.trainer, folder.path)]
    else:
        port, count = _find_free_port(), config.trainer.devices
        children = [_start_local_process(index, count, port, folder.path) for index in range(count)]
    try:
        codes = _wait_for_children(children)
    except BaseException:
        _stop_children(children, patience=PATIENCE)
        raise
    if any(codes):
        raise _build_error(codes, folder.path)


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


def _start_slurm_step(trainer: TrainerConfig, folder: Path) -> "subprocess.Popen[bytes]":
    """Start all processes as one step of the current SLURM job; their output comes here."""
    # The job's own variables would be mistaken for those of one process.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(_find_free_port())}
    srun = ["srun", f"--nodes={trainer.nodes}", f"--ntasks-per-node={trainer.devices}", "--kill-on-bad-exit=0"]
    return subprocess.Popen([*srun, *_build_command(folder)], env=environment, start_new_session=True)


def _start_local_process(index: int, count: int, port: int, folder: Path) -> "subprocess.Popen[bytes]":
    """Start one process on this machine, in its own session, so that only this process forwards signals to it."""
    ranks = {"RANK": index, "WORLD_SIZE": count, "LOCAL_RANK": index, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    variables = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(_build_command(folder), env={**os.environ, **variables}, start_new_session=True)


def _build_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "pylorus.launch.rank", str(folder)]


def _wait_for_children(children: "Sequence[subprocess.Popen[bytes]]") -> list[int]:
    """Return the exit codes of all processes; after a failure, stop the rest, which would wait for it forever."""
    failed_at: float | None = None
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.poll() for child in children):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > AFTER_FAILURE:
            codes = [child.poll() for child in children]
            _stop_children([child for child in children if child.poll() is None], patience=AFTER_FAILURE)
            return [0 if code is None else code for code in codes]  # a process that we stopped did not fail
        time.sleep(0.1)
    return [child.wait() for child in children]


def _stop_children(children: "Sequence[subprocess.Popen[bytes]]", *, patience: float) -> None:
    """Ask processes to stop, and kill those that don't."""
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGUSR2)  # srun forwards this signal without acting on it
    deadline = time.monotonic() + patience
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()


def _build_error(codes: list[int], folder: Path) -> BaseException:
    """Return the error that ended the run: that of a killed process, else of the first that failed."""
    # srun reports 128 + the signal number.
    signals = [-code if code < 0 else code - 128 if code != INTERRUPTED else 0 for code in codes]
    killed_processes = [(index, signal_number) for index, signal_number in enumerate(signals) if signal_number > 0]
    failures = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob(".failure-*.json")]
    for path in folder.glob(".failure-*.json"):
        path.unlink(missing_ok=True)
    if killed_processes:
        index, signal_number = killed_processes[0]
        process_label = f"process {index + 1} of {len(codes)}" if len(codes) > 1 else "a process"
        return PylorusError(
            f"{process_label} was killed by {signal.Signals(signal_number).name}. Most often the machine "
            "ran out of memory (see dmesg): set a smaller trainer.batch_size or fewer trainer.devices.\n"
            f"Then resume: python train.py resume={folder}"
        )
    if failures:
        first = min(failures, key=lambda failure: failure.at)
        print(first.trace, file=sys.stderr, end="")
        return PylorusError(f"process {first.index + 1} failed: {first.message}" if first.trace else first.message)
    if INTERRUPTED in codes:
        return KeyboardInterrupt()
    return PylorusError(f"the run's processes exited with codes {', '.join(map(str, codes))}")


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


log = logging.getLogger(__name__)


def run(folder: RunFolder) -> None:
    """Run, or resume, what a prepared folder describes; its status.json always reports the outcome."""
    config = load_config(folder.config)
    report_faults = partial(explain_faults, folder, config)
    with report_faults():
        if folder.read_status()["state"] == "finished":
            print(f"already finished: {folder.path}")
        else:
            folder.remove_incomplete_files()
            with (
                _print_resume_hint(config, folder),
                handle_signals() as stop,
                open_run_log(folder.path),
                folder.update_status(),
                report_faults(),
            ):
                if config.trainer.devices * config.trainer.nodes == 1:
                    train(config, folder, ALONE, stop)
                else:
                    train_in_processes(config, folder)
        if config.report and not (folder.path / "report" / "report.html").is_file():
            # The run is finished by now: a failing report does not change that.
            print(f"\nreport: {write_report([folder.path])}")
    print(f"\nresults: {folder.path}")
    shipped = folder.shipped
    if shipped is not None:
        choice = explain_choice(shipped, validated_on="test" if config.data.validation == "test" else "val")
        print(f"model: {folder.path / 'model'} holds stage {shipped.name} ({choice})")


@contextmanager
def _print_resume_hint(config: Config, folder: RunFolder) -> Iterator[None]:
    """Print how to resume a run that ends early, unless its error message does."""
    try:
        yield
    except BaseException as error:
        has_checkpoints = any((folder.path / name / "checkpoints").is_dir() for name in config.stages)
        if has_checkpoints and f"resume={folder.path}" not in str(error):
            print(f"\nprogress is saved; to resume: python train.py resume={folder.path}", file=sys.stderr)
        raise


def train(config: Config, folder: RunFolder, processes: Processes, stop: StopRequest) -> None:
    """Train all stages and write their results to the folder.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        processes: The run's processes: this one alone, or several that all call this function.
        stop: Whether the run has been asked to stop.

    Raises:
        PylorusError: If something that the user can fix is wrong; the message says what and how to fix it.
    """
    check_trainer_arguments(config.trainer.args)
    check_user_parts(config)
    record = folder.path / "environment.json"
    initial = restore_trainer_config(config.trainer, record)
    engine = processes.run_on_first(lambda: resolve_engine(initial))
    engine.setup_process(beside=processes.beside)
    images, config = processes.run_on_first(lambda: prepare_images(config, folder.path))
    resolve_deciding_class(config.deploy, classes=images.catalog.classes, short_names=images.catalog.short_names)
    backbone = processes.run_first_then_others(lambda: _build_run_backbone(config))
    check_stages(config, backbone, images, processes)
    config, reason = processes.run_on_first(
        lambda: _set_batch_size(initial, config, backbone, engine, images, processes)
    )
    if processes.is_first:
        resolved = {"batch_size": config.trainer.batch_size, "weights_sha256": backbone.weights_sha256}
        check_environment(record, collect_environment(engine) | resolved)
        log_choices(list_choices(config, engine, backbone.network, why_batch_size=reason))
        write_json(folder.path / "network.json", _extract_structure(config, backbone))
    with Dashboard(config, folder, shown=processes.is_first) as dashboard:
        stage_run = Run(config, folder, images, backbone, engine, dashboard, processes, stop)
        first_epoch = 0
        for name, stage in config.stages.items():
            plan = StagePlan(name, stage, first_epoch, compute_seed(config.seed, "stage", name))
            result = run_stage(plan, stage_run)
            log_stage_table(plan, result, validated_on=images.validation, metrics=build_metrics(config.metrics))
            first_epoch += result.epochs
            if processes.is_first:
                save_candidate(folder, backbone.network, config, images, name)
    if processes.is_first:
        shipped = write_bundle(folder, backbone, images, config, engine)
        log.info("shipped stage %s: %s", shipped.name, explain_choice(shipped, validated_on=images.validation))


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
    size, reason = resolve_batch_size(initial, config, backbone, engine, images=training_images, devices=devices)
    check_batch_divides(size, processes.count)
    return replace(config, trainer=replace(config.trainer, batch_size=size)), reason


def _extract_structure(config: Config, backbone: Backbone) -> list[BlockStructure]:
    trainable_names = {
        name: resolve_depth(backbone.network, stage.learn).learning for name, stage in config.stages.items()
    }
    return extract_network_structure(backbone.network, image_size=backbone.image_size, learning=trainable_names)


def main() -> None:
    """`python -m pylorus.launch.train FOLDER`: one run in its own process."""
    try:
        with handle_closed_pipe():
            run(RunFolder(Path(sys.argv[1])))
    except PylorusError as error:
        sys.exit(f"\nerror: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
