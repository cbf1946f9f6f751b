# The commands of this repository; `make` or `make help` lists them. Everything lives in .venv; nothing is installed elsewhere.
SHELL := /bin/bash
PYTHON ?= python3
# More arguments for pip, for example: make demo PIP_ARGS="--extra-index-url URL-OF-PYTORCHS-CPU-INDEX"
PIP_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)

.PHONY: help install ext cuda cuda-all gpu-check serve demo test emulated clients soak lint docs config-docs bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

install: .venv/.installed  ## make .venv and install Octavo into it, with the tested versions

# The kernels are built in place by `ext`, so the editable install leaves CMake out (wheel.cmake=false).
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Octavo needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time this downloads torch and may take minutes."
	@$(PIP) scikit-build-core cmake ninja
	@$(PIP) --no-build-isolation -C wheel.cmake=false -e '.[dev]'
	@touch $@

ext: .venv/.installed  ## build the C++ kernels in place (output in build/ext.log); without a compiler none, and it says so
	@$(BIN)/python scripts/build_ext.py

cuda: ext  ## build the CUDA kernels in place, for the GPUs of this machine or OCTAVO_CUDA_ARCHS="9.0a;8.0"
	@$(BIN)/python scripts/build_cuda.py

cuda-all: ext  ## build the CUDA kernels for every architecture (half an hour of one processor)
	@$(BIN)/python scripts/build_cuda.py --all

# For a GPU machine without a network: no .venv, the Python that is there (PYTHON=) with torch, numpy and pytest.
gpu-check:  ## on a GPU machine: build, test, sanitise and measure everything with PYTHON (CHECK="--only soak --minutes 6" and others)
	@$(PYTHON) scripts/gpu_check.py $(CHECK)

serve: ext  ## serve a real model on 127.0.0.1:8000 (fetches 98 MB the first time; arguments: SERVE="--port 9000")
	@$(BIN)/octavo serve smollm2 --override-generation-config '{"temperature": 0.2, "top_p": 0.9}' $(SERVE)

demo: ext  ## answer a batch of prompts with a real model (fetches 98 MB the first time)
	@$(BIN)/python examples/demo.py

test: ext  ## run the tests
	@$(BIN)/python -m pytest

emulated: ext  ## run the CUDA kernels on the CPU, and see that faults in them are found (EMULATED="-k decode"; docs/add-a-kernel.md)
	@$(BIN)/python -m pytest tests/emulated/test_*.py tests/emulated/check_mutations.py $(EMULATED)

clients: ext  ## try the server with clients from PyPI and npm (installs them under build/clients the first time)
	@$(BIN)/python scripts/clients.py $(CLIENTS)

soak: ext  ## load a server in earnest, for minutes (arguments: SOAK="--minutes 60")
	@$(BIN)/python scripts/soak_server.py $(SOAK)

lint: .venv/.installed  ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/mypy

.venv/.docs: .venv/.installed
	@$(PIP) --no-build-isolation -C wheel.cmake=false -e '.[docs]'
	@touch $@

docs: .venv/.docs  ## build the documentation into docs/_build/html; a warning is an error
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

config-docs: .venv/.installed  ## write the pages that are made from the code again, after an option, a flag or a field has changed
	@$(BIN)/python docs/generate_config.py
	@$(BIN)/python docs/generate_fields.py
	@$(BIN)/python docs/generate_vllm_flags.py

bench: ext  ## compare with transformers on this machine (the table of docs/performance.md; minutes)
	@$(BIN)/python benchmarks/against_transformers.py

clean:  ## remove what was built; .venv and the model cache stay
	@rm -rf build dist docs/_build octavo/ops/_C.so octavo/ops/_cuda.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find octavo tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
