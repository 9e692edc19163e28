# make demo: train a small RG-Flow on MSDS1 and draw samples. make test: linter and tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG := configs/msds1_demo.args
# Networks this small run best on one thread; a second one gains little and loses much on a busy machine.
demo test: export OMP_NUM_THREADS := 1

.PHONY: demo test
.DELETE_ON_ERROR:

demo: $(VENV)/requirements.done
	$(BIN)/python main.py @$(CONFIG)
	$(BIN)/python plot_mix_temperature.py @$(CONFIG) --temperatures 1 --grid 8

test: $(VENV)/requirements-dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --dist worksteal

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/requirements-dev.done: requirements-metrics.txt requirements-explore.txt

# A stamp per requirements file: nothing is installed again until the file changes.
$(VENV)/%.done: %.txt requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement $<
	touch $@
