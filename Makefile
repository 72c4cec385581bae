# One command each; CI runs the same ones. PYTHON= takes any interpreter: its environment is .venv
# for the default one, else .venv-3.13 and so on.
PYTHON ?= python3
ifeq ($(origin PYTHON),file)
  VENV ?= .venv
else
  VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMPS := $(VENV)/.stamps
PYTEST := $(PY) -m pytest --quiet
# one worker for all tests of a file: they share compiled programs
SPREAD := -n 2 --dist loadfile
PLAIN := not slow and not grid
# what `make test` runs, in this order, each timed
STEPS := lint types test-all float64 devices mutants-quick wheel
TIMES := $(STAMPS)/times

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-all test-slow test-grid float64 devices lint format \
  types mutants mutants-quick fuzz notebooks bench wheel clean

help:  ## print these targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 15

# ---- environments: rebuilt only when pyproject.toml or constraints.txt changes

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "smcscale needs Python 3.11 or newer; say which: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: $(STAMPS)/venv pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	@touch $@

# the comparison with torch and transformers needs the CPU wheel of torch, which is for Python 3.11
$(STAMPS)/dev: $(STAMPS)/venv pyproject.toml constraints.txt
	$(PIP) --editable ".[$$($(PY) -c 'import sys; print("dev,parity" if sys.version_info[:2] == (3, 11) else "dev")')]"
	@touch $@ $(STAMPS)/demo

install: $(STAMPS)/dev  ## everything a developer needs, into .venv

demo: $(STAMPS)/demo  ## install .[demo], filter a real series, solve word problems, steer digits
	$(PY) -m smcscale demo

# ---- tests

test: $(STAMPS)/dev  ## all checks that CI runs, with times
	@: > $(TIMES)
	@set -e; all=$$(date +%s); for step in $(STEPS); do \
	  echo "==== $$step"; start=$$(date +%s); \
	  $(MAKE) --no-print-directory $$step PYTHON='$(PYTHON)' VENV='$(VENV)'; \
	  printf '%-15s %5d s\n' $$step $$(( $$(date +%s) - start )) >> $(TIMES); \
	done; printf '%-15s %5d s\n' total $$(( $$(date +%s) - all )) >> $(TIMES)
	@echo "==== times"; cat $(TIMES)

# annotations are checked at run time in the exact tests; not where compilations are counted, nor
# where wrong types are given to see the project's own message. Compiling takes most of their time, so
# LLVM optimizes nothing there
test-all: $(STAMPS)/dev  ## plain and statistical tests, doctests, README blocks, notebooks
	SMCSCALE_CHECK_TYPES=1 XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" \
	  $(PYTEST) $(SPREAD) --durations 15 \
	  -m "$(PLAIN) and not statistical and not compile and not refusal"
	$(PYTEST) $(SPREAD) --durations 15 -m "$(PLAIN) and (statistical or compile or refusal)"

test-fast: $(STAMPS)/dev  ## exact tests that are quick; no language models, notebooks, README
	$(PYTEST) $(SPREAD) -m "$(PLAIN) and not statistical and not compile and not long" \
	  --ignore tests/test_notebooks.py --ignore tests/test_readme.py --ignore tests/models/reasoning \
	  --ignore tests/models/diffusion

test-slow: $(STAMPS)/dev  ## tests that take minutes
	$(PYTEST) $(SPREAD) -m slow

test-grid: $(STAMPS)/dev  ## every scheme x trigger x tilt x program (writes benchmarks/results/grid.json), sampler x rule
	$(PY) benchmarks/grid.py
	$(PYTEST) $(SPREAD) -m grid

float64: $(STAMPS)/dev  ## the exact tests again in float64, but for those that take seconds
	JAX_ENABLE_X64=1 $(PYTEST) $(SPREAD) -m "$(PLAIN) and not statistical and not compile and not long" \
	  tests/kernels tests/engine tests/program tests/models/statespace

devices: $(STAMPS)/dev  ## the laws of the engine again, and tests of several devices, on 8 host devices
	XLA_FLAGS="$$XLA_FLAGS --xla_force_host_platform_device_count=8" $(PYTEST) $(SPREAD) \
	  -m "multidevice or ($(PLAIN) and not statistical and not compile and not long)" tests/engine
	XLA_FLAGS="$$XLA_FLAGS --xla_force_host_platform_device_count=8" $(PYTEST) $(SPREAD) \
	  -m multidevice tests/models

fuzz: $(STAMPS)/dev  ## property tests with many more examples
	$(PYTEST) $(SPREAD) -m hypothesis --hypothesis-profile=fuzz

mutants: $(STAMPS)/dev  ## plant every listed bug, one at a time, and report those no test catches
	$(PY) tests/support/mutations.py

mutants-quick: $(STAMPS)/dev
	$(PY) tests/support/mutations.py --one-per-room

notebooks: $(STAMPS)/dev  ## run the notebooks top to bottom
	$(PYTEST) $(SPREAD) tests/test_notebooks.py

# ---- code

lint: $(STAMPS)/dev  ## ruff: lint and format check
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMPS)/dev  ## ruff: format and sort imports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMPS)/dev  ## pyright
	@mkdir -p .typings/smcscale
	@ln -sfn ../../kernels .typings/smcscale/kernels && ln -sfn ../../models .typings/smcscale/models
	$(BIN)/pyright --pythonpath $(PY)

bench: $(STAMPS)/dev  ## benchmarks/filter.py, then the README's tables; peers get environments of their own
	$(PY) benchmarks/filter.py --install-peers
	$(PY) benchmarks/report.py

wheel: $(STAMPS)/dev  ## build a wheel, install it into an empty folder, run a filter from it
	$(PYTEST) tests/test_packaging.py -m slow

clean:  ## remove environments and caches made here
	rm -rf .venv .venv-* .typings .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
