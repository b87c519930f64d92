"""Modules whose import is deferred until something of them is used."""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pylorus.core.deferred_imports import DeferredName, defer_import

MADE_UP = "made_up_for_deferring"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that writes a file when it is loaded; sys.modules is left as it was."""
    folder = tmp_path / MADE_UP
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('loaded').touch()\nvalue = 3\n", encoding="utf-8"
    )
    (folder / "part.py").write_text("value = 4\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == MADE_UP]:
        del sys.modules[name]


def test_a_deferred_module_loads_when_it_is_used(package: Path) -> None:
    defer_import(MADE_UP, known=1)
    module = importlib.import_module(MADE_UP)
    assert module.known == 1
    assert importlib.util.find_spec(MADE_UP) is not None
    inspect.getmodule(inspect.currentframe())  # it looks at all loaded modules
    assert not (package / "loaded").exists()
    assert module.value == 3
    assert (package / "loaded").exists()
    assert importlib.import_module(MADE_UP) is module
    assert not hasattr(module, "known")
    assert module.__file__ == str(package / "__init__.py")


def test_a_deferred_name_loads_its_module_when_it_is_used(package: Path) -> None:
    (package / "__init__.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('loaded').touch()\n"
        "class Model:\n    kind = 'text'\n    def __init__(self, size=1):\n        self.size = size\n",
        encoding="utf-8",
    )
    defer_import(MADE_UP, Model=DeferredName(MADE_UP, "Model"))
    deferred = importlib.import_module(MADE_UP).Model
    inspect.unwrap(deferred)
    assert not (package / "loaded").exists()
    assert deferred.kind == "text"
    assert (package / "loaded").exists()
    assert importlib.import_module(MADE_UP).Model is type(deferred(size=3))
    assert deferred(size=3).size == 3
    assert isinstance(deferred(), deferred)
    assert types.new_class("Derived", (deferred,))(2).size == 2


def test_what_is_set_in_a_deferred_module_is_set_in_the_loaded_one(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defer_import(MADE_UP)
    deferred = importlib.import_module(MADE_UP)
    with monkeypatch.context() as patched:
        patched.setattr(deferred, "value", 5)
        assert importlib.import_module(MADE_UP).value == 5
    assert importlib.import_module(MADE_UP).value == 3


def test_a_part_of_a_deferred_module_can_be_imported(package: Path) -> None:
    defer_import(MADE_UP)
    assert importlib.import_module(f"{MADE_UP}.part").value == 4
    assert (package / "loaded").exists()


def test_a_part_of_a_deferred_module_is_one_of_its_names(package: Path) -> None:
    defer_import(MADE_UP)
    names: dict[str, Any] = {}
    exec(f"from {MADE_UP} import part, value", names)
    assert (names["part"].value, names["value"]) == (4, 3)
    with pytest.raises(ImportError, match="nothing"):
        exec(f"from {MADE_UP} import nothing")


def test_a_module_that_fails_says_so_each_time(package: Path) -> None:
    (package / "__init__.py").write_text("raise OSError('no library')", encoding="utf-8")
    defer_import(MADE_UP)
    module = importlib.import_module(MADE_UP)
    for _ in range(2):
        with pytest.raises(OSError, match="no library"):
            _ = module.value


def test_neither_an_unknown_nor_a_loaded_module_is_deferred(package: Path) -> None:
    defer_import("not_installed_anywhere")
    assert "not_installed_anywhere" not in sys.modules
    loaded = importlib.import_module(MADE_UP)
    defer_import(MADE_UP)
    assert sys.modules[MADE_UP] is loaded


@pytest.mark.slow
def test_a_run_imports_neither_wandb_nor_scipy_signal_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("class AutoModel: ...\nclass AutoTokenizer: ...\n")
    (tmp_path / "transformers-4.99.0.dist-info").mkdir()
    (tmp_path / "transformers-4.99.0.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 4.99.0\n")
    words = """
import sys
import pylorus.launch.train
import torchmetrics.functional.text.bert as bert
print(*({'wandb.sdk', 'scipy.stats', 'scipy.signal.windows', 'matplotlib'} & set(sys.modules)))
print('AutoModel' in vars(bert), type(sys.modules['transformers']).__name__)
bert.AutoModel()
print(type(sys.modules['transformers']).__name__)
import torch, torchmetrics
figure, _ = torchmetrics.ConfusionMatrix(task="binary").plot(torch.eye(2))
print(type(figure).__name__)
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "\nTrue DeferredModule\nmodule\nFigure\n"
