# The commands of the README and of CI. `make test` and `make demo` work from a bare checkout: they make .venv, install
# torch and the package there, and build the kernels. To use an environment of your own: make test VENV=/path/to/it

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo digits systems test bench bench-quick docs docs-serve docs-check lint check-gpu-code clean

$(VENV)/.installed: pyproject.toml setup.py $(wildcard build_backend/*.py csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet -e '.[train,test,lint]'
	@touch $@

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
	$(BIN)/python -m pytest tests --ignore tests/test_aot.py --ignore tests/test_cuda_build.py

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
	$(BIN)/mypy

# The GPU code without a GPU: Triton's kernels in its interpreter, then compiled for every architecture; csrc/cuda emulated
# and, with nvcc, compiled.
check-gpu-code: $(VENV)/.installed
	$(BIN)/python -c 'import triton'  # without it the tests below would be skipped, which is no proof
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_ops.py tests/test_model_kernels.py tests/test_grn.py tests/test_triton*.py
	$(BIN)/python -m pytest tests/test_aot.py tests/test_cuda_build.py

clean:
	rm -rf $(VENV) build minisora_kernels/*.so minisora_kernels/build_record.json
