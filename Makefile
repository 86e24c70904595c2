# Each target sets up .venv by itself where it is missing or where the dependencies changed.
PYTHON ?= python3
SETTING ?= toy
METHODS ?=
SEEDS ?=
JOBS ?= 1
N ?= 60
BIN := .venv/bin
INSTALLED := .venv/.installed

export TOKENIZERS_PARALLELISM := false
# notebooks are compared strictly: no progress bars, the same number of threads
NOTEBOOK := CI=1 OMP_NUM_THREADS=2
NBVAL := $(NOTEBOOK) $(BIN)/python -m pytest --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg -p no:cacheprovider

.DEFAULT_GOAL := help
.PHONY: help demo test test-lax check mutants notebooks lab sweep clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## fine-tune a real model with every method; table and figure (<= 10 minutes on 2 cores)
	$(BIN)/lorakit demo

test: check ## everything CI runs: lint, the package's tests, every notebook cell compared strictly
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
	$(NBVAL) --nbval notebooks

test-lax: check ## as test, but notebook outputs may differ (other hardware)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
	$(NBVAL) --nbval-lax notebooks

check: $(INSTALLED) ## ruff: format and lint, notebooks included
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

mutants: $(INSTALLED) ## [SEED=7] [N=60] [AGAIN=1]: small wrong changes, one at a time; which does no test catch?
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutants.py --seed "$(SEED)" --count "$(N)" $(if $(AGAIN),--again)

notebooks: $(INSTALLED) ## run every notebook again and keep its outputs; twice gives identical files
	$(NOTEBOOK) $(BIN)/python -m lorakit.runs.notebooks --regenerate notebooks/*.ipynb

lab: $(INSTALLED) ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir notebooks

sweep: $(INSTALLED) ## SETTING=sst2-minilm [METHODS="lora head"] [SEEDS="0 1 2"] [JOBS=2]: every run that has no finished record
	$(BIN)/python -m lorakit.runs.sweep --setting "$(SETTING)" --methods "$(METHODS)" --seeds "$(SEEDS)" --jobs $(JOBS)

clean: ## remove what can be made again; records and downloads stay
	rm -rf .venv .runs .snakemake .pytest_cache .ruff_cache build *.egg-info results/*/*/*.ipynb
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
