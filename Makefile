# `make train` and `make test` need make and Python >= 3.11, nothing else. ARGS="train.steps=50" is passed on.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: train test lint clean

train: .venv/train.done
	$(BIN)/atoll train $(ARGS)

# Many tests wait for processes of their own: two at a time keep two cores busy. One at a time: make test ARGS=-n0
test: .venv/test.done
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow" $(ARGS)

lint: .venv/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "atoll needs Python 3.11 to 3.13; run make PYTHON=/path/to/one")'
	$(PYTHON) -m venv .venv

.venv/train.done: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e .
	touch $@

# DeepSpeed comes as source alone and asks torch about the machine while it is built, so it sees this environment.
.venv/test.done: .venv/train.done
	$(PIP) install -c constraints.txt -e '.[hf,dev]'
	$(PIP) install -c constraints.txt setuptools wheel
	DS_BUILD_OPS=0 $(PIP) install -c constraints.txt --no-build-isolation deepspeed || \
		echo "DeepSpeed could not be installed: the tests of engine=deepspeed will be skipped"
	touch $@
