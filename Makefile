# `make setup` and `make test` are all that a fresh machine needs: Python 3.11 or 3.12, and make.

PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
FUZZ_SECONDS ?= 600
PIP_ARGS ?=
# Many tests start processes: with bytecode on disk, whatever the environment says, they do not compile the package anew.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup install test test-all test-gpu fuzz mutation lint docs update-golden clean

help:
	@echo "make setup          create $(VENV), install, compile and run a small GPT-2"
	@echo "make test           the tests (JOBS=2 at a time)"
	@echo "make test-all       the slow ones too"
	@echo "make test-gpu       those that need a CUDA device"
	@echo "make fuzz           random programs, modules and damaged files for FUZZ_SECONDS=600"
	@echo "make mutation       small faults planted in the lowerings: how many do the tests notice?"
	@echo "make lint           ruff, mypy, import contracts"
	@echo "make docs           write docs/index.md anew from real output"
	@echo "make update-golden  write the expected texts of the tests anew (look at the diff)"

setup: $(STAMP)
	$(BIN)/aicc env
	$(BIN)/aicc run examples/gpt2.py

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/aicc
	@touch $@

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) -m "not gpu" --hypothesis-profile=all

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

mutation: $(STAMP)
	$(BIN)/python -m aicc.benchmarks.mutation --sample 60 --jobs $(JOBS)

# mypy looks for the package by its name, so it goes through a link of that name: the checkout may be called anything.
lint: $(STAMP)
	$(BIN)/ruff check .
	MYPYPATH=$(VENV)/src $(BIN)/mypy -p aicc
	$(BIN)/lint-imports

docs: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/03_walkthrough.py --write docs/index.md

update-golden: docs
	$(PYTEST) --update-golden

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
