"""Are these the images, and is this the split, that a run began with?"""

from pathlib import Path

import pandas as pd

from pylorus.errors import PylorusError, listing

HOW_TO_MEND = "Put the images back as they were to go on with this run, or start a new one."


def check_same(table: pd.DataFrame, path: Path, *, parts: bool) -> None:
    """Compares images with the split.csv that a run wrote when it began; where there is none, all is well.

    Args:
        table: Rows with path, sha256 and, where `parts` are compared, split.
        path: The run's split.csv.
        parts: Whether the parts are known already; else the images alone are compared.

    Raises:
        PylorusError: Names the images that are gone, new, changed, or in another part.
    """
    if not path.is_file():
        return
    began = pd.read_csv(path, dtype=str, keep_default_na=False).set_index("path")
    now = table.set_index("path")
    both = began.index.intersection(now.index)
    changed = both[began.loc[both, "sha256"].to_numpy() != now.loc[both, "sha256"].to_numpy()]
    moved = both[:0] if not parts else both[began.loc[both, "split"].to_numpy() != now.loc[both, "split"].to_numpy()]
    found = {
        "gone": began.index.difference(now.index),
        "new": now.index.difference(began.index),
        "changed": changed,
        "in another part of the split": moved,
    }
    lines = [f"{name}: {what}" for what, names in found.items() for name in names]
    if lines:
        raise PylorusError(f"{path.parent}: the run there began with other images:\n{listing(lines)}\n{HOW_TO_MEND}")
