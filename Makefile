# Each target creates what it needs: a virtual environment in .venv, updated when the pinned versions change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The demo and the code checks need less than the tests. If everything is installed already, they use it.
DEMO := $(or $(wildcard $(STAMP)),$(VENV)/.installed-demo)
QUALITY := $(or $(wildcard $(STAMP)),$(VENV)/.installed-quality)
DOCS := $(VENV)/.installed-docs
DEMO_DIR ?= outputs/demo
DEMO_SEED ?= 1

.PHONY: demo test gpu-check quality coverage docs install versions oldest clean help

help:  ## list the targets
	@awk -F '## ' '/^[a-z-]+:.*## /{split($$1, target, ":"); printf "make %-10s %s\n", target[1], $$2}' Makefile

install: $(STAMP)  ## create the virtual environment in .venv, with everything that the targets below need

# Check the version of Python, and its venv module, which is a separate package on Debian.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON); give one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); give one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	@touch $(STAMP)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(DEMO)  ## train a small classifier with AdaNorm and with LayerNorm, and compare them (1 GB to install)
	@for norm in adanorm layernorm; do \
		$(BIN)/python recipes/classification.py --config recipes/configs/demo.yaml --norm $$norm --seed $(DEMO_SEED) \
			--output_dir $(DEMO_DIR)/$$norm || exit 1; \
	done
	@echo
	@$(BIN)/python recipes/common/results.py $(DEMO_DIR)/adanorm $(DEMO_DIR)/layernorm

# All tests of a file run in one process, so that they share set-up; the slow folders come first.
test: $(STAMP)  ## run the tests, with one process per core (at most 4)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Uses the system's Python: on a machine with a GPU, torch is installed already, and there may be no network.
gpu-check:  ## run the checks that need a GPU: exactness, launchers, recipes, speed
	$(PYTHON) -m pytest tests/integration/test_gpu.py tests/unit/kernels/test_triton.py
	$(PYTHON) recipes/benchmark.py --what norms models --modes eager compiled --dtypes float32 bfloat16

quality: $(QUALITY)  ## check the code (ruff, mypy, import-linter) and the package (build, twine)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	cd recipes && $(abspath $(BIN))/lint-imports --no-logo --no-cache
	$(BIN)/mypy
	rm -rf dist
	$(BIN)/python -m build --outdir dist . >/dev/null
	$(BIN)/twine check --strict dist/*

docs: $(DOCS)  ## build the documentation into docs/_build (installs torch, transformers and Sphinx) and check its links
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

versions: $(STAMP)  ## run the core tests across versions of Python, transformers and torch (5 minutes, 1 to 8 GB per cell; CELL=... for one)
	@$(BIN)/python -m pip install --quiet 'nox[uv]'
	$(BIN)/nox $(if $(CELL),-s "$(CELL)")

# The test environment with another transformers before it on the path, so that torch is not installed twice.
OLDEST := $(VENV)-oldest
$(OLDEST)/.installed: $(STAMP)
	$(BIN)/python -m venv $(OLDEST)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/newest.pth
	$(OLDEST)/bin/python -m pip install --quiet transformers==5.0.0
	@touch $@

oldest: $(OLDEST)/.installed  ## run the tests of names, hooks, saving and norms with the oldest transformers (1 minute)
	$(OLDEST)/bin/python -m pytest -q tests/unit/saving/test_spec.py tests/unit/saving/test_hooks.py \
		tests/integration/test_saving.py tests/unit/test_modeling_adanorm.py -k "not compile"

coverage: $(STAMP)  ## run the tests and report the coverage of hf_adanorm
	$(BIN)/python -m pytest --cov --cov-report=term-missing --cov-fail-under=90

clean:  ## remove the environment and all build output
	rm -rf $(VENV) $(OLDEST) .nox $(DEMO_DIR) docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
