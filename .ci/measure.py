"""The numbers by which this project measures itself, counted afresh.

`python .ci/measure.py` prints all; `--quick` leaves out what takes longer than seconds (import times, wheel); `--tutorials` runs the tutorials as well.
"""
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
nbs = root / "nbs"
pages = sorted(p for p in nbs.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
numbered = [p for p in pages if p.parent == nbs and re.match(r"\d\d_", p.name)]


def cells(page, kind): return ["".join(c["source"]) for c in json.loads(page.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def exported(source): return re.search(r"^#\|\s*export", source, re.M) is not None


def hidden(source): return re.search(r"^#\|\s*(hide|include:\s*false|echo:\s*false)", source, re.M) is not None


def n_lines(source): return sum(1 for line in source.splitlines() if line.strip() and not line.strip().startswith("#|"))


def public_names(module):
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__": return ast.literal_eval(node.value)
    return []


def written():
    "Pages, exported cells, words, and names at work."
    code = {p: cells(p, "code") for p in numbered}
    lengths = sorted(n_lines(s) for sources in code.values() for s in sources if exported(s))
    words = sum(len(re.findall(r"[^\W\d_]\w*", s)) for p in numbered for s in cells(p, "markdown"))
    shown = total = 0
    for page, sources in code.items():
        names = public_names(root / "specnb" / f"{page.stem[3:]}.py")
        visible = "\n".join(s for s in sources if not hidden(s) and not exported(s))
        total += len(names); shown += sum(bool(re.search(rf"\b{re.escape(n)}\b", visible)) for n in names)
    long = [f"{p.stem} {n}" for p in numbered if (n := len(cells(p, "code")) + len(cells(p, "markdown"))) > 80]
    yield "pages", f"{len(pages)}, of them {len(numbered)} numbered; largest {max(p.stat().st_size for p in pages) / 1024:.0f} kB"
    yield "exported names with visible use", f"{shown} of {total}, {shown / total:.1%}"
    yield "lines of an exported cell", f"median {statistics.median(lengths):.0f}, 90th percentile {lengths[int(0.9 * len(lengths))]}, longest {lengths[-1]}, of {len(lengths)} cells"
    yield "words per exported cell", f"{words / len(lengths):.0f}"
    yield "pages over 80 cells", ", ".join(long) or "none"


def imports():
    "Seconds of a warm import in a fresh interpreter, the best of three, by the clock and of the processor."
    for name in ("specnb.depend", "specnb.learner"):
        code = f"import time; t, c = time.perf_counter(), time.process_time(); import {name}; print(time.perf_counter() - t, time.process_time() - c)"
        took = [[float(v) for v in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout.split()] for _ in range(3)]
        yield f"import {name}", "{:.2f} s, {:.2f} CPU-seconds".format(*map(min, zip(*took)))


def wheel():
    "Size of the wheel and of the source archive."
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, root / ".ci" / "package.py", "--only-build", folder], check=True, capture_output=True)
        for made in sorted(Path(folder).iterdir()): yield made.suffix.lstrip("."), f"{made.name}, {made.stat().st_size / 1024:.0f} kB"


def run_page(page):
    "Execute a page in its folder; cells marked as not to be run are left out."
    import nbformat
    from nbclient import NotebookClient
    book = nbformat.read(page, 4)
    for cell in book.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*(eval:\s*false|slow|gpu|net)\b", cell.source, re.M): cell.source = ""
    NotebookClient(book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(page.parent)}}).execute()


def tutorials():
    "Seconds to run each tutorial with one thread, by the clock and of the processor."
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    took = worked = 0.
    for page in sorted((nbs / "tutorials").glob("*.ipynb")):
        start, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, __file__, "--run", page], check=True, capture_output=True)
        clock, after = time.perf_counter() - start, os.times()
        processor = after.children_user + after.children_system - before.children_user - before.children_system
        took += clock; worked += processor
        yield f"tutorial {page.stem}", f"{clock:.0f} s, {processor:.0f} CPU-seconds"
    yield "tutorials", f"{took:.0f} s, {worked:.0f} CPU-seconds"


def main():
    if "--run" in sys.argv: return run_page(Path(sys.argv[sys.argv.index("--run") + 1]))
    parts = [written] + ([] if "--quick" in sys.argv else [imports, wheel]) + ([tutorials] if "--tutorials" in sys.argv else [])
    for part in parts:
        for name, value in part(): print(f"{name:<34}{value}", flush=True)


if __name__ == "__main__":
    main()
