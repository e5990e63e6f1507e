# Everything runs in a virtual environment that the targets below make for themselves.
#   make demo    the demonstration, on a really pretrained model
#   make test    the tests
PYTHON ?= python3
VENV   ?= .venv
TESTS  ?= tests

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint typecheck format bench clean

help:
	@echo "make demo       run the demonstration: EfficientNet-Lite0, original against compiled"
	@echo "make test       run the tests (TESTS=tests/test_cli.py for some of them)"
	@echo "make lint       ruff, rules and format"
	@echo "make typecheck  mypy, strict"
	@echo "make bench      the exact passes on resnet18"
	@echo "make clean      remove the environment and what was built"

# A stamp is older than pyproject.toml when a requirement may have changed: pip then installs what is missing.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python -m examples.demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed-dev
	$(BIN)/python -m mypy

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks coverage --suite torchvision --models resnet18 --fresh --out build/bench.json

clean:
	rm -rf $(VENV) build dist *.egg-info
