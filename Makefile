# Every command sets .venv up by itself when it is missing or requirements.txt changed. `make` lists them.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup book test lab run data bench clean

PY := .venv/bin/python
# texts are UTF-8 whatever the locale says, or a library makes of it
export PYTHONUTF8 := 1
RUN ?= infnet
IN_RANGE := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

help:  ## list these commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

setup:  ## build .venv from requirements.txt; PYTHON=python3.12 chooses the interpreter
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	  if "$$python" -c '$(IN_RANGE)' >/dev/null 2>&1; then exec "$$python" tools/set_up.py; fi; \
	done; \
	echo "set-up: none of these runs as Python 3.11, 3.12 or 3.13 with its venv module: $(or $(PYTHON),python3.11 python3.12 python3.13 python3)." >&2; \
	echo "Install one (Debian: apt install python3 python3-venv) or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	exit 1

book: setup  ## build the site into _build/html, executing every chapter
	@$(PY) tools/build_book.py

test: setup  ## run every test, quick ones first, notebooks last; ARGS="-k lungs" for some
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --maxschedchunk 1 $(ARGS)

lab: setup  ## open the chapters in JupyterLab
	@$(PY) -m jupyterlab --ServerApp.root_dir=notebooks $(ARGS)

run: setup  ## execute notebooks/runs/$RUN.ipynb into out/ and runs/: make run RUN=infnet ARGS="-p epochs 2"
	@test -f notebooks/runs/$(RUN).ipynb || \
	  { echo "There is no notebooks/runs/$(RUN).ipynb; RUN is one of:" $$(cd notebooks/runs && ls *.ipynb | sed 's/\.ipynb//') >&2; exit 1; }
	@mkdir -p out
	@$(PY) -m papermill notebooks/runs/$(RUN).ipynb out/$(RUN).ipynb -p out runs/$(RUN) $(ARGS)

data: setup  ## list the data sets and weights, or fetch one: make data ARGS="fetch chest-ct"
	@$(PY) -m covidnb.catalog $(or $(ARGS),list)

bench: setup  ## time the package's slow parts (benchmarks/)
	@for script in benchmarks/*.py; do echo "== $$script"; $(PY) "$$script" || exit 1; done

clean:  ## remove .venv and the built site; data, runs and out stay
	rm -rf .venv _build covidnb.egg-info .pytest_cache .ruff_cache .hypothesis
