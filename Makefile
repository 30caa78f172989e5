# `make help` lists the targets and the variables.

VENV ?= .venv
ARGS ?=
RUN := $(VENV)/bin/python
NANO := configs/cascade_mask_rcnn_mamba_vision_nano_shapes.py
DEMO := output/demo
SCENES := $(or $(DETECTRON2_DATASETS),datasets)/shapes/val/images

# tools/setup.sh reads these; where PYTHON, TORCH and DETECTRON2 are not set, it chooses.
export VENV

# Threads that wait for each other sleep: by default they spin, and on a CPU that other work shares
# a step of training then takes ten times as long.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format clean

help: ## list the targets and the variables
	@echo "usage: make TARGET [VARIABLE=VALUE ...]"
	@echo
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 14
	@echo
	@sed -nE 's/^#   ([A-Z0-9]+) +(.*)/  \1\t\2/p' tools/setup.sh | expand -t 14
	@echo "  ARGS        more arguments for pytest, for example ARGS='-m \"not slow\"'"

setup: ## make the virtual environment; every target below does that first
	@tools/setup.sh

demo: setup ## draw scenes, train a small detector on them, draw what it finds, print its AP
	$(RUN) tools/lazyconfig_train_net.py --config-file $(NANO) --resume train.output_dir=$(DEMO)
	$(RUN) tools/demo.py --config-file $(NANO) --weights $(DEMO)/model_final.pth \
		--input "$(SCENES)" --output $(DEMO)/pictures --scale 2 --overwrite
	@$(RUN) -c "import json; found = json.load(open('$(DEMO)/results.json')); \
		print('on held-out scenes: box AP %.1f, mask AP %.1f' % \
		tuple(found[task]['AP'] for task in ('bbox', 'segm')))"

test: setup ## run the tests
	$(RUN) -m pytest $(ARGS)

lint: setup ## check format and style (ruff) and types (mypy)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: setup ## format the code and mend what ruff can mend
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean: ## remove what the other targets wrote, but no data set and no environment
	rm -rf $(DEMO) build dist .mypy_cache .pytest_cache .ruff_cache projects/MambaVision/*.egg-info
