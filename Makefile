# Everything a fresh machine needs: Python 3.11+ and make. No GPU, no internet beyond a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all soak lint bench setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("lorabooth needs Python 3.11 or newer; say make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# The main job, end to end, on the embedded pocket base.
demo: setup
	$(BIN)/lorabooth demo --out runs/demo

# The default tests: offline, two cores, under ten minutes.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The default ones and the slow ones.
test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ''

# 500 times SIGKILL, in real processes, and a count of what that did. Hours; faster with --fork, see the file.
soak: setup
	$(BIN)/python -m tests.faults.soak --kills 500

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Measures speed and memory, and writes the README's table. Takes an hour, 17 GB of disk and 16 GB of memory.
# Beside diffusers' DreamBooth script: make bench PEER=PATH/TO/train_dreambooth_lora.py
PEER ?=
PEER_OPTION := $(if $(PEER),--peer-script $(PEER))
bench: setup
	mkdir -p build/bench
	$(BIN)/python benchmarks/step_time.py $(PEER_OPTION)
	$(BIN)/python benchmarks/lora_overhead.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/photos_to_adapter.py $(PEER_OPTION) --class-images 24 --steps 40
	$(BIN)/python benchmarks/vram.py
	$(BIN)/python benchmarks/merge.py --work build/bench
	$(BIN)/python benchmarks/speed_table.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
