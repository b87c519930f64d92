"""Real processes, as a user starts them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[2] / "train.py"

Finished = subprocess.CompletedProcess[str]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Finished]:
    """`python train.py WORDS…` from an empty folder that is not the project's."""

    def start(*words: str, program: tuple[str, ...] = (sys.executable, str(TRAIN))) -> Finished:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [*program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=280
        )

    return start
