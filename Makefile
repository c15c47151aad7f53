# Two commands on a fresh machine with Python >= 3.11 and make:  make demo,  make test.
PYTHON ?= python3
ENV := .venv
PY := $(ENV)/bin/python

.PHONY: demo test weights clean
demo: $(ENV)/installed
	$(PY) -m lab.demo

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
