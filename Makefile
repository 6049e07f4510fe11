# Everything from a fresh clone: `make demo`, `make test`. See CONTRIBUTING.md for the rest.
#
#   VENV=DIR    the environment to create and use (default .venv); VENV=none uses the python that is active
#   PYTHON=…    the interpreter that creates it (default python3)
#   TORCH=…     what to install where there is no torch >= 2.10 yet (default torch==2.13.0)

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARCHITECTURES ?= 8.0;8.6;8.9;9.0a;10.0;12.0

ifeq ($(VENV),none)
  PY := $(PYTHON)
  STAMP := build/installed
else
  PY := $(VENV)/bin/python
  STAMP := $(VENV)/fastdistill-installed
endif
PIP := $(PY) -m pip --disable-pip-version-check

SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

.PHONY: help demo test test-fast test-long lint format bench gpu-check document wheel check-wheel abi-check clean
help:
	@sed -n '/^# Everything/,/^$$/p' Makefile | sed 's/^# \{0,1\}//'
	@echo "Targets: demo test test-fast test-long lint format bench gpu-check document wheel check-wheel abi-check clean"

# Installed editable, with the libraries built in place; again whenever a source of theirs changes.
$(STAMP): $(SOURCES)
ifneq ($(VENV),none)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
endif
	$(PY) -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 10)" 2>/dev/null \
	  || $(PIP) install "$(TORCH)"
	$(PIP) install "setuptools>=77" "ninja>=1.11"
	$(PIP) install --no-build-isolation -e ".[dev]"
	mkdir -p $(@D) && touch $@

demo: $(STAMP)
	$(PY) -m fastdistill demo --out demo

# Two processes, where pytest-xdist is installed; a file's tests stay together, because they share what they compile.
# The longest file comes first, so that no process is left alone with it at the end.
PARALLEL = $(shell $(PY) -c "import xdist; print('-n 2 --dist loadfile')" 2>/dev/null)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) tests/test_build.py tests
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest $(PARALLEL)

# Without the tests that build native code.
test-fast: $(STAMP)
	$(PY) -m pytest -m "not compiler"

# The tests that take minutes: whole trainings held to the bands of their documentation.
test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) -m long

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	$(PY) -m fastdistill.bench all

# On a machine with a GPU, without network: builds, tests, sanitizes, measures; OUT holds four files. DRY_RUN=1 elsewhere.
#   STEPS=build,test,sanitize,bench   those of them to do      ARGS=…   see .ci/gpu_check.py --help
OUT ?= gpu-check
gpu-check:
	$(PY) .ci/gpu_check.py --out "$(OUT)" $(if $(DRY_RUN),--dry-run) $(if $(STEPS),--steps $(STEPS)) $(ARGS)

# The tables of docs/benchmarks.md, from bench/results.
document: $(STAMP)
	$(PY) -m fastdistill.bench.document

# One wheel for every Python >= 3.10 and every torch >= 2.10 on Linux.
wheel: $(STAMP)
	rm -rf build/wheel && mkdir -p dist
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(ARCHITECTURES)}" FASTDISTILL_TORCH="$$($(PY) -c \
	  'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')" \
	  $(PY) -m build --wheel --outdir dist .

# The wheel in an environment of its own, away from the sources: installed, then tested.
check-wheel: wheel
	.ci/check-wheel "$(PYTHON)" "$(TORCH)"

# Both libraries, built against this torch, in another one (several GB): loaded, registered, tested.
OTHER_TORCH ?= torch==2.14.1
OTHER_PYTHON ?= $(PYTHON)
abi-check: wheel
	.ci/check-wheel "$(OTHER_PYTHON)" "$(OTHER_TORCH)"

clean:
	rm -rf build dist demo *.egg-info fastdistill/*.so fastdistill/_build.json
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
