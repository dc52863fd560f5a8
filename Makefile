# make demo     the main job on real text: translate, evaluate, fine-tune, prune
# make test     the tests
# make quality  ruff and mypy
#
# Each makes the environment it needs. PYTHON=python3.12 chooses the interpreter, VENV=DIR the environment.

PYTHON ?= python3
VENV ?= .venv
VERSIONS := setup.cfg pyproject.toml constraints.txt

.PHONY: demo test quality

demo: $(VENV)/.installed_viz
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/.installed_dev
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --ignore tests/distributed
	$(VENV)/bin/python -m pytest tests/distributed  # these start up to eight processes each

quality: $(VENV)/.installed_dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed_%: $(VERSIONS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
