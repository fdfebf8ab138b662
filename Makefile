# `make train` and `make test` need Python 3.10 or newer, git and make, and set up everything else in .venv.
#
# Settings are read when .venv is made (`make clean` first to change them), as in `make train PYTHON=python3.12`:
PYTHON ?= python3
# The versions to install; CONSTRAINTS= takes the newest of everything.
CONSTRAINTS ?= constraints.txt
# The index that has torch for this machine. PyPI's Linux builds carry gigabytes of CUDA, so without an NVIDIA
# driver the CPU build is taken. Another CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cu126; PyPI: TORCH_INDEX=
ifeq ($(shell uname -s)$(shell command -v nvidia-smi || true),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
# What the command is given, as in `make train ARGS="--model lamda"` or `make test ARGS="-x tests/ops"`.
ARGS ?=

python := .venv/bin/python
pip := $(python) -m pip --disable-pip-version-check install --retries 2 $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: help train test lint clean
help:
	@echo 'make train   set up if need be, then python train.py $$(ARGS)'
	@echo 'make test    set up if need be, then pytest $$(ARGS)'
	@echo 'make lint    set up if need be, then ruff and mypy'
	@echo 'make clean   remove the environment and what the tools left'
	@echo 'Settings (top of the Makefile): ARGS PYTHON CONSTRAINTS TORCH_INDEX'

train: .venv/ready
	$(python) train.py $(ARGS)

test: .venv/ready
	$(python) -m pytest -n auto $(ARGS)

lint: .venv/ready-dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# A set-up that was interrupted has no `ready`, and starts over from an empty .venv.
# An index that the user named must have torch; where the default has none, PyPI's build will do.
.venv/ready: pyproject.toml setup.py $(CONSTRAINTS)
	test -e $@ || $(PYTHON) -m venv --clear .venv
	rm -f .venv/ready*
	$(if $(TORCH_INDEX),$(pip) --no-deps --index-url $(TORCH_INDEX) torch || test $(origin TORCH_INDEX) = file)
	$(pip) -e '.[train,test]'
	touch $@

.venv/ready-dev: .venv/ready
	$(pip) -e '.[dev]'
	touch $@
