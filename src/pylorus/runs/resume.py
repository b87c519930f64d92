"""Going on with a run: only as what it was, with the very images that it began with.

Nothing here imports torch: a refusal comes at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pylorus.config import CONF, Config
from pylorus.errors import PylorusError, listing
from pylorus.files import write_text
from pylorus.runs.folder import RunFolder
from pylorus.validation import built, loaded

FREE = (
    "report",
    "cache.folder",
    "cache.budget_gib",
    "cache.memory_gib",
    "data.root",  # what lies there is compared by content
    "data.workers",
    "trainer.devices",
    "trainer.nodes",
    "trainer.progress",
    "trainer.strategy",
)
"""Keys that may change when a run goes on: they do not change its result, but for rounding where devices do."""
INFERRED = ("data.classes", "data.short_names", "data.root")
"""Keys that a run fills in where they are not given."""


def resume(folder: RunFolder, overrides: list[str]) -> None:
    """Goes on with an unfinished run; of a finished one it only writes a report that is missing.

    Args:
        folder: The run's.
        overrides: What the command line says beside `resume=`, checked.

    Raises:
        PylorusError: If there is no run, if it still runs, or if the overrides would make another run of it.
    """
    check_resumable(folder)
    if overrides:
        began = folder.status().get("overrides", [])
        change_to(folder, _composed([*began, *overrides]), was=_composed(began))
    from pylorus.train import run

    run(folder)


def check_resumable(folder: RunFolder) -> None:
    """Refuses a folder whose run can't go on.

    Raises:
        PylorusError: If it holds no run, a sweep, or one that runs.
    """
    status = folder.status()
    if not status and list(folder.path.glob("*/status.json")):
        raise PylorusError(
            f"resume: {folder.path} is a sweep. Give the command of the sweep again, with "
            f"hydra.sweep.dir={folder.path}: it runs what is missing."
        )
    if not status:
        raise PylorusError(f"resume: found no run in {folder.path}, expected a folder with status.json.")
    if status["state"] in ("starting", "running"):
        raise PylorusError(
            f"resume: the run in {folder.path} is {status['state']}, as process {status['pid']} on {status['host']}. "
            "Wait for it, or stop it first."
        )
    if not folder.config.is_file():
        raise PylorusError(
            f"resume: the run in {folder.path} failed before it began: {status.get('error', 'no configuration')}\n"
            f"Start it anew: python train.py {' '.join(status.get('overrides', []))}"
        )


def change_to(folder: RunFolder, asked: Config, *, was: Config | None = None) -> None:
    """Takes over what may change from a configuration that a run shall go on with.

    Args:
        folder: The run's.
        asked: The configuration.
        was: What the run's own is to be taken for; None: what lies in its folder.

    Raises:
        PylorusError: Names each key that may not change, with both values.
    """
    saved = loaded(folder.config)
    before, after = dict(_leaves(was or saved)), dict(_leaves(asked))
    if asked.data.fold_column is not None:  # their number is read from the manifest
        after["data.folds"] = before["data.folds"]
    changed = {
        name: after.get(name)
        for name in before | after
        if before.get(name) != after.get(name) and not (name in INFERRED and after.get(name) is None)
    }
    refused = [name for name in changed if name not in FREE]
    if refused:
        lines = [f"{name}: the run has {before.get(name)}, found {after.get(name)}" for name in refused]
        raise PylorusError(
            f"{folder.path}: the run there is another one:\n{listing(lines)}\n"
            f"Leave these out to go on with it, or start a new run. What may change: {', '.join(FREE)}."
        )
    if changed:
        settled = OmegaConf.structured(saved)
        for name, value in changed.items():
            OmegaConf.update(settled, name, value)
        write_text(folder.config, OmegaConf.to_yaml(settled))


def _composed(overrides: list[str]) -> Config:
    with initialize_config_dir(str(Path(CONF)), version_base="1.3"):
        return built(compose("config", overrides=[word for word in overrides if not word.startswith("hydra")]))


def _leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value; lists and free parts as they are."""
    if is_dataclass(config):
        for field in fields(config):
            yield from _leaves(getattr(config, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(config, Mapping) and any(is_dataclass(value) for value in config.values()):
        for name, value in config.items():
            yield from _leaves(value, f"{path}.{name}")
    else:
        yield path, config
