"""The house rules: one-way storeys, forbidden libraries, pages that can be read, and generated files that are up to date.

Every test walks over the pages and modules that exist, and names all offenders at once.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB, TESTS = ROOT / "nbs", ROOT / "specnb", ROOT / "tests"
if not (NBS / "_quarto.yml").exists(): pytest.skip("only the library is here, not the pages", allow_module_level=True)

PAGES = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
NUMBERED = [p for p in PAGES if p.parent == NBS and re.match(r"\d\d_", p.name)]
NUMBER = {p.stem[3:]: int(p.stem[:2]) for p in NUMBERED}                      # module -> number of its page
MODULES = {name: LIB / f"{name}.py" for name in NUMBER if (LIB / f"{name}.py").exists()}
ALLOWED = {0: {0}, 1: {0, 1}, 2: {0, 2}, 3: {0, 3}, 4: {0, 3, 4}, 5: {0, 1, 2, 3, 4, 5}}   # storey -> storeys that it may import from
NARROWER = {"frontend": {2}, "layers": {2}, "motion": {2}, "nets": {2}, "objectives": {2}, "callbacks": {2}}
HEAVY = {"torch", "fastai", "astropy", "holoviews", "panel"}
FORBIDDEN = {0: HEAVY, 1: {"torch", "fastai", "holoviews", "panel"}, 2: {"astropy", "holoviews", "panel"}, 3: HEAVY, 4: {"torch", "fastai", "astropy"}, 5: set()}
NETWORK = {"requests", "urllib3", "pyvo", "astroquery", "http", "ftplib", "httpx", "aiohttp", "urllib.request"}
TOP_LEVEL = set("""nbs specnb tests settings.ini setup.py README.md _quarto.yml LICENSE CHANGELOG.md CITATION.cff CONTRIBUTING.md MANIFEST.in Makefile constraints.txt
                   .ci .github .gitattributes .gitignore""".split())
MACHINE_PATH = re.compile(r"(?<![\w.~:/-])(?:/(?:work|tmp|home|root|Users|private|var/folders|mnt|opt)/[\w.@-]+|[A-Z]:\\\\Users)")
ids = dict(ids=lambda p: str(p.relative_to(NBS)) if isinstance(p, Path) else str(p))


def cells(page, kind=None):
    "(index, source, cell) of a page's cells."
    found = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return [(i, "".join(c["source"]), c) for i, c in enumerate(found) if kind in (None, c["cell_type"])]


def directives(source): return [line.strip()[2:].strip() for line in source.splitlines() if line.strip().startswith("#|")]


def is_exported(source): return any(re.match(r"(export|exporti|exports)\b", d) for d in directives(source))


def is_visible(source): return not any(re.match(r"(hide|hide_input|export|exporti|include:\s*false|echo:\s*false)\b", d) for d in directives(source))


def code_of(source):
    "Source without directives and IPython magics, so that it parses."
    return "\n".join("" if line.lstrip().startswith(("#|", "%", "!")) else line for line in source.splitlines())


def imports(tree):
    "Names of all modules imported anywhere in a tree; relative ones as specnb.<name>."
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("specnb." if node.level else "") + (node.module or "")
            out |= {base} if node.module else {base + a.name for a in node.names}
            if base == "specnb": out |= {f"specnb.{a.name}" for a in node.names}
    return {o.rstrip(".") for o in out}


def tree_of(path): return ast.parse(path.read_text(encoding="utf-8"), str(path))


def project_files():
    "Tracked files and new ones that git does not ignore; without git, everything but caches."
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout: return [Path(f) for f in done.stdout.splitlines() if (ROOT / f).is_symlink() or (ROOT / f).exists()]
    skipped = {".venv", ".git", "__pycache__", "build", "dist", "_docs", "_proc", "demo"}
    return [p.relative_to(ROOT) for p in ROOT.rglob("*") if (p.is_file() or p.is_symlink()) and not skipped & set(p.relative_to(ROOT).parts) and not any(x.endswith(".egg-info") for x in p.parts)]


# storeys -----------------------------------------------------------------------------------------------------------------------------------------

def test_there_is_something_to_look_at():
    assert len(PAGES) >= 20 and len(MODULES) >= 20


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name):
    number, storey = NUMBER[name], NUMBER[name] // 10
    allowed = NARROWER.get(name, ALLOWED[storey])
    wrong = []
    for target in imports(tree_of(MODULES[name])):
        if target.split(".")[0] != "specnb" or target in ("specnb", "specnb.__version__"): continue
        other = target.split(".")[1]
        if other not in NUMBER: wrong.append(f"{other} has no page")
        elif (NUMBER[other], other) >= (number, name): wrong.append(f"{NUMBER[other]:02d}_{other} does not stand before {number:02d}_{name}")
        elif NUMBER[other] // 10 not in allowed: wrong.append(f"{other} is in storey {NUMBER[other] // 10}, allowed are {sorted(allowed)}")
    assert not wrong, f"specnb.{name}: {wrong}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_forbidden_libraries(name):
    found = {i.split(".")[0] for i in imports(tree_of(MODULES[name]))}
    assert not found & FORBIDDEN[NUMBER[name] // 10], f"specnb.{name} may not import {sorted(found & FORBIDDEN[NUMBER[name] // 10])}"
    assert "nbdev" not in found, f"specnb.{name} imports the notebook tools"


def test_only_catalogue_adql_and_archive_may_open_a_connection():
    found = {name: sorted(i for i in imports(tree_of(path)) if i in NETWORK or i.split(".")[0] in NETWORK) for name, path in MODULES.items() if name not in ("catalogue", "adql", "archive")}
    for name, path in MODULES.items():      # a socket may look for a free port, as a served app must, but call nobody
        tree = tree_of(path)
        if "socket" in imports(tree): found[name] += sorted({n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("connect", "connect_ex", "create_connection", "getaddrinfo", "sendto")})
    assert not {k: v for k, v in found.items() if v}


def test_no_file_or_path_in_the_windows():
    wrong = {}
    for name, path in MODULES.items():
        if NUMBER[name] // 10 != 4: continue
        tree = tree_of(path)
        touched = {i for i in imports(tree) if i.split(".")[0] in ("pathlib", "os", "shutil", "tempfile", "zarr")}
        touched |= {"open()" for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "open"}
        if touched: wrong[name] = sorted(touched)
    assert not wrong


def test_no_star_imports_and_nothing_happens_on_import():
    wrong = []
    for name, path in MODULES.items():
        for node in tree_of(path).body:
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names): wrong.append(f"{name}: from {node.module} import *")
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call): wrong.append(f"{name}, line {node.lineno}: {ast.unparse(node.value)[:60]}")
    assert not wrong, wrong


def test_tests_never_import_the_notebook_tools():
    assert [p.name for p in TESTS.rglob("*.py") if any(i.split(".")[0] in ("nbdev", "execnb") for i in imports(tree_of(p)))] == []


LIGHT = sorted(n for n in MODULES if NUMBER[n] // 10 in (0, 3))
PROBE = """
import sys, random, time
start = time.perf_counter()
import specnb.{0}
seconds = time.perf_counter() - start
heavy = sorted(set(sys.modules) & {1!r})
assert not heavy, "importing loads " + ", ".join(heavy)
import numpy as np
state = lambda: (random.getstate(), np.random.get_state()[1].tolist(), np.geterr(), np.get_printoptions())
for name in [m for m in sys.modules if m.split(".")[0] == "specnb"]: del sys.modules[name]
before = state()
import specnb.{0}       # once more, now that all other libraries are loaded: whatever changes is our doing
assert before == state(), "importing changes random state or numpy's options"
print(seconds)
"""


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_light(name):
    done = subprocess.run([sys.executable, "-c", PROBE.format(name, HEAVY)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, f"specnb.{name}: {done.stderr.strip().splitlines()[-1]}"
    assert float(done.stdout) < 30, f"specnb.{name} takes {float(done.stdout):.1f} s to import"


# pages -------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, **ids)
def test_page_opens_with_title_and_subtitle(page):
    kind, source = cells(page)[0][2]["cell_type"], cells(page)[0][1]
    assert kind == "markdown" and source.startswith("# ") and "\n> " in source, f"{page.name}: the first cell is an H1 and a > subtitle"


@pytest.mark.parametrize("page", NUMBERED, **ids)
def test_page_exports_to_the_module_of_its_name(page):
    named = [d.split()[1] for _, s, _ in cells(page, "code") for d in directives(s) if d.startswith("default_exp")]
    assert named == [page.stem[3:]], f"{page.name}: default_exp is {named}"


@pytest.mark.parametrize("page", NUMBERED, **ids)
def test_exported_cells_are_short(page):
    long = {i: n for i, s, _ in cells(page, "code") if is_exported(s) and (n := sum(1 for line in s.splitlines() if line.strip() and not line.strip().startswith("#|"))) > 25}
    assert not long, f"{page.name}: cells over 25 lines (cell: lines) {long}"


@pytest.mark.parametrize("page", NUMBERED, **ids)
def test_cells_that_import_only_import(page):
    "Exported ones by house rule; all others because the site's builder runs every cell with an import, and that alone."
    mixed = []
    for i, source, _ in cells(page, "code"):
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(code_of(source)).body}
        if kinds == {True, False}: mixed.append(i)
    assert not mixed, f"{page.name}: cells {mixed} mix imports and other code; move the imports to a cell of their own"


@pytest.mark.parametrize("page", NUMBERED, **ids)
def test_page_is_prose_as_well_as_code(page):
    n = sum(is_exported(s) for _, s, _ in cells(page, "code"))
    words = sum(len(re.findall(r"[^\W\d_]\w*", s)) for _, s, _ in cells(page, "markdown"))
    assert words >= 30 * n, f"{page.name}: {words} words for {n} exported cells, {words / max(n, 1):.0f} each"


@pytest.mark.filterwarnings("default::UserWarning")
def test_page_lengths():
    lengths = {p.name: len(cells(p)) for p in NUMBERED}
    for name, n in lengths.items():
        if not 25 <= n <= 80: warnings.warn(f"{name} has {n} cells, a page has 25 to 80")
    assert not {k: n for k, n in lengths.items() if not 10 <= n <= 120}


def test_page_sizes():
    assert not {str(p.relative_to(NBS)): p.stat().st_size // 1024 for p in PAGES if p.stat().st_size > 300 * 1024}, "kB, 300 allowed"


@pytest.mark.parametrize("page", PAGES, **ids)
def test_no_machine_paths(page):
    found = [(i, m.group()) for i, s, c in cells(page) for text in (s, json.dumps(c.get("outputs", []), ensure_ascii=False)) for m in MACHINE_PATH.finditer(text)]
    assert not found, f"{page.name}: (cell, path) {found[:5]}"


@pytest.mark.parametrize("page", [p for p in PAGES if p not in NUMBERED], **ids)
def test_tutorials_use_the_front_door(page):
    wrong = []
    for i, source, _ in cells(page, "code"):
        if is_exported(source): wrong.append(f"cell {i} exports")
        for node in ast.walk(ast.parse(code_of(source))):
            names = [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            wrong += [f"cell {i} uses {n}" for n in names if re.match(r"_[^_]", n)]
    assert not wrong, f"{page.name}: {wrong}"


def public_names(path):
    "The module's __all__."
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets): return ast.literal_eval(node.value)
    return []


def test_public_names_are_shown_at_work():
    unused, total = {}, 0
    for page in NUMBERED:
        if page.stem[3:] not in MODULES: continue
        names = public_names(MODULES[page.stem[3:]])
        shown = "\n".join(s for _, s, _ in cells(page, "code") if is_visible(s) and not is_exported(s))
        total += len(names)
        if missing := [n for n in names if not re.search(rf"\b{re.escape(n)}\b", shown)]: unused[page.stem] = missing
    share = 1 - sum(map(len, unused.values())) / total
    print(f"{share:.1%} of {total} public names are used visibly in their page; not: {unused}")
    assert share >= 0.9, f"{share:.1%} of {total}; not used visibly: {unused}"


# the house ---------------------------------------------------------------------------------------------------------------------------------------

def test_top_level_holds_only_what_is_agreed():
    assert {f.parts[0] for f in project_files()} <= TOP_LEVEL, sorted({f.parts[0] for f in project_files()} - TOP_LEVEL)


def test_one_quarto_file_for_two_places():
    link = NBS / "_quarto.yml"
    if not (ROOT / ".git").exists() and not link.is_symlink(): pytest.skip("a source archive holds a copy in place of the link")
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"


def test_sidebar_and_pages_agree():
    yaml = pytest.importorskip("yaml")
    def entries(item):
        if isinstance(item, str): return [item]
        return [e for part in (item.get("contents", []) if isinstance(item, dict) else item) for e in entries(part)]
    listed = entries(yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"])
    here = {str(p.relative_to(NBS)) for p in PAGES}
    assert len(listed) == len(set(listed)), "a page is listed twice"
    assert set(listed) == here, f"listed and not there: {sorted(set(listed) - here)}; there and not listed: {sorted(here - set(listed))}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the project, for commands that write."
    folder = tmp_path_factory.mktemp("a copy") / "specnb"
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def tool(name, folder):
    """Run one of the notebook tools, the way a contributor does, in a folder.

    Where Quarto is missing, nbdev would download it and then reinstall the package *from that folder* with pip. So commands of
    these names stand in front, which do nothing and fail: preparing pages asks only whether `quarto` is there."""
    command = shutil.which(name, path=str(Path(sys.executable).parent))
    if command is None: pytest.skip(f"{name} is not installed: this lane runs without the notebook tools")
    guard = folder.parent / "guard"
    guard.mkdir(exist_ok=True)
    for blocked in ("quarto", "pip", "curl", "sudo"):
        (guard / blocked).write_text("#!/bin/sh\nexit 1\n")
        (guard / blocked).chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore", "PATH": f"{guard}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([command], cwd=folder, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, f"{name}: {(done.stderr or done.stdout)[-1500:]}"


def contents(folder, pattern): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob(pattern) if not {"_proc", ".ipynb_checkpoints", "__pycache__"} & set(p.relative_to(folder).parts)}


def changed(before, after): return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


def test_export_leaves_no_diff(copy):
    before = contents(copy / "specnb", "*.py")
    tool("nbdev_export", copy)
    assert not changed(before, contents(copy / "specnb", "*.py")), "run nbdev_export"


def test_clean_leaves_no_diff(copy):
    before = contents(copy / "nbs", "*.ipynb")
    tool("nbdev_clean", copy)
    assert not changed(before, contents(copy / "nbs", "*.ipynb")), "run nbdev_clean"


def test_readme_is_made_from_the_index_page():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
