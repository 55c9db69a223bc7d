# Two commands: make train, make test. Both make the environment first; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.setup-done

.PHONY: setup train test test-all check clean

setup: $(STAMP)

$(STAMP): scripts/setup constraints.txt pyproject.toml
	PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" sh scripts/setup
	touch $(STAMP)

train: setup
	$(VENV)/bin/shoal train quickstart

test: setup
	sh scripts/test

test-all: setup
	sh scripts/test --all

check: setup
	sh scripts/check

clean:
	rm -rf $(VENV)
