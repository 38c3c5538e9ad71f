# `make demo` and `make test` need Python 3.11 or later and make, nothing else. On Windows use the pip commands of README.md.

VENV := .venv
BIN := $(VENV)/bin
# The first Python on the path that is new enough; `make PYTHON=/path/to/python` names another.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3 python,$(shell $(name) -c 'import sys; assert sys.version_info >= (3, 11); print(sys.executable)' 2>/dev/null)))
# One thread a process: more threads than cores make tests slow, and sums of floats depend on their number.
TESTING := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow lint generated bench-data bench-step bench-gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/sdxl-train demo demo

test: $(VENV)/installed-test
	$(TESTING) -m "not slow and not gpu" -n 2

test-slow: $(VENV)/installed-test
	$(TESTING) -m slow -n 2

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

generated: $(VENV)/installed
	$(BIN)/python tools/write_generated.py

# Some minutes and 5 GB of disk; `make bench-data ARGS="--quick --only C7"` measures a part.
bench-data: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/data.py $(ARGS)

# Some minutes; `make bench-step ARGS="--quick --only C1"` measures a part.
bench-step: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step.py $(ARGS)

# Needs one CUDA GPU.
bench-gpu: $(VENV)/installed
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; name one: make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# Installed again when entry points or versions change: entry points are read from the installed metadata.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	touch $@ $(VENV)/installed
