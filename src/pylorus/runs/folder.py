"""A run's folder: what lies where, and whether the run is running, finished, failed or interrupted."""

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
"""Seconds after which a running run says again that it runs."""
SILENCE = timedelta(minutes=3)
"""After which a run on another machine is taken for dead."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; `status.json` tells how far it came.

    A status has `state` (starting, running, finished, failed, interrupted), `id`, `host`, `pid`, `slurm` (the number of
    SLURM's job and how often it was put back, or null), `started`, `heartbeat`, `ended`, `seconds` (that it ran,
    interruptions left out), `resumed` (how often), `overrides` (what the command line said), `sweep` (the sweep's name,
    or null) and, where it failed, `error`. Of a finished run it has `shipped_stage` and `shipped_by`, the stage in
    `model` and how it was chosen (see `pylorus.runs.shipped`).
    """

    path: Path

    @property
    def config(self) -> Path:
        """The whole configuration, resolved."""
        return self.path / "config.yaml"

    def stage(self, name: str) -> StageFolder:
        """The folder of a stage: its curves, checkpoints and predictions."""
        return StageFolder(self.path / name)

    def predictions(self, stage: str, split: str) -> Path:
        """The table of what the best checkpoint of a stage says of each image of `val` or `test`."""
        return self.stage(stage).predictions(split)

    @property
    def shipped(self) -> ShippedStage | None:
        """The stage whose network lies in `model`; None where there is none, or an earlier version wrote it."""
        path = self.path / "model" / "model.json"
        return read_shipped(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def status(self) -> dict[str, Any]:
        """The run's status; empty where the folder holds none. A run whose process is gone was `stopped`."""
        try:
            status = dict(json.loads((self.path / "status.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        if status["state"] in ("starting", "running") and not _lives(status):
            status["state"] = "stopped"
        return status

    def clear(self) -> None:
        """Removes what a killed process had not finished writing; it has names that begin with a dot."""
        for path in [*self.path.glob(".*"), *self.path.glob("*/.*"), *self.path.glob("*/checkpoints/.*")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def prepared(self, overrides: list[str], *, sweep: str | None = None) -> Iterator[None]:
        """Opens the folder for a run to come: `starting`, or `failed` if what is done inside fails."""
        status: dict[str, Any] = {
            "state": "starting",
            "id": secrets.token_hex(4),
            **_here(),
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
        before = self.status()
        status = {**before, **_here(), "state": "running"}
        for word in ("ended", "error"):
            status.pop(word, None)
        if before["state"] != "starting":
            status["resumed"] = before.get("resumed", 0) + 1
        began, ran = time.monotonic(), before.get("seconds", 0.0)

        def say(**more: Any) -> None:
            self.expect_there()
            self._write({**status, "seconds": round(ran + time.monotonic() - began, 1), **more})

        def say_if_possible(**more: Any) -> None:
            with suppress(OSError):  # what ended the run is what its user has to know
                say(**more)

        say()
        try:
            with _beating(say):
                yield
        except KeyboardInterrupt:
            say_if_possible(state="interrupted", ended=_now())
            raise
        except BaseException as error:
            say_if_possible(state="failed", ended=_now(), error=str(error) or type(error).__name__)
            raise
        shipped = self.shipped
        chosen = {} if shipped is None else {"shipped_stage": shipped.name, "shipped_by": shipped.chosen_by}
        say(state="finished", ended=_now(), **chosen)

    def expect_there(self) -> None:
        """Refuses to write into a folder that vanished: it would come again, half empty.

        Raises:
            FileNotFoundError: If the run's configuration is not there any more.
        """
        if not self.config.is_file():
            raise FileNotFoundError(errno.ENOENT, "the run's folder vanished", str(self.config))

    def _write(self, status: dict[str, Any]) -> None:
        write_json(self.path / "status.json", status)


@contextmanager
def _beating(say: Callable[..., None]) -> Iterator[None]:
    """Says from time to time that a run goes on."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(OSError):  # a full disk: the run itself will meet it
                say(heartbeat=_now())

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _here() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "slurm": _slurm(), "heartbeat": _now()}


def _slurm() -> list[str] | None:
    """The job of SLURM that this process belongs to, and how often it was put back into the queue."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def _lives(status: dict[str, Any]) -> bool:
    """Whether the process of a run is there; one of another machine can only be heard."""
    beat = datetime.fromisoformat(status.get("heartbeat", status["started"]))
    before, now = status.get("slurm"), _slurm()
    if before and now and before[0] == now[0] and before[1] != now[1]:
        return False  # this very job, before it was put back: a process that may have run on another machine
    if status.get("host", socket.gethostname()) != socket.gethostname():
        return datetime.now(UTC) - beat < SILENCE
    try:
        process = psutil.Process(status["pid"])
        # A process that is younger than the run's last word has only inherited its number.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= beat.timestamp() + 2
    except psutil.NoSuchProcess:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
