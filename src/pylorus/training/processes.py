"""The processes that train: how each starts and ends, and what a fault of the machine means for the user.

`pylorus.launch.train` starts one as `python -m pylorus.launch.train --rank FOLDER`. A user's own torchrun or srun
starts `python train.py …` once for each process: the first one does what the command says, and the others train with
it. Errors of the operating system, of torch and of its data loader are wrapped in many ways; only this module tells
them apart.
"""

import errno
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from pylorus.config.checks import load_config
from pylorus.config.schema import Config, TrainerConfig
from pylorus.core import system
from pylorus.core.distributed import (
    Processes,
    announce_folder,
    join_process_group,
    read_processes,
    wait_for_folder,
)
from pylorus.core.errors import INTERRUPTED, TRAIN_COMMAND, PylorusError, UnreadableImageError
from pylorus.core.io import write_json
from pylorus.core.system import (
    DISK_FULL,
    NOT_A_FILE,
    NOT_WRITABLE,
    UNREACHABLE,
    format_disk_full,
    format_drive_lost,
    format_not_a_file,
    format_not_writable,
    get_error_path,
)
from pylorus.hardware import get_batch_size, resolve_accelerator
from pylorus.runs.console import detach_streams, open_run_log
from pylorus.runs.folder import RunFolder
from pylorus.runs.process import (
    StopRequest,
    Timeline,
    compute_process_start,
    handle_signals,
    restore_trainer_config,
)

WORKER_ERROR = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
SHARED_MEMORY_ERROR = re.compile(r"shared memory|unable to (write to file|open shared).*/?torch_", re.IGNORECASE)
WORKER_KILL = re.compile(r"killed by signal: ([^.]+)\.")
KILL_WORDS = {"SIGKILL": "Killed", "SIGSEGV": "Segmentation", "SIGABRT": "Aborted", "SIGXCPU": "CPU time limit"}
"""How torch's data loader, which uses the words of the C library, names a signal that killed one of its processes."""
WRITE_ERROR = re.compile(r"PytorchStreamWriter failed writing|No space left on device|Disk quota exceeded")


@contextmanager
def explain_faults(folder: RunFolder, config: Config) -> Iterator[None]:
    """Turn faults that `explain_fault` knows into a PylorusError; the original error becomes its cause."""
    try:
        yield
    except Exception as error:
        explanation = explain_fault(error, folder, config)
        if explanation is None:
            raise
        raise explanation from error


def explain_fault(error: BaseException, folder: RunFolder, config: Config) -> PylorusError | None:
    """Explain an error if it is a known fault of the machine or of the images; otherwise return None.

    Args:
        error: The error that ended the run; the errors that led to it are examined too, the last one first.
        folder: The run's folder.
        config: The run's configuration.
    """
    if isinstance(error, PylorusError):
        return None
    for cause in system.iterate_causes(error):
        message = _explain_cause(cause, folder, config)
        if message is not None:
            return PylorusError(message)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the GPU or of the machine was insufficient."""
    return isinstance(error, torch.OutOfMemoryError) or system.is_out_of_memory(error)


def _explain_cause(error: BaseException, folder: RunFolder, config: Config) -> str | None:
    text = str(error)
    if isinstance(error, UnreadableImageError):
        return _explain_unreadable_image(text, folder.path)
    if is_out_of_memory(error):
        return _explain_out_of_memory(error, folder.path, config.trainer)
    if isinstance(error, OSError) and _is_of_shared_memory(error):
        return _explain_lost_worker(f"shared memory: {text}", folder.path, config.data.workers)
    if isinstance(error, RuntimeError) and (WORKER_ERROR.search(text) or SHARED_MEMORY_ERROR.search(text)):
        return _explain_lost_worker(text, folder.path, config.data.workers)
    if (
        isinstance(error, OSError)
        and (error.errno == errno.ENOENT or error.errno in UNREACHABLE)
        and not _is_file(folder.config)
    ):
        return _explain_missing_folder(folder.path)
    if WRITE_ERROR.search(text) and not isinstance(error, OSError) and system.get_limit("RLIMIT_FSIZE") is not None:
        return f"{system.format_file_size(error)}\nThen {_format_resume_command(folder.path)}"
    if (isinstance(error, OSError) and error.errno in DISK_FULL) or WRITE_ERROR.search(text):
        return _explain_full_disk(error, folder.path, Path(config.cache.folder))
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        message = format_not_writable(error, _format_error_location(error, folder.path), folder.path)
        return f"{message}\nThen {_format_resume_command(folder.path)}"
    if isinstance(error, OSError) and error.errno in NOT_A_FILE:
        path = _format_error_location(error, folder.path)
        return f"{format_not_a_file(path)}\nMove it away, then {_format_resume_command(folder.path)}"
    if isinstance(error, OSError) and error.errno in UNREACHABLE:
        message = format_drive_lost(error, _format_error_location(error, folder.path))
        return f"{message}\nReconnect the drive or the network, then {_format_resume_command(folder.path)}"
    limit = system.explain_limit(error)
    return None if limit is None else f"{limit}\nThen {_format_resume_command(folder.path)}"


def _is_of_shared_memory(error: OSError) -> bool:
    """Return whether a lock that processes share could not be created, which lies in /dev/shm; no file is named."""
    frames = traceback.extract_tb(error.__traceback__)
    return error.filename is None and any(frame.filename.endswith("multiprocessing/synchronize.py") for frame in frames)


def _explain_full_disk(error: BaseException, folder: Path, cache: Path) -> str:
    return (
        f"{format_disk_full(_format_error_location(error, folder), folder)}\n"
        f"Free some space: delete older runs beside {folder} (their checkpoints first), or the whole cache in "
        f"{cache.absolute()}, which is recomputed when needed.\n"
        f"Then {_format_resume_command(folder)}"
    )


def _explain_missing_folder(folder: Path) -> str:
    return (
        f"the run's folder {folder} disappeared during the run: its config.yaml no longer exists.\n"
        "If the folder was moved or its drive was disconnected, restore it, or continue in its new location: "
        f"{TRAIN_COMMAND} resume=NEW_LOCATION. If it was deleted, start the run again."
    )


def _explain_unreadable_image(text: str, folder: Path) -> str:
    # A worker of the data loader passes on its whole traceback, whose last line is the error.
    reason = text.strip().splitlines()[-1].removeprefix(f"{UnreadableImageError.__module__}.UnreadableImageError: ")
    return (
        f"an image can no longer be read as it was when the run started:\n  {reason}\n"
        "Restore the original file (a run can only continue with exactly the images that it started with), "
        f"then {_format_resume_command(folder)}\n"
        "To leave such files out, start a new run with data.on_error=quarantine."
    )


def _explain_lost_worker(text: str, folder: Path, configured: int | None) -> str:
    match = WORKER_ERROR.search(text)
    process = f"a process that decodes images (pid {match[1].strip()})" if match else "a process that decodes images"
    workers = "chosen for the machine's cores" if configured is None else configured
    kill = WORKER_KILL.search(text)
    end = next((name for name, word in KILL_WORDS.items() if kill and kill[1].startswith(word)), None)
    if end is not None:
        reason = system.format_kill(-signal.Signals[end])
    elif SHARED_MEMORY_ERROR.search(text):
        reason = "got no shared memory: /dev/shm is full, too small, or can't be written to"
    else:
        reason = (
            "was killed or got no shared memory. Usually the machine has run out of memory (see dmesg), or /dev/shm is "
            "too small"
        )
    return (
        f"{process} {reason} (in a container: docker run --shm-size=8g).\n"
        f"Use fewer processes: data.workers is {workers}; 0 needs no shared memory and gives the same result.\n"
        f"Then {_format_resume_command(folder, 'data.workers=0')}"
    )


def _explain_out_of_memory(error: BaseException, folder: Path, trainer: TrainerConfig) -> str:
    size, is_automatic = _get_batch_size(folder, trainer), trainer.batch_size == "auto"
    device = "the GPU" if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error) else "this machine"
    advice = (
        f"Try half the batch size in a new run: the same command with trainer.batch_size={size // 2} (now {size}"
        + (
            ", as found by auto)."
            if is_automatic
            else "), or with trainer.batch_size=auto, which finds a size that fits."
        )
        + f"\nWith trainer.accumulate={2 * trainer.accumulate} as well, each step still learns from "
        f"{size * trainer.accumulate} images."
        if size > 1
        else "The batch is already a single image: use a smaller data.image_size or a smaller model in a new run."
    )
    if device == "the GPU":
        advice += " cache.on_device=false leaves the images in the main memory."
    is_limited = device != "the GPU" and system.get_limit("RLIMIT_AS") is not None
    space = f"{system.format_memory_advice()}.\n" if is_limited else ""
    return (
        f"{device} ran out of memory: {system.format_memory_error(error)}\n{advice}\n{space}"
        f"If other programs used the memory, close them and {_format_resume_command(folder)}"
    )


def _get_batch_size(folder: Path, trainer: TrainerConfig) -> int:
    """Return the number of images in a step: as configured, or as found when the run started."""
    try:
        return get_batch_size(restore_trainer_config(trainer, folder / "environment.json"))
    except (OSError, ValueError):
        return get_batch_size(TrainerConfig())


def _format_resume_command(folder: Path, *overrides: str) -> str:
    return f"resume the run: {' '.join([TRAIN_COMMAND, f'resume={folder}', *overrides])}"


def _format_error_location(error: BaseException, folder: Path) -> str:
    """Return the file that an error names, else a phrase with the run's folder."""
    return get_error_path(error) or f"a file in {folder}"


def _is_file(path: Path) -> bool:
    """Return whether a path is a file; false on a drive that can't be reached."""
    try:
        return path.is_file()
    except OSError:
        return False


Train = Callable[[Config, RunFolder, Processes, StopRequest, Timeline], None]
"""The function that trains in one of the processes; the module that holds it imports this one."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The environment variable in which torch's elastic launch names the file for a process's error."""


class RankErrorHandler(ErrorHandler):
    """Write an error as torch's does, but with what names the first of several: torch's times are whole seconds."""

    def record_exception(self, e: BaseException) -> None:
        """Write the error to the file that the launcher named; without one, print it."""
        is_user_error = isinstance(e, PylorusError)
        message = str(e) or type(e).__name__
        trace = message if is_user_error else traceback.format_exc()
        if ERROR_FILE not in os.environ:
            print(f"\nerror: {trace}", file=sys.stderr)
            return
        now, rank = time.time(), int(os.environ["RANK"])
        details = {"py_callstack": trace, "timestamp": str(int(now)), "time": now, "rank": rank}
        error = {"message": message, "extraInfo": details | {"is_user_error": is_user_error}}
        write_json(Path(os.environ[ERROR_FILE]), {"message": error})


def run_launched(run_command: Callable[[], int], train: Train) -> int:
    """Run a command line in the first of the processes that torchrun or srun started; the others train with it.

    Args:
        run_command: Executes `sys.argv` and returns the exit code.
        train: Trains in one of the processes: `pylorus.launch.train.train`.

    Raises:
        PylorusError: If the command is a sweep.
    """
    processes = read_processes()
    if not processes.is_first:
        folder = wait_for_folder()
        if folder:
            train_rank(Path(folder), processes, train)
        return 0
    try:
        if {"-m", "--multirun"} & set(sys.argv):
            raise PylorusError(
                f"-m: found a sweep in {processes.count} processes that torchrun or srun started. A sweep starts the "
                f"processes of its jobs itself: {TRAIN_COMMAND} -m trainer.devices={processes.local_count} …"
            )
        known_keys = {argument.lstrip("+").partition("=")[0] for argument in sys.argv[1:]}
        for key, count in (("devices", processes.local_count), ("nodes", processes.count // processes.local_count)):
            if f"trainer.{key}" not in known_keys:
                sys.argv.append(f"trainer.{key}={count}")
        return run_command()
    finally:
        announce_folder("")


def train_rank(folder: Path, processes: Processes, train: Train) -> None:
    """Train with the other processes; exit with an error's code, after recording it for the launcher."""
    _stop_with_parent(os.getppid())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the process that the user started handles it and requeues the job
    try:
        record(_train, RankErrorHandler())(RunFolder(folder), processes, train)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception:
        os._exit(1)  # a clean exit would wait for the others


@detach_streams()
def _train(folder: RunFolder, processes: Processes, train: Train) -> None:
    timeline = Timeline(compute_process_start())
    config = load_config(folder.config)
    with handle_signals() as stop, _setup_rank_logging(folder, processes), explain_faults(folder, config):
        accelerator, _ = resolve_accelerator(restore_trainer_config(config.trainer, folder.path / "environment.json"))
        with join_process_group(processes, accelerator=accelerator):
            train(config, folder, processes, stop, timeline)
    if processes.is_first:
        timeline.write(folder.speed)  # the process that started this one includes it in its own


@contextmanager
def _setup_rank_logging(folder: RunFolder, processes: Processes) -> Iterator[None]:
    """Let only the first process log and warn."""
    with open_run_log(folder.path) if processes.is_first else nullcontext():
        if not processes.is_first:
            logging.disable(logging.CRITICAL)
            warnings.simplefilter("ignore")
        yield


def _stop_with_parent(parent: int) -> None:
    """Exit when the parent process is gone: if it was killed, it can't stop this one, and a new run may follow."""

    def wait_for_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(INTERRUPTED)

    threading.Thread(target=wait_for_parent, name="parent", daemon=True).start()
