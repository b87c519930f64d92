# `make demo` and `make test` create .venv with everything that they need.
# Another Python: `make demo PYTHON=python3.12`. More options for pip: `make demo PIP_OPTIONS=--no-index`.

PYTHON ?= python3
PIP_OPTIONS ?=
OPTIONS ?=
BIN := .venv/bin

.PHONY: demo test test-fast coverage lint extras docs benchmark clean

demo: .venv/installed
	$(BIN)/python train.py

# The tests start many processes: the package's bytecode is written once, even if the environment says that it should not be.
test: .venv/installed
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

# The tests to run while you work: no processes, no long training.
test-fast: .venv/installed
	$(BIN)/python -m pytest -m fast

# Fails if the fast tests run less than this percentage of the lines of src/pylorus; CONTRIBUTING.md says why.
COVERAGE_FLOOR := 76

coverage: .venv/installed
	$(BIN)/python -m pytest -m fast --cov --cov-fail-under=$(COVERAGE_FLOOR)

# import-linter reads the contracts between packages from pyproject.toml; CONTRIBUTING.md explains them.
lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Resolves all extras together under constraints.txt, as an installation would, without installing anything.
extras: .venv/installed
	@if $(BIN)/python -m pip index $(PIP_OPTIONS) versions pip >/dev/null 2>&1; then \
		$(BIN)/python -m pip install $(PIP_OPTIONS) --dry-run --ignore-installed --quiet --constraint constraints.txt \
			".[$$($(BIN)/python -c 'import tomllib; print(",".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]))')]" \
		&& echo "all extras resolve together"; \
	else echo "SKIPPED: the extras were not resolved: no package index can be reached"; fi

# Opens without a server: site/index.html.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "documentation: $(CURDIR)/site/index.html"

# More options: `make benchmark OPTIONS='--model vgg19 --repeats 5'`.
benchmark:
	PIP_OPTIONS="$(PIP_OPTIONS)" $(PYTHON) benchmarks/run.py $(OPTIONS)

clean:
	rm -rf .venv benchmarks/.venv site

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Pylorus needs Python 3.11 or newer; found: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv \
		|| { echo "The virtual environment could not be created. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install $(PIP_OPTIONS) --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install $(PIP_OPTIONS) --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
