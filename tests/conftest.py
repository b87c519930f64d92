"""Fixtures that many tests share, and the one place where each test gets its marker.

Every test is exactly one of:

* `fast`: starts no process (this is enforced below) and trains for seconds at most; `make test-fast` runs these,
* `slow`: trains models, starts helper processes, or takes seconds for another reason,
* `e2e`: starts the commands as a user does.

A test gets its marker from its own `@pytest.mark.slow` (or its module's `pytestmark`), else from its folder, else from
the fixtures that it uses; the rest is fast.
"""

import copy
import functools
import gc
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side, as the jobs of a sweep do; torch reads the first when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYLORUS_JOBS_AT_ONCE", os.environ["PYTEST_XDIST_WORKER_COUNT"])

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from pylorus.config.checks import build_config
from pylorus.config.schema import CONF, Config
from pylorus.core.io import write_text
from pylorus.core.limited_process import assume_limits
from pylorus.data.synthetic import generate_image_set
from pylorus.launch.main import register
from pylorus.runs.folder import RunFolder
from tests.forking import ForkServer

TESTS = Path(__file__).parent
KINDS = ("fast", "slow", "e2e")
USUAL_SECONDS = {"fast": 0.05, "slow": 1.0, "e2e": 3.0}
"""What a test of each kind usually takes."""
END_TO_END_FOLDERS = (TESTS / "end_to_end", TESTS / "docs" / "test_site.py")
SLOW_FILES = frozenset(
    TESTS / name
    for name in (
        "config/test_own_configuration.py",
        "deploy/test_explain.py",
        "deploy/test_export.py",
        "deploy/test_page.py",
        "deploy/test_predict.py",
        "deploy/test_shipped.py",
        "evaluation/test_coverage.py",
        "extension/test_extension.py",
        "extension/test_registries.py",
        "launch/test_resume.py",
        "launch/test_sharded.py",
        "launch/test_train.py",
        "launch/test_two_processes.py",
        "model/test_distributed.py",
        "model/test_frozen_features.py",
        "test_library.py",
        "training/test_batch_size.py",
        "training/test_faults.py",
    )
)
"""Files in which nearly every test trains, starts a process or simulates for seconds."""
SLOW_FIXTURES = frozenset({"fork_server", "forked_processes", "trained_run", "ensemble_runs"})
"""Fixtures that start processes or train for longer than a fast test may."""

ASKED_OF_MACHINE = frozenset({"lscpu", "fc-list", "nvidia-smi"})
"""Programs that are started once on a machine: joblib counts its cores, matplotlib lists its fonts, a sweep counts GPUs."""

_running_fast_test = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test as one of `KINDS` (see the docstring of this module), and order the files by what they take.

    Two processes take one file after another (`--dist=loadfile`, `--no-loadscope-reorder`). Those with the most slow tests come
    first, so that at the end both still have something to do.
    """
    seconds: Counter[Path] = Counter()
    for item in items:
        kind = next((kind for kind in KINDS if item.get_closest_marker(kind)), None)
        if kind is None:
            kind = _choose_kind(item)
            item.add_marker(kind)
        seconds[item.path] += USUAL_SECONDS[kind]
    items.sort(key=lambda item: -seconds[item.path])


def pytest_collection_finish() -> None:
    """Exempt what the imports created from garbage collection."""
    gc.collect()
    gc.freeze()


def _choose_kind(item: pytest.Item) -> str:
    if any(item.path.is_relative_to(folder) for folder in END_TO_END_FOLDERS):
        return "e2e"
    if item.path in SLOW_FILES:
        return "slow"
    return "slow" if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())) else "fast"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Tell the audit hook below whether the running test is a fast one."""
    global _running_fast_test
    _running_fast_test = item.get_closest_marker("fast") is not None
    assume_limits(_running_fast_test)  # then this process decodes what otherwise only one with limits may
    try:
        return (yield)
    finally:
        _running_fast_test = False
        assume_limits(False)


def _refuse_processes(event: str, arguments: tuple[object, ...]) -> None:
    if not _running_fast_test or event not in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"):
        return
    if not arguments or arguments[0] not in ASKED_OF_MACHINE:
        raise AssertionError(f"a fast test must not start a process ({event}); mark it with @pytest.mark.slow")


sys.addaudithook(_refuse_processes)
os.fsync = lambda descriptor: None  # no test can cut the power; a run waits a quarter of a second for the disk

TINY = "test_resnet.r160_in1k"
"""One of timm's own networks for tests: half a million weights, four layers, batch norm."""


@pytest.fixture(scope="session")
def synthetic_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of synthetic images in class folders: 10 images a class, two a patient. Read it only."""
    root = tmp_path_factory.mktemp("synthetic") / "images"
    generate_image_set(root, images=10, size=48, seed=3)
    return root


@pytest.fixture(scope="session")
def compose_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Compose the configuration that overrides of the command line give, with a cache apart from the user's.

    Hydra takes 0.2 s for it, so each is composed once in each working folder; every test gets a copy of its own.
    """
    cache = f"cache.folder={tmp_path_factory.mktemp('cache')}"

    register()

    @functools.cache
    def compose_once(folder: Path, overrides: tuple[str, ...]) -> Config:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return build_config(compose("config", overrides=[cache, *overrides]))

    return lambda *overrides: copy.deepcopy(compose_once(Path.cwd(), overrides))


@pytest.fixture(scope="session")
def prepare_run_folder(compose_config, synthetic_root, tmp_path_factory) -> Callable[..., RunFolder]:
    """Make a folder in which a run on the synthetic class folders can start, from words of the command line."""

    def prepare(*words: str) -> RunFolder:
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        words = (f"data.root={synthetic_root}", *words)
        with folder.set_starting(list(words)):
            write_text(folder.config, OmegaConf.to_yaml(compose_config(*words)))
        return folder

    return prepare


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Start processes that need not import anything."""
    server = ForkServer()
    yield server
    server.stop()


@pytest.fixture
def skip_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build figures without rendering them, where a test is not about them: rendering takes most of a report's time."""
    page = importlib.import_module("pylorus.report.page")  # only where it is needed
    for name in ("render_svg", "render_png"):
        monkeypatch.setattr(page, name, lambda drawing: drawing.alt.encode())


@pytest.fixture
def class_folders(tmp_path: Path) -> Callable[..., Path]:
    """Make class folders of small plain images: `class_folders({"train/a": 3, "train/b": 2})`."""

    def make(counts: dict[str, int], *, name: str = "patient_{number:03d}_{folder}.png") -> Path:
        rng = np.random.default_rng(0)
        root = tmp_path / "set"
        number = 0
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                number += 1
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                path = root / folder / name.format(number=number, folder=folder.replace("/", "-"))
                Image.fromarray(pixels).save(path)
        return root

    return make
