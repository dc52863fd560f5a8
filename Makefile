# make demo     the main job on real text: translate, evaluate, fine-tune, prune
# make test     the tests
# make quality  ruff and mypy
# make docs     the pages of docs/ as a site, in site/; a warning is an error
#
# And what CI runs besides:
#
# make test-avx2    tests of numbers as on a processor without AVX-512
# make test-newest  tests of what meets transformers, with its newest release, in the environment VENV-newest
#
# Each makes the environment it needs. PYTHON=python3.12 chooses the interpreter, VENV=DIR the environment.

PYTHON ?= python3
VENV ?= .venv
VERSIONS := setup.cfg pyproject.toml constraints.txt
NEWEST_TRANSFORMERS := 5.24.0

PARALLEL := --numprocesses auto --dist loadfile
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2

.PHONY: demo test test-avx2 test-newest quality docs

demo: $(VENV)/.installed_viz
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/.installed_dev
	@# tests/distributed alone, as they start up to eight processes each; and whether or not the others passed
	status=0; \
	$(VENV)/bin/python -m pytest $(PARALLEL) --ignore tests/distributed || status=1; \
	$(VENV)/bin/python -m pytest tests/distributed || status=1; \
	exit $$status

test-avx2: $(VENV)/.installed_dev
	$(AVX2) $(VENV)/bin/python -m pytest $(PARALLEL) tests/models tests/optim tests/compression

test-newest: $(VENV)-newest/.installed_dev
	$(VENV)-newest/bin/python -m pytest $(PARALLEL) tests/models tests/hf_contract/test_generation.py \
		tests/hf_contract/test_trainer.py

quality: $(VENV)/.installed_dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)-docs/.installed_docs
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

# the pages are made from the source alone: what the package itself needs is not installed
$(VENV)-docs/.installed_docs: $(VERSIONS)
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -c "import configparser; c = configparser.ConfigParser(); c.read('setup.cfg'); \
		print(c['options.extras_require']['docs'])" > $(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/python -m pip install --quiet --constraint constraints.txt --requirement $(VENV)-docs/requirements.txt
	touch $@

$(VENV)/.installed_%: $(VERSIONS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

$(VENV)-newest/.installed_dev: $(VERSIONS) Makefile
	$(PYTHON) -m venv $(VENV)-newest
	sed 's/^transformers==.*/transformers==$(NEWEST_TRANSFORMERS)/' constraints.txt > $(VENV)-newest/constraints.txt
	$(VENV)-newest/bin/python -m pip install --quiet --constraint $(VENV)-newest/constraints.txt --editable '.[dev]'
	touch $@
