# `make demo` and `make test` set up all they need on a fresh Debian or Ubuntu with Python 3.11 or later, as root.
VENV := .venv
STAMP := $(VENV)/.ready

.PHONY: demo docs plugin test unit kernel system lint setup test-packages clean

setup: $(STAMP)

$(STAMP): pyproject.toml .ci/setup
	.ci/setup $(VENV)
	touch $@

demo: setup
	@$(VENV)/bin/silkbus demo

# The cf CLI plugin, and at the same time silkbus itself, in one file: cf install-plugin silkbus.pyz
plugin: setup
	$(VENV)/bin/python -m cli.plugin.build silkbus.pyz

# docs/settings.md from the code.
docs: setup
	$(VENV)/bin/python -m tests.docs.settings_reference

test-packages:
	@.ci/setup-tests

# Two at a time, since most of them wait; those of one file in one process, since they share what they start. In a folder
# of a short name, for the path of a Unix socket may have 107 bytes.
test: setup test-packages
	@folder=$$(mktemp -d /tmp/sb.XXXXXX) && trap 'rm -rf "$$folder"' EXIT && \
	$(VENV)/bin/pytest -n 2 --dist loadfile --basetemp="$$folder"

unit: setup
	$(VENV)/bin/pytest -m "not kernel and not system and not databases and not packaging"

kernel: setup test-packages
	$(VENV)/bin/pytest -m kernel

system: setup test-packages
	$(VENV)/bin/pytest -m system

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) silkbus.pyz build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
