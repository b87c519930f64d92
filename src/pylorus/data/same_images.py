"""Are these the images that a run began with, and in which parts of the split did it put them?"""

from pathlib import Path

import pandas as pd

from pylorus.errors import PylorusError, listing

HOW_TO_MEND = "Put the images back as they were to go on with this run, or start a new one."


def check_same(table: pd.DataFrame, path: Path) -> None:
    """Compares images with the split.csv that a run wrote when it began; where there is none, all is well.

    Args:
        table: Rows with path and sha256.
        path: The run's split.csv.

    Raises:
        PylorusError: Names the images that are gone, new or changed.
    """
    if not path.is_file():
        return
    began = _read(path)
    now = table.set_index("path")
    both = began.index.intersection(now.index)
    found = {
        "gone": began.index.difference(now.index),
        "new": now.index.difference(began.index),
        "changed": both[began.loc[both, "sha256"].to_numpy() != now.loc[both, "sha256"].to_numpy()],
    }
    lines = [f"{name}: {what}" for what, names in found.items() for name in names]
    if lines:
        raise PylorusError(f"{path.parent}: the run there began with other images:\n{listing(lines)}\n{HOW_TO_MEND}")


def read_parts(table: pd.DataFrame, path: Path) -> list[str] | None:
    """The part in which a run put each image when it began; None where it did not come so far.

    A run goes on with this split, also where another version of Pylorus would draw another one.

    Args:
        table: Rows with path, the very images of the run.
        path: The run's split.csv.
    """
    return list(_read(path).loc[table["path"], "split"]) if path.is_file() else None


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False).set_index("path")
