"""A sweep explains why it has no result, and waits for its jobs before it ends."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest
from omegaconf import OmegaConf

from pylorus.config.checks import save_config
from pylorus.core.distributed import PARALLEL_JOBS
from pylorus.core.errors import PylorusError
from pylorus.launch import sweep
from pylorus.launch.sweep import explain_sweep_end, setup_sweep_process
from pylorus.runs.folder import RunFolder
from pylorus.runs.process import STOP_SIGNALS


@pytest.fixture
def sweep_folder(tmp_path):
    """A sweep of jobs in some states."""

    def make(*states: str):
        for number, state in enumerate(states):
            (tmp_path / str(number)).mkdir()
            status = {"state": state, "error": f"no room {number}"} if state == "failed" else {"state": state}
            (tmp_path / str(number) / "status.json").write_text(json.dumps(status))
        return tmp_path

    return make


def raised_in(package: str, error: str = "ValueError('No trials are completed yet.')") -> Exception:
    """An error as code of that package raises it."""
    module = types.ModuleType(f"{package}.study")
    exec(f"def best():\n    raise {error}", module.__dict__)
    try:
        module.best()
    except Exception as raised:
        return raised
    raise AssertionError


def test_a_search_without_any_result_names_the_failed_jobs(sweep_folder):
    folder = sweep_folder("failed", "interrupted", "failed")
    words = explain_sweep_end(raised_in("optuna"), folder)
    assert words is not None
    assert "no job of the sweep finished (No trials are completed yet.)" in words
    assert "  job 0 failed: no room 0\n  job 1 interrupted: see its run.log\n  job 2 failed: no room 2" in words
    assert f"hydra.sweep.dir={folder}" in words


@pytest.mark.parametrize("states", [(), ("finished", "failed")])
def test_other_errors_of_a_search_keep_their_traceback(sweep_folder, states):
    assert explain_sweep_end(raised_in("optuna"), sweep_folder(*states)) is None


def test_a_program_error_keeps_its_traceback_even_if_all_jobs_failed(sweep_folder):
    assert explain_sweep_end(raised_in("pylorus", "KeyError('network')"), sweep_folder("failed")) is None


@pytest.mark.parametrize("states", [("finished", "interrupted"), ("failed",)])
def test_a_job_lost_by_its_launcher_is_explained(sweep_folder, states):
    lost = type("UncompletedJobError", (RuntimeError,), {"__module__": "submitit.core.utils"})
    words = explain_sweep_end(
        lost("Job 7 (task: 0)\nhas not produced any output\n------\nlong log"), sweep_folder(*states)
    )
    assert words is not None
    assert "the launcher lost a job: Job 7 (task: 0) has not produced any output\n" in words
    assert "long log" not in words


class FakeRay(types.ModuleType):
    """Takes every signal for itself when it starts, as Ray does."""

    def init(self, **words):
        self.words = words
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def ray(monkeypatch):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    fake = FakeRay("ray")
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setenv(PARALLEL_JOBS, "1")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    yield fake
    for number, handler in before.items():
        signal.signal(number, handler)


def ray_launcher(**init):
    launcher = {"_target_": "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"}
    return OmegaConf.create({**launcher, "ray": {"init": {"address": None, **init}, "remote": {"num_cpus": 1}}})


def test_ray_is_started_so_that_jobs_receive_signals(ray, sweep_folder):
    setup_sweep_process(ray_launcher(num_cpus=1), sweep_folder())
    assert ray.words["num_cpus"] == 1
    assert ray.words["object_store_memory"] > 0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_ray_usage_reports_are_off_by_default(ray, sweep_folder, monkeypatch):
    setup_sweep_process(ray_launcher(), sweep_folder())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    setup_sweep_process(ray_launcher(), sweep_folder())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"


def test_a_running_ray_cluster_is_not_asked_for_memory(ray, sweep_folder):
    setup_sweep_process(ray_launcher(address="auto"), sweep_folder())
    assert ray.words == {"address": "auto"}


ENDS = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(1), sys.exit(130)))"
TWICE = (
    "import os, signal, sys, time; signal.signal(2, lambda *_: (time.sleep(1), sys.exit(130))); signal.signal(15, 1)"
)
DEAF = "import signal, time; signal.signal(15, 1)"


@pytest.fixture
def job():
    started = []

    def start(script: str) -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen([sys.executable, "-uc", f"{script}; print(); time.sleep(60)"], stdout=subprocess.PIPE)
        )
        started[-1].stdout.readline()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_job_has_time_to_finish_its_step(job):
    process = job(ENDS)
    sweep._stop_job(process)
    assert process.returncode == 130


def test_a_job_that_received_ctrl_c_gets_no_second_signal(job):
    process = job(TWICE)
    process.send_signal(2)
    sweep._stop_job(process)
    assert process.returncode == 130


def test_a_job_that_does_not_end_is_killed(job, monkeypatch):
    monkeypatch.setattr(sweep, "JOB_STOP_TIMEOUT", 0.3)
    process = job(DEAF)
    sweep._stop_job(process)
    assert process.returncode == -9


END = "os.kill(os.getpid(), -{0}) if {0} < 0 else os._exit({0})"
"""How a process ends with an exit code, which is negative for a signal."""


@pytest.mark.parametrize(
    ("code", "limit", "expected"),
    [
        (-9, None, ("failed", "its process was killed by SIGKILL. Most often the machine ran out of memory")),
        (-11, None, ("failed", "its process was killed by SIGSEGV")),
        (3, None, ("failed", "its process ended with exit code 3")),
        (130, 0.01, ("interrupted", "time limit: trainer.time_limit=0.01 minutes are over, and the job hung")),
    ],
)
def test_the_status_of_a_job_says_why_its_process_ended(prepare_run_folder, monkeypatch, code, limit, expected):
    words = [] if limit is None else [f"trainer.time_limit={limit}"]
    folder = prepare_run_folder("trainer=cpu", *words)
    monkeypatch.setattr(sweep, "JOB_STOP_TIMEOUT", 0.3)
    script = f"import os, signal, time; signal.signal(15, 1); {'time.sleep(60)' if limit else END.format(code)}"
    monkeypatch.setattr(
        sweep, "_start_job", lambda *_: subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    )
    monkeypatch.setattr(sweep, "start_reading", lambda _: None)
    with pytest.raises(PylorusError, match=f"the job in .* {expected[0]}: {expected[1]}"):
        sweep.run_job_process(folder)
    status = folder.read_status()
    assert status["state"] == expected[0]
    assert status["error"].startswith(expected[1])


READ_AHEAD = """
import sys
from pathlib import Path
from pylorus.launch.sweep import start_reading
from pylorus.runs.folder import RunFolder

reading = start_reading(RunFolder(Path(sys.argv[1])))
assert "torch" not in sys.modules
reading.wait()
import torch
assert start_reading(RunFolder(Path(sys.argv[1]))) is None
"""


def test_the_images_of_the_first_job_are_read_while_torch_is_imported(compose_config, synthetic_root, tmp_path):
    config = compose_config("data=folders", f"data.root={synthetic_root}", f"cache.folder={tmp_path / 'cache'}")
    save_config(RunFolder(tmp_path).config, config)
    subprocess.run([sys.executable, "-c", READ_AHEAD, str(tmp_path)], check=True)
    assert list((tmp_path / "cache" / "facts").rglob("*.parquet"))
