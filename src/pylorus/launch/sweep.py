"""A sweep's jobs: each a process of its own with GPUs of its own, the launchers that start them, and how they end.

Nothing here imports torch or pandas: a launcher that is missing is reported at once.
"""

import fcntl
import importlib
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, cast

from omegaconf import OmegaConf, open_dict

from pylorus.config.checks import load_config
from pylorus.core.distributed import PARALLEL_JOBS
from pylorus.core.errors import INTERRUPTED, PylorusError, format_name_list
from pylorus.core.formatting import BROKEN_PIPE_CODE
from pylorus.core.io import write_json
from pylorus.runs.console import format_job_ends
from pylorus.runs.folder import STATUS, RunFolder
from pylorus.runs.process import (
    IN_SWEEP,
    JOB_STOP_SIGNAL,
    JOB_STOP_TIMEOUT,
    STOP_SIGNALS,
    BackgroundTask,
    ForkedProcess,
    end_after_parent,
    ensure_uninterrupted,
    format_limit,
    pause_garbage_collection,
)

interrupted: list[Path] = []
"""Folders of this process's jobs that a signal ended: after that a launcher's worker starts no other job."""


class JobError(PylorusError):
    """A job of a sweep failed; its status says why, and the sweep continues."""


def run_job_process(folder: RunFolder) -> None:
    """Run a job of a sweep in a process of its own; if it fails, the sweep continues.

    Args:
        folder: The job's folder.

    Raises:
        KeyboardInterrupt: If this process or the job received a signal.
        JobError: If the job failed or reached its time limit.
    """
    _end_worker_after_sweep()
    trainer = load_config(folder.config).trainer
    with reserve_gpus(count_job_gpus(trainer)) as gpus:
        job, reading = None, start_reading(folder) if _is_forking() else None
        try:
            if reading is not None:
                prepare_jobs()
                reading.wait()  # the job finds the images in the caches
            # The job holds the locks too: if this process is killed, it ends a little later.
            job = _start_job(folder.path, {**os.environ, **gpus.environment, IN_SWEEP: str(os.getpid())}, gpus.locks)
            code, reason = _wait_for_job(job, trainer.time_limit)
        except BaseException:  # a signal, or a launcher that requeues its job
            interrupted.append(folder.path)
            if job is not None:
                _stop_job(job)
            if (status := folder.read_status())["state"] == "starting":  # the job had not yet written its own status
                write_json(folder.path / STATUS, {**status, "state": "interrupted"}, sealed=True)
            raise
        finally:
            if reading is not None:
                reading.stop()
    _check_job_end(folder, code, reason)


def _wait_for_job(job: "subprocess.Popen[bytes] | ForkedProcess", minutes: float | None) -> tuple[int, str | None]:
    """Return a job's exit code, and why it had to be ended: at its time limit, it should end by itself."""
    if minutes is None:
        return job.wait(), None
    try:
        return job.wait(timeout=60.0 * minutes + JOB_STOP_TIMEOUT), None
    except subprocess.TimeoutExpired:
        _stop_job(job)
        return INTERRUPTED, f"{format_limit(minutes)}, and the job hung"


def _check_job_end(folder: RunFolder, code: int, limit: str | None) -> None:
    """Write why a job ended into its status if the job could not, and raise the error that says so.

    Args:
        folder: The job's folder.
        code: Its exit code.
        limit: Why this process ended the job; None: it ended by itself.
    """
    status = folder.read_status()
    if code in (0, BROKEN_PIPE_CODE):
        return
    if limit is None and code == INTERRUPTED:
        limit = status.get("error") if status["state"] == "interrupted" else None
        if limit is None:
            interrupted.append(folder.path)
            raise KeyboardInterrupt
    elif status["state"] in ("starting", "running", "stopped"):
        state = "failed" if limit is None else "interrupted"
        status |= {"state": state, "error": limit or _explain_exit_code(code)}
        write_json(folder.path / STATUS, status, sealed=True)
    raise JobError(f"the job in {folder.path} {status['state']}: {status.get('error', _explain_exit_code(code))}")


def _explain_exit_code(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    memory = ". Most often the machine ran out of memory (see dmesg)" if code == -signal.SIGKILL else ""
    return f"its process was killed by {signal.Signals(-code).name}{memory}"


SWEEP_PROCESS = "PYLORUS_SWEEP_PROCESS"
"""The environment variable with the number of the sweep's process, by which a launcher's worker knows its parent."""


@cache
def _end_worker_after_sweep() -> None:
    """Have a launcher's worker, of which this may be one, end when the sweep's process is gone."""
    parent = os.getppid()
    if os.environ.get(SWEEP_PROCESS) == str(parent):
        end_after_parent(parent)


def _start_job(
    folder: Path, environment: dict[str, str], locks: Sequence[int]
) -> "subprocess.Popen[bytes] | ForkedProcess":
    """Start `python -m pylorus.launch.train FOLDER`, on Linux as a fork of this process, which imports it only once."""
    arguments = [sys.executable, "-m", "pylorus.launch.train", str(folder)]
    if not prepare_jobs():
        return subprocess.Popen(arguments, env=environment, pass_fds=locks)

    def run_job() -> None:
        sys.argv = arguments[2:]
        import_training().main()

    return ForkedProcess(run_job, environment=environment, pass_fds=locks)


def start_reading(folder: RunFolder) -> BackgroundTask | None:
    """Start to read the images of a prepared folder into the caches while this process imports torch.

    Returns:
        The process that reads; None if nothing is left to import, or the system can't fork.
    """
    if "torch" in sys.modules or sys.platform != "linux":
        return None
    return BackgroundTask(_read_ahead, folder.config)


def _read_ahead(path: Path) -> None:
    config = load_config(path)  # in this process: composing it again would delay the import
    if config.data.kind in ("folders", "manifest"):
        from pylorus.data.sources import read_ahead

        read_ahead(config)


def import_training() -> ModuleType:
    """Return the module `pylorus.launch.train`; the first call takes seconds."""
    if "pylorus.launch.train" not in sys.modules:
        with pause_garbage_collection():
            importlib.import_module("pylorus.launch.train")
    return sys.modules["pylorus.launch.train"]


def prepare_jobs() -> bool:
    """Import what jobs need, and return whether they may be forked from this process.

    Ray and submitit have threads of their own in it, and each job of theirs a new process.
    """
    if not _is_forking():
        return False
    with ensure_uninterrupted():  # an incomplete module would remain
        import_training()
        importlib.import_module("pylorus.report.page")  # a job alone imports it when it writes its report
    return not sys.modules["torch"].cuda.is_initialized()  # CUDA works only in the process that initialized it


def _is_forking() -> bool:
    return sys.platform == "linux" and not {"ray", "submitit"} & set(sys.modules)


def _stop_job(job: "subprocess.Popen[bytes] | ForkedProcess") -> None:
    """Ask a job to end, and kill it if it does not; a job that already received Ctrl-C from the terminal ignores it."""
    job.send_signal(JOB_STOP_SIGNAL)
    try:
        job.wait(timeout=JOB_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()


GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
"""The environment variable that names the GPUs which a process may use."""
GPU_NAME = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")
"""How it names one: by index or UUID; CUDA ignores what follows another word, such as -1."""


@dataclass
class ReservedGpus:
    """The GPUs of one job of a sweep.

    Attributes:
        names: As in CUDA_VISIBLE_DEVICES; empty if the job is not limited to some.
        locks: Descriptors of locked files, one per GPU; the kernel unlocks one when the last process that has it ends.
    """

    names: list[str] = field(default_factory=list)
    locks: list[int] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of the job."""
        return {GPU_VARIABLE: ",".join(self.names)} if self.names else {}


def count_job_gpus(trainer: Any) -> int:
    """Return how many GPUs a job needs if this machine has any; 0 if it uses none, or those of several machines.

    Args:
        trainer: The section `trainer` of its configuration.
    """
    return 0 if trainer.accelerator in ("cpu", "mps") or trainer.nodes > 1 else int(trainer.devices)


def list_gpus() -> list[str]:
    """List the NVIDIA GPUs that jobs may use by their names in CUDA_VISIBLE_DEVICES: those already in it, else all.

    A GPU that is divided (MIG) is listed as its instances. Nothing here imports torch or initializes CUDA.
    """
    visible = os.environ.get(GPU_VARIABLE)
    if visible is None:
        return list(_find_gpus())
    return list(itertools.takewhile(GPU_NAME.fullmatch, (name.strip() for name in visible.split(","))))


@cache
def _find_gpus() -> tuple[str, ...]:
    """Return the UUIDs of the machine's GPUs: unlike numbers, they do not depend on the order in which one counts."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return tuple(_read_driver_files(Path("/proc/driver/nvidia/gpus"), Path("/dev")))
    return tuple(parse_gpu_list(listing))


def parse_gpu_list(listing: str) -> list[str]:
    """Return the UUIDs in the output of `nvidia-smi -L`: of a divided GPU, those of its instances instead of its own.

    Example:
        >>> parse_gpu_list("GPU 0: A100 (UUID: GPU-1) MIG 3g.20gb Device 0: (UUID: MIG-2) GPU 1: T4 (UUID: GPU-3)")
        ['MIG-2', 'GPU-3']
    """
    gpus: list[list[str]] = []
    for name in re.findall(r"\(UUID: ((?:GPU|MIG)-[\w/-]+)\)", listing):
        if name.startswith("GPU"):
            gpus.append([name])
        elif gpus:
            gpus[-1].append(name)
    return [name for names in gpus for name in names[len(names) > 1 :]]


def _read_driver_files(folder: Path, devices: Path) -> Iterator[str]:
    """Yield the UUIDs in the files of NVIDIA's driver of the GPUs that have a device here: a container has not all."""
    for path in sorted(folder.glob("*/information")):
        entries = dict(re.findall(r"^([\w ]+):\s*(\S+)\s*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        if "GPU UUID" in entries and (devices / f"nvidia{entries.get('Device Minor')}").exists():
            yield entries["GPU UUID"]


@contextmanager
def reserve_gpus(count: int) -> Iterator[ReservedGpus]:
    """Reserve the GPUs of a job: those on which the fewest jobs of this user's sweeps run.

    Nothing waits: if more jobs run at once than there are GPUs, they share them evenly.

    Args:
        count: How many; 0, or more than there are: none is reserved, and the job sees them all.
    """
    gpus = list_gpus() if count else []
    reserved = ReservedGpus()
    try:
        if 0 < count <= len(gpus):
            try:
                _lock_gpus(gpus, count, reserved)
            except OSError:  # no file can be locked here: the job gets the first ones
                reserved.names = gpus[:count]
        yield reserved
    finally:
        for lock in reserved.locks:
            os.close(lock)


def _lock_gpus(gpus: Sequence[str], count: int, reserved: ReservedGpus) -> None:
    """Lock one file of each chosen GPU: its first is locked by its first job, its second by another one beside it."""
    folder = Path(tempfile.gettempdir()) / f"pylorus-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for jobs_beside in itertools.count():
        for gpu in gpus:
            if gpu in reserved.names:
                continue
            path = folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}.{jobs_beside}.lock"
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            reserved.locks.append(lock)
            reserved.names.append(gpu)
            if len(reserved.names) == count:
                return


REQUIRED_PACKAGES = {
    "hydra/launcher=joblib": ("hydra-joblib-launcher", "parallel"),
    "hydra/launcher=submitit_slurm": ("hydra-submitit-launcher", "slurm"),
    "hydra/launcher=submitit_local": ("hydra-submitit-launcher", "slurm"),
    "hydra/launcher=slurm": ("hydra-submitit-launcher", "slurm"),
    "hydra/launcher=ray": ("ray", "ray"),
    "hydra/launcher=ray_local": ("ray", "ray"),
    "hydra/sweeper=optuna": ("hydra-optuna-sweeper", "optuna"),
    "experiment=search": ("hydra-optuna-sweeper", "optuna"),
}
"""Overrides of the command line that need a package, with the package and the extra that installs it."""
RAY_STORE_BYTES = 75 * 2**20
"""Bytes of Ray's shared object store: the minimum that Ray accepts, because the jobs exchange data through files."""
LAUNCHER_PACKAGES = ("joblib", "ray", "submitit")
"""Packages whose errors mean that a launcher lost a job, not that the job failed."""
SEARCH_PACKAGES = ("optuna", "hydra_plugins")
"""Packages that propose jobs, and raise an error if no job returned a result."""


def check_installed(word: str) -> None:
    """Check that the package of a launcher, sweeper or experiment is installed.

    Args:
        word: An override of the command line, such as "hydra/launcher=joblib".

    Raises:
        PylorusError: If it is not; names the package and the command that installs it.
    """
    package, extra = REQUIRED_PACKAGES.get(word, (None, None))
    if package is None:
        return
    try:
        distribution(package)
    except PackageNotFoundError:
        raise PylorusError(
            f"{word}: needs {package}, which is not installed. Run pip install 'pylorus[{extra}]' or, in a clone, "
            f"pip install -e '.[{extra}]'."
        ) from None


AUTO_JOBS = "hydra.launcher.n_jobs=auto"
"""The override that asks for as many jobs at once as there are GPUs for."""


def complete_launcher(arguments: list[str]) -> list[str]:
    """Return a command line whose `hydra.launcher.n_jobs=auto` every launcher understands.

    Example:
        >>> complete_launcher(["hydra.launcher.n_jobs=auto", "-m"])
        ['hydra.launcher.n_jobs=auto', 'hydra/launcher=local', '-m']
        >>> complete_launcher(["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=auto"])
        ['-m', 'hydra/launcher=joblib', 'hydra.launcher.n_jobs=-1']
    """
    if AUTO_JOBS not in arguments:
        return arguments
    launchers = [argument for argument in arguments if argument.startswith("hydra/launcher=")]
    if not launchers:
        index = arguments.index(AUTO_JOBS) + 1  # not at the end: an option may come between it and the other overrides
        return [*arguments[:index], "hydra/launcher=local", *arguments[index:]]
    if launchers[-1] != "hydra/launcher=joblib":
        return arguments
    return ["hydra.launcher.n_jobs=-1" if argument == AUTO_JOBS else argument for argument in arguments]


def count_concurrent_jobs(launcher: Any, *, gpus_per_job: int = 0) -> int:
    """Return how many jobs a launcher runs at once on this machine; 1 if it runs them elsewhere.

    Left open, that is as many as there are GPUs for.

    Args:
        launcher: Hydra's configuration of the launcher.
        gpus_per_job: From `count_job_gpus`.
    """
    jobs_on_gpus = _count_jobs_on_gpus(gpus_per_job)
    if _is_launcher(launcher, "LocalLauncher"):
        # The launcher itself refuses what is neither auto nor a number.
        return launcher.n_jobs if isinstance(launcher.n_jobs, int) else max(1, jobs_on_gpus)
    if _is_launcher(launcher, "JoblibLauncher"):
        from joblib import effective_n_jobs

        return jobs_on_gpus if jobs_on_gpus and launcher.n_jobs == -1 else int(effective_n_jobs(launcher.n_jobs))
    if _is_launcher(launcher, "RayLauncher"):
        from joblib import cpu_count

        cores = launcher.ray.init.get("num_cpus") or cpu_count()
        jobs_on_cores = max(1, int(cores // launcher.ray.remote.get("num_cpus", 1)))
        return min(jobs_on_cores, jobs_on_gpus) if jobs_on_gpus else jobs_on_cores
    return 1


def _count_jobs_on_gpus(gpus_per_job: int) -> int:
    """Return how many jobs find GPUs of their own; 0 if they use none, or if there are none."""
    gpus = len(list_gpus()) if gpus_per_job else 0
    return max(1, gpus // gpus_per_job) if gpus else 0


def setup_sweep_process(launcher: Any, sweep: Path, *, gpus_per_job: int = 0) -> None:
    """Prepare this process for a sweep: set how many jobs share the machine, and let signals end all jobs.

    The signals are Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2.

    Args:
        launcher: Hydra's configuration of the launcher; what the user left open is set to suit the GPUs.
        sweep: The folder of the jobs.
        gpus_per_job: From `count_job_gpus`.
    """
    for noisy in ("hydra._internal.core_plugins.basic_launcher", "matplotlib"):  # `train.py` says which job begins
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ[SWEEP_PROCESS] = str(os.getpid())
    at_once = count_concurrent_jobs(launcher, gpus_per_job=gpus_per_job)
    os.environ[PARALLEL_JOBS] = str(at_once)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ray = _is_launcher(launcher, "RayLauncher")
    _set_concurrent_jobs(launcher, at_once, gpus_per_job=gpus_per_job if _count_jobs_on_gpus(gpus_per_job) else 0)
    if ray:
        _start_ray(launcher.ray.init)
    if at_once > 1 or ray:
        for number, before in handlers.items():
            if before is not signal.SIG_IGN:
                signal.signal(number, _create_signal_handler(sweep, handlers))


def _set_concurrent_jobs(launcher: Any, at_once: int, *, gpus_per_job: int) -> None:
    """Set the number of jobs at once in a launcher's configuration, where the user left it open."""
    with open_dict(launcher):
        if _is_launcher(launcher, "LocalLauncher") and launcher.n_jobs == "auto":
            launcher.n_jobs = at_once
        if _is_launcher(launcher, "JoblibLauncher") and launcher.n_jobs == -1:
            launcher.n_jobs = at_once
        if _is_launcher(launcher, "RayLauncher") and launcher.ray.init.get("address") is None and gpus_per_job:
            launcher.ray.remote.setdefault("num_gpus", gpus_per_job)


def _is_launcher(launcher: Any, name: str) -> bool:
    return str(launcher.get("_target_", "")).endswith(name)


def _start_ray(asked: Any) -> None:
    """Start Ray, or connect to the requested cluster, before its launcher does.

    Ray's own handler aborts on SIGTERM, so signal handlers must be set after Ray has started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray sends usage statistics over the network
    import ray

    arguments = cast(dict[str, Any], OmegaConf.to_container(asked, resolve=True))
    if arguments.get("address") is None:
        arguments.setdefault("object_store_memory", RAY_STORE_BYTES)
    ray.init(**arguments)


def explain_sweep_end(error: Exception, sweep: Path) -> str | None:
    """Explain the end of a sweep if a launcher lost a job or no job finished; otherwise return None.

    Args:
        error: The error of a launcher, or of a sweeper without any result.
        sweep: The folder of the jobs.
    """
    states = {path.parent.name: RunFolder(path.parent).find_status() for path in sorted(sweep.glob("*/status.json"))}
    advice = f"the same command with hydra.sweep.dir={sweep} runs the missing and failed jobs."
    reason = " ".join(str(error).split("\n----", maxsplit=1)[0].split()) or type(error).__name__
    if type(error).__module__.split(".")[0] in LAUNCHER_PACKAGES:
        return (
            f"the launcher lost a job: {reason[:400]}\nUsually its process was killed because memory or time ran out "
            f"(see dmesg, or SLURM's sacct). Finished jobs are saved; {advice}"
        )
    finished = any(status["state"] == "finished" for status in states.values())
    if finished or not states or _get_raising_package(error) not in SEARCH_PACKAGES:
        return None
    ends = format_name_list(format_job_ends(states))
    return f"no job of the sweep finished ({reason[:400]})\n{ends}\nFix the cause; {advice}"


def _get_raising_package(error: Exception) -> str:
    """Return the package of the code that raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).split(".")[0] if frames else ""


def _create_signal_handler(sweep: Path, previous: Mapping[signal.Signals, Any]) -> Any:
    """Return a signal handler that ends the jobs first: launchers kill their workers as soon as they get a signal.

    Args:
        sweep: The folder of the jobs.
        previous: The previous handler of each signal, which is called afterwards and gets every further signal.
    """

    def handle_signal(number: int, frame: FrameType | None) -> None:
        for each, before in previous.items():
            if signal.getsignal(each) is not signal.SIG_IGN:  # a second signal does not wait
                signal.signal(each, before if callable(before) else signal.default_int_handler)
        _stop_jobs(sweep)
        if callable(handler := previous[signal.Signals(number)]):
            handler(number, frame)
        raise KeyboardInterrupt

    return handle_signal


def _stop_jobs(sweep: Path) -> None:
    """Ask all jobs to end, including those that are just starting, and wait for them."""
    deadline, signalled = time.monotonic() + JOB_STOP_TIMEOUT, set()
    while (jobs := _list_active_statuses(sweep)) and time.monotonic() < deadline:
        for status in jobs:
            if status["state"] == "running" and status["pid"] not in signalled:
                signalled.add(status["pid"])
                with suppress(ProcessLookupError):
                    os.kill(status["pid"], JOB_STOP_SIGNAL)
        time.sleep(0.1)


def _list_active_statuses(sweep: Path) -> list[dict[str, Any]]:
    statuses = [RunFolder(path.parent).find_status() for path in sweep.glob("*/status.json")]
    return [status for status in statuses if status["state"] in ("starting", "running")]
