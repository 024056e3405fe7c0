# Every command the project needs. `make` alone lists them.
#
#   make PYTHON=python3.12 test          another interpreter
#   make test PYTEST_ARGS="-k name -x"   anything pytest takes (the default uses every core)

PYTHON      ?= python3
PYTEST_ARGS ?= -n auto
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-tl4 check docs fix environments clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 21

demo: .venv/.installed  ## find the heads of the reference model, offline; results in out/demo
	@.venv/bin/tv-interp heads --out out/demo

test: .venv/.installed  ## run every test on TransformerLens 3.9
	@.venv/bin/python -m pytest $(PYTEST_ARGS)

test-tl4: .venv-tl4/.installed  ## run the tests on TransformerLens 4 (TransformerBridge only)
	@.venv-tl4/bin/python -m pytest -m "not slow and not browser" $(PYTEST_ARGS)

check: .venv/.installed  ## formatting, lint and types
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv/bin/pyright --pythonpath .venv/bin/python

docs: .venv/.installed  ## build the documentation into docs/_build, warnings are errors
	@.venv/bin/python -m sphinx -b html -q -W --keep-going docs docs/_build

fix: .venv/.installed  ## format, and repair what ruff can repair
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

environments: .venv/.installed .venv-tl4/.installed  ## build both environments (-j2: side by side)

clean:  ## remove environments, results and caches
	@rm -rf .venv .venv-tl4 out build dist docs/_build docs/tutorials docs/_static .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints/cpu.txt
	$(call install,.venv,constraints/cpu.txt)

.venv-tl4/.installed: pyproject.toml constraints/cpu-tl4.txt
	$(call install,.venv-tl4,constraints/cpu-tl4.txt)

# install(environment, constraints): build it, or bring it up to date. The stamp is written last.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "tv_interp needs Python 3.11 or newer, and PYTHON=$(PYTHON) is \
	$$($(PYTHON) --version 2>/dev/null || echo not there): name another one, as in make PYTHON=python3.12" >&2; exit 1; }
@echo "Installing $(1) from $(2): about five minutes, once."
@$(PYTHON) -m venv $(1)
@$(1)/bin/python $(PIP_INSTALL) -c $(2) -e '.[dev]'
@touch $(1)/.installed
endef
