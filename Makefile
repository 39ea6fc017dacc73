# Everything works on a fresh machine: each target makes .venv by itself from the pinned constraints.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= outputs/demo
JOBS ?= 2

.PHONY: help env demo test lint format clean

help:  ## show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

env: .venv/.installed  ## make .venv with everything the targets need

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "trackbench needs Python 3.11 to 3.13, PYTHON=... names one; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: env  ## train three tiny trackers, compare them with the baselines, write a report
	$(BIN)/trackbench demo --output $(DEMO)

# one thread each: two processes with threads of their own wait for each other
test: env  ## run the tests, JOBS of them at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: env  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env  ## apply style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches, never outputs
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
