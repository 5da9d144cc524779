# `make demo` and `make test` set everything up by themselves; the second time nothing is installed or built again.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
BIN := .venv/bin
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test lint bench sanitize clean
help:
	@echo "make demo | test | lint | bench | sanitize | clean"

.venv/installed: requirements-ci.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-ci.txt
	@touch $@

# Editable, against the torch that is installed: an isolated build would fetch a second torch.
.venv/built: .venv/installed setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

setup: .venv/built

demo: setup
	$(BIN)/star train --preset shapes --out runs/demo --overwrite

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-disable-gc

clean:
	rm -rf .venv build dist *.egg-info star_kernels/*.so runs/demo
