"""What a run that goes on must find as it was: precision, threads, batch size, first weights, versions."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from pylorus.config import TrainerConfig
from pylorus.errors import PylorusError
from pylorus.files import write_json

log = logging.getLogger(__name__)

ACCELERATORS = {"cuda": "gpu"}
"""Torch's words, as `trainer.accelerator` calls them."""


def as_begun(trainer: TrainerConfig, record: Path) -> TrainerConfig:
    """The trainer's keys with what was chosen for the machine when the run began: it is not measured again.

    Args:
        trainer: The configuration.
        record: environment.json of the run; where there is none the run begins now.
    """
    if not record.is_file():
        return trainer
    began = _read(record)
    accelerator = str(began["accelerator"])
    return replace(
        trainer,
        precision=str(began["precision"]),
        threads=began["threads"],
        accelerator=ACCELERATORS.get(accelerator, accelerator),
        batch_size=began.get("batch_size", trainer.batch_size),
    )


def check_begun(record: Path, now: dict[str, Any]) -> None:
    """Writes the record of a run that begins; compares it where the run goes on.

    Args:
        record: environment.json of the run.
        now: What `machine.environment` says, with `batch_size` and `weights_sha256`.

    Raises:
        PylorusError: If the weights that the run started from are others.
    """
    if not record.is_file():
        write_json(record, now)
        return
    began = _read(record)
    if began.get("weights_sha256") != now["weights_sha256"]:
        raise PylorusError(
            f"model.weights: the run in {record.parent} began with other weights (SHA-256 "
            f"{_short(began.get('weights_sha256'))}, found {_short(now['weights_sha256'])}). Put that file back, or "
            "start a new run."
        )
    changed = [
        f"{name} {began['packages'].get(name)} → {version}"
        for name, version in {**now["packages"], "python": now["python"]}.items()
        if {**began["packages"], "python": began["python"]}.get(name) != version
    ]
    changed += [f"{key} {began[key]} → {now[key]}" for key in ("system", "processor", "gpu") if began[key] != now[key]]
    if changed:
        log.warning(
            "the run began with other versions or on another machine (%s): the result may differ in rounding",
            ", ".join(changed),
        )


def _read(record: Path) -> dict[str, Any]:
    return dict(json.loads(record.read_text(encoding="utf-8")))


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none: random weights"
