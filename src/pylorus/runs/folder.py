"""A run's folder: which file is where, and whether the run is running, finished, failed or interrupted."""

import errno
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from pylorus.files import write_json
from pylorus.runs.shipped import ShippedStage, read_shipped
from pylorus.stages.folder import StageFolder

HEARTBEAT = 20.0
"""Seconds between two heartbeats of a running run."""
SILENCE = timedelta(minutes=3)
"""A run on another machine counts as dead after this time without a heartbeat."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, with its state in `status.json`.

    A status has `state` (starting, running, finished, failed, interrupted), `id`, `host`, `pid`, `slurm` (the SLURM job
    ID and how often the job was requeued, or null), `started`, `heartbeat`, `ended`, `seconds` (running time without
    interruptions), `resumed` (how often), `overrides` (from the command line), `sweep` (the sweep's name, or null) and,
    if the run failed, `error`. A finished run also has `shipped_stage` and `shipped_by`: the stage in `model` and how
    it was chosen (see `pylorus.runs.shipped`).

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """File of the complete, resolved configuration."""
        return self.path / "config.yaml"

    def get_stage(self, name: str) -> StageFolder:
        """Return the folder of a stage: its curves, checkpoints and predictions."""
        return StageFolder(self.path / name)

    def get_predictions_path(self, stage: str, split: str) -> Path:
        """Return the file with the predictions of a stage's best checkpoint for each image of `val` or `test`."""
        return self.get_stage(stage).get_predictions_path(split)

    @property
    def shipped(self) -> ShippedStage | None:
        """The stage whose network is in `model`; None if there is none, or if an earlier version wrote it."""
        path = self.path / "model" / "model.json"
        return read_shipped(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def read_status(self) -> dict[str, Any]:
        """Read the run's status; empty if the folder has none. A run whose process is gone is `stopped`."""
        try:
            status = dict(json.loads((self.path / "status.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        if status["state"] in ("starting", "running") and not _is_alive(status):
            status["state"] = "stopped"
        return status

    def remove_incomplete_files(self) -> None:
        """Remove incomplete files of a killed process: their names begin with a dot."""
        for path in [*self.path.glob(".*"), *self.path.glob("*/.*"), *self.path.glob("*/checkpoints/.*")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def set_starting(self, overrides: list[str], *, sweep: str | None = None) -> Iterator[None]:
        """Mark the run as `starting`, or as `failed` if the code inside the context fails.

        Args:
            overrides: The overrides of the command line.
            sweep: Name of the sweep, if the run is one of its jobs.
        """
        status: dict[str, Any] = {
            "state": "starting",
            "id": secrets.token_hex(4),
            **_get_process_info(),
            "started": _format_now(),
            "overrides": overrides,
            "sweep": sweep,
        }
        self._write_status(status)
        try:
            yield
        except Exception as error:
            self._write_status({**status, "state": "failed", "ended": _format_now(), "error": str(error)})
            raise

    @contextmanager
    def update_status(self) -> Iterator[None]:
        """Keep status.json up to date while the run executes inside the context, however it ends."""
        previous = self.read_status()
        status = {**previous, **_get_process_info(), "state": "running"}
        for key in ("ended", "error"):
            status.pop(key, None)
        if previous["state"] != "starting":
            status["resumed"] = previous.get("resumed", 0) + 1
        start, earlier_seconds = time.monotonic(), previous.get("seconds", 0.0)

        def write_update(**updates: Any) -> None:
            self.check_exists()
            self._write_status({**status, "seconds": round(earlier_seconds + time.monotonic() - start, 1), **updates})

        def write_if_possible(**updates: Any) -> None:
            with suppress(OSError):  # the user has to see the error that ended the run, not this one
                write_update(**updates)

        write_update()
        try:
            with _send_heartbeats(write_update):
                yield
        except KeyboardInterrupt:
            write_if_possible(state="interrupted", ended=_format_now())
            raise
        except BaseException as error:
            write_if_possible(state="failed", ended=_format_now(), error=str(error) or type(error).__name__)
            raise
        shipped = self.shipped
        choice = {} if shipped is None else {"shipped_stage": shipped.name, "shipped_by": shipped.chosen_by}
        write_update(state="finished", ended=_format_now(), **choice)

    def check_exists(self) -> None:
        """Check that the run's folder still exists: writing to it would create it again, half empty.

        Raises:
            FileNotFoundError: If the run's configuration no longer exists.
        """
        if not self.config.is_file():
            raise FileNotFoundError(errno.ENOENT, "the run's folder disappeared", str(self.config))

    def _write_status(self, status: dict[str, Any]) -> None:
        write_json(self.path / "status.json", status)


@contextmanager
def _send_heartbeats(write: Callable[..., None]) -> Iterator[None]:
    """Write a heartbeat at regular intervals while the code inside the context runs."""
    ended = threading.Event()

    def send_heartbeat() -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(OSError):  # the run itself will report a full disk
                write(heartbeat=_format_now())

    thread = threading.Thread(target=send_heartbeat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _get_process_info() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "slurm": _get_slurm_job(), "heartbeat": _format_now()}


def _get_slurm_job() -> list[str] | None:
    """Return the SLURM job ID of this process and how often the job was requeued; None outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def _is_alive(status: dict[str, Any]) -> bool:
    """Return whether the process of a run is alive; on another machine only its heartbeat can be checked."""
    heartbeat = datetime.fromisoformat(status.get("heartbeat", status["started"]))
    before, now = status.get("slurm"), _get_slurm_job()
    if before and now and before[0] == now[0] and before[1] != now[1]:
        return False  # the same job before it was requeued: that process may have run on another machine
    if status.get("host", socket.gethostname()) != socket.gethostname():
        return datetime.now(UTC) - heartbeat < SILENCE
    try:
        process = psutil.Process(status["pid"])
        # A process that started after the run's last heartbeat only reuses its process ID.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= heartbeat.timestamp() + 2
    except psutil.NoSuchProcess:
        return False


def _format_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
