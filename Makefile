# `make demo` and `make test` do everything on a machine with Python 3.12 or 3.11, git, make and a C compiler.
VENV ?= .venv
BIN := $(VENV)/bin

# PYTHON= chooses the interpreter. Without it the environment that is there stays as it is; the first is built with the
# newest supported interpreter that starts (a shim of pyenv for a version that is not selected is on the PATH and does
# not start).
PYTHONS := python3.12 python3.11
BUILT := $(firstword $(patsubst $(VENV)/.installed-%,%,$(wildcard $(VENV)/.installed-*)))
ifneq ($(origin PYTHON),undefined)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
else ifneq ($(BUILT),)
PYTHON := python$(BUILT)
VERSION := $(BUILT)
else
PYTHON := $(firstword $(foreach name,$(PYTHONS),$(shell $(name) -c '' >/dev/null 2>&1 && echo $(name))))
VERSION := $(PYTHON:python%=%)
endif
STAMP := $(VENV)/.installed-$(VERSION)

# Tests run in this many workers; the tests of a file stay together.
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help env llama-cpp matrix demo demo-quick demo-align test test-fast soak lint docs format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

env: $(STAMP)  ## build .venv with the pinned stack

# Built again when the requirements change, and from nothing when PYTHON= is of another version than the environment.
# Plain pip: torch then resolves to the build that fits the machine.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "none of $(PYTHONS) starts here; install one, or give it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '' || { echo "$(PYTHON) does not start; give another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(if $(wildcard $(STAMP)),,--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[stack,dev]"
	$(BIN)/python -m pip check
	@touch $@

# Its plain build crashes on processors with AMX. The wheel is kept, as pip's own cache forgets it where it is off.
WHEELS ?= $(HOME)/.cache/nemo-minitron/wheels
LLAMA_CPP := llama_cpp_python-0.3.36
llama-cpp: env  ## llama.cpp for the checks of GGUF exports and the K types (builds for 8 minutes, the first time)
	@mkdir -p $(WHEELS)
	@ls $(WHEELS)/$(LLAMA_CPP)-*.whl >/dev/null 2>&1 || \
		CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" \
		CMAKE_BUILD_PARALLEL_LEVEL=$(WORKERS) $(BIN)/python -m pip wheel --quiet --disable-pip-version-check \
		--no-deps -w $(WHEELS) $(subst _,-,$(subst -,==,$(LLAMA_CPP)))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(WHEELS)/$(LLAMA_CPP)-*.whl -c constraints.txt

matrix: env  ## the smoke tests beside each known pair of NeMo and Megatron-core (NAMES= chooses; 7 GB at a time)
	$(BIN)/python tests/matrix/run.py $(NAMES)

demo: env  ## the main job on a real model: import, score, prune, distil, evaluate, export, report
	$(BIN)/minitron run configs/demo.yaml

demo-quick: env  ## the same in a few minutes
	$(BIN)/minitron run configs/demo-quick.yaml

demo-align: env  ## what `make demo` made, aligned: fine-tuned on answers, then on preferences
	$(BIN)/minitron run configs/demo-align.yaml

test: env  ## all tests (WORKERS=2 files at a time, 1.5 GB of memory each at most)
	$(BIN)/python -m pytest $(SHARED)

test-fast: env  ## tests that take less than five seconds each
	$(BIN)/python -m pytest $(SHARED) -m "not slow"

MINUTES ?= 30
soak: env  ## kills, damaged files and full disks at random, for MINUTES=30 (SEED= repeats)
	$(BIN)/python tests/soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

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
