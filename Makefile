# make demo     the main job on real text: translate, evaluate, fine-tune, prune
# make test     the tests
# make quality  ruff and mypy: `make lint types`
# make docs     the pages of docs/ as a site, in site/; a warning is an error
#
# And what CI runs besides:
#
# make test-avx2    tests of numbers as on a processor without AVX-512
# make test-newest  tests of what meets other packages, with NEWEST of them, in the environment VENV-newest
# make test-oldest  the same with the oldest that setup.cfg admits, in VENV-oldest
# make dist         sdist and wheel in dist/, checked, and the wheel tested in an environment of its own (RELEASING.md)
#
# Each makes the environment it needs. PYTHON=python3.12 chooses the interpreter, VENV=DIR the environment,
# NEWEST="torch==2.15.0 transformers==5.24.0" the newest releases.

PYTHON ?= python3
VENV ?= .venv
VERSIONS := setup.cfg pyproject.toml constraints.txt
NEWEST ?= transformers==5.24.0

PARALLEL := --numprocesses auto --dist loadfile
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2

# what meets PyTorch, transformers and accelerate closely, and what is known to be wrong in them
MEETS_OTHERS := tests/models tests/hf_contract/test_generation.py tests/hf_contract/test_trainer.py \
	tests/test_private_names.py tests/test_upstream.py

.PHONY: demo test test-avx2 test-newest test-oldest quality lint types docs dist

demo: $(VENV)/.installed_viz
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/.installed_dev
	@# tests/distributed alone, as they start up to eight processes each, beside which others' times mean nothing; and
	@# whether or not the others passed
	status=0; \
	$(VENV)/bin/python -m pytest $(PARALLEL) --ignore tests/distributed || status=1; \
	$(VENV)/bin/python -m pytest $(PARALLEL) tests/distributed || status=1; \
	exit $$status

test-avx2: $(VENV)/.installed_dev
	$(AVX2) $(VENV)/bin/python -m pytest $(PARALLEL) tests/models tests/optim tests/compression

test-newest test-oldest: test-%: $(VENV)-%/.installed_dev
	$(VENV)-$*/bin/python -m pytest $(PARALLEL) $(MEETS_OTHERS)

quality: lint types

lint: $(VENV)/.installed_dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed_dev
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

# The wheel is installed into an environment that has nothing of the tree, and the smoke tests run outside of it.
dist:
	rm -rf dist build
	$(PYTHON) -m venv --clear $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --constraint constraints.txt build twine
	$(VENV)-dist/bin/python -m build --outdir dist .
	$(VENV)-dist/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	smoke=$$(mktemp -d) && cp -r tests/smoke.py examples/checkpoints/zcode_m3_demo $$smoke && cd $$smoke && \
		$(abspath $(VENV))-dist/bin/python smoke.py zcode_m3_demo; \
		status=$$?; rm -rf $$smoke; exit $$status

$(VENV)/.installed_%: $(VERSIONS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

$(VENV)-newest/.installed_dev: $(VERSIONS) Makefile
	$(PYTHON) -m venv $(VENV)-newest
	sed $(foreach pin,$(NEWEST),-e 's/^$(firstword $(subst ==, ,$(pin)))==.*/$(pin)/') constraints.txt \
		> $(VENV)-newest/constraints.txt
	$(VENV)-newest/bin/python -m pip install --quiet --constraint $(VENV)-newest/constraints.txt --editable '.[dev]'
	touch $@

$(VENV)-oldest/.installed_dev: $(VERSIONS) constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	touch $@
