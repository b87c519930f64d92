"""A run's folder: what lies where, and whether the run is running, finished, failed or interrupted."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pylorus.files import write_json


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; `status.json` tells how far it came.

    A status has `state` (starting, running, finished, failed, interrupted), `pid`, `started`, `ended`, `overrides`
    (what the command line said), `sweep` (the sweep's name, or null) and, where it failed, `error`.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The whole configuration, resolved."""
        return self.path / "config.yaml"

    def stage(self, name: str) -> Path:
        """The folder of a stage: its curves, checkpoints and predictions."""
        return self.path / name

    def predictions(self, stage: str, split: str) -> Path:
        """The table of what the best checkpoint of a stage says of each image of `val` or `test`."""
        return self.path / stage / f"predictions-{split}.parquet"

    def status(self) -> dict[str, Any]:
        """The run's status; empty where the folder holds none. A run whose process is gone was `stopped`."""
        try:
            status = dict(json.loads((self.path / "status.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        if status["state"] in ("starting", "running") and not psutil.pid_exists(status["pid"]):
            status["state"] = "stopped"
        return status

    @contextmanager
    def prepared(self, overrides: list[str], *, sweep: str | None = None) -> Iterator[None]:
        """Opens the folder for a run to come: `starting`, or `failed` if what is done inside fails."""
        status: dict[str, Any] = {
            "state": "starting",
            "pid": os.getpid(),
            "started": _now(),
            "overrides": overrides,
            "sweep": sweep,
        }
        self._write(status)
        try:
            yield
        except Exception as error:
            self._write({**status, "state": "failed", "ended": _now(), "error": str(error)})
            raise

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keeps status.json true while a run goes on inside, whatever ends it."""
        status = {**self.status(), "state": "running", "pid": os.getpid(), "started": _now()}
        self._write(status)
        try:
            yield
        except KeyboardInterrupt:
            self._write({**status, "state": "interrupted", "ended": _now()})
            raise
        except BaseException as error:
            self._write({**status, "state": "failed", "ended": _now(), "error": str(error) or type(error).__name__})
            raise
        self._write({**status, "state": "finished", "ended": _now()})

    def _write(self, status: dict[str, Any]) -> None:
        write_json(self.path / "status.json", status)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
