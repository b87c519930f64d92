"""Sweeps that are stopped from outside or give no result end with a message."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from pylorus.core.io import write_json
from pylorus.runs.folder import RunFolder
from tests.conftest import TINY
from tests.forking import TRAIN

WORDS = ("-m", "trainer=cpu", "trainer.precision=32", "data.image_size=32", "data.drawn.images=12", "data.drawn.size=64",
         "model=timm", f"model.name={TINY}", "report=false", "stage=pretrain")  # fmt: skip
ENDLESS = ("model.weights=none", "stages.pretrain.epochs=9000", "seed=0,1,2")


def plugin(name: str) -> pytest.MarkDecorator:
    there = find_spec("hydra_plugins") is not None and find_spec(f"hydra_plugins.{name}") is not None
    return pytest.mark.skipif(not there, reason=f"needs the plugin {name}")


def stopped(start, sweep, words, number, *, group=False, jobs=1) -> subprocess.CompletedProcess[str]:
    """Starts a sweep, sends it a signal once so many jobs train, and waits."""
    pipe = subprocess.PIPE
    command = [sys.executable, str(TRAIN), *WORDS, *ENDLESS, f"hydra.sweep.dir={sweep}", *words]
    run = start(command, cwd=sweep.parent, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(sweep.glob("*/pretrain/metrics.csv"))) < jobs and time.monotonic() < deadline:
            time.sleep(0.1)
        (os.killpg if group else os.kill)(run.pid, number)
        out, errors = run.communicate(timeout=90)
    finally:
        run.kill()
    return subprocess.CompletedProcess(command, run.returncode, out, errors)


def assert_ended_cleanly(sweep, found, *, jobs=1) -> None:
    assert found.returncode == 130, found.stderr
    assert "Traceback" not in found.stderr
    assert f"to resume: the same command with hydra.sweep.dir={sweep}" in found.stderr
    states = [RunFolder(path.parent).read_status()["state"] for path in sweep.glob("*/status.json")]
    assert states == ["interrupted"] * jobs
    assert (sweep / "sweep.csv").is_file()
    assert f"sweep: {sweep}" in found.stdout


@pytest.mark.parametrize(
    ("name", "group"), [("SIGTERM", False), ("SIGTERM", True), ("SIGUSR1", False), ("SIGINT", True), ("SIGINT", False)]
)
def test_a_signal_ends_the_job_of_a_sweep_cleanly_and_writes_the_table(fork_server, tmp_path, name, group):
    sweep = tmp_path / "sweep"
    found = stopped(fork_server.start, sweep, (), getattr(signal, name), group=group)
    assert_ended_cleanly(sweep, found)
    assert ("interrupted\n" if name == "SIGINT" else f"interrupted by {name}") in found.stderr


@plugin("hydra_joblib_launcher")
def test_a_signal_ends_all_parallel_jobs_of_a_sweep(tmp_path):
    sweep = tmp_path / "sweep"
    words = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert_ended_cleanly(sweep, stopped(subprocess.Popen, sweep, words, signal.SIGTERM, jobs=2), jobs=2)


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Four made-up GPUs; a job that looks for them finds none and computes on the CPU."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "locks"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    return ("hydra.launcher.n_jobs=auto", "trainer.accelerator=auto")


def visible_gpus(sweep) -> list[str]:
    return sorted(json.loads(path.read_text())["visible_gpus"] for path in sweep.glob("*/environment.json"))


def test_a_signal_to_a_sweep_of_jobs_on_gpus_of_their_own_ends_them_all(fork_server, tmp_path, gpus):
    sweep = tmp_path / "sweep"
    assert_ended_cleanly(sweep, stopped(fork_server.start, sweep, gpus, signal.SIGTERM, jobs=3), jobs=3)
    assert visible_gpus(sweep) == ["GPU-a", "GPU-b", "GPU-c"]


def test_a_sweep_of_jobs_at_once_is_repeated_without_what_is_done(train, tmp_path, gpus):
    words = (
        *WORDS,
        *gpus,
        "model.weights=none",
        "stages.pretrain.epochs=1",
        "seed=0,1",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )
    first = train(*words)
    assert first.returncode == 0, first.stderr
    assert visible_gpus(tmp_path / "sweep") == ["GPU-a", "GPU-b"]
    again = train(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already finished") == 2


def test_runs_of_two_devices_get_two_gpus_each(train, tmp_path, gpus):
    words = ("model.weights=no/such/file", "trainer.devices=2", "seed=0,1,2", f"hydra.sweep.dir={tmp_path}/sweep")
    found = train(*WORDS, *gpus, *words)
    assert found.returncode == 1
    assert "Launching 3 jobs locally, 2 at once" in found.stdout


@plugin("hydra_optuna_sweeper")
def test_a_search_without_a_finished_trial_names_each_error(train, tmp_path):
    found = train(
        *WORDS, "experiment=search", "model.weights=no/such/file", "~hydra.sweeper.params.model", "hydra.sweeper.n_trials=2"
    )  # fmt: skip
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert "error: no job of the sweep finished" in found.stderr
    assert f"  jobs 0 and 1 failed: model.weights: found {tmp_path}/no/such/file, expected" in found.stderr


@pytest.mark.parametrize("where", ["hydra.run.dir", "hydra.sweep.dir"])
def test_a_file_in_place_of_the_sweep_folder_is_named(train, tmp_path, where):
    (tmp_path / "taken").write_text("")
    sweep = ("-m", "seed=0,1") if "sweep" in where else ()
    found = train(*sweep, "experiment=debug", f"{where}={tmp_path / 'taken' / 'run'}")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert f"{tmp_path / 'taken'}" in found.stderr
    assert "found a file with this name" in found.stderr


def test_an_unwritable_folder_stops_before_the_run_with_a_remedy(tmp_path):
    script = (
        "import errno, sys; from pathlib import Path\n"
        "def shut(path, *_, **__): raise OSError(errno.EROFS, 'Read-only file system', str(path))\n"
        "sys.argv = ['train.py', 'hydra.run.dir=there']; Path.mkdir = shut\n"
        "from pylorus.launch.main import main; main()"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert "error: there can't be written to: Read-only file system." in found.stderr
    assert "hydra.run.dir=DIR" in found.stderr


@pytest.mark.parametrize("words", [(str(TRAIN), "--help"), ("-c", "from pylorus.cli import main; main(['--help'])")])
def test_a_closed_pipe_is_not_an_error(tmp_path, words):
    read, write = os.pipe()
    os.close(read)
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    found = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=buffered,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert found.stderr == ""
    assert found.returncode == 141


def test_a_sweep_and_a_run_that_already_run_are_refused_at_once(fork_server, tmp_path):
    sweep, pipe = tmp_path / "sweep", subprocess.PIPE
    command = [sys.executable, str(TRAIN), *WORDS, *ENDLESS, f"hydra.sweep.dir={sweep}"]
    first = fork_server.start(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(sweep.glob("*/pretrain/metrics.csv")) and time.monotonic() < deadline:
            time.sleep(0.1)
        (job,) = [path.parent for path in sweep.glob("*/status.json")]
        before = RunFolder(job).read_status()["id"]
        for words in (command[2:], [f"resume={job}"], [*WORDS[1:], f"hydra.run.dir={job}"]):
            second = fork_server.start([*command[:2], *words], cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
            _, errors = second.communicate(timeout=60)
            assert second.returncode == 1
            assert re.search(r"process .*(is training|is running a sweep) in this folder. Wait until it ends", errors)
            assert "Traceback" not in errors
        status = RunFolder(job).read_status()
        assert (status["id"], status["state"]) == (before, "running")
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=90)
    finally:
        first.kill()
    assert RunFolder(job).read_status()["state"] == "interrupted"


def wait_for(condition) -> None:
    deadline = time.monotonic() + 280
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def read_states(sweep) -> dict[str, str]:
    return {path.parent.name: RunFolder(path.parent).read_status()["state"] for path in sweep.glob("*/status.json")}


@pytest.mark.parametrize("words", [(), ("hydra/launcher=local", "hydra.launcher.n_jobs=2")])
def test_the_jobs_of_a_killed_sweep_end_by_themselves_with_their_state_saved(fork_server, tmp_path, words):
    sweep = tmp_path / "sweep"
    command = [sys.executable, str(TRAIN), *WORDS, *ENDLESS, f"hydra.sweep.dir={sweep}", *words]
    parent = fork_server.start(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(sweep.glob("*/pretrain/metrics.csv"))) >= (2 if words else 1))
    parent.kill()
    wait_for(lambda: set(read_states(sweep).values()) == {"interrupted"})
    assert all((sweep / job / "pretrain/checkpoints/last.ckpt").is_file() for job in read_states(sweep))


def test_a_killed_job_is_named_and_the_others_go_on(fork_server, tmp_path):
    sweep, pipe = tmp_path / "sweep", subprocess.PIPE
    words = ("model.weights=none", "stages.pretrain.epochs=20", "seed=0,1", f"hydra.sweep.dir={sweep}")
    command = [sys.executable, str(TRAIN), *WORDS, *words]
    parent = fork_server.start(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    wait_for((sweep / "0/pretrain/metrics.csv").is_file)
    os.kill(RunFolder(sweep / "0").read_status()["pid"], signal.SIGKILL)
    out, errors = parent.communicate(timeout=280)
    assert parent.returncode == 1, errors
    assert read_states(sweep) == {"0": "failed", "1": "finished"}
    assert "job 0 failed: its process was killed by SIGKILL. Most often the machine ran out of memory" in out
    again = fork_server.run(command, cwd=tmp_path, timeout=280)
    assert again.returncode == 0, again.stderr
    assert read_states(sweep) == {"0": "finished", "1": "finished"}
    assert "job 1: already finished" in again.stdout


def test_a_job_that_reaches_its_time_limit_is_saved_and_the_sweep_goes_on(fork_server, tmp_path):
    sweep = tmp_path / "sweep"
    command = [sys.executable, str(TRAIN), *WORDS, "model.weights=none", f"hydra.sweep.dir={sweep}"]
    found = fork_server.run(
        [*command, "seed=0,1", "stages.pretrain.epochs=3000", "trainer.time_limit=0.05"], cwd=tmp_path, timeout=280
    )
    assert found.returncode == 1, found.stderr
    assert read_states(sweep) == {"0": "interrupted", "1": "interrupted"}
    assert "jobs 0 and 1 interrupted: time limit: trainer.time_limit=0.05 minutes are over" in found.stdout


def test_a_run_that_reached_its_time_limit_continues_with_another_limit(train, tmp_path):
    words = (*WORDS[1:], "model.weights=none", "stages.pretrain.epochs=9000", f"hydra.run.dir={tmp_path}/run")
    for command in ((*words, "trainer.time_limit=0.05"), (f"resume={tmp_path}/run", "trainer.time_limit=0.06")):
        found = train(*command)
        assert found.returncode == 130, found.stderr
        limit = f"time limit: {command[-1]} minutes are over"
        assert f"interrupted by {limit}" in found.stderr
        assert "Traceback" not in found.stderr
        status = RunFolder(tmp_path / "run").read_status()
        assert (status["state"], status["error"]) == ("interrupted", limit)


def test_another_command_in_the_folder_of_a_sweep_with_a_failed_job_is_refused(train, tmp_path):
    words = (*WORDS, "seed=0", "model.weights=none", "stages.pretrain.epochs=1", f"hydra.sweep.dir={tmp_path}/sweep")
    first = train(*words[1:-1], f"hydra.run.dir={tmp_path}/sweep/0")
    assert first.returncode == 0, first.stderr
    status = RunFolder(tmp_path / "sweep/0").read_status()
    write_json(tmp_path / "sweep/0/status.json", {**status, "state": "failed", "error": "no room"}, sealed=True)
    second = train(*words, "optimizer.lr=0.5")
    assert second.returncode == 1
    assert "this folder contains a run with a different configuration" in second.stderr
    assert "optimizer.lr: the run has" in second.stderr


@pytest.mark.parametrize("words", [(str(TRAIN),), ("-m", "pylorus", "train")])
def test_ctrl_c_while_the_command_line_is_imported_has_no_traceback(tmp_path, words):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pylorus.launch.overrides': os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, *words, "--help"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True
    )
    assert (found.returncode, found.stdout) == (130, b"")
    assert found.stderr in (b"", b"interrupted\n")
