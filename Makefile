# The commands of the README. Everything runs in a virtual environment of its own, .venv, made from PYTHON.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
RESULTS ?= benches/results
API    := cfsfl_fast $(addprefix cfsfl_fast, .config .model .estimator .stages .callbacks .datasets .evaluation .metrics .ops \
          .backends .interactions .checkpoint .export .serving)
INSTALLED := $(addprefix tests/test_,model.py training.py estimator.py cli.py export.py serving.py row_bag.py \
          feedback_step.py linear_topk.py linear_nll.py)
BIN    := $(VENV)/bin
DONE   := $(VENV)/.installed

.PHONY: demo test chaos fuzz adapters docs wheel bench gpu asan kernel-report lint format clean

# Threads wait without spinning: the machine may be busy.
demo test: export OMP_WAIT_POLICY ?= passive

demo: $(DONE)
	$(BIN)/cfsfl demo --out demo

test: $(DONE)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

chaos: $(DONE)
	$(BIN)/python -m tests.chaos

# Every byte of the headers flipped, and ten times the suite's inputs of every kind, other ones every time. Then, where
# atheris is installed (pip install atheris), the readers for FUZZ_SECONDS under a fuzzer that follows coverage.
FUZZ_SECONDS ?= 300
fuzz: $(DONE)
	$(BIN)/python -m pytest tests/test_damage.py $(wildcard tests/test_fuzz*.py) --hypothesis-profile=fuzz
	if $(BIN)/python -c "import atheris" 2>/dev/null; then \
	    $(BIN)/python -m tests.coverage_fuzz -max_total_time=$(FUZZ_SECONDS); \
	else echo "no atheris: the readers were not fuzzed by coverage"; fi

# Each in an environment of its own, .venv-LIBRARY: they pin other packages.
adapters:
	for library in rectools recbole lenskit; do \
	    bin=.venv-$$library/bin; \
	    test -x $$bin/python || $(PYTHON) -m venv .venv-$$library; \
	    $$bin/python -m pip install --quiet "$(TORCH)" && \
	    $$bin/python -m pip install --quiet --editable ".[$$library]" pytest hypothesis && \
	    $$bin/python -m pytest tests/test_adapters.py || exit 1; \
	done

# The API reference, from the docstrings.
docs: $(DONE)
	$(BIN)/python -m pip install --quiet --editable ".[docs,serve]"
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs $(API)

# A wheel and an sdist in dist; the wheel, in an environment of its own, against the sdist's tests without its package.
wheel: export PYTHONPATH :=
wheel: $(DONE)
	rm -rf dist build/wheel .venv-wheel
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet "$(TORCH)"
	.venv-wheel/bin/python -m pip install --quiet "$$(ls dist/*.whl)[test]"
	mkdir -p build/wheel && tar -xf dist/*.tar.gz -C build/wheel --strip-components 1
	rm -rf build/wheel/cfsfl_fast build/wheel/kernels build/wheel/setup.py
	cd build/wheel && ../../.venv-wheel/bin/python -m pytest $(INSTALLED)
	.venv-wheel/bin/cfsfl doctor

bench: $(DONE)
	$(BIN)/python -m pytest benches --results $(RESULTS)

# Without a virtual environment and a network: PYTHON has torch, triton, numpy, scipy, pybind11 and pytest.
gpu:
	$(PYTHON) benches/gpu.py --results $(RESULTS) $(if $(SECONDS),--seconds $(SECONDS))

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
