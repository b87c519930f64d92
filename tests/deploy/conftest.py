"""A tiny trained run, its bundle, and copies of that to change."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pylorus.core.io import write_text
from pylorus.deploy.verified_files import SUMS
from pylorus.launch.train import run
from pylorus.runs.folder import RunFolder
from tests.conftest import TINY

WORDS = ["data=folders", r"data.group=patient_\d+", "data.image_size=32", "data.workers=0", "trainer=cpu", "trainer.precision=32",
         "trainer.progress=false", "model=timm", f"model.name={TINY}", "model.weights=none", "report=false",
         "data.classes=[gastric_cancer,gastric_ulcer,chronic_gastritis]", "data.short_names=[GC,GU,CG]",
         "stages.pretrain.epochs=1", "stages.finetune.epochs=3", "optimizer.lr=0.003",
         "deploy.prediction_sets=0.5", "deploy.fingerprints=true"]  # fmt: skip


@pytest.fixture(scope="session")
def trained_run(compose_config, synthetic_root, tmp_path_factory) -> RunFolder:
    """A run of both stages in 32 bits on synthetic images. Read it only."""
    folder = RunFolder(tmp_path_factory.mktemp("trained"))
    config = compose_config(f"data.root={synthetic_root}", *WORDS)
    with folder.set_starting(WORDS):
        write_text(folder.config, OmegaConf.to_yaml(config))
    run(folder)
    return folder


@pytest.fixture(scope="session")
def bundle_folder(trained_run) -> Path:
    """The run's bundle. Read it only."""
    return trained_run.path / "model"


ENSEMBLE_WORDS = [word for word in WORDS if not word.startswith(("stages.", "deploy.", "data.image_size"))]


@pytest.fixture(scope="session")
def ensemble_runs(compose_config, synthetic_root, tmp_path_factory) -> dict[str, Path]:
    """Runs of one epoch: two seeds of a fold, one of them with larger images, and the other fold. Read them only."""
    runs = {}
    for name, words in (
        ("first", ["data.fold=0", "data.image_size=64"]),
        ("second", ["data.fold=0", "data.image_size=96", "seed=1"]),
        ("fold", ["data.fold=1", "data.image_size=64"]),
    ):
        folder = RunFolder(tmp_path_factory.mktemp("member") / name)
        folder.path.mkdir()
        words = [*ENSEMBLE_WORDS, "data.folds=2", "stage=pretrain", "stages.pretrain.epochs=1", *words]
        config = compose_config(f"data.root={synthetic_root}", *words)
        with folder.set_starting(words):
            write_text(folder.config, OmegaConf.to_yaml(config))
        run(folder)
        runs[name] = folder.path
    return runs


@pytest.fixture
def bundle_copy(bundle_folder, tmp_path) -> Path:
    """A copy of the bundle that a test may change or damage."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "copy"))


@pytest.fixture
def write_hashes() -> Callable[[Path], Path]:
    """Write the hashes anew, as one would who changes a bundle on purpose."""

    def seal(folder: Path) -> Path:
        names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
        lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (folder / SUMS).write_text("".join(lines))
        return folder

    return seal


@pytest.fixture
def edit_model_json(bundle_copy, write_hashes) -> Callable[[Callable[[dict], object]], Path]:
    """Change model.json in a copy of the bundle with a function, and its hashes with it."""

    def change(act: Callable[[dict], object]) -> Path:
        path = bundle_copy / "model.json"
        content = json.loads(path.read_text())
        act(content)
        path.write_text(json.dumps(content))
        return write_hashes(bundle_copy)

    return change
