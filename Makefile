# Everything that is run by hand or by CI. `make` alone lists the targets; `make setup` comes by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CACHES := .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast cluster chaos check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with the pinned packages (again when pyproject.toml or the pins change)

# The stamp comes last: an installation that broke off is done again.
$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is not Python 3.11 or newer; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "setup: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing packages into $(VENV) (about 2 GB, some minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade "pip>=24.1"
	@$(BIN)/python -m pip install -qq --constraint .ci/constraints.txt --editable ".[dev]"
	@touch $@
	@echo "setup: done; commands are in $(BIN)"

demo: $(READY) ## MovieLens-100K from download to report, on this machine
	@$(BIN)/dti-ray demo

test test-fast: export HF_HUB_OFFLINE := 1
# One process a core for tests that need no cluster: one thread each, or they stand in each other's way.
UNIT := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/unit -n logical --maxprocesses 8 --dist worksteal

test: $(READY) ## all tests but the long ones, which `make cluster` has
	@$(UNIT)
	@$(BIN)/python -m pytest -q tests/integration -m "not long" --durations 15
	@$(BIN)/python -m pytest -q tests/chaos

test-fast: $(READY) ## tests without Ray, DeepSpeed and S3, each under ten seconds
	@$(UNIT) -m "not slow and not integration"

cluster: export HF_HUB_OFFLINE := 1
cluster: $(READY) ## the long tests: jobs on a cluster of three local nodes, its doctor, a killed sweep (20 minutes)
	@$(BIN)/python -m pytest -q -m "cluster or long"

CHAOS_TABLE ?= outputs/chaos.md

chaos: $(READY) ## every fault three times under a real run, ten minutes of random ones, and a table (an hour)
	@mkdir -p $(dir $(CHAOS_TABLE))
	@$(BIN)/python -m tests.chaos.table --times 3 --soak 600 --to $(CHAOS_TABLE)

check: $(READY) ## format, lint, types, import layers, YAML
	@echo "check: ruff format" && $(BIN)/ruff format --check --quiet .
	@echo "check: ruff check" && $(BIN)/ruff check --quiet .
	@echo "check: basedpyright" && $(BIN)/basedpyright --pythonpath $(BIN)/python
	@echo "check: lint-imports" && $(BIN)/lint-imports --no-logo
	@echo "check: yamllint" && $(BIN)/yamllint --strict .
	@echo "check: all good"

clean: ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) $(CACHES)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
