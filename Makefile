# The commands of the README. Everything runs in a virtual environment of its own, .venv, made from PYTHON.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
RESULTS ?= benches/results
BIN    := $(VENV)/bin
DONE   := $(VENV)/.installed

.PHONY: demo test chaos adapters bench gpu asan kernel-report lint format clean

# Threads wait without spinning: the machine may be busy.
demo test: export OMP_WAIT_POLICY ?= passive

demo: $(DONE)
	$(BIN)/cfsfl demo --out demo

test: $(DONE)
	$(BIN)/python -m pytest

chaos: $(DONE)
	$(BIN)/python -m tests.chaos

# Each in an environment of its own, .venv-LIBRARY: they pin other packages.
adapters:
	for library in rectools recbole lenskit; do \
	    bin=.venv-$$library/bin; \
	    test -x $$bin/python || $(PYTHON) -m venv .venv-$$library; \
	    $$bin/python -m pip install --quiet "$(TORCH)" && \
	    $$bin/python -m pip install --quiet --editable ".[$$library]" pytest && \
	    $$bin/python -m pytest tests/test_adapters.py || exit 1; \
	done

bench: $(DONE)
	$(BIN)/python -m pytest benches --results $(RESULTS)

# Without a virtual environment and a network: PYTHON has torch, triton, numpy, scipy, pybind11 and pytest.
gpu:
	$(PYTHON) benches/gpu.py --results $(RESULTS)

$(DONE): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

asan: $(DONE)
	PATH="$(abspath $(BIN)):$$PATH" sh csrc/asan.sh

kernel-report: $(DONE)
	$(BIN)/python -m pip install --quiet --editable ".[triton]"
	$(BIN)/python -m cfsfl_fast.kernels.report

lint: $(DONE)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h

format: $(DONE)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h

clean:
	rm -rf build dist *.egg-info cfsfl_fast/*.so demo $(VENV) .venv-*
