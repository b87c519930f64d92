"""Turn a node of the user's configuration with a `_target_` into an object: the door for code from outside Pylorus."""

import importlib
import inspect
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from pylorus.core.errors import PylorusError, format_suggestion

TARGET = "_target_"


def get_target(section: Any) -> dict[str, Any] | None:
    """Return a section of the configuration as a node for `instantiate`, or None if it names no `_target_`.

    Args:
        section: A mapping, or a dataclass of the schema; of the latter, `_target_` and `args` are used.
    """
    if isinstance(section, Mapping | DictConfig):
        node = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else dict(section)
        return cast(dict[str, Any], node) if cast(dict[str, Any], node).get(TARGET) else None
    target = getattr(section, TARGET, None)
    return {TARGET: target, **getattr(section, "args", {})} if target else None


def instantiate(node: Mapping[str, Any], *, key: str, **arguments: Any) -> Any:
    """Call the `_target_` of a node with its other entries and `arguments` as keyword arguments.

    Only for nodes that the user wrote in their own configuration: never for a bundle, a checkpoint or a download.

    Args:
        node: `_target_`, the dotted path of a class or function, and its arguments.
        key: Where the node is in the configuration, for error messages.
        arguments: Further arguments; they take precedence.

    Raises:
        PylorusError: If the target can't be imported, or fails; the message names key, target and reason.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    get_object(node, key=key)
    try:
        # Nested nodes become objects first; our own arguments are passed as they are, not through OmegaConf.
        prepared = hydra.utils.instantiate({**node, "_partial_": True}, _convert_="all")
        return partial(prepared, **arguments) if node.get("_partial_") else prepared(**arguments)
    except PylorusError:
        raise
    except Exception as error:  # whatever the user's code raises
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        raise PylorusError(f"{key}: {node[TARGET]} failed: {type(cause).__name__}: {cause}") from error


def build_callable(node: Mapping[str, Any], *, key: str, **arguments: Any) -> Any:
    """Return a callable from a node: an instance of a class, or a function with the node's arguments bound.

    Args:
        node: `_target_` and its arguments; `_partial_: false` calls a function, which then returns the callable.
        key: Where the node is in the configuration, for error messages.
        arguments: Arguments that are passed only if the target has a parameter of that name.

    Raises:
        PylorusError: If the target can't be imported, fails, or the result can't be called.
    """
    target = get_object(node, key=key)
    accepted = list_parameters(target)
    passed = {name: value for name, value in arguments.items() if name in accepted and name not in node}
    if not isinstance(target, type):
        node = {"_partial_": True, **node}
    built = instantiate(node, key=key, **passed)
    if not callable(built):
        raise PylorusError(f"{key}: {node[TARGET]} gave {type(built).__name__}, expected something that can be called.")
    return built


def get_object(node: Mapping[str, Any], *, key: str) -> Any:
    """Import the `_target_` of a node.

    Raises:
        PylorusError: If there is no such module or name, or its module fails; the message says what to type.
    """
    import hydra.utils

    target = node.get(TARGET)
    if not isinstance(target, str) or "." not in target:
        raise PylorusError(
            f"{key}: found {target}, expected the dotted path of a class or function, such as "
            f"my_package.my_module.MyClass."
        )
    hydra_log = logging.getLogger("hydra.utils")
    hydra_log.addFilter(_hide_record)  # it would say the same before our own message
    try:
        return hydra.utils.get_object(target)
    except Exception as error:  # an import runs any code of the user's module
        raise PylorusError(f"{key}: {target} can't be imported: {_explain_import(target, error)}") from error
    finally:
        hydra_log.removeFilter(_hide_record)


def _hide_record(record: logging.LogRecord) -> bool:
    return False


def _explain_import(target: str, error: Exception) -> str:
    """Return why a target can't be imported, and what to do."""
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception:  # the module itself is missing or fails
        return (
            f"{error.__cause__ or error}. Install its package (pip install -e FOLDER), or start with "
            f"PYTHONPATH=FOLDER, the folder that contains {target.partition('.')[0]}."
        )
    return f"{module_name} has no {name}.{format_suggestion(name, dir(module))}"


def check_node(node: Mapping[str, Any], *, key: str) -> None:
    """Check that the `_target_` of a node can be imported and has its arguments; nothing is called.

    Raises:
        PylorusError: Names the key of the unknown argument.
    """
    target = get_object(node, key=key)
    known = list_parameters(target)
    try:
        has_any = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return
    for name in node:
        if not name.startswith("_") and name not in known and not has_any:
            raise PylorusError(f"{key}.{name}: {node[TARGET]} has no such argument.{format_suggestion(name, known)}")


def list_parameters(target: Any) -> set[str]:
    """Return the names of the parameters of a class or function; empty if Python does not know them."""
    try:
        return set(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return set()
