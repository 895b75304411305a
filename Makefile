# make demo: plays the small game and prints where its report is.   make test: the CPU test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU || true)
GPUS := $(or $(CUDA),0)
REQUIREMENTS := $(if $(filter-out 0,$(GPUS)),requirements-gpu.txt,requirements.txt)
RANKS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)

.PHONY: demo test lint bench clean

$(STAMP): requirements.txt requirements-gpu.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet $$(grep -E '^(torch|triton)==' requirements.txt)
	$(BIN)/pip install --quiet -r $(REQUIREMENTS)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: $(STAMP)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/torchrun --nproc_per_node $(RANKS) -m aot_fast run tiny

test: $(STAMP)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-enable -q $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
