# paella-ray: `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?= runs/demo/train/model
ARGS ?=

.PHONY: help setup demo serve mlflow cluster-local cluster-down test test-slow lint format type bench clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.installed ## Create .venv with the exact versions of constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "paella-ray needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about 7 GB, a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

demo: setup ## Images → tokens → training → pictures, on a CPU (DATA=folder for your own images)
	$(BIN)/python pipelines/demo.py $(if $(DATA),--data $(DATA)) $(ARGS)

serve: setup ## HTTP endpoint and page for the demo's model (MODEL=directory or URI for another)
	$(BIN)/python -m serve.run --model $(MODEL) $(ARGS)

mlflow: setup ## The MLflow UI on the runs under runs/
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db $(ARGS)

cluster-local: setup ## A Ray cluster of several nodes here, with S3 and MLflow on PostgreSQL
	$(BIN)/python cluster/local.py up

cluster-down: ## End it
	$(BIN)/python cluster/local.py down

test: setup ## All tests but the slow ones, with coverage of paella/; in two processes, for they often wait (ARGS="-n 0": in one)
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term $(ARGS)

test-slow: setup ## The long kill and soak tests
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup ## Check style and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## Apply style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup ## Check types
	$(BIN)/mypy

bench: setup ## Run every benchmark; each prints a table and one JSON line
	@for program in benchmarks/*.py; do echo "== $$program"; $(BIN)/python $$program || exit 1; done

clean: ## Remove caches (not .venv, not runs)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .coverage; find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
