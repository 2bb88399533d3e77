# Each target builds .venv first if it has to. Another Python: make PYTHON=python3.12 test
# More arguments for pytest: make test ARGS='-k budget -x'
# A run of your own, or its URL: make serve SOURCE=s3://bucket/run

PYTHON ?= python3
RUN := .venv/bin/python -m
LOWEST := tests/test_load_tensors.py tests/test_table.py tests/test_compiling.py
LOWEST_TOOLS := anyio blockbuster hypothesis psutil pytest pytest-timeout safetensors
PATIENT := --timeout=0 --override-ini faulthandler_timeout=0
# pip shows its progress to a person, and keeps quiet in a log.
PIP_INSTALL := $(RUN) pip install $$(test -t 2 || echo --quiet) --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo serve serve-s3 test test-lowest soak fuzz check cover bench bench-remote bench-disk bench-serving format dist clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: .venv/installed ## save a small checkpoint, look into it, and watch it load
	@$(RUN) examples.demo $(ARGS)

serve: .venv/installed-serve ## serve a model in a browser's sight while new versions come in
	@$(RUN) examples.serve $(if $(SOURCE),--run $(SOURCE)) $(ARGS)

serve-s3: .venv/installed ## run a server of S3 on this machine (Swift), for make serve SOURCE=s3://…
	@$(RUN) tests.servers

test: .venv/installed ## run the tests, three at a time: some of them wait
	$(RUN) pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-lowest: .venv-lowest/installed ## run some of the tests on the lowest releases that are declared
	.venv-lowest/bin/python -m pytest -p no:cacheprovider $(LOWEST) $(ARGS)

check: .venv/installed ## formatting, lint, types, and who may import whom
	$(RUN) ruff format --check
	$(RUN) ruff check
	$(RUN) mypy
	.venv/bin/lint-imports

soak: .venv/installed ## swap a model a thousand times under readers, load 500 times, meet savers
	$(RUN) pytest tests/test_live_soak.py tests/test_soak.py tests/test_saving_meanwhile.py \
		--soak-swaps 1000 --soak-loads 500 --soak-seconds 60 $(PATIENT) $(ARGS)
	$(RUN) pytest tests/test_save_faults.py tests/test_save_cancellation.py tests/test_cancellation.py \
		tests/test_save_run.py tests/test_store_saving.py tests/test_store_runs.py \
		--every-step --both-loops $(PATIENT) $(ARGS)

fuzz: .venv/installed-fuzz ## look for inputs that break a promise; ARGS='load -runs=1000' for one target
	@$(RUN) tests.fuzz $(ARGS)

cover: .venv/installed ## run the tests, and fail where too few lines and branches are covered
	$(RUN) pytest --cov $(ARGS)

bench: .venv/installed-bench ## measure, beside what others use instead
	$(RUN) pytest bench --full $(PATIENT) --ignore=bench/serving --ignore=bench/remote --ignore=bench/disk $(ARGS)

bench-remote: .venv/installed-bench ## measure loads and saves over the network, beside what others use instead
	$(RUN) pytest bench/remote --full $(PATIENT) $(ARGS)

bench-disk: .venv/installed-bench ## measure lookups of rows that stay on the disk (12 GB, and fio), beside what others use
	$(RUN) pytest bench/disk --full $(PATIENT) $(ARGS)

bench-serving: .venv/installed-bench ## measure how late a service answers while a version comes in
	$(RUN) pytest bench/serving --full $(PATIENT) $(ARGS)

format: .venv/installed ## format, and fix what can be fixed without thought
	$(RUN) ruff format
	$(RUN) ruff check --fix

dist: .venv/installed ## build the wheel and the source archive into dist/
	$(RUN) build

clean: ## remove what the other targets made, .venv excepted
	rm -rf dist build .coverage coverage.xml htmlcov .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last, so an interrupted installation is taken up again. A .venv that cannot run pip, or
# not on a Python that is new enough, is made anew.
.venv/installed: pyproject.toml constraints.txt
	@.venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
			echo "asyncloader needs Python 3.11 or newer, and $(PYTHON) is not: $$("$(PYTHON)" --version 2>&1)"; \
			echo "Name another one: make PYTHON=python3.12"; exit 1; }; \
		echo "Creating .venv with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv --clear .venv; }
	@echo "Installing asyncloader and its tools into .venv (torch is large, this may take minutes)"
	@$(PIP_INSTALL) --upgrade 'pip>=25.1'
	@$(PIP_INSTALL) --editable . --group dev --constraint constraints.txt
	@touch $@

# torch and the tools of the tests are those of constraints.txt.
.venv-lowest/installed: .venv/installed constraints-lowest.txt
	@echo "Installing the lowest releases that are declared into .venv-lowest"
	@.venv/bin/python -m venv --clear .venv-lowest
	@grep -Ev '^(numba|numpy|obstore|rich|typer|opentelemetry-.*|prometheus-client)==' constraints.txt \
		> .venv-lowest/constraints.txt
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[metrics,otel]' $(LOWEST_TOOLS) \
		--constraint constraints-lowest.txt --constraint .venv-lowest/constraints.txt
	@touch $@

.venv/installed-bench: .venv/installed
	@echo "Installing what asyncloader is measured against"
	@$(PIP_INSTALL) --group bench --constraint constraints.txt
	@touch $@

.venv/installed-fuzz: .venv/installed
	@echo "Installing the fuzzer"
	@$(PIP_INSTALL) --group fuzz --constraint constraints.txt
	@touch $@

.venv/installed-serve: .venv/installed
	@echo "Installing what the server is made of"
	@$(PIP_INSTALL) --group serve --constraint constraints.txt
	@touch $@
