#!/usr/bin/env bash
# A rehearsal of nbdev 3: do the pages export unchanged? On a copy, in an environment of its own; nothing here is touched.
# nbdev 3 reads pyproject.toml in place of settings.ini, so the copy gets one, with what matters to an export.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
work="${1:?name a folder for environment and copy}"
mkdir -p "$work" && work="$(cd "$work" && pwd)"
[ -x "$work/env/bin/python" ] || "${PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet "nbdev>=3,<4"
rm -rf "$work/copy" && mkdir "$work/copy"
(cd "$root" && git ls-files -co --exclude-standard -z | tar cf - --null -T -) | tar xf - -C "$work/copy"
cd "$work/copy"
version="$(sed -n 's/^version = //p' settings.ini)"
rm settings.ini
cat > pyproject.toml <<TOML
[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "specnb"
description = "a rehearsal"
requires-python = ">=3.10"
dynamic = ["version"]

[project.urls]
Repository = "https://github.com/specnb/specnb"
Documentation = "https://specnb.github.io/specnb/"

[tool.setuptools.dynamic]
version = {attr = "specnb.__version__"}

[tool.nbdev]
nbs_path = "nbs"
lib_path = "specnb"
doc_path = "_docs"
recursive = true
put_version_in_init = true
custom_sidebar = true
black_formatting = false
TOML
"$work/env/bin/nbdev-export" 2>/dev/null || "$work/env/bin/nbdev_export"
"$work/env/bin/python" -c "from importlib.metadata import version; print('nbdev', version('nbdev'))"
"$work/env/bin/python" - "$root/specnb" specnb <<'PYTHON'
# nbdev 3 adds the address of a module's page to its docstring; everything else must be the same, to the letter
import re, sys
from pathlib import Path
ours, theirs = ({p.name: p.read_text() for p in Path(folder).glob("*.py") if p.name != "_modidx.py"} for folder in sys.argv[1:])
plain = {name: re.sub(r'\n\nDocs: https://\S+"""', '"""', text, count=1) for name, text in theirs.items()}
differ = sorted(n for n in ours.keys() | plain.keys() if ours.get(n) != plain.get(n))
added = sum(plain[n] != theirs[n] for n in plain)
print(f"{len(ours) - len(differ)} of {len(ours)} modules are exported unchanged, but for a line `Docs: ...` in {added} docstrings")
if differ: sys.exit("these differ: " + ", ".join(differ))
PYTHON
