"""Start runs from the command line: Hydra composes and sweeps; this module checks, starts and summarizes.

Nothing here imports torch, so that help, error messages and composition are immediate.
"""

import ctypes
import json
import math
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from pylorus import __version__
from pylorus.config.checks import build_config, check_paths, format_help, load_config, save_config
from pylorus.config.keys import (
    DECISIVE_KEYS,
    RULES,
    check_used_keys,
    find_unused_keys,
    format_unused_keys,
    read_overrides,
)
from pylorus.config.schema import CONF, EXTENSIBLE, Config
from pylorus.core.distributed import is_launched
from pylorus.core.errors import INTERRUPTED, TRAIN_COMMAND, PylorusError, format_name_list
from pylorus.core.formatting import format_command, handle_closed_pipe, setup_terminal
from pylorus.core.io import explain_lock, iter_leaves, lock_folder, resolve_path
from pylorus.core.system import explain_disk_error, explain_limit, format_stop, initialize_cuda, reserve_cpu_time
from pylorus.launch.corrections import explain_error
from pylorus.launch.overrides import check_overrides
from pylorus.launch.sweep import (
    JobError,
    complete_launcher,
    count_job_gpus,
    explain_sweep_end,
    import_training,
    interrupted,
    run_job_process,
    setup_sweep_process,
    start_reading,
)
from pylorus.runs.console import announce_job
from pylorus.runs.folder import PREPARED, STATUS, RunFolder
from pylorus.runs.process import Timeline, ensure_uninterrupted, exit_process, handle_signals

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CHANGEABLE_KEYS = (
    "report",
    "cache.folder",
    "cache.budget_gib",
    "cache.memory_gib",
    "cache.on_device",
    "data.root",  # the images there are compared by content
    "data.workers",
    "trainer.devices",
    "trainer.nodes",
    "trainer.progress",
    "trainer.strategy",
    "trainer.time_limit",
)
"""Keys that may change when a run is resumed: its result stays the same, apart from the rounding of other devices."""
MAX_JOBS_CHECKED = 64
"""Jobs of a sweep that are composed before the first one starts, to see whether any uses each key."""
INFERRED_KEYS = ("data.classes", "data.short_names", "data.root")  # a run fills them in if they are not given


def resume(folder: RunFolder, overrides: list[str]) -> None:
    """Resume an unfinished run; for a finished run, only write its report if it is missing.

    Args:
        folder: The run's folder.
        overrides: The overrides of the command line apart from `resume=`, already checked.

    Raises:
        PylorusError: If there is no run, if it is still running, or if the overrides would make it a different run.
    """
    with folder.lock():
        check_resumable(folder)
        if overrides:
            status = folder.read_status()
            initial = [_format_search_path(status.get("searchpath", [])), *status.get("overrides", [])]
            update_config(folder, resolve_config([*initial, *overrides]), was=resolve_config(initial))
        _import_and_run(folder, Timeline.from_process_start())


def run_overrides(overrides: list[str], folder: Path | None = None, *, config_dir: Path | None = None) -> RunFolder:
    """Start or resume a run in this process, as the command line does.

    Args:
        overrides: Overrides as on the command line, such as data.root=images.
        folder: The run's folder; None: that of `hydra.run.dir`.
        config_dir: Folder of the user's own configuration; None for none.

    Raises:
        PylorusError: If an override or something else that the user can fix is wrong.
    """
    if config_dir is not None:
        overrides = [*overrides, format_config_dir(config_dir, overrides)]
    timeline = Timeline()
    try:
        with initialize_config_dir(str(Path(CONF)), version_base="1.3"):
            composed = compose("config", overrides=check_overrides(overrides), return_hydra_config=True)
            run_folder = RunFolder(Path(folder or composed.hydra.run.dir).expanduser().absolute())
        context = composed.hydra
        with open_dict(composed):
            del composed["hydra"]
        _start_or_resume(composed, context, run_folder, in_sweep=False, timeline=timeline)
    except (HydraException, OmegaConfBaseException) as error:
        raise PylorusError(explain_error(error, overrides)) from error
    return run_folder


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
        runs = sorted((path.parent for path in Path("outputs").glob("*/*/status.json")), key=str)
        hint = f" The last run here: {RESUME}{runs[-1]}" if runs else ""
        raise PylorusError(f"resume: found no run in {folder.path}, expected a folder with status.json.{hint}")
    if status["state"] in ("starting", "running"):
        raise PylorusError(
            "resume: "
            + explain_lock(folder.path, "the run is {state} as process {pid} on {host}".format_map(status), status)
        )
    if not folder.config.is_file():
        words = [*status.get("overrides", []), *map(_format_search_path, filter(None, [status.get("searchpath")]))]
        raise PylorusError(
            f"resume: the run in {folder.path} failed before it started: {status.get('error', 'no configuration')}\n"
            f"Start it again: {TRAIN_COMMAND} {format_command(words)}"
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
    before, after = dict(iter_leaves(was or saved)), dict(iter_leaves(asked))
    if asked.data.fold_column is not None:  # the number of folds is read from the manifest
        after["data.folds"] = before["data.folds"]
    changed = {
        name: after.get(name)
        for name in before | after
        if before.get(name) != after.get(name) and not (name in INFERRED_KEYS and after.get(name) is None)
    }
    fixed = [name for name in changed if name not in CHANGEABLE_KEYS]
    if fixed:
        lines = [f"{name}: the run has {before.get(name)}, found {after.get(name)}" for name in fixed]
        raise PylorusError(
            f"{folder.path}: this folder contains a run with a different configuration:\n{format_name_list(lines)}\n"
            f"Remove these to resume it, or start a new run. Keys that may change: {', '.join(CHANGEABLE_KEYS)}."
        )
    if changed:
        updated = OmegaConf.structured(saved)
        for name, value in changed.items():
            OmegaConf.update(updated, name, value)
        save_config(folder.config, updated)


def resolve_config(overrides: list[str]) -> Config:
    """Return the configuration that checked overrides give; what they say of Hydra itself is ignored."""
    ignored = re.compile(r"[+~]*hydra(?!\.searchpath)\b")
    with initialize_config_dir(str(Path(CONF)), version_base="1.3"):
        return build_config(compose("config", overrides=[each for each in overrides if not ignored.match(each)]))


def format_config_dir(folder: Path, overrides: list[str]) -> str:
    """Return the override that adds a folder of the user's own to Hydra's search path, after checking it."""
    if not folder.expanduser().is_dir():
        raise PylorusError(f"config_dir: {folder} is not a folder, expected one with your configuration.")
    if any(override.startswith("hydra.searchpath=") for override in overrides):
        raise PylorusError(
            "config_dir: found hydra.searchpath among the overrides too, expected one of them. hydra.searchpath takes "
            "several folders: 'hydra.searchpath=[DIR1,DIR2]'."
        )
    return _format_search_path([f"file://{folder.expanduser().absolute()}"])


def _format_search_path(sources: list[str]) -> str:
    return f"hydra.searchpath={json.dumps(sources, ensure_ascii=False)}"


RESUME = "resume="
_typed_words: list[str] = []  # the command line, for the corrected one that an error shows
_failures: list[PylorusError] = []  # of a run that is not part of a sweep: `main` raises the first


class SweepFolder(Callback):
    """Record for `main` where the sweep's jobs are; Hydra calls this before the first job."""

    path: Path | None = None
    jobs: int | None = None
    """Number of jobs; None for a search, which decides as it goes."""
    varied: frozenset[str] = frozenset()
    """Keys in which the jobs differ; empty for a search."""
    _lock = ExitStack()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Expand `~` in the run's folder, which a configuration file may contain."""
        _expand_folder(config.hydra.run)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Store the sweep's folder, and lock it until this process ends."""
        _expand_folder(config.hydra.sweep)
        path = Path(config.hydra.sweep.dir).absolute()
        path.mkdir(parents=True, exist_ok=True)
        try:
            SweepFolder._lock.enter_context(lock_folder(path, lambda: _explain_sweep_lock(path)))
        except PylorusError as error:  # Hydra would only warn of it
            print(f"\nerror: {error}", file=sys.stderr)
            sys.exit(1)
        SweepFolder.path = path
        SweepFolder.jobs, SweepFolder.varied = _count_jobs(config)
        setup_sweep_process(config.hydra.launcher, SweepFolder.path, gpus_per_job=count_job_gpus(config.trainer))


def _count_jobs(config: DictConfig) -> tuple[int | None, frozenset[str]]:
    """Return how many jobs Hydra's own sweeper makes of a command line, and what they differ in; None for a search."""
    if not str(config.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return None, frozenset()
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    sweeps = [each for each in _parse_overrides([*params, *config.hydra.overrides.task]) if each.is_sweep_override()]
    if not all(override.is_discrete_sweep() for override in sweeps):
        return None, frozenset()
    count = math.prod(len(_list_choices(override)) for override in sweeps)
    return count, frozenset(str(override.key_or_group) for override in sweeps)


def _parse_overrides(words: Sequence[str]) -> "list[Override]":
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_overrides(list(words))


def _list_choices(override: "Override") -> list[str]:
    """Return the overrides of single jobs that one of a command line stands for; none for a range of a search."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    values = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
    return [f"{override.key_or_group}={value}" for value in values]


def _explain_sweep_lock(sweep: Path) -> str:
    """Return the message for a locked sweep; the latest sign of life is that of its jobs."""
    statuses = [RunFolder(path.parent).find_status() for path in sweep.glob("*/status.json")]
    latest = max(statuses, key=lambda status: str(status.get("heartbeat", "")), default={})
    return explain_lock(sweep, "another process is running a sweep", latest)


def _expand_folder(section: DictConfig) -> None:
    if str(section.dir).startswith("~"):
        with read_write(section), open_dict(section):
            section.dir = str(Path(section.dir).expanduser())


def register() -> None:
    """Register the schema and our resolvers with Hydra; calling it again changes nothing."""
    token = "".join(secrets.choice("abcdefghijkmnpqrstuvwxyz23456789") for _ in range(4))
    # Cached, so that a launcher's worker sees the same value as this process.
    OmegaConf.register_new_resolver("pylorus.token", lambda: token, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("pylorus.help", lambda: format_help(CONF), replace=True)
    schema = OmegaConf.structured(Config)
    for section in EXTENSIBLE:
        OmegaConf.set_struct(schema[section], False)  # accepts the arguments of a _target_; build_config checks them
    ConfigStore.instance().store(name="schema", node=schema)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _run_hydra_job(composed: DictConfig) -> float | None:
    """Run one Hydra job: a run in this process or, in a sweep, in a separate process that leaves ours clean.

    Returns what a hyperparameter search maximizes: validation accuracy of the shipped stage; None if it failed.
    """
    return run_job(composed, HydraConfig.get())


def run_job(composed: DictConfig, context: Any) -> float | None:
    """Do what `_run_hydra_job` documents; launchers pickle it by name, so that a worker uses the state of its own
    process.
    """
    folder = RunFolder(Path(context.runtime.output_dir).absolute())
    in_sweep = context.mode == RunMode.MULTIRUN
    try:
        timeline = Timeline() if in_sweep else Timeline.from_process_start()
        _start_or_resume(composed, context, folder, in_sweep=in_sweep, timeline=timeline)
    except Exception as error:
        message = str(error) if isinstance(error, PylorusError) else _explain_system_error(error)
        if message is None:
            raise
        failure = error if isinstance(error, PylorusError) else PylorusError(message)
        if not in_sweep:
            _failures.append(failure)  # if raised here, Hydra would print the command line again
        elif not isinstance(error, JobError):
            raise failure from error  # the folder belongs to another run, so its status does not report this error
        return None
    if not in_sweep:
        return None
    with ensure_uninterrupted():  # an import must not be interrupted: the module is needed afterwards too
        from pylorus.launch.sweep_table import get_objective

    return get_objective(folder)


def _start_or_resume(
    composed: DictConfig, context: Any, folder: RunFolder, *, in_sweep: bool, timeline: Timeline
) -> None:
    if interrupted:
        raise KeyboardInterrupt
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock():
        _prepare_folder(composed, context, folder, in_sweep=in_sweep)
        if not in_sweep:
            _import_and_run(folder, timeline)
    if in_sweep and folder.read_status()["state"] == "finished":
        print(f"job {folder.path.name}: already finished")
    elif in_sweep:
        announce_job(folder, context.overrides.task, jobs=SweepFolder.jobs, varied=SweepFolder.varied)
        run_job_process(folder)  # it locks the folder itself


def _prepare_folder(composed: DictConfig, context: Any, folder: RunFolder, *, in_sweep: bool) -> None:
    if folder.read_status() and folder.config.is_file():
        # The same command on the same folder: resume it.
        check_resumable(folder)
        try:
            update_config(folder, build_config(composed, folder=context.runtime.cwd))
        except PylorusError:
            if folder.has_trained:
                raise
            folder.delete_preparation()  # that run failed before it trained: the corrected command starts anew
    elif not folder.read_status():
        _check_unused(folder.path, stages=list(composed.stages))
    if not folder.config.is_file():
        overrides = [str(override) for override in context.overrides.task]
        sweep = folder.path.parent.name if in_sweep else None
        sources = _list_own_sources(context.runtime.config_sources)
        try:
            with folder.set_starting(overrides, sweep=sweep, searchpath=sources):
                config = build_config(composed, folder=context.runtime.cwd)
                check_used_keys(config, [] if in_sweep else overrides)  # `check_sweep` has checked the words of a sweep
                check_paths(config)
                save_config(folder.config, config)
        except PylorusError as error:
            raise JobError(str(error)) from error


def _check_unused(folder: Path, *, stages: list[str]) -> None:
    """Check that a folder without status.json holds nothing that a run would read or overwrite.

    Raises:
        PylorusError: If it does.
    """
    names = [name for name in (*PREPARED, "model", "report", *stages) if os.path.lexists(folder / name)]
    if names:
        raise PylorusError(
            f"{folder}: found {names[0]}, but no {STATUS}: the folder is not that of a run, or has lost this file. "
            "Move that folder away, or choose another one: hydra.run.dir=DIR, or hydra.sweep.dir=DIR for a sweep."
        )


def _import_and_run(folder: RunFolder, timeline: Timeline) -> None:
    """Run a prepared folder; its images are read and a GPU is initialized during the seconds of importing torch."""
    reading = None
    if folder.read_status()["state"] != "finished":
        reading = start_reading(folder)
        threading.Thread(target=_initialize_gpu, args=(folder,), name="CUDA", daemon=True).start()
    try:
        with folder.report_early_end():
            import_training().run(folder, reading, timeline)
    finally:
        if reading is not None:
            reading.stop()


def _initialize_gpu(folder: RunFolder) -> None:
    """Prepare the first GPU, unless the run uses none or several."""
    with suppress(Exception):  # of whatever is wrong with the GPU: the run itself will say it
        driver = ctypes.CDLL("libcuda.so.1")  # first: without one, the configuration need not be read
        trainer = load_config(folder.config).trainer
        if trainer.accelerator in ("auto", "gpu") and trainer.devices * trainer.nodes == 1:
            initialize_cuda(driver)


def _list_own_sources(sources: Any) -> list[str]:
    """Return where the user's own configuration is: what `hydra.searchpath` would have to name."""
    own = [source for source in sources if source.provider.startswith(("command-line", "hydra.searchpath"))]
    return [f"{source.schema}://{source.path}" for source in own]


register()  # here, since a launcher's worker imports this module and composes before it calls anything


def main() -> None:
    """`python train.py`: run, print errors that users can fix without a traceback, and summarize a sweep."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # make Hydra raise errors, so that we print them
    code = 0
    setup_terminal()
    reserve_cpu_time()
    with handle_closed_pipe():
        try:
            code = _get_exit_code(_run_launched if is_launched() else _run_command_line)
        finally:
            if SweepFolder.path is not None:
                code = max(code, _get_exit_code(_report_sweep))
        if code and is_launched():
            sys.stdout.flush()
            os._exit(code)  # a clean exit would wait for the other processes
    if "torch" in sys.modules:
        exit_process(code)
    sys.exit(code)


def _run_launched() -> int:
    from pylorus.training.processes import run_launched

    return run_launched(_run_command_line, import_training().train)


def _run_command_line() -> int:
    """Execute the command line."""
    from hydra._internal.utils import get_args_parser

    resumed_folders = [argument.removeprefix(RESUME) for argument in sys.argv[1:] if argument.startswith(RESUME)]
    words = [argument for argument in sys.argv[1:] if not argument.startswith(RESUME)]
    if "--version" in words:  # Hydra would show its own
        print(f"pylorus {__version__}")
        return 0
    _typed_words[:] = sys.argv[1:]
    sys.argv[1:] = check_overrides(complete_launcher(words), resuming=bool(resumed_folders), typed=_typed_words)
    with handle_signals() as stop:
        try:
            if resumed_folders:
                overrides = get_args_parser().parse_args(sys.argv[1:]).overrides
                resume(RunFolder(resolve_path(resumed_folders[-1], argument="resume").absolute()), overrides)
            else:
                _check_sweep(sys.argv[1:])
                _run_hydra_job()
            if _failures and SweepFolder.path is None:
                raise _failures[0]
        except PylorusError:
            if stop.asked:  # before the run began: a library made an error of its own of the interruption
                stop.raise_interrupt()
            raise
    return 0


def _check_sweep(arguments: list[str]) -> None:
    """Check that some job of a sweep uses each key of its command line.

    Raises:
        PylorusError: If none does; the message names the key, and what to type instead.
    """
    from hydra._internal.utils import get_args_parser

    options = get_args_parser().parse_args(arguments)
    typed = read_overrides(options.overrides)
    if not options.multirun or not any(re.fullmatch(rule.key, key) for rule in RULES for key in typed):
        return
    choices: list[list[str]] = []
    for override in _parse_overrides(options.overrides):
        is_decisive = override.key_or_group in DECISIVE_KEYS or override.key_or_group.startswith("stages.")
        choices.append(_list_choices(override)[: None if is_decisive else 1])
    unused: dict[str, str] | None = None
    for words in islice(product(*filter(None, choices)), MAX_JOBS_CHECKED):
        try:
            source = [format_config_dir(Path(options.config_dir), [])] if options.config_dir else []
            reasons = find_unused_keys(resolve_config([*words, *source]), typed)
        except (PylorusError, HydraException, OmegaConfBaseException):
            return  # the job will say so
        unused = reasons if unused is None else {key: unused[key] for key in unused.keys() & reasons.keys()}
        if not unused:
            return
    if unused:
        raise PylorusError(format_unused_keys(unused, typed))


def _report_sweep() -> int:
    from pylorus.launch.sweep_table import write_sweep_table

    assert SweepFolder.path is not None
    return write_sweep_table(SweepFolder.path)


def _get_exit_code(run_command: Callable[[], int]) -> int:
    """Call `run_command` and return its exit code; if it raises, print the error and return the matching code."""
    try:
        return run_command()
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # a terminal that was closed
            print(f"\ninterrupted{format_stop(str(stop))}", file=sys.stderr)
            if SweepFolder.path is not None:
                print(f"to resume: the same command with hydra.sweep.dir={SweepFolder.path}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        message = _explain_error(error)
        if message is None:
            raise
        print(f"\nerror: {message}", file=sys.stderr)
        return 1


def _explain_system_error(error: Exception) -> str | None:
    return explain_disk_error(error) if isinstance(error, OSError) else explain_limit(error)


def _explain_error(error: Exception) -> str | None:
    """Return the message of an error that users can fix, to be shown without a traceback; None for all others."""
    if isinstance(error, PylorusError | HydraException | OmegaConfBaseException):
        return explain_error(error, _typed_words)
    message = _explain_system_error(error)
    if message is None and SweepFolder.path is not None and not isinstance(error, BrokenPipeError):
        message = explain_sweep_end(error, SweepFolder.path)
    return message
