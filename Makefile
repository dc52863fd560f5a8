# make demo     the main job on real text: translate, evaluate, fine-tune, prune
# make test     the tests
# make quality  ruff and mypy
#
# Each makes the environment it needs. PYTHON=python3.12 chooses the interpreter, VENV=DIR the environment.

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test quality

demo: $(INSTALLED)
	$(VENV)/bin/python examples/demo.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

quality: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
