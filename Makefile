# Two commands for a newcomer, each from a fresh clone:   make demo   make test
#
# They share one virtual environment. Each step leaves a stamp in it, so the second run starts at once and a step
# runs again when what it depends on changes.

PYTHON ?= python3
VENV   ?= .venv
# A fixed version, because a bare "torch" may fetch gigabytes of CUDA libraries. Anything from 2.11 on will do:
#   make test TORCH='torch>=2.11,<3'
TORCH  ?= torch==2.13.0
# The CUDA library: off; all (every architecture: minutes); native (the GPUs in this machine); a list such as 80,90a.
# auto: as lowbit was built last, or native where there are both nvcc and a GPU, else off, so that the commands above
# stay quick.
CUDA   ?= auto
# More arguments for pytest:   make test ARGS='-k gemm -x'
ARGS   ?=

SHELL  := /bin/bash
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.lowbit
PIP    := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml
ifeq ($(CUDA),auto)
  override CUDA := $(shell cat $(STAMPS)/package 2>/dev/null)
  ifeq ($(CUDA),)
    override CUDA := $(shell nvcc --version >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q ^GPU && echo native || echo off)
  endif
endif
DEFINES := $(if $(filter off,$(CUDA)),-Ccmake.define.LOWBIT_CUDA=OFF,-Ccmake.define.LOWBIT_CUDA=ON -Ccmake.define.LOWBIT_CUDA_ARCHS=$(CUDA))
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test test-all oracles lint format mutants bench bench-ops build wheel clean FORCE

help:
	@echo "make demo      quantize a real text encoder and run it: size, speed and accuracy"
	@echo "make test      the tests"
	@echo "make test-all  the tests, the slow ones included"
	@echo "make oracles   what other libraries write and read, recorded again: tests/data/checkpoints"
	@echo "make bench     times lowbit beside torch and every peer that pip can install; ten minutes, into bench/results"
	@echo "make bench-ops times every op alone, by pytest-benchmark"
	@echo "make mutants   whether the tests would notice a missing barrier or bounds check in a kernel"
	@echo "make lint      ruff, mypy and clang-format;  make format applies what can be applied"
	@echo "make build     environment and lowbit in editable form;  again after a C++ change"
	@echo "make wheel     dist/: a source distribution, and a wheel built from it"
	@echo "make clean     removes the environment and everything built"
	@echo
	@echo "variables: PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH='$(TORCH)'  CUDA='$(CUDA)'  ARGS=(of the command)"

demo: build $(STAMPS)/demo
	$(BIN)/python examples/demo_minilm.py

test: build $(STAMPS)/demo
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: build $(STAMPS)/demo
	$(BIN)/python -m pytest $(ARGS)

# The libraries whose checkpoints are read and written run again, in an environment of their own: what they pack and decode
# is recorded in tests/data/checkpoints, where a change shows up as a difference to what is committed.
ORACLES := $(VENV)/oracles
oracles: build $(STAMPS)/oracles
	CT_OLD=$(abspath $(ORACLES))/ct-old MODELOPT=$(abspath $(ORACLES))/modelopt \
	  $(SHELL) -c 'for step in pack decode; do $(ORACLES)/bin/python tests/data/checkpoints/make.py $$step || exit 1; done'
	$(ORACLES)/bin/python tests/data/checkpoints/make_written.py
	CT_OLD=$(abspath $(ORACLES))/ct-old MODELOPT=$(abspath $(ORACLES))/modelopt \
	  $(ORACLES)/bin/python -m pytest -m oracle tests/test_oracle_*.py tests/test_quality.py $(ARGS)
	@git diff --stat -- tests/data || true

bench: build $(STAMPS)/bench
	$(BIN)/python bench/record.py $(ARGS)

bench-ops: build $(STAMPS)/bench
	$(BIN)/python -m pytest bench $(ARGS)

# Leaves out every barrier and bounds check of the CUDA and Metal kernels, one at a time: would a test notice?
#   make mutants ARGS='--sample 10 --seed 3'
mutants: build
	PYTHONPATH=tests $(BIN)/python -m emulator.mutants $(ARGS)

lint: build $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(STAMPS)/package

# From the source distribution, so that a file missing in it is noticed here.
wheel: build
	rm -rf dist
	$(BIN)/python -c "import scikit_build_core.build as backend; backend.build_sdist('dist')"
	$(PIP) wheel --no-deps --no-build-isolation $(DEFINES) -w dist dist/lowbit-*.tar.gz
	@ls -l dist

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the environment, step by step -----------------------------------------------------------------------------------

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "lowbit needs Python 3.10 or later; there is no '$(PYTHON)' here. Try: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "lowbit needs Python 3.10 or later and $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	@echo "==> 1/4 virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

# PyTorch first and by itself: the build uses the one that is installed. The stamp holds its specification.
$(STAMPS)/torch: $(STAMPS)/venv $(if $(filter-out $(shell cat $(STAMPS)/torch 2>/dev/null),$(TORCH)),FORCE)
	@echo "==> 2/4 $(TORCH)"
	$(PIP) install "$(TORCH)"
	@echo "$(TORCH)" > $@

$(STAMPS)/tools: $(STAMPS)/torch
	@echo "==> 3/4 build tools"
	$(PIP) install "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.21" "ninja>=1.11"
	@touch $@

# pip hides a build's output unless it is verbose, and verbose says too much: keep the compiler's lines, and all of
# it in a log for the day that it fails.
PROGRESS := ^ *\[[0-9]+/[0-9]+\]|warning:|error:|CMake Error|^ERROR|^Successfully|^Collecting|^Downloading
$(STAMPS)/package: $(STAMPS)/tools $(SOURCES) $(if $(filter-out $(shell cat $(STAMPS)/package 2>/dev/null),$(CUDA)),FORCE)
	@echo "==> 4/4 lowbit, CUDA=$(CUDA)"
	@set -o pipefail; $(PIP) install -v --no-build-isolation $(DEFINES) -e ".[test]" 2>&1 | tee $(STAMPS)/package.log \
	  | grep --line-buffered -E '$(PROGRESS)' || { tail -n 60 $(STAMPS)/package.log; exit 1; }
	@echo "$(CUDA)" > $@

# lowbit itself is there already: these two bring what the extra names.
$(STAMPS)/dev: $(STAMPS)/package
	$(PIP) install "lowbit[dev]"
	@touch $@

$(STAMPS)/bench: $(STAMPS)/package
	$(PIP) install "lowbit[bench]"
	@touch $@

# Beside the environment of the tests, whose packages it sees.
$(STAMPS)/oracles: $(STAMPS)/package tests/requirements-oracles.txt
	$(PYTHON) -m venv $(ORACLES)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > "$$($(ORACLES)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tests.pth"
	$(ORACLES)/bin/python -m pip install transformers==5.23.0 gguf==0.19.0 pydantic loguru einops termcolor
	$(ORACLES)/bin/python -m pip install --no-deps -r tests/requirements-oracles.txt
	$(ORACLES)/bin/python -m pip install --no-deps --target $(ORACLES)/ct-old compressed-tensors==0.13.0
	$(ORACLES)/bin/python -m pip install --no-deps --target $(ORACLES)/modelopt nvidia-modelopt==0.47.0
	@touch $@

$(STAMPS)/demo: $(STAMPS)/venv examples/requirements-demo.txt
	$(PIP) install --no-deps -r examples/requirements-demo.txt
	@touch $@

FORCE:
