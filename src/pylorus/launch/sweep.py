"""A sweep's jobs: each a process of its own, the launchers that start them elsewhere, and how they end.

Nothing here imports torch or pandas: a launcher that is missing is reported at once.
"""

import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import FrameType
from typing import Any, cast

from omegaconf import OmegaConf

from pylorus.core.distributed import PARALLEL_JOBS
from pylorus.core.errors import INTERRUPTED, PylorusError, format_name_list
from pylorus.core.io import BROKEN_PIPE_CODE, write_json
from pylorus.runs.folder import RunFolder
from pylorus.runs.process import IN_SWEEP, JOB_STOP_SIGNAL, JOB_STOP_TIMEOUT, STOP_SIGNALS

interrupted: list[Path] = []
"""Folders of this process's jobs that a signal ended: after that a launcher's worker starts no other job."""


def run_job_process(folder: RunFolder) -> None:
    """Run a job of a sweep as `python -m pylorus.launch.train FOLDER`; if it fails, the sweep continues.

    Args:
        folder: The job's folder.

    Raises:
        KeyboardInterrupt: If this process or the job received a signal.
        PylorusError: If the job failed.
    """
    job = subprocess.Popen(
        [sys.executable, "-m", "pylorus.launch.train", str(folder.path)], env={**os.environ, IN_SWEEP: "1"}
    )
    try:
        code = job.wait()
    except BaseException:  # a signal, or a launcher that requeues its job
        interrupted.append(folder.path)
        _stop_job(job)
        if (status := folder.read_status())["state"] == "starting":  # the job had not yet written its own status
            write_json(folder.path / "status.json", {**status, "state": "interrupted"})
        raise
    if code == INTERRUPTED:
        interrupted.append(folder.path)
        raise KeyboardInterrupt
    if code not in (0, BROKEN_PIPE_CODE):
        reason = folder.read_status().get("error", f"its process ended with exit code {code}")
        raise PylorusError(f"the job in {folder.path} failed: {reason}")


def _stop_job(job: subprocess.Popen[bytes]) -> None:
    """Ask a job to end, and kill it if it does not; a job that already received Ctrl-C from the terminal ignores it."""
    job.send_signal(JOB_STOP_SIGNAL)
    try:
        job.wait(timeout=JOB_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()


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


def count_concurrent_jobs(launcher: Any) -> int:
    """Return how many jobs a launcher runs at once on this machine; 1 if it runs them elsewhere.

    Args:
        launcher: Hydra's configuration of the launcher.
    """
    if _is_launcher(launcher, "JoblibLauncher"):
        from joblib import effective_n_jobs

        return int(effective_n_jobs(launcher.n_jobs))
    if _is_launcher(launcher, "RayLauncher"):
        from joblib import cpu_count

        cores = launcher.ray.init.get("num_cpus") or cpu_count()
        return max(1, int(cores // launcher.ray.remote.get("num_cpus", 1)))
    return 1


def setup_sweep_process(launcher: Any, sweep: Path) -> None:
    """Prepare this process for a sweep: set how many jobs share the machine, and let signals end all jobs.

    The signals are Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2.

    Args:
        launcher: Hydra's configuration of the launcher.
        sweep: The folder of the jobs.
    """
    at_once = count_concurrent_jobs(launcher)
    os.environ[PARALLEL_JOBS] = str(at_once)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ray = _is_launcher(launcher, "RayLauncher")
    if ray:
        _start_ray(launcher.ray.init)
    if at_once > 1 or ray:
        for number, before in handlers.items():
            if before is not signal.SIG_IGN:
                signal.signal(number, _create_signal_handler(sweep, before))


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
    states = {path.parent.name: RunFolder(path.parent).read_status() for path in sorted(sweep.glob("*/status.json"))}
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
    ends = [f"job {job} {status['state']}: {status.get('error', 'see its run.log')}" for job, status in states.items()]
    return f"no job of the sweep finished ({reason[:400]})\n{format_name_list(ends)}\nFix the cause; {advice}"


def _get_raising_package(error: Exception) -> str:
    """Return the package of the code that raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).split(".")[0] if frames else ""


def _create_signal_handler(sweep: Path, previous: Any) -> Any:
    """Return a signal handler that ends the jobs first: launchers kill their workers as soon as they get a signal.

    Args:
        sweep: The folder of the jobs.
        previous: The signal's previous handler, which is called afterwards.
    """

    def handle_signal(number: int, frame: FrameType | None) -> None:
        for each in STOP_SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:
                signal.signal(each, signal.default_int_handler)  # a second signal does not wait
        _stop_jobs(sweep)
        if callable(previous):
            previous(number, frame)
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
    statuses = [RunFolder(path.parent).read_status() for path in sweep.glob("*/status.json")]
    return [status for status in statuses if status["state"] in ("starting", "running")]
