# Every target sets up what it needs in .venv; a fresh clone needs nothing but Python >= 3.10 and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test bench lint clean

demo: $(STAMP)
	rm -rf demo-output
	$(BIN)/python -m sparse_rcnn.data.synthetic demo-output/scenes --train 0 --valid 8 --seed 2026
	$(BIN)/python -m sparse_rcnn.infer demo-output/scenes/valid --output demo-output/drawn --stages \
		--json demo-output/detections.json
	@echo "drawn images, and the boxes of every stage (*.stages.jpg): demo-output/drawn"

test: $(STAMP)
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python -m benchmarks.model

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Reinstalled only when the dependencies change: the install is editable.
$(STAMP): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint,backbones]'
	touch $@

clean:
	rm -rf build dist *.egg-info demo-output .pytest_cache .ruff_cache
