"""Resolve the PATH arguments of `pylorus report` to a run, a sweep or several runs, and to an output folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pylorus.errors import PylorusError, format_name_list

STATUS = "status.json"
"""File that identifies a folder as a run."""


@dataclass(frozen=True)
class Scope:
    """The runs of a report and its output folder.

    Attributes:
        kind: "run", "sweep" or "runs".
        folders: Folders of the runs, each once; jobs of a sweep are in the order of their numbers.
        output: Output folder of the report.
    """

    kind: str
    folders: tuple[Path, ...]
    output: Path


def resolve_scope(paths: Sequence[Path], output: Path | None = None) -> Scope:
    """Find the runs in the given paths.

    Args:
        paths: Folders of runs or of sweeps (whose subfolders are runs).
        output: Output folder; None: `report` inside a single run or sweep, or in the current folder for several paths.

    Raises:
        PylorusError: If no path is given, or a path is neither a run nor a sweep.
    """
    if not paths:
        raise PylorusError("no path given; expected the folder of a run or of a sweep, as in: pylorus report FOLDER")
    folders = tuple({folder.resolve(): folder for path in paths for folder in _find_runs(path)}.values())
    if len(paths) > 1:
        return Scope("runs" if len(folders) > 1 else "run", folders, output or Path("report"))
    is_run = (paths[0] / STATUS).is_file()
    return Scope("run" if is_run else "sweep", folders, output or paths[0] / "report")


def _find_runs(path: Path) -> list[Path]:
    """Return the path itself if it is a run, or the runs directly inside it."""
    if not path.is_dir():
        raise PylorusError(f"{path}: no such folder; expected the folder of a run or of a sweep.")
    if (path / STATUS).is_file():
        return [path]
    jobs = [file.parent for file in path.glob(f"*/{STATUS}")]
    if jobs:
        return sorted(jobs, key=_get_job_order)
    deeper = sorted({file.parent for pattern in (f"*/*/{STATUS}", f"*/*/*/{STATUS}") for file in path.glob(pattern)})
    hint = f" There are runs deeper inside it:\n{format_name_list(deeper, most=4)}" if deeper else ""
    raise PylorusError(
        f"{path}: neither a run (it contains no {STATUS}) nor a sweep (none of its folders contains one).{hint}"
    )


def _get_job_order(folder: Path) -> tuple[int, str]:
    """Return a sort key that puts jobs 0, 1, …, 10 in numerical order before folders with other names."""
    return (int(folder.name), "") if folder.name.isdigit() else (1 << 31, folder.name)
