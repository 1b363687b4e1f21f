# Needs Python >= 3.11 and make, nothing else: everything is installed into .venv. `make help` lists the targets.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-for
LENS4 := .venv-lens4
PIP_FLAGS ?= -qq
PIP := $(BIN)/python -m pip $(PIP_FLAGS) --disable-pip-version-check --no-input install -c constraints.txt

# Tried by running them, since a name on the PATH may be a launcher without its interpreter.
CHECK_PYTHON := -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python $(CHECK_PYTHON) && echo $$python && break; done)

# Matrix products as other processors compute them, and the tests whose outcome could rest on that.
PROCESSORS := MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default
NUMERICAL := $(addprefix tests/,probes tasks theory models measures training/test_training.py sweeps/test_batch.py)

# Two processes, each file in one of them. Bytecode is kept, also where the environment says not to: both
# processes, and each command that a test starts, would compile everything anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-lens4 test-processors soak lint check-format check-lint check-types check-rooms docs format bench wheel clean venv $(VENV)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile
	@echo "  PYTHON=...            the interpreter to set up with (default: the first of python3.13, 3.12, 3.11, python3)"

demo: $(STAMP) ## train on a Markov chain and watch the causal graph appear
	$(BIN)/mechcausal train runs/markov_chain.toml

test: $(STAMP) ## run the whole default test suite, in two processes
	$(PYTEST)

test-lens4: $(LENS4)/.installed-for ## run the same suite with TransformerLens 4.x
	$(LENS4)/bin/python -m pytest -n 2 --dist loadfile

test-processors: $(STAMP) ## run the numerical tests with the arithmetic of other processors
	@for processor in $(PROCESSORS); do \
		echo "== $$processor"; \
		env $$processor $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not soak" $(NUMERICAL) || exit 1; \
	done

soak: $(STAMP) ## what the default suite leaves out: killed runs and workers, a W&B server
	$(BIN)/python -m pytest -m soak

lint: check-format check-lint check-types check-rooms ## check format, lint, types and the order of the rooms

check-format: $(STAMP)
	$(BIN)/ruff format --check .

check-lint: $(STAMP)
	$(BIN)/ruff check .

check-types: $(STAMP)
	$(BIN)/mypy

check-rooms: $(STAMP)
	$(BIN)/lint-imports

docs: $(STAMP) ## build the documentation into build/docs; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

format: $(STAMP) ## rewrite the code to the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure speed (tests/benchmarks, not part of `make test`)
	$(BIN)/python -m pytest tests/benchmarks -s

wheel: $(STAMP) ## build the sdist and the wheel into dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove the environments, builds and caches; records in runs/ stay
	rm -rf $(VENV) $(LENS4) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find mechcausal probes tests -name __pycache__ -type d -prune -exec rm -rf {} +

venv $(VENV): $(STAMP)

# The stamp is written last and holds the folder it was made for. A .venv without it is half-made, and one that was
# copied or moved still points to its old folder: both are remade from nothing.
MADE_FOR := $(shell test -x $(BIN)/python && cat $(STAMP) 2>/dev/null)
ifneq ($(MADE_FOR),$(CURDIR))
.PHONY: $(STAMP)
endif

# hatchling and setuptools come first, and builds use them instead of fetching their own, so that they too are pinned.
$(STAMP): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) $(CHECK_PYTHON) || { echo "mechcausal needs Python >= 3.11 with its venv module:\
	 found none$(if $(PYTHON), in PYTHON=$(PYTHON)); install one or name it with make PYTHON=..." >&2; exit 1; }
	@echo "Setting up $(VENV) from constraints.txt (once; a few minutes) ..."
	@test "$(MADE_FOR)" = "$(CURDIR)" || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $(STAMP)
	@$(PIP) pip setuptools hatchling
	@$(PIP) --no-build-isolation -e ".[dev]"
	@$(PIP) --no-deps sweeps # for the schema in it; what its code needs does not go with numpy 2
	@echo "$(CURDIR)" > $(STAMP)

# Seconds instead of minutes: it finds in .venv what constraints-lens4.txt does not replace.
$(LENS4)/.installed-for: $(STAMP) constraints-lens4.txt
	@rm -rf $(LENS4)
	@$(BIN)/python -m venv --without-pip $(LENS4)
	@$(BIN)/python -c 'import sys, sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(LENS4)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth
	@$(BIN)/python -m pip --python $(LENS4)/bin/python $(PIP_FLAGS) --disable-pip-version-check --no-input \
		install --no-deps -r constraints-lens4.txt
	@echo "$(CURDIR)" > $@
