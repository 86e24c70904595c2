# Each target sets up .venv by itself where it is missing or where the dependencies changed.
PYTHON ?= python3
SETTING ?= toy
METHODS ?=
SEEDS ?=
JOBS ?=
PROFILE ?= default
SEED ?=
MINUTES ?= 20
CASE ?=
PART ?=
N ?= 60
COLUMNS ?= oldest pinned newest
TORCH ?= 2.13.0
TESTED ?= tests
NOTEBOOKS ?= notebooks
BIN := .venv/bin
INSTALLED := .venv/.installed
SITE := .venv/.site-installed

export TOKENIZERS_PARALLELISM := false
# notebooks are compared strictly: no progress bars, the same number of threads (one: two would wait for each other),
# the same vector instructions, by which bf16 products differ
NOTEBOOK := CI=1 OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
# a file or notebook stays on one worker, and long ones begin first
TESTS := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
NBVAL := $(NOTEBOOK) $(TESTS) --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg -p no:cacheprovider

.DEFAULT_GOAL := help
FAULTS := SEED="$(SEED)" MINUTES="$(MINUTES)" CASE="$(CASE)"

.PHONY: help demo test test-lax check faults long slurm mutants matrix gpu notebooks readme site lab sweep clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## [SEEDS="0 1"]: fine-tune a real model with every method; table, figure, a page (<= 10 minutes on 2 cores)
	$(BIN)/lorakit demo --seeds "$(SEEDS)"

test: check ## everything CI runs: lint, the package's tests, every notebook cell compared strictly
	$(TESTS)
	$(NBVAL) --nbval notebooks

test-lax: check ## as test, but notebook outputs may differ (other hardware)
	$(TESTS)
	$(NBVAL) --nbval-lax notebooks

faults: $(INSTALLED) ## [SEED=7] [MINUTES=20] [CASE=kills/17]: kills, malformed and hostile input, lost processes, full disks, closed pipes …; a table
	$(FAULTS) $(BIN)/python -m pytest -m slow tests/faults -s -q -p no:cacheprovider

long: $(INSTALLED) ## 5,000 steps of a gate, SkipLoRA and FLoRA, a million rows: does memory grow?
	$(BIN)/python -m pytest -m slow tests/long -s -q -p no:cacheprovider

slurm: $(INSTALLED) ## sweeps on a SLURM of one node, started and stopped here (root; apt install slurm-wlm munge)
	$(BIN)/python -m pytest -m slurm tests/slurm -s -q -p no:cacheprovider

check: $(INSTALLED) ## ruff: format and lint, notebooks included
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

mutants: $(INSTALLED) ## [SEED=7] [N=60] [AGAIN=1]: small wrong changes, one at a time; which does no test catch?
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutants.py --seed "$(SEED)" --count "$(N)" $(if $(AGAIN),--again)

matrix: ## [COLUMNS="oldest newest"] [TESTED=tests/adapters] [TORCH=2.13.0]: other versions of the stack, each in its own environment
	$(PYTHON) scripts/matrix.py --columns "$(COLUMNS)" --torch "$(TORCH)" --tests "$(TESTED)" --notebooks "$(NOTEBOOKS)"

gpu: $(INSTALLED) ## [PART=tests|memory|time|page] [AGAIN=1]: what is claimed of a GPU, measured on this one; docs/gpu.md
	$(BIN)/python -m benchmarks._gpu --part "$(PART)" $(if $(AGAIN),--again)

notebooks: $(INSTALLED) ## run every notebook again and keep its outputs; twice gives identical files
	printf '%s\n' notebooks/*.ipynb | $(NOTEBOOK) xargs -n 1 -P 2 $(BIN)/python -m lorakit run --regenerate

readme: $(INSTALLED) ## write the tables of results, in README and docs/, anew from records and saved benchmarks
	$(BIN)/python scripts/readme.py

$(SITE): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt -e '.[site]'
	@touch $@

# what it needs is fetched once: the extra, and MathJax into the cache of `lorakit fetch`; warnings are errors
site: $(SITE) ## notebooks, docs, records, parameters and docstrings as pages in build/site, to be read offline
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lab: $(INSTALLED) ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir notebooks

sweep: $(INSTALLED) ## SETTING=sst2-minilm [METHODS="lora head"] [SEEDS="0 1 2"] [JOBS=2] [PROFILE=slurm]: every run that has no finished record
	$(BIN)/lorakit sweep --setting "$(SETTING)" --methods "$(METHODS)" --seeds "$(SEEDS)" --profile "$(PROFILE)" $(if $(JOBS),--jobs $(JOBS))

clean: ## remove what can be made again; records and downloads stay
	rm -rf .venv .venv-matrix .runs .snakemake .pytest_cache .ruff_cache build *.egg-info results/*/*/*.ipynb results/*/compare.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
