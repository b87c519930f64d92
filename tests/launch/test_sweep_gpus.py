"""Jobs of a sweep get GPUs of their own, on machines with made-up ones; nothing here needs a GPU or imports torch."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from pylorus.config.schema import CONF, TrainerConfig
from pylorus.core.distributed import PARALLEL_JOBS
from pylorus.launch.sweep import (
    GPU_VARIABLE,
    complete_launcher,
    count_concurrent_jobs,
    count_job_gpus,
    list_gpus,
    parse_gpu_list,
    reserve_gpus,
    setup_sweep_process,
)
from tests.forking import ForkedProcess

LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 3g.20gb     Device  0: (UUID: MIG-bb1f4a2c-0000-5d0d-8d8e-1f0d3a4e7a11)
  MIG 3g.20gb     Device  1: (UUID: MIG-GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f/2/0)
GPU 1: Tesla V100-SXM2-16GB (UUID: GPU-7f1c0d12-9c1a-4c55-8f4e-30e8a1f1c001)
"""


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with four made-up GPUs, whose sweeps nobody else's disturb."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(GPU_VARIABLE, "GPU-a,GPU-b,GPU-c,GPU-d")
    monkeypatch.setenv(PARALLEL_JOBS, "1")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,1", ["0", "1"]),
        ("GPU-a, MIG-b,MIG-GPU-c/1/0", ["GPU-a", "MIG-b", "MIG-GPU-c/1/0"]),
        ("2,-1,3", ["2"]),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_jobs_use_only_gpus_that_the_user_left_visible(monkeypatch, visible, expected):
    monkeypatch.setenv(GPU_VARIABLE, visible)
    assert list_gpus() == expected


def test_a_divided_gpu_is_listed_as_its_instances():
    assert parse_gpu_list(LISTING) == [
        "MIG-bb1f4a2c-0000-5d0d-8d8e-1f0d3a4e7a11",
        "MIG-GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f/2/0",
        "GPU-7f1c0d12-9c1a-4c55-8f4e-30e8a1f1c001",
    ]


LIST_GPUS = (
    "from pylorus.launch.sweep import list_gpus; import sys; print(*list_gpus()); assert 'torch' not in sys.modules"
)


@pytest.mark.slow
def test_gpus_are_found_without_torch(tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    del environment[GPU_VARIABLE]
    found = subprocess.run(
        [sys.executable, "-c", LIST_GPUS], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == parse_gpu_list(LISTING)


def test_each_job_gets_a_gpu_of_its_own_and_returns_it():
    with reserve_gpus(1) as first, reserve_gpus(1) as second:
        assert (first.names, second.names) == (["GPU-a"], ["GPU-b"])
        assert second.environment == {GPU_VARIABLE: "GPU-b"}
    with reserve_gpus(1) as third:
        assert third.names == ["GPU-a"]


def test_a_run_of_two_devices_gets_two_gpus():
    with reserve_gpus(2) as first, reserve_gpus(2) as second:
        assert (first.names, second.names) == (["GPU-a", "GPU-b"], ["GPU-c", "GPU-d"])


def test_more_jobs_than_gpus_share_them_evenly(monkeypatch):
    monkeypatch.setenv(GPU_VARIABLE, "0,1")
    with reserve_gpus(1) as a, reserve_gpus(1) as b, reserve_gpus(1) as c, reserve_gpus(1) as d, reserve_gpus(2) as e:
        assert [each.names for each in (a, b, c, d, e)] == [["0"], ["1"], ["0"], ["1"], ["0", "1"]]


@pytest.mark.parametrize("count", [0, 5])
def test_a_job_that_needs_none_or_more_than_there_are_sees_them_all(count):
    with reserve_gpus(count) as reserved:
        assert reserved.environment == {}
        assert reserved.locks == []


@pytest.mark.slow
def test_a_job_holds_its_gpu_to_its_own_end_even_if_the_sweep_is_killed_before():
    with reserve_gpus(1) as reserved:
        job = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=reserved.locks)
    # The lock is closed here, as it is when the sweep's process is killed.
    try:
        with reserve_gpus(1) as other:
            assert other.names == ["GPU-b"]
    finally:
        job.kill()
        job.communicate()
    with reserve_gpus(1) as other:
        assert other.names == ["GPU-a"]


def test_where_no_file_can_be_locked_jobs_still_run(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with reserve_gpus(1) as reserved:
        assert reserved.names == ["GPU-a"]


@pytest.mark.parametrize(
    ("changed", "count"),
    [({}, 1), ({"devices": 2}, 2), ({"accelerator": "cpu"}, 0), ({"accelerator": "mps"}, 0), ({"nodes": 2}, 0)],
)
def test_a_job_needs_as_many_gpus_as_it_has_devices(changed, count):
    assert count_job_gpus(TrainerConfig(**changed)) == count


def launcher(name: str, **arguments):
    return OmegaConf.create({"_target_": f"some.package.{name}", **arguments})


RAY = {"ray": {"init": {"address": None, "num_cpus": 8}, "remote": {"num_cpus": 1}}}


@pytest.mark.parametrize(
    ("asked", "gpus_per_job", "jobs"),
    [
        (launcher("BasicLauncher"), 1, 1),
        (launcher("LocalLauncher", n_jobs="auto"), 1, 4),
        (launcher("LocalLauncher", n_jobs="auto"), 2, 2),
        (launcher("LocalLauncher", n_jobs="auto"), 3, 1),
        (launcher("LocalLauncher", n_jobs="auto"), 8, 1),
        (launcher("LocalLauncher", n_jobs="auto"), 0, 1),
        (launcher("LocalLauncher", n_jobs=6), 1, 6),
        (launcher("JoblibLauncher", n_jobs=-1), 1, 4),
        (launcher("JoblibLauncher", n_jobs=2), 1, 2),
        (launcher("RayLauncher", **RAY), 1, 4),
        (launcher("RayLauncher", **RAY), 0, 8),
    ],
)
def test_as_many_jobs_run_at_once_as_there_are_gpus_for_unless_set(asked, gpus_per_job, jobs):
    assert count_concurrent_jobs(asked, gpus_per_job=gpus_per_job) == jobs


@pytest.mark.parametrize("visible", ["", "-1"])
def test_without_a_gpu_one_job_runs_at_a_time(monkeypatch, visible):
    monkeypatch.setenv(GPU_VARIABLE, visible)
    assert count_concurrent_jobs(launcher("LocalLauncher", n_jobs="auto"), gpus_per_job=1) == 1


@pytest.fixture
def signals():
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("n_jobs", "expected"), [(-1, 4), (3, 3)])
def test_joblib_starts_as_many_jobs_as_there_are_gpus_unless_set(signals, tmp_path, n_jobs, expected):
    asked = launcher("JoblibLauncher", n_jobs=n_jobs)
    setup_sweep_process(asked, tmp_path, gpus_per_job=1)
    assert asked.n_jobs == expected
    assert os.environ[PARALLEL_JOBS] == str(expected)


def test_n_jobs_auto_alone_selects_the_launcher_that_needs_no_package():
    assert complete_launcher(["-m", "seed=0,1"]) == ["-m", "seed=0,1"]
    words = complete_launcher(["hydra.launcher.n_jobs=auto"])
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(Path(CONF)), version_base="1.3"):
        config = compose("config", overrides=words, return_hydra_config=True)
    assert config.hydra.launcher == {"_target_": "hydra_plugins.pylorus_local.LocalLauncher", "n_jobs": "auto"}


APP = """
import os, sys, time
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    from hydra.core.hydra_config import HydraConfig
    job = HydraConfig.get().job
    open(f"{config.folder}/{job.num}-{config.a}-{os.environ['PYLORUS_JOBS_AT_ONCE']}", "w").close()
    deadline = time.monotonic() + 30
    while len(os.listdir(config.folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    if config.a == 2:
        raise ValueError("a job fails")
    if config.a == 9:
        time.sleep(600)
    if config.a == 8:
        os.kill(os.getpid(), 9)
    return config.a

main()
"""


@pytest.fixture
def app(tmp_path, fork_server):
    """Starts a sweep of small jobs, which wait until two of them run."""
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "started").mkdir()

    def start(*words: str) -> ForkedProcess:
        command = [sys.executable, tmp_path / "app.py", "-m", f"hydra.searchpath=[file://{CONF}]", "hydra/launcher=local",
                   f"+folder={tmp_path}/started", f"hydra.sweep.dir={tmp_path}/sweep", *words]  # fmt: skip
        pipe = subprocess.PIPE
        return fork_server.start(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path)

    return start


def started(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "started").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "jobs", "message"),
    [
        ("1,2,3", ["0-1-2", "1-2-2", "2-3-2"], "a job fails"),
        ("8,1,3", ["0-8-2", "1-1-2", "2-3-2"], "the process that waits for job 0 ended with exit code -9"),
    ],
    ids=["failed", "killed"],
)
def test_jobs_run_at_once_each_with_its_number_and_one_that_ends_early_leaves_the_others_alone(
    app, tmp_path, values, jobs, message
):
    run = app("hydra.launcher.n_jobs=2", f"+a={values}")
    _, errors = run.communicate(timeout=100)
    assert started(tmp_path) == jobs, errors
    assert message in errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_jobs_and_starts_no_other(app, tmp_path, number):
    run = app("hydra.launcher.n_jobs=2", "+a=9,9,9")
    deadline = time.monotonic() + 100
    while len(started(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(number)
    run.communicate(timeout=200)  # long before the jobs would have ended
    assert started(tmp_path) == ["0-9-2", "1-9-2"]


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", ["many", "0", "auto"])
def test_a_number_of_jobs_that_means_nothing_is_named(app, tmp_path, n_jobs):
    _, errors = app(f"hydra.launcher.n_jobs={n_jobs}", "+a=1,2").communicate(timeout=100)
    assert f"hydra.launcher.n_jobs: found {n_jobs}, expected auto" in errors
    assert started(tmp_path) == []
