"""The arguments of the Python interface are checked against its annotations, and never converted silently."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from annotated_types import Ge, Le

from pylorus.core.arguments import check_arguments
from pylorus.core.errors import PylorusError

Paths = str | Path | Sequence[str | Path]


@check_arguments
def call(
    *,
    folder: str | Path = "",
    size: Annotated[int, Ge(1)] | None = None,
    rate: Annotated[float, Ge(0), Le(1)] = 0.5,
    strict: bool = False,
    names: Sequence[str] = (),
    weights: Sequence[Annotated[float, Ge(0)]] = (),
    options: Mapping[str, Any] | None = None,
    loss: str | Callable[..., object] = "",
    fit: Literal["pad", "crop"] = "pad",
    paths: Paths = "",
    unknown: "str | NotImported" = "",  # noqa: F821
) -> dict[str, Any]:
    return dict(locals())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("folder", 3, "found 3, expected a path."),
        ("folder", None, "found None, expected a path."),
        ("size", 0, "found 0, expected a whole number of at least 1, or None."),
        ("size", True, "found True, expected a whole number"),
        ("size", "32", "found '32', expected a whole number"),
        ("size", 32.5, "found 32.5, expected a whole number"),
        ("rate", float("nan"), "found nan, expected a number of at least 0 and of at most 1."),
        ("rate", np.float32(2), "found 2.0, expected a number of at least 0 and of at most 1."),
        ("strict", "no", "found 'no', expected True or False."),
        ("names", "ABC", "found 'ABC', expected a list of text."),
        ("names", [1, 2], "found [1, 2], expected a list of text."),
        ("weights", [1, -2], "found [1, -2], expected a list of numbers of at least 0."),
        ("options", 3, "found 3, expected a dictionary, or None."),
        ("loss", 3, "found 3, expected text, or a function."),
        ("fit", "padd", "found 'padd', expected 'pad' or 'crop'. Did you mean \"pad\"?"),
        ("paths", np.zeros((3, 3)), "found an array of shape (3, 3), expected a path, or a list of paths."),
        ("folder", dict, "found the class dict, expected a path."),
        ("folder", len, "found the function len, expected a path."),
        ("folder", torch.nn.Identity(), "found an Identity, expected a path."),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_found_and_expected(name, value, message):
    with pytest.raises(PylorusError) as error:
        call(**{name: value})
    assert f"call: {name}: {message}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("folder", Path("a"), Path("a")),
        ("size", np.int64(3), 3),
        ("rate", 1, 1),
        ("names", np.array(["a"]), ["a"]),
        ("names", pd.Index(["a"]), ["a"]),
        ("weights", torch.ones(2), [1.0, 1.0]),
        ("paths", ["a", Path("b")], ["a", Path("b")]),
        ("unknown", 3, 3),
    ],
)
def test_a_valid_argument_is_passed_on(name, value, expected):
    passed = call(**{name: value})[name]
    assert (type(passed), passed) == (type(expected), expected)


def test_python_names_a_missing_or_unknown_argument():
    with pytest.raises(TypeError, match="call.*siez"):
        call(siez=1)
