# Two commands on a fresh machine with Python >= 3.11 and make:  make demo,  make test.
PYTHON ?= python3
ENV := .venv
PY := $(ENV)/bin/python
RUN := runs/demo

.PHONY: demo test weights clean
demo: $(ENV)/installed
	$(PY) train.py --stage 1 --out $(RUN) --overwrite
	$(PY) evaluate.py --run $(RUN) --steps 4 --num 200 --json $(RUN)/metrics.json
	$(PY) train.py --stage 2 --init $(RUN) --iterations 360 --out $(RUN)-stage2 --overwrite
	rm -rf $(RUN)-stage2/samples
	$(PY) sample.py --steps 4 --run $(RUN)-stage2 --out $(RUN)-stage2/samples
	$(PY) evaluate.py --run $(RUN)-stage2 --steps 4 --num 200 --json $(RUN)-stage2/metrics.json
	@echo "undistilled, stage 1, stage 2 and teacher, side by side: $$(ls $(RUN)-stage2/preview-*.png | tail -n 1)"
	@echo "pictures: $(RUN)-stage2/samples/grid.png; metrics: $(RUN)/metrics.json, $(RUN)-stage2/metrics.json"

test: $(ENV)/installed
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

weights: $(ENV)/installed
	$(PY) -m toy.build --rebuild

$(ENV)/installed: requirements.txt
	$(PYTHON) -m venv $(ENV)
	$(ENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(ENV) runs
