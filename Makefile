# Each target makes what it needs: a virtual environment in .venv, filled once and again when the pins change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_DIR ?= outputs/demo
DEMO_SEED ?= 1

.PHONY: demo test quality coverage install clean help

help:
	@echo "make demo       train a small classifier with AdaNorm and with LayerNorm, compare them"
	@echo "make test       run the tests"
	@echo "make quality    ruff and mypy"
	@echo "make coverage   the tests, with the coverage of hf_adanorm"

install: $(STAMP)

# The Python that the project needs, and its venv module, which Debian packages apart.
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

demo: $(STAMP)
	@for norm in adanorm layernorm; do \
		$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
			recipes/classification.py --config recipes/configs/demo.yaml --norm $$norm --seed $(DEMO_SEED) \
			--output_dir $(DEMO_DIR)/$$norm --overwrite_output_dir true || exit 1; \
	done
	@echo
	@$(BIN)/python recipes/common/results.py $(DEMO_DIR)/adanorm $(DEMO_DIR)/layernorm

test: $(STAMP)
	$(BIN)/python -m pytest

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(STAMP)
	$(BIN)/python -m pytest --cov --cov-report=term-missing --cov-fail-under=90

clean:
	rm -rf $(VENV) $(DEMO_DIR) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
