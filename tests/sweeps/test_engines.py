"""A sweep that ends without a result says why in words; what is a bug keeps its traceback."""

import json
import types

import pytest

from pylorus.sweeps.engines import explained_end


@pytest.fixture
def sweep(tmp_path):
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


def test_a_search_without_any_result_names_the_failed_jobs(sweep):
    folder = sweep("failed", "interrupted", "failed")
    words = explained_end(raised_in("optuna"), folder)
    assert words is not None
    assert "no job of the sweep finished (No trials are completed yet.)" in words
    assert "  job 0 failed: no room 0\n  job 1 interrupted: see its run.log\n  job 2 failed: no room 2" in words
    assert f"hydra.sweep.dir={folder}" in words


@pytest.mark.parametrize("states", [(), ("finished", "failed")])
def test_what_a_search_raises_beside_that_keeps_its_traceback(sweep, states):
    assert explained_end(raised_in("optuna"), sweep(*states)) is None


def test_a_bug_of_ours_keeps_its_traceback_though_all_jobs_failed(sweep):
    assert explained_end(raised_in("pylorus", "KeyError('network')"), sweep("failed")) is None


@pytest.mark.parametrize("states", [("finished", "interrupted"), ("failed",)])
def test_a_job_that_a_launcher_lost_is_told_in_words(sweep, states):
    lost = type("UncompletedJobError", (RuntimeError,), {"__module__": "submitit.core.utils"})
    words = explained_end(lost("Job 7 (task: 0)\nhas not produced any output\n------\nlong log"), sweep(*states))
    assert words is not None
    assert "the launcher lost a job: Job 7 (task: 0) has not produced any output\n" in words
    assert "long log" not in words
