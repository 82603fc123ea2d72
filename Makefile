# The commands of the README and of CI. `make test` and `make demo` work from a bare checkout: they make .venv, install
# torch and the package there, and build the kernels. To use an environment of your own: make test VENV=/path/to/it

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
# What this torch requires in its CUDA build; bench/results/aot.json is of it. The others are the oldest and the newest
# that the torches in pyproject.toml's range require; the oldest's interpreter does not know NumPy 2.4.
TRITON ?= triton==3.7.1; platform_system == "Linux" and platform_machine == "x86_64"
OLDEST := 3.6.0
NEWEST := 3.9.0
# What is fetched once for all checkouts, by the Python that it is for.
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/minisora_kernels/$(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')
BIN := $(VENV)/bin

# What compilers say is in here; what failed, in the last lines of the build and in build_record.json.
WARNINGS := build/native/warnings.txt
# ninja compiles what changed and shows each file. `pip install -e .` does the same, and shows it on a terminal only.
BUILD = mkdir -p build/native && $(BIN)/python setup.py --quiet build_ext --inplace 2>$(WARNINGS)
INSTALL = $(BIN)/pip install --quiet --no-build-isolation -e

.PHONY: dev op new-op native
.PHONY: gpu-interpreted gpu-interpreted-oldest gpu-approximate gpu-compiled gpu-compiled-oldest gpu-compiled-newest gpu-cuda
.PHONY: demo digits systems test test-slow bench bench-quick docs docs-serve docs-check lint types format
.PHONY: check-gpu-code clean

$(VENV)/.torch: Makefile
	@echo 'Making $(VENV) and installing $(TORCH)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet 'setuptools>=77' ninja
	@touch $@

# The package for this CPU, with one group of extras. pip builds what setup.py has built: ninja finds nothing to do.
$(VENV)/.native-%: $(VENV)/.torch pyproject.toml setup.py build_backend/backend.py
	@echo 'Building the kernels for this CPU, file by file, then installing what is needed to $*'
	MINISORA_CPU=native; export MINISORA_CPU; $(BUILD) && $(INSTALL) '.[$*]'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard build_backend/*.py csrc/*.h csrc/*/*)
	$(BUILD)
	$(INSTALL) '.[train,test,lint]' '$(TRITON)'
	@touch $@

# The package for this CPU, and pytest: enough to work on an op.
dev: $(VENV)/.native-dev

# After an edit: build for this CPU, test one op, and time it in short.
op: $(VENV)/.native-dev
	$(BIN)/python -c 'import pytest_benchmark, triton' 2>/dev/null || $(INSTALL) '.[op]' '$(TRITON)'
	$(BIN)/python tools/op.py $(OP)

# The files of a new op, ready to fill.
new-op:
	$(PYTHON) tools/new_op.py $(OP)

# The kernels again, for every instruction set that the compiler knows: `make op` leaves one.
native: $(VENV)/.torch
	$(BUILD)

# Train a small video DiT on real clips and sample new ones: a few minutes on two cores.
demo: $(if $(wildcard $(VENV)/.installed),$(VENV)/.installed,$(VENV)/.native-train)
	$(BIN)/python -m models.demo

# The same on moving handwritten digits; prints how many generated frames a classifier recognises.
digits: $(VENV)/.installed
	$(BIN)/python -m models.digits

# Every system on moving digits: trained on the kernels and on plain PyTorch, sampled, judged, timed; more than an hour
# on two cores. Writes the record, its plot and sheets of samples under bench/results.
systems: $(VENV)/.installed
	$(BIN)/python -m bench.systems

test: $(VENV)/.installed native
	$(BIN)/python -m minisora_kernels
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -m 'not slow' --numprocesses 2 --ignore tests/bench/test_aot.py --ignore tests/packaging/test_cuda_build.py

test-slow: $(VENV)/.installed native
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -m slow --numprocesses 2 --ignore tests/bench/test_aot.py --ignore tests/packaging/test_cuda_build.py

# What the kernels are worth on this machine, against eager PyTorch and torch.compile: under 25 minutes on two cores
# with a warm compiler cache.
bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only

# A first impression in two or three minutes.
bench-quick: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only --quick

# The measured tables and pictures of the README and of docs/ are those of the committed records.
docs-check: $(VENV)/.installed
	$(BIN)/python -m bench.docs --check

# The site, in build/site; a link that leads nowhere fails. The package is installed, so pip adds what builds the site.
docs: $(VENV)/.installed
	$(BIN)/pip install --quiet 'minisora_kernels[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The site on http://127.0.0.1:8000, built again after each edit.
docs-serve: docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.h csrc/*/* tools/templates/*.cpp
	$(BIN)/mypy

types: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*/* tools/templates/*.cpp

# The GPU code without a GPU. Triton's kernels run in the interpreters of the newest and the oldest Triton; they are compiled
# by the oldest, the newest and TRITON. csrc/cuda is emulated, and csrc is compiled against the headers of the oldest torch
# too. Triton keeps what it has compiled.
check-gpu-code: $(CACHE)/triton-$(OLDEST)/.installed $(CACHE)/triton-$(NEWEST)/.installed
	$(MAKE) --no-print-directory gpu-interpreted gpu-interpreted-oldest gpu-approximate
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target gpu-compiled gpu-compiled-oldest gpu-compiled-newest gpu-cuda

# Another checkout may be making the same: each makes its own, and the first to be done names it.
KEEP = touch $(@D).$$$$/.installed && { mv -nT $(@D).$$$$ $(@D); rm -rf $(@D).$$$$; }

$(CACHE)/triton-%/.installed: | $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --target $(@D).$$$$ triton==$* 'numpy$(if $(filter 3.6.%,$*),<2.4)' && $(KEEP)

# .venv with another Triton.
ON_OLDEST := PYTHONPATH=$(CACHE)/triton-$(OLDEST)
ON_NEWEST := PYTHONPATH=$(CACHE)/triton-$(NEWEST)
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2

# Each case of each op in each dtype once, by one of three: the others would find little more, and take ten minutes.
gpu-interpreted:
	$(ON_NEWEST) $(INTERPRETED) tests/ops/test_ops.py tests/models/test_model_kernels.py tests/ops/test_grn.py tests/ops/test_attention.py tests/ops/test_norm_rope.py tests/ops/test_approximate.py tests/ops/test_triton*.py -k 'not test_ops or not values_and_gradients or torch.bfloat16'

gpu-interpreted-oldest:
	$(ON_OLDEST) $(INTERPRETED) tests/ops/test_ops.py -k 'values_and_gradients and torch.float16 or compiles'

# With the errors of a GPU's approximate instructions, in float32, where those of single ones are not lost in rounding.
gpu-approximate:
	MINISORA_APPROXIMATE=1 $(ON_NEWEST) $(INTERPRETED) tests/ops/test_approximate.py tests/ops/test_ops.py -k 'approximate or values_and_gradients and float32'

gpu-compiled-oldest:
	$(ON_OLDEST) $(BIN)/python -m bench.aot --quick --architectures sm_90

gpu-compiled-newest:
	$(ON_NEWEST) $(BIN)/python -m bench.aot --architectures sm_80

gpu-compiled:
	$(BIN)/python -m pytest tests/bench/test_aot.py

gpu-cuda:
	MINISORA_OLDEST_HEADERS=$$($(BIN)/python tests/packaging/oldest_torch.py $(CACHE)) $(BIN)/python -m pytest tests/packaging/test_cuda_build.py

# Triton's kernels as Triton compiles them, executed on CPU tensors by ttsem, and Triton's passes one by one: two processes
# for a few minutes. `IR=` runs the large cases too. ttsem 0.1.0 knows the code of Triton 3.8; its metadata asks for a
# Python that it does not need. Both are only on the path of these tests.
.PHONY: check-gpu-ir gpu-ir-cases gpu-ir-passes
IR ?= -m 'not slow'
IR_TOOLS := $(CACHE)/ir-triton-3.8.0-ttsem-0.1.0
IR_PYTEST := MINISORA_EXECUTE_IR=1 OMP_NUM_THREADS=1 PYTHONPATH=$(IR_TOOLS) $(BIN)/python -m pytest

$(IR_TOOLS)/.installed: | $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python --target $(@D).$$$$ triton==3.8.0 ttsem==0.1.0 && $(KEEP)

check-gpu-ir: $(VENV)/.installed $(IR_TOOLS)/.installed
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target gpu-ir-cases gpu-ir-passes

gpu-ir-cases:
	$(IR_PYTEST) tests/ops/test_gpu_ir.py $(IR)

gpu-ir-passes:
	$(IR_PYTEST) tests/ops/test_gpu_ir_passes.py

clean:
	rm -rf $(VENV) build minisora_kernels/*.so minisora_kernels/build_record.json
