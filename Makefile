PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench bench-gpu clean
.DELETE_ON_ERROR:

# pip installs torch first and by its pin: a resolver that meets "torch" unpinned would take another build.
$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Interrupt it and run it again: it goes on where it was.
RUNS = awk -F, '/,mini,finished,/ { print $$1 }' experiments/results.csv
demo: $(READY)
	$(BIN)/python scripts/run_study.py experiments/studies/mini.toml
	$(BIN)/python scripts/split_results.py
	@echo; echo "Text of the last run, after 'The function ':"
	@$(BIN)/python scripts/sample.py --tokens 100 --num_samples 3 --prompt "The function " --run "$$($(RUNS) | tail -n 1)"
	@echo; echo "The runs' curves, one line each, then the study's figures, then the page with all of it:"
	@$(BIN)/python scripts/plot.py --each $$($(RUNS) | tail -n 4)
	@$(BIN)/python scripts/plot.py --stage mini --only all
	@$(BIN)/python scripts/report.py

test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python scripts/gpt/bench.py

# Eight minutes at most, the most valuable part first; each part is a file as soon as it is done.
GPU_OUT := experiments/gpu
bench-gpu: $(READY)
	$(BIN)/python scripts/gpt/bench.py --device cuda --out $(GPU_OUT) --deadline_s 240
	-timeout -s INT 120 $(BIN)/python scripts/hamt/compare_baselines.py --speed_only --preset 100m \
		--mixer both --device cuda --output_dir $(GPU_OUT)
	-$(BIN)/python scripts/scaled/bench_scaled.py --device cuda --out $(GPU_OUT) --deadline_s 120

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
