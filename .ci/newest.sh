#!/usr/bin/env bash
# The library and its tests on the newest of everything, without the notebook tools: in an environment of its own.
# `.ci/newest.sh FOLDER [pytest arguments]`; the folder is made, and kept for a second run.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
folder="${1:?name a folder for the environment}"; shift
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --upgrade --upgrade-strategy eager "$root[all]" "pytest>=8" pytest-xdist hypothesis selenium pyyaml psutil
! "$folder/bin/python" -c "import nbdev" 2>/dev/null || { echo "the notebook tools are in this environment: the lane proves nothing"; exit 1; }
"$folder/bin/python" - <<'PYTHON'
from importlib.metadata import version
print(", ".join(f"{n} {version(n)}" for n in "torch fastai fastcore zarr xarray holoviews panel numpy astropy".split()))
PYTHON
cd "$root/tests"
OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest "$@"
