from pathlib import Path

import pytest

from pylorus.core.errors import PylorusError
from pylorus.runs.reading import resolve_scope


def run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "status.json").write_text("{}")
    return folder


def test_jobs_of_a_sweep_are_sorted_by_number(tmp_path):
    for name in ("10", "2", "0", "extra"):
        run(tmp_path / name)
    found = resolve_scope([tmp_path])
    assert [folder.name for folder in found.folders] == ["0", "2", "10", "extra"]
    assert (found.kind, found.output) == ("sweep", tmp_path / "report")


def test_a_run_given_twice_or_with_its_sweep_counts_once(tmp_path):
    job = run(tmp_path / "sweep" / "0")
    run(tmp_path / "sweep" / "1")
    found = resolve_scope([tmp_path / "sweep", job, job])
    assert [folder.name for folder in found.folders] == ["0", "1"]
    assert found.output == Path("report")


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PylorusError, match="gone: no such folder"):
        resolve_scope([tmp_path / "gone"])


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(PylorusError, match="neither a run .* nor a sweep"):
        resolve_scope([tmp_path])


def test_runs_in_deeper_folders_are_suggested(tmp_path):
    run(tmp_path / "2026-01-31" / "12-00-00")
    with pytest.raises(PylorusError, match=r"There are runs deeper inside it:\n.*12-00-00"):
        resolve_scope([tmp_path])


def test_an_empty_list_of_paths_is_refused():
    with pytest.raises(PylorusError, match="no path given"):
        resolve_scope([])
