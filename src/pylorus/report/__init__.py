"""Reports on runs: tables, figures, reporting checklists and the comparison with published results.

`pylorus.report` is this package and also the public function: Python puts a package that was imported in the place of
whatever has its name, so the package itself can be called.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from annotated_types import Ge

from pylorus.core.arguments import check_arguments
from pylorus.core.errors import PylorusError, translate_errors
from pylorus.core.io import resolve_path

ARGUMENTS = {
    "--class": "class_name",
    "--sensitivity": "sensitivity",
    "--guarantee": "guarantee",
    "--margin": "margin",
    "--reference": "reference",
    "--against": "against",
}
"""What the options in messages are called in Python."""


@check_arguments
def report(
    paths: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    class_name: str | None = None,
    sensitivity: float | None = None,
    guarantee: float | None = None,
    published: bool = False,
    margin: float | None = None,
    reference: str | None = None,
    against: Sequence[str] = (),
    thumbnails: bool = False,
    names: bool = False,
    resamples: Annotated[int, Ge(1)] | None = None,
    seed: Annotated[int, Ge(0)] = 0,
) -> Path:
    """Write the report of a run, a sweep or several runs; return the path of the HTML page.

    Args:
        paths: Folder of a run or of a sweep, or several.
        output: Output folder; None: `report` in a single run or sweep, or in the current folder for several.
        class_name: Name of the class for which a threshold is fixed; None: the first run's deciding class.
        sensitivity: True sensitivity that this threshold has to guarantee for new patients, in (0, 1]; None: that of
            the first run.
        guarantee: Confidence of this guarantee, in (0, 1); None: that of the first run.
        published: Whether to compare with the results of the published study.
        margin: Largest difference at which a model counts as no worse, in (0, 1), for tests of non-inferiority and
            equivalence; None: that of the runs (deploy.margin).
        reference: Label, model or folder of the run that the others are compared with by the margin; None: the one
            selected on validation images.
        against: Figures that the selected model is compared with by the margin, such as `"sensitivity=0.9"`,
            `"sensitivity=135/150"` or `"published"`.
        thumbnails: Whether to show the worst mistakes as small images.
        names: Whether to show file names, groups, folders and error messages, which may name patients.
        resamples: Random exchanges of two models' predictions in tests of macro F1 and similar indices; None: as many
            as the command makes.
        seed: Random seed of these exchanges and of permutation tests: the same seed gives the same report.

    Raises:
        PylorusError: If a path is not a run or sweep, or a file is damaged; the message names it.
    """
    from pylorus.report.page import write_report
    from pylorus.report.results import ReportOptions

    folders = [resolve_path(path, argument="paths") for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not folders:
        raise PylorusError("paths: found an empty list, expected the folder of a run or of a sweep, or several.")
    page_folder = None if output is None else resolve_path(output, argument="output")
    with translate_errors(ARGUMENTS):
        options = ReportOptions(
            class_name=class_name,
            sensitivity=sensitivity,
            guarantee=guarantee,
            published=published,
            margin=margin,
            reference=reference,
            against=tuple(against),
            thumbnails=thumbnails,
            names=names,
            resamples=ReportOptions.resamples if resamples is None else resamples,
            seed=seed,
        )
        return write_report(folders, page_folder, options=options)


class _CallablePackage(ModuleType):
    """This package, called as `pylorus.report(paths)`."""

    def __call__(self, *arguments: Any, **options: Any) -> Path:
        """Write a report; see `report`."""
        return report(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
