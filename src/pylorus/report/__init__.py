"""Reports on runs: tables, figures, reporting checklists and the comparison with published results.

`pylorus.report` is this package and also the public function: Python puts a package that was imported in the place of
whatever has its name, so the package itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """This package, called as `pylorus.report(paths)`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Write a report; see `pylorus.report.page.write_report`."""
        from pylorus.report.page import write_report

        return write_report(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
