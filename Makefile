# `make demo` and `make test` each set up everything they need in .venv; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
# One test process per core, each with one thread, is the fastest split on small machines.
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)

# The versions of transformers that models must load on, oldest to newest; 5 with the newest torch.
TRANSFORMERS ?= 4.51.3 4.57.6 5.17.0 5.23.0

.PHONY: help demo demo-mixers demo-causal test test-all test-transformers lint clean
help:
	@echo "make demo       build a small corpus, pretrain a small Hydra on it, fill a few masks, finetune it (about 4 minutes)"
	@echo "make demo-mixers   train each of 17 mixers for a minute and compare them (about 20 minutes)"
	@echo "make demo-causal   train a small Doge and a small HGRN2, compare them and let both write (about 3 minutes)"
	@echo "make test       lint and test (about 6 minutes); make test-all runs the long tests too (about 17)"
	@echo "make test-transformers   the models and their export on transformers $(TRANSFORMERS)"
	@echo "make clean        remove .venv and the demo's data and runs"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3.x" >&2; exit 2; }
ifdef UV
	uv venv --quiet --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv $(VENV)
endif

# Byte-compiled on installation: without it every process would spend 20 seconds importing.
INSTALL = $(if $(UV),uv pip install --quiet --compile-bytecode --python $(BIN)/python,$(BIN)/python -m pip install --quiet)

$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	@echo "Installing the pinned packages into $(VENV) (half a minute to a few minutes) ..."
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -r requirements.txt -e '.[dev]'
	@touch $@

data/demo/manifest.json: | $(VENV)/.installed
	$(BIN)/python -m data_prep.convert --dataset demo --out_root data/demo --train_tokenizer 4096 --concat_tokens 128

demo: $(VENV)/.installed data/demo/manifest.json
	$(BIN)/python main.py yamls/demo/hydra.yaml
	$(BIN)/anymixer fill-mask runs/demo-hydra --examples 4
	$(BIN)/python -m data_prep.demo_glue --out_root data/demo/glue
	$(BIN)/python glue.py yamls/demo/glue.yaml

demo-mixers: $(VENV)/.installed data/demo/manifest.json
	$(BIN)/anymixer compare yamls/demo/mixers/*.yaml
	$(BIN)/anymixer report matrices $(patsubst yamls/demo/mixers/%.yaml,runs/demo-mixers-%,$(wildcard yamls/demo/mixers/*.yaml))

demo-causal: $(VENV)/.installed data/demo/manifest.json
	$(BIN)/anymixer compare yamls/demo/causal/doge.yaml yamls/demo/causal/hgrn2.yaml
	$(BIN)/anymixer generate runs/demo-causal-doge --prompt "The function returns" --n-samples 2 --temperature 0.8
	$(BIN)/anymixer generate runs/demo-causal-hgrn2 --prompt "The function returns" --n-samples 2 --temperature 0.8

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=10

test: lint
	@$(PYTEST) -m "not slow"

test-all: lint
	@$(PYTEST)

# Composer allows one version of transformers; models and exports must not need Composer.
$(VENV)-transformers/%/.installed: pyproject.toml
ifdef UV
	uv venv --quiet --clear --python $(PYTHON) $(@D)
else
	$(PYTHON) -m venv --clear $(@D)
endif
	$(if $(UV),uv pip install --quiet --python $(@D)/bin/python,$(@D)/bin/python -m pip install --quiet) \
	  transformers==$* $(if $(filter 4.%,$*),torch==2.7.0 'numpy<2.3',torch) safetensors peft accelerate \
	  omegaconf rich typer matplotlib 'pytest>=8,<10'
	@touch $@

test-transformers: $(TRANSFORMERS:%=$(VENV)-transformers/%/.installed)
	@set -e; for version in $(TRANSFORMERS); do echo "transformers $$version"; OMP_NUM_THREADS=1 \
	  $(VENV)-transformers/$$version/bin/python -m pytest tests/models tests/checkpoints \
	  tests/export/test_flatten.py tests/export/test_export.py tests/export/test_import_checkpoint.py; done

clean:
	rm -rf $(VENV) $(VENV)-transformers data/demo runs/demo-hydra runs/demo-mixers-* runs/demo-causal-*
