"""The curves of a stage as a file: metrics.csv, one row an epoch, whole at any time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning.loggers.logger import Logger

from pylorus.files import whole


class CurvesFile(Logger):
    """Lightning's metrics in metrics.csv: columns `step` (epochs over the whole run) and one a metric.

    What is undefined stands as an empty cell. A row is written anew when more of its epoch becomes known.

    Args:
        path: The file.
        last_step: Up to here rows that lie there are kept: a stage that goes on from there has no gap, no row twice.

    Attributes:
        known_step: The last step that the file held; 0 where there was none.
    """

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.known_step = 0
        self._rows: dict[int, dict[str, float]] = {}
        if path.is_file():
            kept = pd.read_csv(path, index_col="step")
            rows = {int(str(step)): {str(k): float(v) for k, v in row.items()} for step, row in kept.iterrows()}
            self.known_step = max(rows, default=0)
            self._rows = {step: row for step, row in rows.items() if step <= last_step}

    @property
    def name(self) -> str:
        """Lightning's word for the kind of logger."""
        return "curves"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Left to config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds metrics to the row of a step."""
        row = self._rows.setdefault(int(step or 0), {})
        row.update({name: value for name, value in metrics.items() if "/" in name})

    def save(self) -> None:
        """Writes the file; Lightning calls it after each batch of metrics, and before the first."""
        if not self._rows:
            return
        frame = pd.DataFrame([{"step": step, **row} for step, row in sorted(self._rows.items())])
        with whole(self.path) as temporary:
            frame.to_csv(temporary, index=False)
