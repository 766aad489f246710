# qwenkit: `make chat` on a machine with Python 3.11, a C++ compiler, make and the package
# registries talks with a model; `make check test` says whether the code holds.

PYTHON ?= python3
MODEL := default
PROMPT :=
TESTS := tests
WORKERS := 2
ARGS :=

ENV := .venv
ORACLE_ENV := .venv-oracles
# One environment for each major version of the openai client that other clients ask for.
CLIENT_ENVS := .venv-openai-0 .venv-openai-2 .venv-openai-3
PIP_OPTIONS := --quiet --quiet --disable-pip-version-check --no-input --constraint constraints.txt
CLIENT_PIP_OPTIONS := --quiet --quiet --disable-pip-version-check --no-input --no-deps --no-compile
TEST_OPTIONS = -q -n $(WORKERS) --dist worksteal  # whose neighbours share what a file prepares
HOUSE_TESTS := tests/test_rooms.py tests/test_sizes.py tests/test_docs.py tests/test_import_cost.py
REQUIREMENTS := pyproject.toml constraints.txt Makefile

# llama.cpp is compiled for the processor it runs on, and kept for that processor. Without AMX: on
# virtual machines that announce it, what GCC 12 makes of that code ends in an illegal instruction.
LLAMA_VERSION = $(shell sed -n 's/^llama-cpp-python==//p' constraints.txt)
PROCESSOR = $(shell grep -m 1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null | cksum | cut -d ' ' -f 1)
WHEELS = $(HOME)/.cache/qwenkit/wheels-$(PROCESSOR)
NO_AMX = -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
LLAMA_FLAGS = $(shell echo | cc $(NO_AMX) -E - >/dev/null 2>&1 && echo "$(NO_AMX)")

# What the user wrote, untouched: neither make nor the shell reads a $$ or a quote in it.
export CHAT_PROMPT := $(value PROMPT)
export CHAT_MODEL := $(value MODEL)
unexport PROMPT MODEL

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help chat test oracles check fix bench docs clean

help:
	@echo "make chat      talk with the embedded model; MODEL=name for another one,"
	@echo "               PROMPT=\"...\" or a piped text for one answer"
	@echo "make test      all light tests, in under 5 minutes; TESTS=tests/chat for some"
	@echo "make oracles   the tests that compare with other implementations"
	@echo "make check     lint, format, types, import contracts, sizes, docs"
	@echo "make fix       repair lint and format"
	@echo "make bench     speed beside llama.cpp and transformers; ARGS=\"--json\" for programs"
	@echo "make docs      write docs/cli.md anew from the commands' help"
	@echo "make clean     remove the environments and caches of this folder"

chat: $(ENV)/.installed
	@if [ -n "$$CHAT_PROMPT" ]; \
	then exec $(ENV)/bin/qwenkit chat "$$CHAT_MODEL" --prompt "$$CHAT_PROMPT"; \
	else exec $(ENV)/bin/qwenkit chat "$$CHAT_MODEL"; fi

test: $(ENV)/.installed-for-tests
	OMP_NUM_THREADS=1 $(ENV)/bin/python -m pytest -m "not oracle" $(TEST_OPTIONS) $(TESTS)

# First what would otherwise only be skipped: the other implementations and the default model.
oracles: $(ORACLE_ENV)/.installed $(CLIENT_ENVS:=/.installed)
	$(ORACLE_ENV)/bin/python -c "import gguf, llama_cpp, peft, safetensors, tokenizers, transformers"
	$(ORACLE_ENV)/bin/python -c "import gradio, openai, playwright"
	$(ORACLE_ENV)/bin/python tests/parity/llama_cpp_blas.py
	$(ORACLE_ENV)/bin/qwenkit pull default
	@{ command -v qemu-aarch64 && command -v aarch64-linux-gnu-g++; } >/dev/null \
	|| echo "ARM kernels are not tested: that takes Debian's g++-aarch64-linux-gnu and qemu-user."
	@{ command -v chromium || command -v chromium-browser; } >/dev/null \
	|| echo "The chat page is not driven in a browser: that takes Debian's chromium."
	OMP_NUM_THREADS=1 $(ORACLE_ENV)/bin/python -m pytest -m oracle $(TEST_OPTIONS) $(TESTS)

check: $(ENV)/.installed-for-tests
	$(ENV)/bin/ruff check src tests
	$(ENV)/bin/ruff format --check src tests
	$(ENV)/bin/mypy
	$(ENV)/bin/lint-imports
	$(ENV)/bin/python -m pytest -q $(HOUSE_TESTS)

fix: $(ENV)/.installed-for-tests
	$(ENV)/bin/ruff check --fix src tests
	$(ENV)/bin/ruff format src tests

bench: $(ORACLE_ENV)/.installed
	$(ORACLE_ENV)/bin/qwenkit bench speed --peer-python $(ORACLE_ENV)/bin/python $(ARGS)

docs: $(ENV)/.installed
	$(ENV)/bin/python -m qwenkit.cli.docs docs/cli.md

clean:
	rm -rf $(ENV) $(ORACLE_ENV) $(CLIENT_ENVS) build dist src/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. A stamp makes repeated calls instant; a change of the requirements renews it. What
# is printed goes to standard error, and nothing reads standard input: both belong to `make chat`.

$(ENV)/.installed: $(REQUIREMENTS)
	@$(call create_environment,$(ENV)) >&2 </dev/null
	@$(call install,$(ENV),-e .) >&2 </dev/null
	@touch $@

$(ENV)/.installed-for-tests: $(ENV)/.installed
	@$(call install,$(ENV),-e ".[check$(,)test]") >&2 </dev/null
	@touch $@

$(ORACLE_ENV)/.installed: $(REQUIREMENTS)
	@$(call create_environment,$(ORACLE_ENV)) >&2 </dev/null
	@ls $(WHEELS)/llama_cpp_python-$(LLAMA_VERSION)-*.whl >/dev/null 2>&1 \
	|| { echo "Compiling llama-cpp-python: this takes some minutes, once."; \
	CFLAGS="$(LLAMA_FLAGS)" CXXFLAGS="$(LLAMA_FLAGS)" $(ORACLE_ENV)/bin/python -m pip wheel \
	$(PIP_OPTIONS) --no-deps --no-cache-dir --wheel-dir $(WHEELS) llama-cpp-python; } \
	>&2 </dev/null
	@$(call install,$(ORACLE_ENV),--find-links $(WHEELS) -e ".[test$(,)oracle]") >&2 </dev/null
	@touch $@

# Complete lists, so nothing has to be resolved; compiled is only what the tests import.
$(CLIENT_ENVS:=/.installed): .venv-%/.installed: tests/clients/environments/%.txt Makefile
	@$(call create_environment,$(@D)) >&2 </dev/null
	@echo "Installing client libraries into $(@D), the first time takes a minute ..." >&2
	@$(@D)/bin/python -m pip install $(CLIENT_PIP_OPTIONS) --requirement $< >&2 </dev/null
	@$(@D)/bin/python -m pip check >&2 </dev/null
	@touch $@

, := ,

define create_environment
{ $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "qwenkit needs Python 3.11 or newer; name one: make PYTHON=python3.11 chat"; exit 1; }; \
} && { test -x $(1)/bin/pip || $(PYTHON) -m venv --clear $(1) \
  || { rm -rf $(1); echo "This Python cannot create environments. On Debian and Ubuntu:" \
       "apt-get install python3-venv"; exit 1; }; }
endef

# torch goes first and alone: once it is there, no other package asks for another build of it.
define install
echo "Installing into $(1), the first time takes some minutes ..." \
&& $(1)/bin/python -m pip install $(PIP_OPTIONS) torch \
&& $(1)/bin/python -m pip install $(PIP_OPTIONS) $(2)
endef
