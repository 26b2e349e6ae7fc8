# make demo    watch MLA beat joint training, in a minute
# make test    every behaviour once, in some minutes; make test-all: at every size, too. Lint is separate: make lint
# The first of these makes a virtual environment in .venv; PYTHON, TORCH and VENV may be set to something else.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= python3
DATA ?= avdigits.npz
ACCURACY ?= runs/accuracy
JOBS ?= 2
TARGETS ?= sm_90 sm_100 sm_80 gfx942
RESULTS ?= bench/results/cpu-xeon.jsonl
READY := $(VENV)/.ready

.PHONY: demo test test-exhaustive test-all lint bench results report accuracy missing kernels-check gpu-check tune wheel docs env clean
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
	@echo "==> the tests, a process on each core"
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not exhaustive"

test-all: test test-exhaustive

test-exhaustive: $(READY)
	@echo "==> the exhaustive part: all sizes of the interpreted kernels, long runs, more seeds"
	$(BIN)/python -m pytest -n auto --dist worksteal -m exhaustive

lint: $(READY)
	@echo "==> ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	@echo "==> operators, inference and training steps beside their rivals, on one thread and on all, in four minutes"
	rm -f build/throughput.jsonl
	OMP_WAIT_POLICY=passive $(BIN)/python -m bench.throughput --device cpu --quick --output build/throughput.jsonl

# On a quiet machine and a clean tree, whose commit is recorded.
results: $(READY)
	@echo "==> the same with time for it, and with torch.compile; rewrites $(RESULTS)"
	rm -f build/throughput.jsonl
	OMP_WAIT_POLICY=passive $(BIN)/python -m bench.throughput --device cpu --compile --output build/throughput.jsonl
	mv build/throughput.jsonl $(RESULTS)

report: $(READY)
	@echo "==> bench/REPORT.md, its pictures and the tables of README.md, from bench/results"
	$(BIN)/python -m bench.report

# Table 2 of the paper, in runs that go on where they were; DATA may be left out for the digits alone.
missing: $(READY)
	@echo "==> methods for missing modalities beside late fusion, QMF and MLA, at seven rates; results go to runs/missing/"
	$(BIN)/python -m bench.accuracy.missing $(if $(wildcard $(DATA)),--data $(DATA)) --jobs $(JOBS) --output runs/missing

# What is in $(ACCURACY) already is not run again; bench/results has what the READMEs quote.
accuracy: $(READY)
	@test -f $(DATA) || { echo "no $(DATA): python -m bench.make_avdigits makes it of two public data sets, which its --help names"; exit 1; }
	@echo "==> accuracy of all methods and the paper's studies on $(DATA), a process on each core; results go to $(ACCURACY)/"
	$(BIN)/python -m bench.accuracy --everything --data $(DATA) --jobs $(JOBS) --output $(ACCURACY)

kernels-check: $(READY)
	@echo "==> every Triton kernel and shipped configuration, compiled for each target without a GPU"
	printf '%s\n' $(TARGETS) | xargs -P $(JOBS) -I{} $(BIN)/python -m bench.throughput.aot --targets {}

# On a machine with a GPU, with its own Python, torch and triton; nothing is downloaded. GPU_PYTHON may name another Python.
gpu-check:
	@echo "==> build, test and measure on this machine's GPU, in two parts of some minutes; results go to bench/results/"
	PYTHON=$(GPU_PYTHON) bash .ci/gpu-check first
	PYTHON=$(GPU_PYTHON) bash .ci/gpu-check second

# After gpu-check, whose build it runs from.
tune:
	@echo "==> measuring launch configurations on this machine's GPU; rewrites kernels/launch.json"
	cd build/gpu/checkout && PYTHONPATH=$(CURDIR)/build/gpu/site $(GPU_PYTHON) -m bench.throughput.tune --output $(CURDIR)/kernels/launch.json

wheel: $(READY)
	@echo "==> a manylinux wheel in dist/, used under each Python from 3.10 on that is here (PYTHONS names others)"
	bash .ci/wheel

docs: $(READY)
	@echo "==> the pages of docs/, in build/site; a broken link is an error"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

env: $(READY)
	$(BIN)/mla-fast env

clean:
	rm -rf $(VENV) build dist *.egg-info mla_fast/*.so .mypy_cache .pytest_cache .ruff_cache
