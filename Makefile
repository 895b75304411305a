# make demo: plays the small game and prints where its report is.   make test: the CPU test suite.
# make sanitize: the C++ operators' tests under the address and undefined-behaviour sanitizers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU || true)
GPUS := $(or $(CUDA),0)
REQUIREMENTS := $(if $(filter-out 0,$(GPUS)),requirements-gpu.txt,requirements.txt)
# Processes that share the tests, a file each at a time; 0: one by one. Some tests start two ranks of their own.
WORKERS ?= 2
RANKS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)

.PHONY: demo test lint bench sanitize sanitize-gpu clean

$(STAMP): requirements.txt requirements-gpu.txt setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet $$(grep -E '^(torch|triton)==' requirements.txt)
	$(BIN)/pip install --quiet -r $(REQUIREMENTS)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	$(BIN)/python -m aot_fast.kernels.native
	touch $@

demo: $(STAMP)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/torchrun --nproc_per_node $(RANKS) -m aot_fast run tiny

test: $(STAMP)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-enable -q $(PYTEST_ARGS)

SANITIZERS := -fsanitize=address,undefined
sanitize: $(STAMP)
	CFLAGS="$(SANITIZERS) -fno-omit-frame-pointer" LDFLAGS="$(SANITIZERS)" $(BIN)/python setup.py -q build_ext \
		--build-temp build/sanitize/temp --build-lib build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		AOT_FAST_CSRC_LIBRARY=$$(ls $(CURDIR)/build/sanitize/aot_fast/kernels/_cpu*.so) TRITON_INTERPRET=0 \
		$(BIN)/python -m pytest tests/kernels -m "not gpu" -k csrc $(PYTEST_ARGS)

# On a machine with a GPU, where nvcc built csrc/cuda.
sanitize-gpu: $(STAMP)
	compute-sanitizer --tool memcheck $(BIN)/python -m pytest tests/kernels/test_row_loss.py -m gpu $(PYTEST_ARGS)
	compute-sanitizer --tool racecheck $(BIN)/python -m pytest tests/kernels/test_row_loss.py -m gpu -k bits $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
