# From a fresh clone with only Python and make: `make demo` shows the product at work, `make test` runs the tests,
# `make lowest` a third of them with the lowest version of each dependency.
PYTHON ?= python3
# A package index with torch builds for your machine, if the default one does not suit it, for instance
# TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
# the tests run side by side, one thread each: two threads that share a busy core wait for each other
WORKERS ?= 2

# the linter and formatter, which also breaks the lines of signatures in the documentation
RUFF := ruff==0.17.6

# the modules that touch the dependencies, about a third of the tests
LOWEST := api args blend card checkpoint codecs data_stream deci describe each_strategy ecosystem export extensions \
	extract features flags gguf head hf_text journal least_squares loading losses packaging plots plugin quantize \
	recipes report sources strategies surrogate testing transformers tutorials

.PHONY: setup demo test coverage slow lowest lint docs dist clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

# needs Python 3.10 to 3.12 (PYTHON=python3.12), for which the lowest versions have been built
$(VENV)-lowest/installed: pyproject.toml constraints-lowest.txt
	$(call install,$(VENV)-lowest,constraints-lowest.txt)

define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) --editable ".[test]"
	touch $(1)/installed
endef

demo: setup
	$(BIN)/python benchmarks/demo.py $(if $(SHORT),--short) $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# modules under 80 % are listed; processes that tests start are not counted
coverage: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pytest-cov==7.1.0 coverage==7.17.5
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --cov=litgpt_whittle --cov-report= $(ARGS)
	$(BIN)/python -m coverage report --skip-covered --sort=cover

slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow $(ARGS)

lowest: $(VENV)-lowest/installed
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n $(WORKERS) $(LOWEST:%=tests/test_%.py) $(ARGS)

lint: $(VENV)-lint/installed setup
	$(VENV)-lint/bin/ruff check . && $(VENV)-lint/bin/ruff format --check . && $(VENV)-lint/bin/lint-imports
	$(VENV)-lint/bin/mypy --python-executable $(BIN)/python

$(VENV)-lint/installed: Makefile
	test -x $(VENV)-lint/bin/python || $(PYTHON) -m venv $(VENV)-lint
	$(VENV)-lint/bin/python -m pip install --quiet --disable-pip-version-check $(RUFF) import-linter==2.17 mypy==2.4.1
	touch $@

# reads the sources without importing them, so it needs neither torch nor the package; its tools need Python 3.11
docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict $(ARGS)

$(VENV)-docs/installed: Makefile
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check $(RUFF) mkdocs==1.6.1 \
		mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 griffelib==2.4.1
	touch $@

# the source distribution, and the wheel that is built from it, which must run in an environment of its own
dist: $(VENV)-build/installed
	rm -rf dist build $(VENV)-dist
	$(VENV)-build/bin/python -m build
	$(VENV)-build/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(VENV)-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	folder=$$(mktemp -d) && $(VENV)-dist/bin/python tests/try_installed.py $$folder && rm -r $$folder

$(VENV)-build/installed: Makefile
	test -x $(VENV)-build/bin/python || $(PYTHON) -m venv $(VENV)-build
	$(VENV)-build/bin/python -m pip install --quiet --disable-pip-version-check build==1.6.1 twine==7.0.0
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-lint $(VENV)-docs $(VENV)-build $(VENV)-dist dist out build site *.egg-info
