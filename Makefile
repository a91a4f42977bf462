# make setup   .venv with the pinned dependencies; instant when nothing changed
# make lint    style and types
# make check   those and the fast tests, in a few minutes
# make test    every test
# make demo    the main job on a small real model: all GPUs there are, else two CPU ranks; within 10 minutes
#              MODEL=, TRAIN= and HELDOUT= (folder, file or Hub id) put your own in place of the demo's
# make gpu-wheels   collect in WHEELS= (.whl) what a GPU machine without a network lacks beside torch and transformers
# make gpu-check    there: GPU tests and training near its floor, on one GPU, within ten minutes
# make clean   remove caches, builds and the demo's folder (not .venv, prepared/ and runs/)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup lint check test format demo demo-short gpu-wheels gpu-check clean

VENV := .venv
STAMP := $(VENV)/.setup-done
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
DEMO_ARGS = $(if $(MODEL),--model '$(MODEL)') $(if $(TRAIN),--train '$(TRAIN)') $(if $(HELDOUT),--heldout '$(HELDOUT)')

# PyTorch compiles DeepSpeed's kernels here, away from the builds of other environments, and finds ninja on PATH.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(STAMP)
	@:

# The first Python >= 3.11 that can make environments and compile extensions; `make setup PYTHON=...` chooses another.
define FIND_PYTHON
usable='import sys, sysconfig, os, venv, ensurepip; \
sys.exit(sys.version_info < (3, 11) or not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do
    if "$$python" -c "$$usable" 2>/dev/null; then echo "$$python"; exit; fi
done
recent='import sys; sys.exit(sys.version_info < (3, 11))'
for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do
    "$$python" -c "$$recent" 2>/dev/null || continue
    echo "make setup: $$python is there, but not its venv module or its C headers (Python.h). On Debian and Ubuntu:" >&2
    echo "    apt-get install python3-venv python3-dev" >&2
    exit 69
done
echo "make setup: no Python >= 3.11 found; tried $(or $(PYTHON),python3.13, python3.12, python3.11 and python3)." >&2
exit 69
endef
export FIND_PYTHON

# torch first and by itself: with it in place no other package pulls in another build of it. deepspeed is a source
# distribution whose setup asks the installed torch, hence no build isolation; its kernels are compiled when needed.
$(STAMP): setup.py constraints.txt
	@command -v "$${CXX:-c++}" >/dev/null || { echo "make setup: no C++ compiler found. On Debian and Ubuntu:" >&2; \
	    echo "    apt-get install g++" >&2; exit 69; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    python=$$(bash -c "$$FIND_PYTHON"); \
	    echo "make setup: creating $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	$(PIP) setuptools wheel ninja packaging
	$(PIP) $(TORCH)
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e '.[mpi,demo,test,dev]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -m "not slow" --timeout 60 -q

# Two files at a time: most tests wait for processes, or for Slurm, more than they compute.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup
	$(BIN)/python examples/quickstart/demo.py $(DEMO_ARGS)

demo-short: setup
	$(BIN)/python examples/quickstart/demo.py --short $(DEMO_ARGS)

# For the Python of the GPU machine, which need not be ours; deepspeed is a source distribution and becomes a wheel of
# pure Python here. What is installed there is kept as it is: only what is named comes along, nothing it depends on.
WHEELS := .whl
GPU_PACKAGES := accelerate annotated-types datasets dill hjson multiprocess peft pydantic pydantic_core \
    typing_extensions typing-inspection
GPU_PYTHON := 3.12
gpu-wheels: setup
	rm -f $(WHEELS)/*.whl
	$(BIN)/python -m pip --disable-pip-version-check download -q -c constraints.txt --no-deps --only-binary=:all: \
	    --implementation cp --python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 \
	    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest $(WHEELS) $(GPU_PACKAGES)
	DS_BUILD_OPS=0 $(BIN)/python -m pip --disable-pip-version-check wheel -q --no-deps --no-build-isolation \
	    --wheel-dir $(WHEELS) -c constraints.txt deepspeed
	@du -sh $(WHEELS)

# With the Python that is there: such a machine has no .venv.
gpu-check:
	python3 benchmarks/gpu_check.py --wheels $(WHEELS)

clean:
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
