"""Run the whole pipeline: images → network → stages → a model in a folder.

`python -m pylorus.train FOLDER` runs what FOLDER/config.yaml describes; `train.py` and sweeps call this module through
`pylorus.launch`.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pylorus.chance import compute_seed
from pylorus.config import Config, TrainerConfig
from pylorus.data.prepare import RunImages, prepare_images
from pylorus.deploy.bundle import save_candidate, write_bundle
from pylorus.deploy.fixing import resolve_deciding_class
from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.files import write_json
from pylorus.machine.batch_size import resolve_batch_size
from pylorus.machine.choices import list_choices, log_choices
from pylorus.machine.engine import Engine, collect_environment, resolve_engine
from pylorus.model.backbone import Backbone, build_backbone
from pylorus.model.classifier import StagePlan
from pylorus.model.freeze import resolve_depth
from pylorus.model.structure import BlockStructure, extract_network_structure
from pylorus.parallel.processes import ALONE, Processes
from pylorus.parallel.start import check_batch_divides, train_in_processes
from pylorus.pipe import handle_closed_pipe
from pylorus.report.write import write_report
from pylorus.runs.begun import check_environment, restore_trainer_config
from pylorus.runs.console import open_run_log
from pylorus.runs.dashboard import Dashboard
from pylorus.runs.faults import explain_faults
from pylorus.runs.folder import RunFolder
from pylorus.runs.shipped import explain_choice
from pylorus.runs.signals import StopRequest, handle_signals
from pylorus.stages.run import Run
from pylorus.stages.stage import check_stages, run_stage
from pylorus.stages.table import log_stage_table
from pylorus.validation import load_config

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
    record = folder.path / "environment.json"
    initial = restore_trainer_config(config.trainer, record)
    engine = processes.run_on_first(lambda: resolve_engine(initial))
    engine.setup_process(beside=processes.beside)
    images, config = processes.run_on_first(lambda: (prepare_images(config, folder), config))
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
            log_stage_table(plan, result, validated_on=images.validation)
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
    """`python -m pylorus.train FOLDER`: one run in its own process."""
    try:
        with handle_closed_pipe():
            run(RunFolder(Path(sys.argv[1])))
    except PylorusError as error:
        sys.exit(f"\nerror: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
