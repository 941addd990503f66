PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench bench-gpu clean
.DELETE_ON_ERROR:

# Exact versions: `make LOCK= demo` takes what is newest instead, for a Python that has not these.
LOCK ?= -c requirements.lock
PIP := $(BIN)/pip --disable-pip-version-check

# pip installs torch first and by its pin: a resolver that meets "torch" unpinned would take another
# build.
$(READY): requirements.txt requirements-dev.txt requirements.lock
	@echo "setting up $(VENV), once: step 1 of 2, torch (the largest part)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(LOCK) "$$(grep '^torch==' requirements.txt)"
	@echo "setting up $(VENV): step 2 of 2, the other packages"
	@$(PIP) install $(LOCK) -r requirements-dev.txt
	@touch $@

# Two launchers share the study's runs, one on each core. Interrupt it and run it again: it goes on
# where it was.
STUDY := experiments/studies/mini.toml
RUNS = awk -F, '/,mini,finished,/ { print $$1 }' experiments/results.csv
demo: export OMP_NUM_THREADS = 1
demo: $(READY)
	@$(BIN)/python scripts/run_study.py $(STUDY) > logs/demo-second.out 2>&1 & \
		$(BIN)/python scripts/run_study.py $(STUDY); code=$$?; wait; exit $$code
	@$(BIN)/python scripts/split_results.py --stages experiments/tables/mini.toml
	@echo; echo "Text of the last run, after 'The function ':"
	@$(BIN)/python scripts/sample.py --tokens 45 --prompt "The function " --run "$$($(RUNS) | tail -n 1)"
	@$(BIN)/python scripts/plot.py --stage mini --stages experiments/tables/mini.toml --only steps,forest
	@$(BIN)/python scripts/report.py
	@echo
	@echo "In the table above, an interval that leaves out zero is a difference; one that holds zero"
	@echo "shows none. The picture: experiments/figures/difference_mini.png. Next:"
	@echo "    open experiments/report.html                    (Linux: xdg-open) all of it, one page"
	@echo "    source .venv/bin/activate                       for this and all other commands"
	@echo "    PRESET=demo ATTNGATE=headwise python train_gpt.py    a run of your own"

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
	$(BIN)/python scripts/gpt/bench.py --device cuda --out $(GPU_OUT) --deadline_s 150
	-$(BIN)/python scripts/hamt/compare_baselines.py --speed_only --preset 100m --device cuda \
		--precision bf16 --knobs compile=1 --lengths 1024,8192 --tokens_per_step 16384 \
		--decode_contexts 1024,16384 --output_dir $(GPU_OUT) --deadline_s 120
	-$(BIN)/python scripts/scaled/bench_scaled.py --device cuda --out $(GPU_OUT) --deadline_s 120
	-timeout -s INT 90 $(BIN)/python scripts/arith/bench_arith.py --device cuda --out $(GPU_OUT) \
		--deadline_s 80

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
