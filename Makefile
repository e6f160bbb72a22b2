# make demo    the whole pipeline on a miniature world: no GPU, no Docker, no models
# make test    every test
# make check   style of the Python and shell files
# make clean   remove what these made
PYTHON ?= python3
VENV := .venv
SHELL_FILES := $(wildcard scripts/*.sh container/*.sh .ci/run)

.NOTPARALLEL:
.PHONY: demo test check clean

demo: $(VENV)/complete
	$(VENV)/bin/python -m demo

test: $(VENV)/complete
	$(VENV)/bin/python -m pytest

check: $(VENV)/complete
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck $(SHELL_FILES)

clean:
	rm -rf $(VENV) demo/workspace .pytest_cache .ruff_cache
	find scripts demo tests -name __pycache__ -prune -exec rm -r {} +

# Made last: an environment without it was interrupted, or belongs to other requirements, and is made anew.
$(VENV)/complete: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; LoRACat needs 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --requirement requirements-dev.txt
	@touch $@
