# Two commands on a fresh machine with Python >= 3.11 and make:  make demo,  make test.
PYTHON ?= python3
ENV := .venv
PY := $(ENV)/bin/python
RUN := runs/demo

.PHONY: demo test weights clean
demo: $(ENV)/installed
	$(PY) train.py --stage 1 --out $(RUN) --overwrite
	rm -rf $(RUN)/samples
	$(PY) sample.py --steps 4 --run $(RUN) --out $(RUN)/samples
	$(PY) evaluate.py --run $(RUN) --steps 4 --num 200 --json $(RUN)/metrics.json
	@echo "the student beside its teacher: $$(ls $(RUN)/preview-*.png | tail -n 1)"
	@echo "its pictures: $(RUN)/samples/grid.png; its metrics: $(RUN)/metrics.json"

test: $(ENV)/installed
	$(PY) -m ruff check .
	$(PY) -m pytest

weights: $(ENV)/installed
	$(PY) -m toy.build --rebuild

$(ENV)/installed: requirements.txt
	$(PYTHON) -m venv $(ENV)
	$(ENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(ENV) runs
