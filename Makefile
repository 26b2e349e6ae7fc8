# make demo    watch MLA beat joint training, in a minute
# make test    lint is separate: make lint
# The first of these makes a virtual environment in .venv; PYTHON, TORCH and VENV may be set to something else.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= python3
READY := $(VENV)/.ready

.PHONY: demo test lint bench kernels-check gpu-check tune env clean
# The build needs the torch that is installed, not one that pip would fetch into an isolated environment.
$(READY): pyproject.toml setup.py $(wildcard csrc/* csrc/cuda/*)
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
	@echo "==> the whole test suite, a process on each core"
	$(BIN)/python -m pytest -n auto

lint: $(READY)
	@echo "==> ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	@echo "==> operators beside the best eager forms, on one thread and on two"
	$(BIN)/python -m bench.ops --threads 1
	$(BIN)/python -m bench.ops --threads 2

kernels-check: $(READY)
	@echo "==> every Triton kernel and shipped configuration, compiled for each target without a GPU"
	$(BIN)/python -m mla_fast.kernels.aot

# On a machine with a GPU, with its own Python, torch and triton; nothing is downloaded. GPU_PYTHON may name another Python.
gpu-check:
	@echo "==> build, test and measure on this machine's GPU; results go to bench/results/"
	PYTHON=$(GPU_PYTHON) bash .ci/gpu-check

# After gpu-check, whose build it runs from.
tune:
	@echo "==> measuring launch configurations on this machine's GPU; rewrites kernels/launch.json"
	cd build/gpu/checkout && PYTHONPATH=$(CURDIR)/build/gpu/site $(GPU_PYTHON) -m bench.tune --output $(CURDIR)/kernels/launch.json

env: $(READY)
	$(BIN)/mla-fast env

clean:
	rm -rf $(VENV) build dist *.egg-info mla_fast/*.so .pytest_cache .ruff_cache
