# The words of the README: make reproduce, make evidence, make cures, make test, make lint. PYTHON is any Python >= 3.11.
PYTHON ?= python3
PARAMS ?= params/miniature.yaml
BIN := .venv/bin
WORKERS ?= 2

.PHONY: setup reproduce evidence cures test lint lock clean

setup: .venv/installed

reproduce: .venv/installed
	$(BIN)/ctxlib reproduce --params "$(PARAMS)"

# many trainings: a notebook a core at a time; stopped and called again it goes on
evidence: .venv/installed
	$(BIN)/ctxlib reproduce --params params/evidence.yaml

# the bench of cures; stopped and called again it goes on
cures: .venv/installed
	$(BIN)/ctxlib reproduce --params params/cures.yaml

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
	rm -rf .venv .snakemake .pytest_cache .ruff_cache .hypothesis *.egg-info outputs/*/work
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@
