"""What must be the same when a run is resumed: precision, threads, batch size, initial weights, versions."""

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
"""Names of accelerators in torch, mapped to those of `trainer.accelerator`."""


def restore_trainer_config(trainer: TrainerConfig, record: Path) -> TrainerConfig:
    """Return the trainer's configuration with the values that were chosen for the machine when the run started.

    They are not measured again when a run is resumed.

    Args:
        trainer: The configuration.
        record: The run's environment.json; if it does not exist, the run is new and the configuration is unchanged.
    """
    if not record.is_file():
        return trainer
    initial = _read_record(record)
    accelerator = str(initial["accelerator"])
    return replace(
        trainer,
        precision=str(initial["precision"]),
        threads=initial["threads"],
        accelerator=ACCELERATORS.get(accelerator, accelerator),
        batch_size=initial.get("batch_size", trainer.batch_size),
    )


def check_environment(record: Path, now: dict[str, Any]) -> None:
    """Write the environment of a new run, or compare it with the present one when a run is resumed.

    Args:
        record: The run's environment.json.
        now: The result of `machine.environment`, with `batch_size` and `weights_sha256`.

    Raises:
        PylorusError: If the run started from other initial weights.
    """
    if not record.is_file():
        write_json(record, now)
        return
    initial = _read_record(record)
    if initial.get("weights_sha256") != now["weights_sha256"]:
        raise PylorusError(
            f"model.weights: the run in {record.parent} started from other weights: expected SHA-256 "
            f"{_format_digest(initial.get('weights_sha256'))}, found {_format_digest(now['weights_sha256'])}. Restore that file, or "
            "start a new run."
        )
    changed = [
        f"{name} {initial['packages'].get(name)} → {version}"
        for name, version in {**now["packages"], "python": now["python"]}.items()
        if {**initial["packages"], "python": initial["python"]}.get(name) != version
    ]
    changed += [
        f"{key} {initial[key]} → {now[key]}" for key in ("system", "processor", "gpu") if initial[key] != now[key]
    ]
    if changed:
        log.warning(
            "the run started with other versions or on another machine (%s): results may differ by rounding",
            ", ".join(changed),
        )


def _read_record(record: Path) -> dict[str, Any]:
    return dict(json.loads(record.read_text(encoding="utf-8")))


def _format_digest(digest: str | None) -> str:
    return digest[:12] if digest else "none: random weights"
