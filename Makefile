# Two commands on a fresh machine with Python >= 3.11 and make:  make demo,  make test.
# make page: docs/index.html, anew from docs/walkthrough.md and the code.
PYTHON ?= python3
ENV := .venv
PY := $(ENV)/bin/python

.PHONY: demo test page weights clean
demo: $(ENV)/installed
	$(PY) -m lab.demo

test: $(ENV)/installed
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

page: $(ENV)/installed
	$(PY) -m lab.notes
	$(PY) -m lab.page

weights: $(ENV)/installed
	$(PY) -m toy.build --rebuild

$(ENV)/installed: requirements.txt
	$(PYTHON) -m venv $(ENV)
	$(ENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(ENV) runs
