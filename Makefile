# make quickstart: from text to a scored model, in one go.   make test: every check.
# make test-fast: the checks without training.   make docs: the documentation, in site/.
PYTHON ?= python3
# The index to take torch from, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
DATA := runs/python-stdlib
# For the training of the quickstart, which is shorter on a machine that takes longer.
BUDGET ?= 4m
TRAIN = $(BIN)/pretrain train gpt2_124m --config quickstart.yaml --data.path $(DATA)

# Three processes of one thread each, on two cores: while some wait, others compute.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-fast docs format clean
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer"; exit 2; }
	@echo "== Installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip
	@if [ -n "$(TORCH_INDEX)" ]; then \
		$(BIN)/pip install --quiet "torch>=2.11,<2.14" --index-url "$(TORCH_INDEX)"; fi
	@$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

quickstart: $(VENV)/.installed
	@echo "== 1/6 Training a small GPT-2 on the Python standard library's sources"
	@$(TRAIN) --run.dir $(RUN) --budget $(BUDGET)
	@echo "== 2/6 Making the same model untrained, to compare with"
	@$(TRAIN) --run.dir $(RUN)-untrained --run.max_steps 0
	@echo "== 3/6 Building two lm-eval tasks from held-out text"
	@$(BIN)/pretrain tasks $(DATA) --out $(RUN)/tasks
	@echo "== 4/6 Scoring both with lm-eval-harness (chance is 0.25 for heldout_choice)"
	@echo "untrained:"
	@$(BIN)/pretrain eval $(RUN)-untrained --tasks heldout_choice,heldout_perplexity \
		--include_path $(RUN)/tasks --out $(RUN)-untrained/scores.json
	@echo "trained:"
	@$(BIN)/pretrain eval $(RUN) --tasks heldout_choice,heldout_perplexity \
		--include_path $(RUN)/tasks --out $(RUN)/scores.json
	@echo "== 5/6 Exporting the trained one as a Hugging Face folder, its scores in the card"
	@$(BIN)/pretrain export $(RUN) --out $(RUN)/export --scores $(RUN)/scores.json
	@echo "== 6/6 Drawing the curves, and a page about the run"
	@$(BIN)/pretrain plot $(RUN)
	@$(BIN)/pretrain report $(RUN)
	@echo
	@echo "What lies where"
	@echo "  $(RUN)/report.html       the run on one page: curves, scores, samples, settings"
	@echo "  $(RUN)/plots/curves.png  loss, learning rate, gradient norm, speed"
	@echo "  $(RUN)/export            the model and its card, for transformers, lm-eval and all else"
	@echo "  $(RUN)/scores.json       lm-eval's results"
	@echo "  $(DATA)                the tokens, with their tokenizer"
	@echo "What next"
	@echo "  let it write       $(BIN)/pretrain sample $(RUN)/export --prompt 'def read_'"
	@echo "  your own text      $(BIN)/pretrain train gpt2_124m --config quickstart.yaml \\"
	@echo "                       --data.source FILE_OR_FOLDER --data.validation first:20000 --run.dir runs/mine"
	@echo "  the real recipes   recipes/README.md"

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(PYTEST)

test-fast: $(VENV)/.installed
	$(PYTEST) -m "not slow and not moderate and not cuda"

$(VENV)/.docs: $(VENV)/.installed
	@$(BIN)/pip install --quiet --editable ".[docs]"
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(RUN) $(RUN)-untrained $(DATA)
