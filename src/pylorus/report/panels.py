"""Where the panels of a figure stand that has one a result."""

from collections.abc import Sequence

from pylorus.report.result import Result

ACROSS = 4
"""Most panels in a line."""

MOST = 16
"""Most panels in a figure: what a printed page holds."""


def arranged(results: Sequence[Result]) -> list[list[list[Result | None]]]:
    """Figures of lines of panels: models across and stages down where that fits, else one after the other.

    Args:
        results: At least one, in the order of runs and stages.

    Returns:
        A figure each a list of lines of equal length; None where a panel stays empty.
    """
    runs = list(dict.fromkeys(result.run for result in results))
    stages = list(dict.fromkeys(result.stage.name for result in results))
    if 1 < len(runs) <= ACROSS and len(runs) * len(stages) <= MOST:
        by_place = {(result.stage.name, result.run): result for result in results}
        return [[[by_place.get((stage, run)) for run in runs] for stage in stages]]
    figures = []
    for start in range(0, len(results), MOST):
        chunk: list[Result | None] = list(results[start : start + MOST])
        across = min(ACROSS, len(chunk))
        chunk += [None] * (-len(chunk) % across)
        figures.append([chunk[place : place + across] for place in range(0, len(chunk), across)])
    return figures
