"""Build what would be uploaded, install it in an environment of its own, and use it there. Needs no network.

`python .ci/package.py` does everything; `--only-build FOLDER` builds into a folder. The new environment sees the libraries of the one that runs
this, but not the checkout: what is missing from the wheel is missing here.
"""
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "fastai", "safetensors", "holoviews", "panel", "bokeh", "datashader", "tsdownsample", "pyvo"}   # what only the extras bring
SLIM = "wave spectra simulate prep fits eso ingest catalogue depend dims disentangle traverse search".split()    # what must work without them
LOOK = """
import importlib, json, pkgutil, sys, specnb
missing = set(json.loads(sys.argv[1]))
class Absent:                                       # as if they were not installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
print(json.dumps({"file": specnb.__file__, "version": specnb.__version__}))
for found in sorted(m.name for m in pkgutil.iter_modules(specnb.__path__)):
    if found == "_modidx": continue
    try: importlib.import_module("specnb." + found)
    except ModuleNotFoundError as error: print(json.dumps({"module": found, "error": str(error)}))
    else: print(json.dumps({"module": found, "error": ""}))
"""


def call(*command, **options):
    "What a command prints; its complaint if it fails."
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode: raise SystemExit(f"{command[0]} {command[1]}: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done.stdout


def build(folder):
    "Wheel and source archive of a clean copy of the project; their paths."
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "specnb"
        names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True).stdout.splitlines()
        for name in names or [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]:
            if not (root / name).exists(): continue
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((root / name).read_bytes())
        call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, copy)
    return next(Path(folder).glob("*.whl")), next(Path(folder).glob("*.tar.gz"))


def check_contents(wheel, archive):
    "The wheel holds every module and the mark that it is typed, and nothing else; the archive holds pages, tests and what the Makefile needs."
    modules = {f"specnb/{p.name}" for p in (root / "specnb").glob("*.py")} | {"specnb/py.typed"}
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert inside == modules, f"only in the wheel: {sorted(inside - modules)}; not in it: {sorted(modules - inside)}"
    packed = {n.split("/", 1)[1] for n in tarfile.open(archive).getnames() if "/" in n}
    wanted = {"setup.py", "settings.ini", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt", "_quarto.yml", "nbs/index.ipynb", "tests/conftest.py", "specnb/wave.py"}
    assert wanted <= packed, f"not in the archive: {sorted(wanted - packed)}"
    words = "\n".join(zipfile.ZipFile(wheel).read(n).decode() for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    for extra in ("train", "app", "archive", "cluster", "all", "dev"): assert f"Provides-Extra: {extra}" in words, f"no extra {extra}"
    for extra in ("train", "all", "dev"): assert re.search(rf"Requires-Dist: torch.*extra == ['\"]{extra}['\"]", words), f"extra {extra} does not bring torch"
    assert not [line for line in words.splitlines() if line.startswith("Requires-Dist: torch") and "extra ==" not in line], "torch is asked of everybody"


def environment(folder, wheel):
    "A new environment with the wheel in it, which sees the libraries of this one; its interpreter."
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--force-reinstall", "--quiet", wheel, cwd=folder)
    return python


def modules(python, folder, missing=()):
    "Every module of the installed package: name -> why it could not be imported."
    import json
    lines = [json.loads(line) for line in call(python, "-W", "ignore", "-c", LOOK, json.dumps(sorted(missing)), cwd=folder).splitlines() if line.startswith("{")]
    assert str(folder) in lines[0]["file"] or Path(lines[0]["file"]).is_relative_to(Path(folder).resolve()), f"imported from {lines[0]['file']}"
    return {line["module"]: line["error"] for line in lines[1:]}


def main():
    if "--only-build" in sys.argv: print(*build(Path(sys.argv[sys.argv.index("--only-build") + 1]).resolve()), sep="\n"); return
    with tempfile.TemporaryDirectory() as work:
        work = Path(work).resolve()
        wheel, archive = build(work / "dist")
        check_contents(wheel, archive)
        print(f"{wheel.name} {wheel.stat().st_size / 1024:.0f} kB, {archive.name} {archive.stat().st_size / 1024:.0f} kB")
        python = environment(work / "env", wheel)
        whole = modules(python, work)
        assert not any(whole.values()), {k: v for k, v in whole.items() if v}
        print(f"{len(whole)} modules imported from the wheel; " + call(python.with_name("specnb" + (".exe" if os.name == "nt" else "")), "--version", cwd=work).strip())
        slim = modules(python, work, HEAVY)
        assert not [n for n in SLIM if slim[n]], {n: slim[n] for n in SLIM if slim[n]}
        print(f"without the extras: {sum(not e for e in slim.values())} modules imported; not: " + ", ".join(f"{n} ({e})" for n, e in slim.items() if e))
        print(call(sys.executable, "-m", "pip", "--python", python, "check", cwd=work).strip())


if __name__ == "__main__":
    main()
