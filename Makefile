# `make demo` and `make test` do everything on a machine with Python 3.11, git, make and a C compiler.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo demo-quick demo-align test test-fast lint docs format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

env: $(STAMP)  ## build .venv with the pinned stack

# Built again when the requirements change. Plain pip: torch then resolves to the build that fits the machine.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is needed; give another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip check
	@touch $@

demo: env  ## the main job on a real model: import, score, prune, distil, evaluate, export, report
	$(BIN)/minitron run configs/demo.yaml

demo-quick: env  ## the same in a few minutes
	$(BIN)/minitron run configs/demo-quick.yaml

demo-align: env  ## what `make demo` made, aligned: fine-tuned on answers, then on preferences
	$(BIN)/minitron run configs/demo-align.yaml

test: env  ## all tests
	$(BIN)/python -m pytest

test-fast: env  ## tests that take less than five seconds each
	$(BIN)/python -m pytest -m "not slow"

lint: env  ## style, types, import boundaries
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: env  ## the guides as a site, into build/site
	$(BIN)/mkdocs build

format: env  ## rewrite to the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and build products (runs stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
