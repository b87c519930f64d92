"""A run with a dashboard: one stage of a tiny network on the synthetic class folders."""

from collections.abc import Callable

import pytest
from omegaconf import OmegaConf

from pylorus.core.io import write_text
from pylorus.runs.folder import RunFolder
from tests.conftest import TINY


@pytest.fixture
def train_with_logger(compose_config, synthetic_root, tmp_path) -> Callable[..., RunFolder]:
    """Train with a logger that may show images; return the finished run."""

    def train(logger: str, *more: str, epochs: int, stage: str = "pretrain") -> RunFolder:
        from pylorus.launch.train import run

        folder = RunFolder(tmp_path / "run")
        words = [
            f"stage={stage}", f"stages.pretrain.epochs={epochs}", f"logger={logger}", "logger.images=true", "trainer=cpu",
            *more,
        ]  # fmt: skip
        config = compose_config(
            "data=folders", f"data.root={synthetic_root}", "data.image_size=32", "model=timm", f"model.name={TINY}",
            "model.weights=none", "report=false", *words,
        )  # fmt: skip
        with folder.set_starting(words):
            write_text(folder.config, OmegaConf.to_yaml(config))
        run(folder)
        assert folder.read_status()["state"] == "finished"
        return folder

    return train
