"""A sweep that is asked to end has its jobs end, however long a step takes, and kills none that is about to."""

import subprocess
import sys

import pytest

from pylorus.launch import sweep

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


def test_a_job_is_given_time_for_its_step(job):
    process = job(ENDS)
    sweep._stop_job(process)
    assert process.returncode == 130


def test_a_job_that_ctrl_c_reached_already_is_left_to_it(job):
    process = job(TWICE)
    process.send_signal(2)
    sweep._stop_job(process)
    assert process.returncode == 130


def test_a_job_that_does_not_end_is_killed(job, monkeypatch):
    monkeypatch.setattr(sweep, "JOB_PATIENCE", 0.3)
    process = job(DEAF)
    sweep._stop_job(process)
    assert process.returncode == -9
