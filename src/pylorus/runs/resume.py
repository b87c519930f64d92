"""Resume a run, but only as the same run, with exactly the images that it started with.

Nothing here imports torch, so errors are reported at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pylorus.config import CONF, Config
from pylorus.errors import PylorusError, format_name_list
from pylorus.files import write_text
from pylorus.runs.folder import RunFolder
from pylorus.validation import build_config, load_config

FREE = (
    "report",
    "cache.folder",
    "cache.budget_gib",
    "cache.memory_gib",
    "data.root",  # the images there are compared by content
    "data.workers",
    "trainer.devices",
    "trainer.nodes",
    "trainer.progress",
    "trainer.strategy",
)
"""Keys that may change when a run is resumed: they do not change its result, except that other devices may change
rounding."""
INFERRED = ("data.classes", "data.short_names", "data.root")
"""Keys that a run fills in if they are not given."""


def resume(folder: RunFolder, overrides: list[str]) -> None:
    """Resume an unfinished run; for a finished run, only write its report if it is missing.

    Args:
        folder: The run's folder.
        overrides: The overrides of the command line apart from `resume=`, already checked.

    Raises:
        PylorusError: If there is no run, if it is still running, or if the overrides would make it a different run.
    """
    check_resumable(folder)
    if overrides:
        initial = folder.read_status().get("overrides", [])
        update_config(folder, _resolve_config([*initial, *overrides]), was=_resolve_config(initial))
    from pylorus.train import run

    run(folder)


def check_resumable(folder: RunFolder) -> None:
    """Check that the run in a folder can be resumed.

    Raises:
        PylorusError: If the folder contains no run, a sweep, a run that is still running, or one that never started.
    """
    status = folder.read_status()
    if not status and list(folder.path.glob("*/status.json")):
        raise PylorusError(
            f"resume: {folder.path} is a sweep. Run the command of the sweep again with "
            f"hydra.sweep.dir={folder.path}: it runs the missing jobs."
        )
    if not status:
        raise PylorusError(f"resume: found no run in {folder.path}, expected a folder with status.json.")
    if status["state"] in ("starting", "running"):
        raise PylorusError(
            f"resume: the run in {folder.path} is {status['state']} as process {status['pid']} on {status['host']}. "
            "Wait until it ends, or stop it first."
        )
    if not folder.config.is_file():
        raise PylorusError(
            f"resume: the run in {folder.path} failed before it started: {status.get('error', 'no configuration')}\n"
            f"Start it again: python train.py {' '.join(status.get('overrides', []))}"
        )


def update_config(folder: RunFolder, asked: Config, *, was: Config | None = None) -> None:
    """Update a run's configuration with the keys that may change when it is resumed.

    Args:
        folder: The run's folder.
        asked: The requested configuration.
        was: The configuration to compare it with; None for the one in the run's folder.

    Raises:
        PylorusError: If other keys differ; names each of them with both values.
    """
    saved = load_config(folder.config)
    before, after = dict(_iter_leaves(was or saved)), dict(_iter_leaves(asked))
    if asked.data.fold_column is not None:  # the number of folds is read from the manifest
        after["data.folds"] = before["data.folds"]
    changed = {
        name: after.get(name)
        for name in before | after
        if before.get(name) != after.get(name) and not (name in INFERRED and after.get(name) is None)
    }
    fixed = [name for name in changed if name not in FREE]
    if fixed:
        lines = [f"{name}: the run has {before.get(name)}, found {after.get(name)}" for name in fixed]
        raise PylorusError(
            f"{folder.path}: this folder contains a run with a different configuration:\n{format_name_list(lines)}\n"
            f"Remove these to resume it, or start a new run. Keys that may change: {', '.join(FREE)}."
        )
    if changed:
        updated = OmegaConf.structured(saved)
        for name, value in changed.items():
            OmegaConf.update(updated, name, value)
        write_text(folder.config, OmegaConf.to_yaml(updated))


def _resolve_config(overrides: list[str]) -> Config:
    with initialize_config_dir(str(Path(CONF)), version_base="1.3"):
        return build_config(compose("config", overrides=[each for each in overrides if not each.startswith("hydra")]))


def _iter_leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over all keys with their values; lists and free-form groups are single values."""
    if is_dataclass(config):
        for field in fields(config):
            yield from _iter_leaves(getattr(config, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(config, Mapping) and any(is_dataclass(value) for value in config.values()):
        for name, value in config.items():
            yield from _iter_leaves(value, f"{path}.{name}")
    else:
        yield path, config
