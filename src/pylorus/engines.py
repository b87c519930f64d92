"""Engines that run a sweep's jobs elsewhere than one after the other: what they need, share, and how they end.

Nothing here imports torch: a launcher that is missing is named at once.
"""

import os
import signal
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import FrameType
from typing import Any

from pylorus.errors import PylorusError
from pylorus.run_folder import RunFolder

JOBS_AT_ONCE = "PYLORUS_JOBS_AT_ONCE"
"""The environment variable that tells a job how many of its sweep share this machine's cores."""
PATIENCE = 10.0
"""Seconds that a job has to end by itself."""
NEEDS = {
    "hydra/launcher=joblib": ("hydra-joblib-launcher", "parallel"),
    "hydra/launcher=submitit_slurm": ("hydra-submitit-launcher", "slurm"),
    "hydra/launcher=submitit_local": ("hydra-submitit-launcher", "slurm"),
    "hydra/launcher=slurm": ("hydra-submitit-launcher", "slurm"),
    "hydra/launcher=ray": ("hydra-ray-launcher", "ray"),
    "hydra/launcher=ray_local": ("hydra-ray-launcher", "ray"),
    "hydra/sweeper=optuna": ("hydra-optuna-sweeper", "optuna"),
    "experiment=search": ("hydra-optuna-sweeper", "optuna"),
}
"""Words of the command line that need a package, and the extra that brings it."""


def check_installed(word: str) -> None:
    """Refuses a launcher, sweeper or experiment whose package is missing.

    Raises:
        PylorusError: Names the package and the command that installs it.
    """
    package, extra = NEEDS.get(word, (None, None))
    if package is None:
        return
    try:
        distribution(package)
    except PackageNotFoundError:
        raise PylorusError(
            f"{word}: needs {package}, which is not installed. pip install 'pylorus[{extra}]', or, in a clone, "
            f"pip install -e '.[{extra}]'."
        ) from None


def jobs_at_once(launcher: Any) -> int:
    """How many jobs a launcher's configuration starts at once on this machine; 1 where it starts them elsewhere."""
    name = str(launcher.get("_target_", ""))
    if name.endswith("JoblibLauncher"):
        from joblib import effective_n_jobs

        return int(effective_n_jobs(launcher.n_jobs))
    if name.endswith("RayLauncher"):
        from joblib import cpu_count

        cores = launcher.ray.init.get("num_cpus") or cpu_count()
        return max(1, int(cores // launcher.ray.remote.get("num_cpus", 1)))
    return 1


def share_machine(launcher: Any, sweep: Path) -> None:
    """Tells the jobs to come how many they are, and has Ctrl-C end them all."""
    at_once = jobs_at_once(launcher)
    os.environ[JOBS_AT_ONCE] = str(at_once)
    if at_once > 1 and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _ending(sweep))


def _ending(sweep: Path) -> Any:
    """Handles Ctrl-C: launchers kill their workers, with all that these started, as soon as they hear of it."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one does not wait
        _wait(sweep)
        for status in _running(sweep):  # the signal reached only this process
            os.kill(status["pid"], signal.SIGINT)
        _wait(sweep)
        raise KeyboardInterrupt

    return stop


def _wait(sweep: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while _running(sweep) and time.monotonic() < deadline:
        time.sleep(0.1)


def _running(sweep: Path) -> list[dict[str, Any]]:
    found = [RunFolder(path.parent).status() for path in sweep.glob("*/status.json")]
    return [status for status in found if status["state"] in ("starting", "running")]
