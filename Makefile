# make demo | test | test-all | check | fix | serve | serve-vllm | validate-cluster | clean
# The virtual environment is made once and installed into only when a requirements file changes.
PYTHON ?= python3
BIN := .venv/bin
VLLM ?= cpu
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all check fix serve serve-vllm validate-cluster clean

demo: .venv/runtime
	$(BIN)/python -m jobs.run_all --config configs/quickstart.yaml

# The second setting keeps Ray to localhost, as jobs do (cbtm_ray/ray_session.py); the first is in docs/SERVING.md.
serve: .venv/runtime
	RAY_SERVE_PROXY_USE_GRPC=1 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 $(BIN)/serve run serve.app:build run_dir=runs/quickstart

# make VLLM=cuda serve-vllm where there are GPUs. Nine engines share the cores of a small machine: eight experts', the control's.
serve-vllm: .venv-vllm/$(VLLM)
	RAY_SERVE_PROXY_USE_GRPC=1 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 .venv-vllm/bin/serve run serve.app:build \
		run_dir=runs/quickstart engine=vllm group_cpus=0.2

# The clouds' own clients, which describe their nodes, are among what testing needs.
validate-cluster: .venv/dev
	$(BIN)/python -m jobs.validate_cluster cluster.yaml cluster-gcp.yaml $(wildcard kuberay/*.yaml)

test: .venv/dev
	$(PYTEST) -m "not slow"

test-all: .venv/dev .venv-vllm/cpu
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
	rm -rf .venv .venv-vllm .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

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

# vLLM fixes other versions than requirements.txt, so it has an environment of its own. Packages for images and sound are built
# for CUDA and do not load beside torch for CPUs; vLLM does without them.
.venv-vllm/cpu .venv-vllm/cuda: .venv-vllm/%: requirements-vllm-%.txt requirements-vllm-common.txt
	@echo "Installing $< into .venv-vllm, several minutes the first time."
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -r $<
	$(if $(filter cpu,$*),.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@touch $@
