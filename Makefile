# `make demo` and `make test` set everything up by themselves; the second time nothing is installed or built again.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
# `make test TORCH=2.15.0` takes that torch, with the Triton that it asks for, instead of the pinned one.
VENV := .venv$(addprefix -,$(TORCH))
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test test-slow fuzz lint links docs install-check compat bench bench-quick gpu-check sanitize wheel clean
help:
	@echo "make demo      train the embedded model; a page of the run in runs/demo/report.html"
	@echo "make test      lint, build, all tests but the slow ones"
	@echo "make test-slow machine code for every GPU, and what else takes minutes; for releases"
	@echo "make fuzz      random calls of the operators against the reference; CASES=20000"
	@echo "make lint      ruff and mypy"
	@echo "make links     the links of all Markdown pages"
	@echo "make docs      the documentation's site in build/site; fails at any warning"
	@echo "make install-check  every documented install line in an empty environment; half an hour"
	@echo "make compat    operators, capture and drop-ins beside the versions that other trainers pin; hours, HOSTS=\"newest\""
	@echo "make bench     every benchmark, until each is decided; adds the run to benchmarks/results.jsonl, fills the docs; an hour"
	@echo "make bench-quick  the quick ones, and what got slower; under 4 minutes"
	@echo "make gpu-check tests and benchmarks on this machine's GPU, one table"
	@echo "make sanitize  the compiled kernels under the address and undefined-behavior sanitizers"
	@echo "make wheel     dist/: an sdist and the wheel that is built from it"
	@echo "make clean     remove what was built and installed"

$(VENV)/installed: requirements-ci.txt
	@echo "The first time: what requirements-ci.txt pins goes into $(VENV), several GB. It takes minutes and shows nothing."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/; s/^triton==.*/triton/)' requirements-ci.txt > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/requirements.txt
	@touch $@

# Editable, against the torch that is installed: an isolated build would fetch a second torch.
$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	@echo "The operators are compiled: minutes again, MAX_JOBS compilers at a time."
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

setup: $(VENV)/built

demo: setup
	$(BIN)/star train --preset shapes-nft --out runs/demo --overwrite
	$(BIN)/star report runs/demo

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

links:
	$(PYTHON) tools/check_links.py

# Docstrings are read from the source: nothing is compiled or imported. With --quiet no warning would fail. The variable
# silences an announcement of the theme's.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install-check:
	$(PYTHON) tools/install_check.py

# One environment for each host, kept only while its tests run: a few GB. HOSTS= names those to run again.
compat: setup
	$(BIN)/python tools/compat.py $(HOSTS)

# As many processes as cores, of one thread each; a file's tests stay together, for they share what it sets up.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Kernels in an interpreter, or run as fibers, take a hundred times as long: a smaller share.
CASES ?= 20000
FUZZ := PYTHONPATH=tests $(BIN)/python -W ignore tests/fuzz.py
fuzz: setup
	$(FUZZ) --cases $(CASES)
	$(FUZZ) --cases $$(($(CASES) / 100)) --impl cuda_shuffled
	$(FUZZ) --cases $$(($(CASES) / 100)) --impl triton

bench: setup
	$(BIN)/python benchmarks/run.py --record

bench-quick: setup
	$(BIN)/python benchmarks/run.py --quick

gpu-check: setup
	PYTHONPATH=benchmarks $(BIN)/python tools/gpu/gpu_check.py

# A build of its own under build/sanitize; the editable one stays as it is. The interpreter is not instrumented, so the
# runtime is preloaded, with libstdc++ for its exceptions; Python's allocator would hide small overruns, and it and torch
# never free everything. Inductor would compile its own code under the preloaded runtime. gradcheck calls each kernel a
# hundred times on the same memory, which takes the CUDA kernels on the CPU minutes.
SANITIZED := $(CURDIR)/build/sanitize
sanitize: setup
	@mkdir -p $(SANITIZED)
	STAR_SANITIZE=1 $(BIN)/python setup.py build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib \
	  > $(SANITIZED)/build.log 2>&1 || { cat $(SANITIZED)/build.log; exit 1; }
	export STAR_SANITIZE=1 PYTHONSAFEPATH=1 PYTHONPATH=$(SANITIZED)/lib PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"; \
	$(BIN)/python -c "from star_kernels import native; assert native.build_info()['sanitizers'] != 'none', native.REASON" && \
	$(BIN)/python -m pytest -p no:cacheprovider --capture=sys -k "(native or instruction_set or cuda_forward) and not (gpu or inductor or (gradcheck and cuda_forward))" tests/kernels

# One wheel for every torch from 2.13 on and every Linux from glibc 2.28 on, of this Python: pybind11's modules are of one.
# torch's libraries stay torch's. STAR_CUDA=1 adds the GPU kernels, whatever torch is here; =0 leaves them out.
wheel: setup
	rm -rf dist && mkdir -p dist build
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')" > build/sdist.log 2>&1 \
	  || { cat build/sdist.log; exit 1; }
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel dist/*.tar.gz
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat \
	  --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tools/distribution.py dist

clean:
	rm -rf .venv .venv-* build dist *.egg-info star_kernels/*.so star_kernels/_build.py runs/demo
