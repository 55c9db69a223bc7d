# Two commands: make train, make test. Both make the environment first; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
TRAIN := $(VENV)/.setup-done
DEV := $(VENV)/.setup-dev-done
SETUP := PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" sh scripts/setup

.PHONY: setup train test test-all fuzz fuzz-models check clean

setup: $(TRAIN)

$(TRAIN): scripts/setup constraints.txt pyproject.toml
	$(SETUP)
	touch $(TRAIN)

# what training does not need: pytest, ruff, mypy, ...
$(DEV): $(TRAIN)
	$(SETUP) --dev
	touch $(DEV)

train: $(TRAIN)
	$(VENV)/bin/shoal train quickstart

test: $(DEV)
	sh scripts/test

test-all: $(DEV)
	sh scripts/test --all

fuzz: $(DEV)
	$(VENV)/bin/python scripts/fuzz_layouts.py

fuzz-models: $(DEV)
	$(VENV)/bin/python scripts/fuzz_models.py

check: $(DEV)
	sh scripts/check

clean:
	rm -rf $(VENV)
