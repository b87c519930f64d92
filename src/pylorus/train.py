"""One run, top to bottom: images → network → stage by stage → a model in a folder.

`python -m pylorus.train FOLDER` runs what FOLDER/config.yaml says; `train.py` and sweeps come here through
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

from pylorus.batch_size import settle_batch_size
from pylorus.begun import as_begun, check_begun
from pylorus.chance import derived_seed
from pylorus.choices import choices, tell
from pylorus.config import Config
from pylorus.console import run_log
from pylorus.dashboard import Dashboard
from pylorus.data.prepare import prepare_images
from pylorus.deploy.bundle import write_bundle
from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.faults import faults_explained
from pylorus.files import write_json
from pylorus.machine import environment, settle_engine
from pylorus.model.backbone import build_backbone
from pylorus.model.classifier import StagePlan
from pylorus.model.freeze import depth
from pylorus.model.structure import network_structure
from pylorus.pipe import ends_quietly
from pylorus.report.write import write_report
from pylorus.run_folder import RunFolder
from pylorus.signals import stopped_by_signals
from pylorus.stage import check_stages, run_stage
from pylorus.stage_table import show_stage
from pylorus.validation import loaded

log = logging.getLogger(__name__)


def run(folder: RunFolder) -> None:
    """The run that a prepared folder describes, or what is left of it; whatever happens, its status tells."""
    config = loaded(folder.config)
    told = partial(faults_explained, folder, config)
    with told():
        if folder.status()["state"] == "finished":
            print(f"finished before: {folder.path}")
        else:
            folder.clear()
            with _kept(config, folder), stopped_by_signals(), run_log(folder.path), folder.running(), told():
                train(config, folder)
        if config.report and not (folder.path / "report" / "report.html").is_file():
            # Of a finished run: a report that fails takes nothing from it.
            print(f"\nreport: {write_report([folder.path])}")
    print(f"\nresults: {folder.path}")


@contextmanager
def _kept(config: Config, folder: RunFolder) -> Iterator[None]:
    """Tells how to go on with a run that ends early, where its error does not."""
    try:
        yield
    except BaseException as error:
        begun = any((folder.path / name / "checkpoints").is_dir() for name in config.stages)
        if begun and f"resume={folder.path}" not in str(error):
            print(f"\nwhat is done is kept; to go on: python train.py resume={folder.path}", file=sys.stderr)
        raise


def train(config: Config, folder: RunFolder) -> None:
    """Trains all stages and writes what they give into the folder.

    Raises:
        PylorusError: If something in the user's hands is wrong; the message says what and how to mend it.
    """
    record = folder.path / "environment.json"
    began = as_begun(config.trainer, record)
    engine = settle_engine(began)
    images = prepare_images(config, folder)
    torch.manual_seed(derived_seed(config.seed, "head"))
    backbone = build_backbone(
        config.model,
        classes=len(images.catalog.classes),
        image_size=config.data.image_size,
        random_if_unreachable=config.data.kind == "synthetic",
    )
    check_stages(config, backbone)
    size, why = settle_batch_size(began, config, backbone, engine, images=sum(images.of_class("train")))
    config = replace(config, trainer=replace(config.trainer, batch_size=size))
    check_begun(record, environment(engine) | {"batch_size": size, "weights_sha256": backbone.weights_sha256})
    tell(choices(config, engine, backbone.network, why_batch_size=why))
    learning = {name: depth(backbone.network, stage.learn).learning for name, stage in config.stages.items()}
    structure = network_structure(backbone.network, image_size=backbone.image_size, learning=learning)
    write_json(folder.path / "network.json", structure)
    with Dashboard(config, folder) as dashboard:
        first_epoch = 0
        for name, stage in config.stages.items():
            plan = StagePlan(name, stage, first_epoch, derived_seed(config.seed, "stage", name))
            result = run_stage(plan, config, backbone, images, engine, dashboard, folder)
            show_stage(plan, result)
            first_epoch += result.epochs
    write_bundle(folder.path / "model", backbone, images, config)


def main() -> None:
    """`python -m pylorus.train FOLDER`: one run in a process of its own."""
    try:
        with ends_quietly():
            run(RunFolder(Path(sys.argv[1])))
    except PylorusError as error:
        sys.exit(f"\nerror: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
