# Two commands matter: `make book` and `make test`. Everything lives in $(VENV); nothing else on the machine changes.
VENV ?= .venv
STORY ?=
SMALL ?=
NB_TIMEOUT ?= 900
# The first interpreter that is new enough and can make a virtual environment; `make PYTHON=…` chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES = $(shell find cinema notebooks -type f ! -path '*/films/*' ! -path '*/.*' ! -name '*.pyc') constraints.txt
FILM = films/$(basename $(notdir $(STORY))).mp4

.DEFAULT_GOAL := help
.PHONY: help book test lint ledger movie clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */	/' | expand -t 8

book: $(STAMP) _build/.sources  ## execute the notebooks and build the book into _build/html
	@# Sphinx does not repeat the warnings of pages that it has read: after a failure all pages are read again.
	$(BIN)/jupyter-book build . -n -W --keep-going || { rm -rf _build/.doctrees; exit 1; }
	@echo "The book: _build/html/index.html"

test: lint  ## everything CI runs: ruff, mypy, pytest, nbval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -ra
	@# Films of another version would be refused; and one thread a process, because two that want all cores wait for
	@# one another, ten times as long.
	rm -rf notebooks/films
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout=$(NB_TIMEOUT) -o filterwarnings= notebooks

lint: $(STAMP)  ## only ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ledger: $(STAMP)  ## measure what the claims ledger is missing (hours); a little of everything with SMALL=1
	$(BIN)/python book/_ext/ledger.py $(if $(SMALL),--small)

movie: $(STAMP)  ## a film from a story: make movie STORY=cinema/stories/NAME.yaml
	@test -n "$(STORY)" || { echo "make movie: say which story, e.g. make movie STORY=$(firstword $(wildcard cinema/stories/*))"; exit 1; }
	@test -f "$(STORY)" || { echo "make movie: there is no file $(STORY); give the path of a story or a storyline"; exit 1; }
	$(BIN)/cinema movie "$(STORY)" -o "$(FILM)"

clean:  ## remove the built book, the notebooks' films and all caches; films/, runs/ and .venv stay
	rm -rf _build notebooks/films .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find . -path "./$(VENV)" -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print | xargs rm -rf

# A second call installs nothing unless what to install has changed.
$(STAMP): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || test -x "$(BIN)/python" || { echo "make: Python 3.11 or newer with its venv module is missing; install it (on Debian: apt install python3 python3-venv) or name it with PYTHON=…"; exit 1; }
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install -c constraints.txt -e ".[book]"
	@touch $@

# The execution cache does not see the package: when package, notebooks or versions change, start the book anew.
_build/.sources: $(SOURCES)
	rm -rf _build notebooks/films
	@mkdir -p _build && touch $@
