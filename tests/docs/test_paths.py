"""Paths and module names that documentation, configuration and docstrings mention exist."""

import ast
import re
from pathlib import Path

from tests.end_to_end.documented import PROJECT

PATTERNS = (
    "*.md", "*.toml", "*.py", ".*.yaml", "mkdocs.yml", "CITATION.cff", "Makefile", ".ci/*", "docs/*.md", "docs/*.py",
    "conf/**/*.yaml", "benchmarks/*.md", "benchmarks/**/*.py", "benchmarks/**/*.sh", "src/**/*.py",
)  # fmt: skip
"""Files that are searched."""

RELEASES = re.compile(r"^## 0\..*", re.DOTALL | re.MULTILINE)
"""The part of the changelog that names what existed in an earlier release."""

PATH = re.compile(r"(?<![\w./<>{}$-])(?:src|tests|docs|conf|benchmarks)/[\w./*-]*\w")
MODULE = re.compile(r"(?<![\w./@-])pylorus(?:\.[A-Za-z_]\w*)+")

BUILT = r"docs/reference/|benchmarks/(\.venv|outputs)|conf/\w+/(NAME|poly|hospital)\.yaml"
"""Paths that a build, a benchmark or a user creates."""

NO_MODULES = r"pylorus\.(input|run|outputs|classes|short_names|intended_use|version|model\.json|css|help|token)\b"
"""Keys in the metadata of an exported ONNX file, a tag of MLflow, resolvers of the configuration, and a style sheet."""


def find_files() -> list[Path]:
    return sorted({path for pattern in PATTERNS for path in PROJECT.glob(pattern) if ".venv" not in path.parts})


def read_names(module: Path) -> set[str]:
    """Names that a module defines, assigns or imports, those of its classes included."""
    names: set[str] = set()
    for file in (module, module.with_suffix(".pyi")):
        for node in ast.walk(ast.parse(file.read_text() if file.is_file() else "")):
            match node:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.Name(id=name):
                    names.add(name)
                case ast.ImportFrom(names=aliases):
                    names |= {alias.asname or alias.name for alias in aliases}
    return names


def is_known(dotted: str) -> bool:
    """Whether a dotted name leads to a package, a module, or a name in one of them."""
    folder = PROJECT / "src" / "pylorus"
    parts = dotted.split(".")[1:]
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if (folder / part).is_dir():
            folder /= part
        elif (folder / f"{part}.py").is_file():
            return following is None or following in read_names(folder / f"{part}.py")
        else:
            return part in read_names(folder / "__init__.py")
    return True


def find_stale(text: str) -> list[str]:
    """The paths and module names in a text that do not exist."""
    paths = {path for path in PATH.findall(text) if not re.match(BUILT, path) and not any(PROJECT.glob(path))}
    names = {name for name in MODULE.findall(text) if not re.match(NO_MODULES, name) and not is_known(name)}
    return sorted(paths | names)


def test_paths_and_modules_in_documentation_configuration_and_docstrings_exist():
    stale = {str(path.relative_to(PROJECT)): find_stale(RELEASES.sub("", path.read_text())) for path in find_files()}
    assert {path: names for path, names in stale.items() if names} == {}


def test_a_path_or_a_module_that_does_not_exist_is_found():
    assert find_stale("`src/pylorus/data/image.py`, `conf/model/*.yaml`, docs/pictures/.") == [
        "docs/pictures", "src/pylorus/data/image.py",
    ]  # fmt: skip
    assert find_stale("pylorus.data.decode, pylorus.core.errors.PylorusError, pylorus.evaluation.discrimination") == []
    assert find_stale("`pylorus.data.image`; from pylorus.data.decode import none_such") == ["pylorus.data.image"]
    assert find_stale("pylorus.data.decode.none_such") == ["pylorus.data.decode.none_such"]
