"""Engines that run a sweep's jobs elsewhere than one after the other: what they need, share, and how they end.

Nothing here imports torch: a launcher that is missing is named at once.
"""

import os
import signal
import time
import traceback
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import FrameType
from typing import Any, cast

from pylorus.errors import PylorusError, listing
from pylorus.runs.folder import RunFolder
from pylorus.runs.signals import HAND_ON, JOB_PATIENCE, STOPPING

JOBS_AT_ONCE = "PYLORUS_JOBS_AT_ONCE"
"""The environment variable that tells a job how many of its sweep share this machine's cores."""
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
RAY_OBJECTS = 75 * 2**20
"""Bytes of shared memory for what Ray's processes hand each other: the least that it takes. Our jobs share files."""
LAUNCHERS = ("joblib", "ray", "submitit")
"""Packages whose errors tell that a launcher lost a job, not that the job failed."""
SEARCHERS = ("optuna", "hydra_plugins")
"""Packages that propose jobs, and raise where none gave them a result."""


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
    if _is(launcher, "JoblibLauncher"):
        from joblib import effective_n_jobs

        return int(effective_n_jobs(launcher.n_jobs))
    if _is(launcher, "RayLauncher"):
        from joblib import cpu_count

        cores = launcher.ray.init.get("num_cpus") or cpu_count()
        return max(1, int(cores // launcher.ray.remote.get("num_cpus", 1)))
    return 1


def share_machine(launcher: Any, sweep: Path) -> None:
    """Tells the jobs to come how many they are, and has Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 end them all."""
    at_once = jobs_at_once(launcher)
    os.environ[JOBS_AT_ONCE] = str(at_once)
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    ray = _is(launcher, "RayLauncher")
    if ray:
        _start_ray(launcher.ray.init)
    if at_once > 1 or ray:
        for number, before in handlers.items():
            if before is not signal.SIG_IGN:
                signal.signal(number, _ending(sweep, before))


def _is(launcher: Any, name: str) -> bool:
    return str(launcher.get("_target_", "")).endswith(name)


def _start_ray(asked: Any) -> None:
    """Starts Ray, or joins the one that is asked for, before its launcher does.

    Its own answer to SIGTERM is to abort: only what is set up after it is heard. And its launcher asks for memory of a
    cluster that runs already, which Ray refuses.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports on itself over the network
    import ray
    from omegaconf import OmegaConf

    words = cast(dict[str, Any], OmegaConf.to_container(asked, resolve=True))
    if words.get("address") is None:
        words.setdefault("object_store_memory", RAY_OBJECTS)
    ray.init(**words)


def explained_end(error: Exception, sweep: Path) -> str | None:
    """What ended a sweep, where it was a lost job or that no job finished; else None.

    Args:
        error: Of a launcher, or of a sweeper that had nothing to choose from.
        sweep: The folder of the jobs.
    """
    states = {path.parent.name: RunFolder(path.parent).status() for path in sorted(sweep.glob("*/status.json"))}
    go_on = f"the same command with hydra.sweep.dir={sweep} runs what is missing or failed."
    said = " ".join(str(error).split("\n----", maxsplit=1)[0].split()) or type(error).__name__
    if type(error).__module__.split(".")[0] in LAUNCHERS:
        return (
            f"the launcher lost a job: {said[:400]}\nMost often its process was killed: memory or time used up "
            f"(dmesg, or SLURM's sacct, tells). What is done is kept; {go_on}"
        )
    finished = any(status["state"] == "finished" for status in states.values())
    if finished or not states or _raised_by(error) not in SEARCHERS:
        return None
    ends = [f"job {job} {status['state']}: {status.get('error', 'see its run.log')}" for job, status in states.items()]
    return f"no job of the sweep finished ({said[:400]})\n{listing(ends)}\nMend that; {go_on}"


def _raised_by(error: Exception) -> str:
    """The package of the code that raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).split(".")[0] if frames else ""


def _ending(sweep: Path, then: Any) -> Any:
    """Handles a signal: launchers kill their workers, with all that these started, as soon as they hear of it."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in STOPPING:
            if signal.getsignal(other) is not signal.SIG_IGN:
                signal.signal(other, signal.default_int_handler)  # a second one does not wait
        _end_jobs(sweep)
        if callable(then):
            then(number, frame)
        raise KeyboardInterrupt

    return stop


def _end_jobs(sweep: Path) -> None:
    """Has the jobs end, also one that just begins to run; waits for them."""
    deadline, told = time.monotonic() + JOB_PATIENCE, set()
    while (jobs := _running(sweep)) and time.monotonic() < deadline:
        for status in jobs:
            if status["state"] == "running" and status["pid"] not in told:
                told.add(status["pid"])
                with suppress(ProcessLookupError):
                    os.kill(status["pid"], HAND_ON)
        time.sleep(0.1)


def _running(sweep: Path) -> list[dict[str, Any]]:
    found = [RunFolder(path.parent).status() for path in sweep.glob("*/status.json")]
    return [status for status in found if status["state"] in ("starting", "running")]
