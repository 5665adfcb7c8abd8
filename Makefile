# make demo    train a small network, explain it, write a picture
# make test    what CI runs: lint, format, types, tests
# make clean   remove the environment and everything generated
#
# PYTHON names the interpreter (3.10 or newer) that the environment is made with. pip takes its
# own settings from the environment as usual; the CPU build of torch, for instance, comes with
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt

.PHONY: demo test check clean

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/quickstart.py examples/out/quickstart.png
	@echo "The picture is in examples/out/quickstart.png"

# One thread per worker: pytest-xdist already fills the cores.
test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

check: test

# One stamp per extra; an installation is repeated only when the requirements have changed.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[$*]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info examples/out
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
