"""Redaction of paths and patient identifiers from reports: names of folders and files may be those of patients."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from omegaconf import DictConfig, OmegaConf

HIDDEN = "(not shown)"

FILES = ("data.root", "data.manifest", "data.split_file", "resume")
"""Keys whose values are folders or files, even if they contain no slash."""

OF_PATIENTS = ("data.test_values", "data.test_from")
"""Keys whose values may identify patients in a manifest."""

FOLD = "data.fold"

REGULAR_EXPRESSIONS = ("data.group",)
"""Keys whose values may look like paths but are not."""


def redact_value(key: str, value: Any) -> Any:
    """Redact the value of a configuration key if it is a path or may identify a patient.

    Example:
        >>> redact_value("data.root", "/patients"), redact_value("model.weights", "/home/w/vgg.pth"), redact_value("seed", 3)
        ('(not shown)', 'vgg.pth', 3)
    """
    if value is not None and key in (*FILES, *OF_PATIENTS):
        return HIDDEN
    if key == FOLD and isinstance(value, str):  # a value of data.fold_column; otherwise it is a number
        return HIDDEN
    if not isinstance(value, str) or key in REGULAR_EXPRESSIONS:
        return value
    if key == "model.weights":
        return PureWindowsPath(PurePosixPath(value).name).name
    return HIDDEN if "/" in value or "\\" in value else value


def redact_override(word: str) -> str:
    """Redact the value of one override of the command line.

    Example:
        >>> redact_override("data.root=/patients"), redact_override("optimizer.lr=0.1")
        ('data.root=(not shown)', 'optimizer.lr=0.1')
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")
    return f"{key}{equals}{redact_value(name, int(value) if name == FOLD and value.isdecimal() else value)}"


def redact_overrides(words: Sequence[str]) -> list[str]:
    """Redact the overrides of a command line, including a fold that is a value of data.fold_column."""
    by_column = any(word.startswith("data.fold_column=") for word in words)
    return [
        f"{FOLD}={HIDDEN}" if by_column and word.startswith(f"{FOLD}=") else redact_override(word) for word in words
    ]


def format_redacted_yaml(config: DictConfig, *, names: bool) -> str:
    """Format a configuration as YAML.

    Args:
        config: The configuration.
        names: Whether to keep the names of files and folders and the values that may identify patients.
    """
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return OmegaConf.to_yaml(plain if names else _redact_values(plain, ""))


def collect_config_values(config: DictConfig) -> dict[str, Any]:
    """Return every value of a configuration by its dotted key."""
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return dict(_iter_config_values(plain, ""))


def _iter_config_values(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _iter_config_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _redact_values(values: Mapping[Any, Any], prefix: str) -> dict[Any, Any]:
    return {
        name: _redact_values(value, f"{prefix}{name}.")
        if isinstance(value, dict)
        else [redact_value(f"{prefix}{name}", item) for item in value]
        if isinstance(value, list)
        else redact_value(f"{prefix}{name}", value)
        for name, value in values.items()
    }
