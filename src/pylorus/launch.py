"""From the command line to runs: Hydra composes and sweeps, this module checks, starts and sums up.

Nothing here imports torch, so that help, a typo's message and the composition come at once.
"""

import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pylorus.config import CONF, GROUPS, Config
from pylorus.errors import INTERRUPTED, PylorusError, did_you_mean
from pylorus.files import write_text
from pylorus.pipe import ends_quietly
from pylorus.runs.disk import refused
from pylorus.runs.folder import RunFolder
from pylorus.runs.resume import change_to, check_resumable, resume
from pylorus.runs.signals import stopped_by_signals, undisturbed
from pylorus.sweeps.apart import interrupted, run_apart
from pylorus.sweeps.engines import check_installed, explained_end, share_machine
from pylorus.validation import built, check_key, is_free

RESUME = "resume="

_failures: list[PylorusError] = []
"""Of a run that is no job of a sweep: `main` raises it."""


class SweepFolder(Callback):
    """Tells `main` where the sweep's jobs lie: Hydra calls it before the first one."""

    found: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Keeps the sweep's folder."""
        SweepFolder.found = Path(config.hydra.sweep.dir).absolute()
        share_machine(config.hydra.launcher, SweepFolder.found)


def register() -> None:
    """Makes the schema and our resolvers known to Hydra; calling it again changes nothing."""
    token = "".join(secrets.choice("abcdefghijkmnpqrstuvwxyz23456789") for _ in range(4))
    # Cached: what a launcher's worker is sent says the same as here.
    OmegaConf.register_new_resolver("pylorus.token", lambda: token, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("pylorus.help", _help, replace=True)
    ConfigStore.instance().store(name="schema", node=Config)


def _help() -> str:
    from pylorus.help import help_text

    return help_text(CONF)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _job(composed: DictConfig) -> float | None:
    """One job of Hydra's: a run here, or, in a sweep, a process of its own that leaves nothing behind in ours.

    Gives what a search makes as large as it can: validation accuracy of the shipped stage; None of a job that failed.
    """
    return job(composed, HydraConfig.get())


def job(composed: DictConfig, context: Any) -> float | None:
    """What `_job` says; by this name a launcher's worker finds it, with the state of its own process."""
    folder = RunFolder(Path(context.runtime.output_dir).absolute())
    in_sweep = context.mode == RunMode.MULTIRUN
    try:
        _run(composed, context, folder, in_sweep=in_sweep)
    except PylorusError as error:
        if not in_sweep:
            _failures.append(error)  # Hydra would print the command line again before it hands an error on
        elif folder.status().get("state") not in ("failed", "stopped"):
            raise  # the folder does not tell it: it holds another run
        return None
    if not in_sweep:
        return None
    with undisturbed():  # what is imported here is used after an interruption too
        from pylorus.sweeps.table import objective

    return objective(folder)


def _run(composed: DictConfig, context: Any, folder: RunFolder, *, in_sweep: bool) -> None:
    if interrupted:
        raise KeyboardInterrupt
    if folder.status() and folder.config.is_file():
        # The same command on the same folder: what is there is not done again.
        check_resumable(folder)
        change_to(folder, built(composed))
    else:
        overrides = [str(override) for override in context.overrides.task]
        with folder.prepared(overrides, sweep=folder.path.parent.name if in_sweep else None):
            write_text(folder.config, OmegaConf.to_yaml(built(composed)))
    if in_sweep and folder.status()["state"] == "finished":
        print(f"job {folder.path.name}: finished before")
    elif in_sweep:
        run_apart(folder)
    else:
        from pylorus.train import run

        run(folder)


def checked(arguments: list[str]) -> list[str]:
    """The command line with unknown keys refused; a key of a free part (model.args) is added without a `+`.

    Raises:
        PylorusError: Names the unknown key or file and the nearest known one.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    words = set(get_args_parser().parse_args(arguments).overrides)
    return [_checked_override(word, parser.parse_override(word)) if word in words else word for word in arguments]


def _checked_override(word: str, override: Any) -> str:
    name = override.key_or_group
    check_installed(word)
    if name.startswith("hydra"):
        return word
    if name in GROUPS:
        files = [path.stem for path in (CONF / name).glob("*.yaml")]
        value = override.value()
        choices = value.list if isinstance(value, ChoiceSweep) else [value]
        for chosen in [str(choice) for choice in choices if choice is not None]:
            if chosen not in files:
                raise PylorusError(
                    f"{name}={chosen}: there is no {name}/{chosen}.yaml.{did_you_mean(chosen, files)}\n"
                    f"Known: {', '.join(sorted(files))}."
                )
        return word
    check_key(name)
    if override.is_add() and re.match(r"stages\.", name):
        raise PylorusError(f"{word}: a stage is not added here but in a file of conf/stage. Leave the + out.")
    free = is_free(name) and not (override.is_add() or override.is_force_add() or override.is_delete())
    return f"++{word}" if free else word


register()  # a launcher's worker imports this module and composes before it calls anything here


def main() -> None:
    """`python train.py`: runs, prints errors that a user can mend without a traceback, sums up a sweep."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on, and we print them
    code = 0
    with ends_quietly():
        try:
            code = _ended(_begin)
        finally:
            if SweepFolder.found is not None:
                code = max(code, _ended(_sum_up))
        sys.exit(code)


def _begin() -> int:
    """Does what the command line says."""
    begun = [word.removeprefix(RESUME) for word in sys.argv[1:] if word.startswith(RESUME)]
    sys.argv[1:] = checked([word for word in sys.argv[1:] if not word.startswith(RESUME)])
    with stopped_by_signals():
        if begun:
            resume(RunFolder(Path(begun[-1]).expanduser().absolute()), sys.argv[1:])
        else:
            _job()
    if _failures and SweepFolder.found is None:
        raise _failures[0]
    return 0


def _sum_up() -> int:
    from pylorus.sweeps.table import sum_up

    assert SweepFolder.found is not None
    return sum_up(SweepFolder.found)


def _ended(act: Callable[[], int]) -> int:
    """Acts; gives its exit code, or the one of what ended it, which is printed."""
    try:
        return act()
    except KeyboardInterrupt as stop:
        by = f" by {stop}" if str(stop) not in ("", "SIGINT") else ""
        print(f"\ninterrupted{by}", file=sys.stderr)
        if SweepFolder.found is not None:
            print(f"to go on: the same command with hydra.sweep.dir={SweepFolder.found}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        words = _words(error)
        if words is None:
            raise
        print(f"\nerror: {words}", file=sys.stderr)
        return 1


def _words(error: Exception) -> str | None:
    """What a user can mend, without a traceback; None of all else."""
    if isinstance(error, PylorusError | HydraException | OmegaConfBaseException):
        return readable(error)
    words = refused(error) if isinstance(error, OSError) else None
    if words is None and SweepFolder.found is not None and not isinstance(error, BrokenPipeError):
        words = explained_end(error, SweepFolder.found)
    return words


def readable(error: BaseException) -> str:
    """An error's message; of OmegaConf's the key and what is wrong with its value."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: no value given. Add {error.full_key}=… to the command line."
    cause = error.__cause__ if isinstance(error, HydraException) else None
    lines = [str(error)] + ([str(cause)] if cause is not None else [])
    return "\n".join(line.strip() for line in lines if line.strip())
