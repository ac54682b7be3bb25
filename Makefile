# `make serve` and `make test` are all that a newcomer needs; both make .venv on first use.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: serve test test-unit test-gpu memcheck fuzz check format clean

serve: $(VENV)/.serve
	$(BIN)/octavo serve $(ARGS)

# The tests start many processes: what Python has compiled for one serves all, and the next run.
test test-unit: export PYTHONDONTWRITEBYTECODE =

# Everything, the slow tests too. `make test ARGS="-k scheduler"` runs a part.
test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

# Two and a half minutes on two cores: no model weights, no real servers, fewer examples of properties.
test-unit: $(VENV)/.dev
	$(BIN)/python -m pytest tests/unit -m "not slow" $(ARGS)

# Needs a CUDA device; skipped where there is none.
test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest tests -m gpu $(ARGS)

# A thousand requests with every access to memory of our kernels checked (compute-sanitizer, a minute).
KERNELS = $(shell grep -rhoE 'def \w+_kernel' octavo/kernels | sed 's/def /--kernel-name kns=/')
memcheck: $(VENV)/.dev
	compute-sanitizer --tool memcheck --error-exitcode 9 $(KERNELS) \
		$(BIN)/python -m pytest tests/gpu -m gpu -k thousand

# `make fuzz ARGS="gguf --minutes 10"`; fuzz/README.md has the names.
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m fuzz.run $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/architecture

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and pinned: a range would fetch another build of it.
$(VENV)/.serve: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e ".[server]"
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.serve
	$(PIP) -e ".[dev]"
	touch $@

# Without atheris, the harnesses run unguided.
$(VENV)/.fuzz: pyproject.toml $(VENV)/.dev
	$(PIP) -e ".[fuzz]" || echo "no atheris for this Python: fuzzing without coverage"
	touch $@
