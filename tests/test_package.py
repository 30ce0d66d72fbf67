"""What is uploaded: built, installed into an environment of its own, imported there, with the extras and without them."""
import importlib.util
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
import pytest
from test_structure import FORBIDDEN, LIB, MODULES, NUMBER, ROOT, imports, tree_of  # noqa: F401

settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
BROUGHT = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}        # module -> what it is called where it is asked for
INDIRECT = {"urllib3": "requests", "param": "panel", "IPython": "fastai", "pyviz_comms": "panel"}   # brought by what is asked for, and belongs to it

OPTIONAL = {"specutils"}                                                       # imported by the functions that turn to it by name, and by no other


def asked(name): return {re.split(r"[\[<>=!]", r)[0] for r in settings[name].split()}


def test_everything_imported_is_asked_for():
    known = set().union(*(asked(f"{extra}requirements") for extra in ("", "train_", "app_", "archive_", "cluster_")))
    unasked = {}
    for name, path in MODULES.items():
        for top in {i.split(".")[0] for i in imports(tree_of(path))} - set(sys.stdlib_module_names) - OPTIONAL - {"specnb"}:
            if BROUGHT.get(top, top) not in known and INDIRECT.get(top) not in known: unasked.setdefault(top, []).append(name)
    assert not unasked


def test_the_ground_and_the_statistics_ask_for_no_extra():
    core, wrong = asked("requirements"), {}
    assert not core & {"torch", "fastai", "panel", "holoviews"}
    for name, path in MODULES.items():
        if NUMBER[name] // 10 not in (0, 3): continue
        tops = {BROUGHT.get(t, t) for t in {i.split(".")[0] for i in imports(tree_of(path))} - set(sys.stdlib_module_names) - OPTIONAL - {"specnb"}}
        if tops - core: wrong[name] = sorted(tops - core)
    assert not wrong


def test_citation_agrees_with_the_settings():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == settings["version"] and cited["license"].lower() == settings["license"]
    assert {"cff-version", "message", "authors", "title"} <= set(cited) and cited["preferred-citation"]["doi"].startswith("10.")
    assert re.search(rf"^## {re.escape(settings['version'])}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M), "CHANGELOG.md has no section of this version"
    assert f'__version__ = "{settings["version"]}"' in (LIB / "__init__.py").read_text(encoding="utf-8")


def test_installed_versions_are_what_is_asked_for():
    "`pip check` of the environment that runs the tests, for this package alone."
    requirement = pytest.importorskip("packaging.requirements").Requirement
    from importlib.metadata import version
    try: wanted = [requirement(r) for r in requires("specnb") or []]
    except PackageNotFoundError: pytest.skip("specnb is not installed here, only on the path")
    wrong = []
    for r in wanted:
        if r.marker and not r.marker.evaluate({"extra": ""}): continue
        if not r.specifier.contains(version(r.name), prereleases=True): wrong.append(f"{r} but {version(r.name)}")
    assert not wrong


@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs `build`, one of the tools of extra `dev`")
def test_wheel_and_archive_build_install_and_import():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "package.py"], capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, (done.stderr or done.stdout)[-1500:]
    assert "No broken requirements" in done.stdout and "modules imported from the wheel" in done.stdout


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "fastai", "holoviews", "panel", "pyvo"): raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from specnb.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_the_extras_the_command_says_what_to_install():
    asked = lambda *words: subprocess.run([sys.executable, "-c", WITHOUT, *words], capture_output=True, text=True, cwd=ROOT)
    done = asked("train", "store.zarr", "run")
    assert done.returncode == 1 and "pip install 'specnb[all]'" in done.stderr and "Traceback" not in done.stderr
    assert asked("--version").returncode == 0 and "Train a network" in asked("train", "--help").stdout
