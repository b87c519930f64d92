"""Read optional JSON files of a run."""

import json
from pathlib import Path
from typing import Any

from pylorus.errors import PylorusError


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if it does not exist.

    Raises:
        PylorusError: If the file is not valid JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PylorusError(f"{path}: not valid JSON: {error}") from error
