# MegaFusion: `make quickstart` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
WEB := $(VENV)/web

.PHONY: help quickstart demo test test-all coverage test-parallel test-faults slurm-test audit lint format preprocess \
  benchmark reproduce-small \
  small-shards clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

quickstart: $(INSTALLED)  ## Install, preprocess, train a small model on emoji, draw and describe (runs/quickstart/).
	@set -e; begin=$$(( $$(date +%s) - $$(cat $(INSTALLED)) )); \
	$(BIN)/megafusion preprocess configs/preprocess/quickstart.yaml; \
	$(BIN)/megafusion train configs/quickstart.yaml; \
	$(BIN)/megafusion report runs/quickstart --seconds-before $$(( $$(date +%s) - begin ))

demo: $(WEB)  ## Open a page that chats, draws, describes and edits with the quickstart's model; trains it if needed.
	@test -f runs/quickstart/captions.txt || $(MAKE) --no-print-directory quickstart
	@$(BIN)/megafusion serve runs/quickstart --open

# A file's tests share its fixtures, so they run on one process. Three keep two cores busy, because many tests wait.
# The files of several ranks come first (tests/conftest.py), so that none is left over at the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
test: $(WEB)  ## Run the quick tests, on three processes.
	$(PYTEST)

# The tests marked slow run by their file: .venv/bin/python -m pytest -m slow FILE
test-all: $(WEB)  ## Run the tests marked full, too; those marked slow need -m slow.
	$(PYTEST) -m "not slow"

coverage: $(WEB)  ## Run the quick tests, with a table of the lines not covered.
	$(PYTEST) --cov --cov-report=term

test-parallel: $(INSTALLED)  ## Every form of parallelism against one device: a table, and runs/parallel.json.
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.parallel.matrix

test-faults: $(INSTALLED)  ## Kills, signals, bad disks and bad gradients, done to real runs: runs/faults.json (as root).
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.table

slurm-test: $(INSTALLED)  ## A real SLURM of two nodes here: runs on it, disturbed ten times; runs/slurm.json.
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.launchers.slurm_matrix

audit:  ## Look every pinned package up among known vulnerabilities (needs the internet).
	@mkdir -p build; rm -f build/audit.json; : > build/audit.log
	@{ test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && \
	  build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }; } && \
	build/audit/bin/pip-audit --requirement requirements.txt --requirement requirements-web.txt --no-deps \
	  --disable-pip --progress-spinner off --format json --output build/audit.json > build/audit.log 2>&1 || \
	  test -f build/audit.json || tail -n 1 build/audit.log
	@$(PYTHON) -m tests.audit build/audit.json

lint: $(INSTALLED)  ## Check format, style, types, and which package may import which.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(INSTALLED)  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

CONFIG ?= configs/preprocess/quickstart.yaml
preprocess: $(INSTALLED)  ## Turn images, captions and text into shards (CONFIG=...).
	$(BIN)/megafusion preprocess $(CONFIG)

benchmark: $(INSTALLED)  ## Time a training step of the quickstart model.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/train.py

reproduce-small: $(INSTALLED)  ## Claims (a) and (b) of the paper, small and from nothing: differences and their signs.
	@$(MAKE) --no-print-directory -j 2 small-shards
	OMP_NUM_THREADS=1 $(BIN)/megafusion sweep configs/sweeps/claims-small.yaml --jobs 2
	@status=0; set -x; \
	$(BIN)/python benchmarks/claims.py compare runs/claims/small/sweep.json transfusion quantized \
	  --signs benchmarks/results/claims/signs-a.json || status=1; \
	$(BIN)/python benchmarks/claims.py compare runs/claims/small/sweep.json patch-2 patch-2-causal \
	  --signs benchmarks/results/claims/signs-b.json || status=1; \
	{ set +x; } 2> /dev/null; exit $$status

# One fold, as latents and as codes of autoencoders that are trained half as long as those of docs/claims.md.
SMALL := styles quantized-styles
SMALL_STEPS_styles := 1000
SMALL_STEPS_quantized-styles := 1500
FOLD := data/styles-64/fold-0
small-shards: $(SMALL:%=data/claims-small/%/fold-0/held-out/pairs/manifest.json)
data/styles/fold-0/captions.json: | $(INSTALLED)
	$(BIN)/python -m data_prep.emoji.styles split --fold 0 --out data/styles/fold-0
$(FOLD)/captions.json: | $(INSTALLED)
	$(BIN)/python -m data_prep.emoji.styles split --fold 0 --num-concepts 64 --out $(FOLD)
$(SMALL:%=runs/vae-small-%/config.json): runs/vae-small-%/config.json: | data/styles/fold-0/captions.json
	$(BIN)/megafusion train-vae configs/vae/$*.yaml out=runs/vae-small-$* optimization.num_steps=$(SMALL_STEPS_$*)
$(SMALL:%=data/claims-small/%/fold-0/held-out/pairs/manifest.json): data/claims-small/%/fold-0/held-out/pairs/manifest.json: \
  | runs/vae-small-%/config.json $(FOLD)/captions.json
	OMP_NUM_THREADS=1 $(BIN)/megafusion preprocess configs/preprocess/claims.yaml vae=runs/vae-small-$* \
	  out=data/claims-small/$*/fold-0/train keys=$(FOLD)/train.txt texts=[$(FOLD)/text.txt]
	OMP_NUM_THREADS=1 $(BIN)/megafusion preprocess configs/preprocess/claims.yaml vae=runs/vae-small-$* \
	  out=data/claims-small/$*/fold-0/held-out keys=$(FOLD)/held-out.txt texts=[] augmentation.copies=8

clean:  ## Remove the environment, the shards and the quickstart's run.
	rm -rf $(VENV) data/quickstart runs/quickstart

# The file holds the seconds that installing took, which the quickstart's report counts in.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@set -e; begin=$$(date +%s); \
	$(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 -r requirements.txt; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .; \
	echo $$(( $$(date +%s) - begin )) > $@

# gradio's own limit on pillow is a version behind; the page's tests run with ours.
$(WEB): $(INSTALLED) requirements-web.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-web.txt
	@touch $@
