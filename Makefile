# Every target sets itself up: the first run makes .venv, later runs reuse it until the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Small models on few cores: OpenMP threads spin against each other, one thread each is faster.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

# Extra pytest arguments, e.g. make test PYTEST_ARGS="-m 'not slow'"
PYTEST_ARGS ?=
# A worker holds its own copy of torch and the models (about 1 GB).
PYTEST_WORKERS ?= 2

.PHONY: help setup demo smoke test lint format types clean

help:
	@echo "make demo    train, measure and plot two posteriors into runs/demo"
	@echo "make test    all tests (PYTEST_ARGS=\"-m 'not slow'\" leaves out the slow ones)"
	@echo "make smoke   every experiment of the paper for a few steps into runs/smoke"
	@echo "make lint    ruff check and format check        make format  apply both"
	@echo "make types   mypy                               make clean   remove .venv and caches"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "amortlm needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/python recipes/demo.py --output runs/demo

smoke: $(STAMP)
	@for name in numbers continuation infilling subjectivity arithmetic; do \
	  echo "== $$name"; \
	  HF_HUB_OFFLINE=1 $(BIN)/amortlm reproduce $$name --preset smoke --output runs/smoke/$$name || exit 1; \
	done

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests recipes -name __pycache__ -type d -prune -exec rm -rf {} +
