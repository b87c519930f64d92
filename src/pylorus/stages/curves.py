"""The learning curves of a stage as a file: metrics.csv, one row per epoch, complete at any time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning.loggers.logger import Logger

from pylorus.files import write_atomically


class CurvesFile(Logger):
    """Write Lightning's metrics to metrics.csv: columns `step` (epochs over the whole run) and one per metric.

    Undefined values are empty cells. A row is rewritten when more metrics of its epoch arrive.

    Args:
        path: The file.
        last_step: Rows up to this step are retained: a stage resumed from there has neither gaps nor duplicates.

    Attributes:
        known_step: The last step in the existing file; 0 if there was none.
    """

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.known_step = 0
        self._rows: dict[int, dict[str, float]] = {}
        if path.is_file():
            existing = pd.read_csv(path, index_col="step")
            rows = {int(str(step)): {str(k): float(v) for k, v in row.items()} for step, row in existing.iterrows()}
            self.known_step = max(rows, default=0)
            self._rows = {step: row for step, row in rows.items() if step <= last_step}

    @property
    def name(self) -> str:
        """Lightning's name for this logger."""
        return "curves"

    @property
    def version(self) -> str:
        """Empty: there is only one."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of a step."""
        row = self._rows.setdefault(int(step or 0), {})
        row.update({name: value for name, value in metrics.items() if "/" in name})

    def save(self) -> None:
        """Write the file; Lightning calls this after each set of metrics, and before the first."""
        if not self._rows:
            return
        frame = pd.DataFrame([{"step": step, **row} for step, row in sorted(self._rows.items())])
        with write_atomically(self.path) as temporary:
            frame.to_csv(temporary, index=False)
