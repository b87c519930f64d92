"""A JSON file of a run, or nothing where there is none."""

import json
from pathlib import Path
from typing import Any

from pylorus.errors import PylorusError


def read_json(path: Path) -> Any:
    """What the file holds; None where there is no such file.

    Raises:
        PylorusError: If it holds no JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PylorusError(f"{path}: damaged: {error}") from error
