# make demo    watch MLA beat joint training, in a minute
# make test    lint is separate: make lint
# The first of these makes a virtual environment in .venv; PYTHON, TORCH and VENV may be set to something else.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench env clean
# The build needs the torch that is installed, not one that pip would fetch into an isolated environment.
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	@echo "==> preparing $(VENV) with $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "setuptools>=77" "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev]"
	$(BIN)/mla-fast env
	@touch $@

demo: $(READY)
	@echo "==> joint training beside MLA; results go to demo/"
	$(BIN)/mla-fast demo

test: $(READY)
	@echo "==> the whole test suite"
	$(BIN)/python -m pytest

lint: $(READY)
	@echo "==> ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	@echo "==> operators beside the best eager forms, on one thread and on two"
	$(BIN)/python -m bench.ops --threads 1
	$(BIN)/python -m bench.ops --threads 2

env: $(READY)
	$(BIN)/mla-fast env

clean:
	rm -rf $(VENV) build dist *.egg-info mla_fast/*.so .pytest_cache .ruff_cache
