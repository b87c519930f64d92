"""Check that a resumed run has the images it started with, and restore its split."""

from pathlib import Path

import pandas as pd

from pylorus.errors import PylorusError, format_name_list

HOW_TO_FIX = "To resume this run, restore the images as they were; else start a new run."


def check_images_unchanged(table: pd.DataFrame, path: Path) -> None:
    """Check that the images are those in the split.csv that a run wrote at its start, if there is one.

    Args:
        table: Rows with path and sha256.
        path: The run's split.csv.

    Raises:
        PylorusError: If images are gone, new or changed; the message names them.
    """
    if not path.is_file():
        return
    initial = _read_split_table(path)
    current = table.set_index("path")
    common = initial.index.intersection(current.index)
    differences = {
        "gone": initial.index.difference(current.index),
        "new": current.index.difference(initial.index),
        "changed": common[initial.loc[common, "sha256"].to_numpy() != current.loc[common, "sha256"].to_numpy()],
    }
    lines = [f"{name}: {change}" for change, names in differences.items() for name in names]
    if lines:
        raise PylorusError(
            f"{path.parent}: the images are not those that this run started with:\n{format_name_list(lines)}\n{HOW_TO_FIX}"
        )


def read_initial_split(table: pd.DataFrame, path: Path) -> list[str] | None:
    """Return the split of each image as a run wrote it at its start.

    A resumed run continues with this split, even if another version of Pylorus would draw a different one.

    Args:
        table: Rows with path, the same images as in split.csv.
        path: The run's split.csv.

    Returns:
        train, val or test for each row; None if the run had not written its split yet.
    """
    return list(_read_split_table(path).loc[table["path"], "split"]) if path.is_file() else None


def _read_split_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False).set_index("path")
