# The commands of the README and of CI. `make test` and `make demo` work from a bare checkout: they make .venv, install
# torch and the package there, and build the kernels. To use an environment of your own: make test VENV=/path/to/it

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

# What compilers say is in here; what failed, in the last lines of the build and in build_record.json.
WARNINGS := build/native/warnings.txt
# ninja compiles what changed and shows each file. `pip install -e .` does the same, and shows it on a terminal only.
BUILD = mkdir -p build/native && $(BIN)/python setup.py --quiet build_ext --inplace 2>$(WARNINGS)
INSTALL = $(BIN)/pip install --quiet --no-build-isolation -e

.PHONY: dev op new-op native
.PHONY: demo digits systems test test-slow bench bench-quick readme-check lint types format check-gpu-code clean

$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet 'setuptools>=77' ninja
	@touch $@

# pip builds what the line before has built: ninja finds nothing to do.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py build_backend/backend.py
	MINISORA_CPU=native; export MINISORA_CPU; $(BUILD) && $(INSTALL) '.[dev]'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard build_backend/*.py csrc/*/*)
	$(BUILD)
	$(INSTALL) '.[train,test,lint]'
	@touch $@

# The package for this CPU, and pytest: enough to work on an op.
dev: $(VENV)/.dev

# After an edit: build for this CPU, test one op, and time it in short.
op: $(VENV)/.dev
	$(BIN)/python -c 'import pytest_benchmark, triton' 2>/dev/null || $(INSTALL) '.[op]'
	$(BIN)/python tools/op.py $(OP)

# The files of a new op, ready to fill.
new-op:
	$(PYTHON) tools/new_op.py $(OP)

# The kernels again, for every instruction set that the compiler knows.
native: $(VENV)/.torch
	$(BUILD)

# Train a small video DiT on real clips and sample new ones: about ten minutes on two cores.
demo: $(VENV)/.installed
	$(BIN)/python -m models.demo

# The same on moving handwritten digits; prints how many generated frames a classifier recognises.
digits: $(VENV)/.installed
	$(BIN)/python -m models.digits

# Every system on moving digits: trained on the kernels and on plain PyTorch, sampled, judged, timed; more than an hour
# on two cores. Writes the record, its plot and sheets of samples under bench/results.
systems: $(VENV)/.installed
	$(BIN)/python -m bench.systems

test: $(VENV)/.installed
	$(BIN)/python -m minisora_kernels
	$(BIN)/python -m pytest tests -m 'not slow' --ignore tests/test_aot.py --ignore tests/test_cuda_build.py

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest tests -m slow --ignore tests/test_aot.py --ignore tests/test_cuda_build.py

# What the kernels are worth on this machine, against eager PyTorch and torch.compile: under 25 minutes on two cores
# with a warm compiler cache.
bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only

# A first impression in two or three minutes.
bench-quick: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only --quick

# The README's measured tables are those of the committed records.
readme-check: $(VENV)/.installed
	$(BIN)/python -m bench.readme --check

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*/* tools/templates/*.cpp
	$(BIN)/mypy

types: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*/* tools/templates/*.cpp

# The GPU code without a GPU: Triton's kernels in its interpreter, then compiled for every architecture; csrc/cuda emulated
# and, with nvcc, compiled.
check-gpu-code: $(VENV)/.installed
	$(BIN)/python -c 'import triton'  # without it the tests below would be skipped, which is no proof
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_ops.py tests/test_model_kernels.py tests/test_grn.py tests/test_triton*.py
	$(BIN)/python -m pytest tests/test_aot.py tests/test_cuda_build.py

clean:
	rm -rf $(VENV) build minisora_kernels/*.so minisora_kernels/build_record.json
