# make demo   sets up .venv and runs the main job on a simulated survey
# make test   sets up .venv and runs every test: the notebooks, then tests/
# make docs   builds the site, where Quarto is installed
# make bench  runs the benchmarks
PYTHON ?= python3
WORKERS ?= 2
RUN ?= demo

.PHONY: demo test docs bench clean
.DELETE_ON_ERROR:

.venv/ready: setup.py settings.ini constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 10), 'specnb needs Python 3.10 or newer, this is ' + sys.version"
	@echo "Installing specnb and what it needs into .venv: some minutes the first time, without further words"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

demo: .venv/ready
	.venv/bin/specnb demo "$(RUN)"

# one thread a process, since the workers are as many as the cores
test: export OMP_NUM_THREADS = 1
test: .venv/ready
	.venv/bin/nbdev_test --n_workers $(WORKERS) --do_print
	.venv/bin/python -m pytest tests -n $(WORKERS) --dist loadfile

docs: .venv/ready
	@command -v quarto >/dev/null || { echo "Quarto is not installed: see quarto.org, then run make docs again"; exit 1; }
	.venv/bin/python -c "from nbdev.quarto import nbdev_docs; nbdev_docs()"

bench: .venv/ready
	for f in tests/benchmarks/bench_*.py; do echo "== $$f"; .venv/bin/python "$$f" || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info _docs _proc
