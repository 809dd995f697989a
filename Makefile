# `make train` and `make test` set up all that they need in VENV, once, and run.
# `make train PYTHON=python3 VENV=` uses what PYTHON has installed, and installs nothing.

PYTHON ?= python3
VENV ?= .venv
# further arguments of the command that a target runs
ARGS ?=
# of compile-triton; the oldest supported
TRITON ?= 3.6.0

METADATA := constraints.txt pyproject.toml setup.py

.PHONY: help train test lint bench environment compile-all compile-triton clean

help:
	@echo "make train [ARGS=...]   train GoogLeNet; ARGS go to 'python -m fused_inception train'"
	@echo "make test [ARGS=...]    run all tests; ARGS go to pytest"
	@echo "make bench [ARGS=...]   run the benchmarks; ARGS go to pytest"
	@echo "make lint               ruff and mypy"
	@echo "make compile-all        compile all kernels for all targets, write tests/compiled/results"
	@echo "make compile-triton TRITON=3.6.0   the same with another Triton"
	@echo "make environment        set up VENV for all of these, run nothing"
	@echo "make clean              remove .venv and caches"
	@echo
	@echo "PYTHON=python3 VENV=    use the packages that PYTHON has, install nothing"

ifneq ($(strip $(VENV)),)

RUN := $(VENV)/bin/python
# workers of pytest-xdist
WORKERS ?= -n auto --maxprocesses 4 --dist worksteal

ready-%: $(VENV)/.installed-% ;

# extras that an extra holds
HOLDS_test := train bench test
HOLDS_dev := $(HOLDS_test) dev

# a stamp that is newer than the metadata: installed, nothing to do
.PRECIOUS: $(VENV)/.installed-%
$(VENV)/.installed-%: $(METADATA) | $(VENV)/bin/python
	@echo "installing what '$*' needs into $(VENV)"
	@$(RUN) -m pip install --quiet -c constraints.txt -e '.[$*]' || { \
	  echo "pip could not install the packages. On a machine without a network that has torch"; \
	  echo "and Triton, use them as they are: make ... PYTHON=python3 VENV="; exit 1; }
	@touch $(foreach extra,$(or $(HOLDS_$*),$*),$(VENV)/.installed-$(extra))

# torchvision is compared with in tests; its dependencies would replace torch
$(VENV)/.installed-test: $(VENV)/.installed-torchvision
$(VENV)/.installed-dev: $(VENV)/.installed-torchvision
$(VENV)/.installed-torchvision: constraints.txt | $(VENV)/bin/python
	@$(RUN) -m pip install --quiet --no-deps -c constraints.txt torchvision
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) .ci/check_modules.py venv
	@$(PYTHON) -m venv $(VENV)

else

RUN := $(PYTHON)
WORKERS ?=
MODULES_train := torch triton numpy PIL matplotlib tqdm $(if $(findstring --data,$(ARGS)),,sklearn)
MODULES_test := torch triton numpy pytest
MODULES_bench := torch triton numpy pytest pytest_benchmark
MODULES_dev := $(MODULES_test) ruff mypy

ready-%:
	@$(PYTHON) .ci/check_modules.py $(MODULES_$*)

endif

train: ready-train
	$(RUN) -m fused_inception train $(ARGS)

test: ready-test
	$(RUN) -m pytest -rs $(WORKERS) tests $(ARGS)

bench: ready-bench
	$(RUN) -m pytest benchmarks $(ARGS)

lint: ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# hours of processor time; ARGS="--workers 8"
compile-all: ready-test
	$(RUN) -m tests.compiled full --table tests/compiled/results $(ARGS)

compile-triton: build/triton-$(TRITON)/.installed
	build/triton-$(TRITON)/bin/python -m tests.compiled full --table tests/compiled/results $(ARGS)

# torch names one version of Triton; kernels compile with another all the same
build/triton-$(TRITON)/.installed: constraints.txt
	$(PYTHON) -m venv build/triton-$(TRITON)
	build/triton-$(TRITON)/bin/python -m pip install --quiet -c constraints.txt torch numpy
	build/triton-$(TRITON)/bin/python -m pip install --quiet --no-deps triton==$(TRITON)
	@touch $@

environment: ready-dev

clean:
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
