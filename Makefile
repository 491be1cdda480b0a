# Everything a fresh machine needs is Python 3.11 or newer, git and make:
#   make demo    run the whole pipeline on generated data
#   make test    run the tests
# Both make .venv and install what they need into it, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet
RUN    := $(VENV)/.runtime-installed
DEV    := $(VENV)/.dev-installed
# One process per core, 8 at most: each holds about 1 GB. Tests of one file share a process and its fixtures; tests/conftest.py
# sorts the files by duration, longest first.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test quick check format lint types contract bench clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -4
	@echo "  make quick   the tests that are not slow, for use while changing something"
	@echo "  make check   format, lint, types, import contract, tests: what CI runs"
	@echo "  make format  rewrite the sources in the project format"
	@echo "  make bench   every benchmark in its short form, and one table of ratios"

demo: $(RUN)
	$(BIN)/dinocell demo

test: $(DEV)
	$(PYTEST)

quick: $(DEV)
	$(PYTEST) -m "not slow"

check: lint types contract test

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/mypy

contract: $(DEV)
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV)
	$(BIN)/python benchmarks/_all.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or newer, or run make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: Python 3.11 or newer is needed (make PYTHON=/path/to/python3)"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(RUN): requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing DINOCell and what it needs into $(VENV) (a few minutes the first time)"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@

$(DEV): requirements-dev.txt $(RUN)
	$(PIP) -r requirements-dev.txt
	@touch $@
