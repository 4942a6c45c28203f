# `make demo` and `make test` do all the set-up themselves: a virtual environment in .venv, and everything in it.
# On Linux with an x86-64 processor and no GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Three for two cores: half of the suites wait for brokers, agents and each other.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(6, (os.cpu_count() or 1) * 3 // 2))')

# The suites start hundreds of processes: without compiled modules each would compile Midge again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test faults check test-deploy bench clean

demo: $(STAMP)
	@$(BIN)/coordinator demo $(ARGS)

test: check
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report=term $(ARGS)

faults: $(STAMP)
	$(BIN)/python -m pytest --faults --seeds 10000 --numprocesses $(WORKERS) --dist worksteal $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-deploy: $(STAMP)
	$(BIN)/python -m pytest -m deploy tests/deploy $(ARGS)

bench: $(STAMP)
	PYTHONPATH=. $(BIN)/python benchmarks/aggregate.py
	PYTHONPATH=. $(BIN)/python benchmarks/round_overhead.py
	PYTHONPATH=. $(BIN)/python benchmarks/idle_agent.py
	PYTHONPATH=. $(BIN)/python benchmarks/accuracy.py

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Midge needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build ./*.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
