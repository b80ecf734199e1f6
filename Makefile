# make demo | test | test-all | check | fix | serve | validate-cluster | clean
# The virtual environment is made once and installed into only when a requirements file changes.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all check fix serve validate-cluster clean

demo: .venv/runtime
	$(BIN)/python -m jobs.run_all --config configs/quickstart.yaml

# The second setting keeps Ray to localhost, as jobs do (cbtm_ray/ray_session.py); the first is in docs/SERVING.md.
serve: .venv/runtime
	RAY_SERVE_PROXY_USE_GRPC=1 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 $(BIN)/serve run serve.app:build run_dir=runs/quickstart

# The clouds' own clients, which describe their nodes, are among what testing needs.
validate-cluster: .venv/dev
	$(BIN)/python -m jobs.validate_cluster cluster.yaml cluster-gcp.yaml $(wildcard kuberay/*.yaml)

test: .venv/dev
	$(PYTEST) -m "not slow"

test-all: .venv/dev
	$(PYTEST)

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fix: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Trained models stay: runs/ is the user's to delete.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/runtime: requirements.txt | .venv/bin/python
	@echo "Installing requirements.txt into .venv, a few minutes the first time."
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
