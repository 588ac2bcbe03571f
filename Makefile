# make demo   the main job on a laptop: rank, convert, distil, judge, report
# make test   the test suite
# make check  lint, types, import contracts
# make test-serve  answers of vLLM's CPU build beside transformers', in an environment of its own, .venv-serve
# Each makes .venv when it is missing. PYTHON=python3.12 make ... picks another interpreter (3.11 or newer);
# WORKERS=8 make test runs more tests at a time; SEED= make test draws other random numbers each time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2
SEED ?= 1
export HYBRIDIZE_TEST_SEED := $(SEED)

SERVE := .venv-serve
SERVE_INSTALLED := $(SERVE)/.installed

.PHONY: demo test test-serve check format clean

demo: $(INSTALLED)
	$(BIN)/hybridize run recipes/demo.yaml

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope -m "not timing"
	$(BIN)/python -m pytest -m timing

test-serve: $(SERVE_INSTALLED)
	OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest tests/serving/test_served.py tests/serving/test_server.py \
		-k "not two_ranks and not compiled"

check: $(INSTALLED)
	$(BIN)/ruff check src tests examples
	$(BIN)/ruff format --check src tests examples
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix src tests examples
	$(BIN)/ruff format src tests examples

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# PyPI's torchvision and its like are CUDA builds, which do not load beside a CPU build of PyTorch.
$(SERVE_INSTALLED): pyproject.toml requirements-serve.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --upgrade pip
	$(SERVE)/bin/python -m pip install --quiet --requirement requirements-serve.txt
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVE)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(SERVE) build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
