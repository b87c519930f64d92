"""Arrange the panels of figures that show one panel per result."""

from collections.abc import Sequence

from pylorus.report.result import Result

ACROSS = 4
"""Maximum number of panels per row."""

MOST = 16
"""Maximum number of panels per figure: what fits on a printed page."""


def split_into_panels(results: Sequence[Result]) -> list[list[list[Result | None]]]:
    """Arrange results in figures of rows of panels: models in columns and stages in rows if they fit, else in sequence.

    Args:
        results: At least one, in the order of runs and stages.

    Returns:
        Figures, each a list of rows of equal length; None marks an empty panel.
    """
    runs = list(dict.fromkeys(result.run for result in results))
    stages = list(dict.fromkeys(result.stage.name for result in results))
    if 1 < len(runs) <= ACROSS and len(runs) * len(stages) <= MOST:
        by_position = {(result.stage.name, result.run): result for result in results}
        return [[[by_position.get((stage, run)) for run in runs] for stage in stages]]
    figures = []
    for start in range(0, len(results), MOST):
        chunk: list[Result | None] = list(results[start : start + MOST])
        columns = min(ACROSS, len(chunk))
        chunk += [None] * (-len(chunk) % columns)
        figures.append([chunk[first : first + columns] for first in range(0, len(chunk), columns)])
    return figures
