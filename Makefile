# `make demo` and `make test` do all set-up; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SNAKEMAKE := $(BIN)/python -m snakemake
# A process a core, of some 2 GB each; the tests of a file share what they build, and stay together.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile
TRACKNET := models/tracknet-demo.onnx reports/tracknet-demo.eval.json
DEMO := models/demo.Modelfile models/demo.q4_k_m.gguf reports/demo.smoke.json reports/demo.rag.json

.PHONY: help demo demo-tracknet test quick lint format lock clean clean-all

help:
	@echo "make demo           set up, fine-tune, quantize and question a small model, on the CPU"
	@echo "make demo-tracknet  set up, train a heatmap model on drawn clips, export and evaluate it, on the CPU"
	@echo "make test           set up, lint and run every test this machine can run"
	@echo "make quick          the tests that need no llama.cpp"
	@echo "make format         format the code"
	@echo "make clean          remove logs and temporary files; artifacts and checkpoints stay"
	@echo "make clean-all      remove what was built as well, after asking"

demo: $(VENV)/.runtime
	@$(SNAKEMAKE) -j1 --quiet host reason -- $(DEMO)
	@$(BIN)/python scripts/summarize_build.py --model demo

demo-tracknet: $(VENV)/.runtime
	@$(SNAKEMAKE) -j1 --quiet host reason -- $(TRACKNET)
	@$(BIN)/python scripts/summarize_build.py --model tracknet-demo

test: lint
	$(BIN)/python -m pytest $(PARALLEL)

quick: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakefmt --check Snakefile rules
	$(SNAKEMAKE) --lint

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakefmt Snakefile rules

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "modelmill needs Python 3.11 or later; set PYTHON=…")'
	@# A venv that failed half-way has a python already, and would be taken for whole the next time.
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.runtime: requirements.txt requirements-lock.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -c requirements-lock.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-slurm.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt -r requirements-slurm.txt \
	  -c requirements-lock.txt
	@touch $@

lock: $(VENV)/.dev
	{ echo "# Written by \`make lock\`: what requirements*.txt bring along, used as constraints."; \
	  $(BIN)/python -m pip freeze | sed 's/+[a-z0-9.]*$$//'; } > requirements-lock.txt

clean:
	rm -rf logs .pytest_cache .ruff_cache .snakemake/log .snakemake/tmp*
	find scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean
	@printf 'Remove bases, adapters, models, ollama, reports and work with their checkpoints? [y/N] '; \
	read -r answer; test "$$answer" = y && rm -rf bases adapters models ollama reports work .snakemake || echo "nothing removed"
