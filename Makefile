# The whole contributor interface. `.ci/run` calls the same targets.
#   make demo    trace digits with planted label errors; writes demo/report.html
#   make test    every test, doctests included, with coverage
#   make check   format, lint, types, layers
#   make docs    docs/_build/html/index.html
#   make bench   speed, memory and error beside other libraries, as ratios to one plain pass; half an hour
#   make study   who finds planted label flips first, on Fashion-MNIST; hours
#   make clean   what the targets wrote, .venv and .venv-bench excepted
# TORCH is what pip installs as torch (TORCH=torch==2.13.0); PYTHON makes .venv where there is none.

TORCH ?= torch
PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Stamps say what the environment already has, so that a second run starts at once.
TORCH_STAMP := $(VENV)/.tracin-torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
DEMO_STAMP := $(VENV)/.tracin-demo
DEV_STAMP := $(VENV)/.tracin-dev
BENCH_STAMP := $(BENCH_VENV)/.tracin-bench

.PHONY: help demo test check docs bench study clean
.DELETE_ON_ERROR:

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(DEMO_STAMP)
	$(BIN)/tracin demo --out demo

test: $(DEV_STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term

check: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(DEV_STAMP)
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python benchmarks/run.py --write-docs
	$(BENCH_VENV)/bin/python benchmarks/run.py --profile all --write-docs
	$(BENCH_VENV)/bin/python benchmarks/growth.py --write-docs
	$(BENCH_VENV)/bin/python benchmarks/online.py --overhead

study: $(DEV_STAMP)
	$(BIN)/python benchmarks/mislabelled.py
	$(BIN)/python benchmarks/mislabelled.py --write-docs
	$(BIN)/python benchmarks/audit.py
	$(BIN)/python benchmarks/audit.py --write-docs
	$(BIN)/python benchmarks/calibration.py --write-docs

clean:
	rm -rf demo docs/_build build dist .coverage .coverage.* .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("tracin needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# torch comes first, so that the project takes the build that was asked for.
$(TORCH_STAMP): | $(BIN)/python
	$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(PIP) install '$(TORCH)'
	rm -f $(VENV)/.tracin-*
	touch $@

$(DEMO_STAMP): pyproject.toml $(TORCH_STAMP)
	$(PIP) install --editable '.[demo]'
	touch $@

$(DEV_STAMP): pyproject.toml $(TORCH_STAMP)
	$(PIP) install --editable '.[all,dev]'
	# A judge of our EK-FAC. Its dependencies would bring torchvision, which the test does without.
	$(PIP) install --no-deps curvlinops-for-pytorch einops einconv linear_operator
	touch $@ $(DEMO_STAMP)

# The libraries that the benchmark compares with stay out of .venv: their wishes are not the project's.
$(BENCH_STAMP): pyproject.toml benchmarks/peers.txt benchmarks/peers-needs.txt
	test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install '$(TORCH)'
	$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install --requirement benchmarks/peers-needs.txt --editable '.[demo]' '$(TORCH)'
	$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install --no-deps --requirement benchmarks/peers.txt
	touch $@
