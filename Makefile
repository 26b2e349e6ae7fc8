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

.PHONY: demo test test-exhaustive test-all lint bench results report accuracy kernels-check gpu-check tune env clean
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
	$(BIN)/python -m pytest -n auto -m "not exhaustive"

test-all: test test-exhaustive

test-exhaustive: $(READY)
	@echo "==> the exhaustive part: all sizes of the interpreted kernels, long runs, more seeds"
	$(BIN)/python -m pytest -n auto -m exhaustive

lint: $(READY)
	@echo "==> ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	@echo "==> operators, inference and training steps beside their rivals, on one thread and on two, in four minutes"
	for threads in 1 2; do OMP_WAIT_POLICY=passive $(BIN)/python -m bench.throughput --device cpu --threads $$threads --quick \
		|| exit 1; done

# On a quiet machine and a clean tree, whose commit is recorded.
results: $(READY)
	@echo "==> the same with time for it, and with torch.compile; rewrites $(RESULTS)"
	rm -f build/throughput.jsonl
	for threads in 1 2; do OMP_WAIT_POLICY=passive $(BIN)/python -m bench.throughput --device cpu --threads $$threads --compile \
		--output build/throughput.jsonl || exit 1; done
	mv build/throughput.jsonl $(RESULTS)

report: $(READY)
	@echo "==> bench/REPORT.md, its pictures and the tables of README.md, from bench/results"
	$(BIN)/python -m bench.report

# What is in $(ACCURACY) already is not run again; bench/results has what the READMEs quote.
accuracy: $(READY)
	@echo "==> accuracy of all methods and the paper's studies on $(DATA), a process on each core; results go to $(ACCURACY)/"
	$(BIN)/python -m bench.accuracy --data $(DATA) --config B --seeds 0-5 --jobs $(JOBS) --output $(ACCURACY)/accuracy.jsonl
	$(BIN)/python -m bench.accuracy --data digits --seeds 0-5 --jobs $(JOBS) --output $(ACCURACY)/accuracy.jsonl
	$(BIN)/python -m bench.accuracy --data $(DATA) --config B --seeds 0-5 --jobs $(JOBS) --output $(ACCURACY)/accuracy.jsonl \
		--missing 0.1:0.7 --methods "Concat,Late fusion,MLA rls,MLA window"
	$(BIN)/python -m bench.accuracy --data $(DATA) --config C --seeds 0-2 --jobs $(JOBS) --output $(ACCURACY)/accuracy.jsonl
	$(BIN)/python -m bench.accuracy --data competition --seeds 0-2 --jobs $(JOBS) --output $(ACCURACY)/accuracy.jsonl
	for study in isolation gap collapse; do $(BIN)/python -m bench.studies.$$study --data $(DATA) --config B --jobs $(JOBS) \
		--output $(ACCURACY)/$$study.jsonl || exit 1; done
	for study in forgetting competition; do $(BIN)/python -m bench.studies.$$study --jobs $(JOBS) \
		--output $(ACCURACY)/$$study.jsonl || exit 1; done
	$(BIN)/python -m bench.accuracy --show $(ACCURACY)/accuracy.jsonl

kernels-check: $(READY)
	@echo "==> every Triton kernel and shipped configuration, compiled for each target without a GPU"
	printf '%s\n' $(TARGETS) | xargs -P $(JOBS) -I{} $(BIN)/python -m mla_fast.kernels.aot --targets {}

# On a machine with a GPU, with its own Python, torch and triton; nothing is downloaded. GPU_PYTHON may name another Python.
gpu-check:
	@echo "==> build, test and measure on this machine's GPU, in two parts of some minutes; results go to bench/results/"
	PYTHON=$(GPU_PYTHON) bash .ci/gpu-check first
	PYTHON=$(GPU_PYTHON) bash .ci/gpu-check second

# After gpu-check, whose build it runs from.
tune:
	@echo "==> measuring launch configurations on this machine's GPU; rewrites kernels/launch.json"
	cd build/gpu/checkout && PYTHONPATH=$(CURDIR)/build/gpu/site $(GPU_PYTHON) -m bench.tune --output $(CURDIR)/kernels/launch.json

env: $(READY)
	$(BIN)/mla-fast env

clean:
	rm -rf $(VENV) build dist *.egg-info mla_fast/*.so .pytest_cache .ruff_cache
