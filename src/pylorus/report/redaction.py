"""What must not leave with a report: folders and files, since their names may be those of patients."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from omegaconf import DictConfig, OmegaConf

HIDDEN = "(not shown)"

FILES = ("data.root", "data.manifest", "data.split_file", "resume")
"""Keys whose values are folders or files, also where no / tells so."""

OF_PATIENTS = ("data.test_values", "data.test_from")
"""Keys whose values a manifest may use for patients."""

FOLD = "data.fold"

REGULAR_EXPRESSIONS = ("data.group",)
"""Keys whose values may look like paths and are none."""


def redacted(key: str, value: Any) -> Any:
    """The value of a key of the configuration, without a folder.

    Example:
        >>> redacted("data.root", "/patients"), redacted("model.weights", "/home/w/vgg.pth"), redacted("seed", 3)
        ('(not shown)', 'vgg.pth', 3)
    """
    if value is not None and key in (*FILES, *OF_PATIENTS):
        return HIDDEN
    if key == FOLD and isinstance(value, str):  # a value of data.fold_column; else it is a number
        return HIDDEN
    if not isinstance(value, str) or key in REGULAR_EXPRESSIONS:
        return value
    if key == "model.weights":
        return PureWindowsPath(PurePosixPath(value).name).name
    return HIDDEN if "/" in value or "\\" in value else value


def redacted_override(word: str) -> str:
    """A word of the command line, without a folder.

    Example:
        >>> redacted_override("data.root=/patients"), redacted_override("optimizer.lr=0.1")
        ('data.root=(not shown)', 'optimizer.lr=0.1')
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")
    return f"{key}{equals}{redacted(name, int(value) if name == FOLD and value.isdecimal() else value)}"


def redacted_overrides(words: Sequence[str]) -> list[str]:
    """The words of a command line, without folders and without a value that a manifest uses for patients."""
    by_column = any(word.startswith("data.fold_column=") for word in words)
    return [
        f"{FOLD}={HIDDEN}" if by_column and word.startswith(f"{FOLD}=") else redacted_override(word) for word in words
    ]


def redacted_yaml(config: DictConfig, *, names: bool) -> str:
    """A configuration as YAML; unless `names`, without folders."""
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return OmegaConf.to_yaml(plain if names else _without_folders(plain, ""))


def flat(config: DictConfig) -> dict[str, Any]:
    """Every value of a configuration by its dotted key."""
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return dict(_flat(plain, ""))


def _flat(values: Mapping[Any, Any], above: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _without_folders(values: Mapping[Any, Any], above: str) -> dict[Any, Any]:
    return {
        name: _without_folders(value, f"{above}{name}.")
        if isinstance(value, dict)
        else [redacted(f"{above}{name}", part) for part in value]
        if isinstance(value, list)
        else redacted(f"{above}{name}", value)
        for name, value in values.items()
    }
