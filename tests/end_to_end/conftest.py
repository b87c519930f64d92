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
