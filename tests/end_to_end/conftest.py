"""Real processes, as a user starts them, and forks that do the same without their imports."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forking import TRAIN, ForkServer

Finished = subprocess.CompletedProcess[str]
COMMAND = (sys.executable, str(TRAIN))
HERE = Path(__file__).parent
OF_THE_TEST = ("HF_HUB_OFFLINE", "WANDB_MODE", "WANDB_ERROR_REPORTING", "NO_ALBUMENTATIONS_UPDATE", "DO_NOT_TRACK")
"""Variables that would keep packages off the network; a user has none of them."""


@pytest.fixture
def train(tmp_path: Path, fork_server: ForkServer) -> Callable[..., Finished]:
    """Run `python train.py ARGUMENTS…`, or another program, in an empty folder outside the project, as a fork (tests/forking.py)."""

    def start(*words: str, program: tuple[str, ...] = COMMAND) -> Finished:
        return fork_server.run([*program, *words], cwd=tmp_path, timeout=280)

    return start


@pytest.fixture
def train_for_real(tmp_path: Path) -> Callable[..., Finished]:
    """The same, started as a user does it."""

    def start(*words: str, program: tuple[str, ...] = COMMAND) -> Finished:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [*program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=280
        )

    return start


class AirGap:
    """Processes cut off from the network.

    Args:
        folder: Where they work, and below it the records.
        fork_server: Starts the commands of `pylorus`; tests/end_to_end/air_gap is imported in each fork.
    """

    def __init__(self, folder: Path, fork_server: ForkServer) -> None:
        self._fork_server = fork_server
        self.work, self.records = folder / "work", folder / "records"
        for made in (self.work, self.records):
            made.mkdir(parents=True)
        paths = [str(HERE / "air_gap"), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in OF_THE_TEST},
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYLORUS_TEST_AIR_GAP": str(self.records),
            "HF_HOME": str(folder / "hub"),
        }

    def python(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *words], cwd=self.work, env=self.environment, capture_output=True, text=True, check=False, timeout=560
        )  # fmt: skip

    def fork(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self._fork_server.run([*words], cwd=self.work, env=self.environment, timeout=560)

    def pylorus(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self.fork("pylorus", *words)

    def attempts(self) -> list[str]:
        return self._lines("attempts")

    def watched(self) -> list[str]:
        return self._lines("watched")

    def _lines(self, name: str) -> list[str]:
        file = self.records / name
        return file.read_text().splitlines() if file.is_file() else []
