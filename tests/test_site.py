"""The site as a reader meets it: pages prepared by the notebook tools, rendered without Quarto, and looked at in a browser.

Quarto itself is not needed. A stand-in does to a prepared page what Quarto would (titles, hidden input, directives), nbconvert makes HTML of it,
and what is then still raw, broken or nowhere is a flaw of the page. Saved outputs are compared with those of a fresh run."""
import json
import re
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path
import pytest
from test_app import browser  # noqa: F401  a fixture
from test_structure import NBS, PAGES, ROOT, cells, copy, directives, tool  # noqa: F401  `copy` is a fixture

KNOWN = {"echo", "output", "eval", "include", "warning", "code-fold", "label", "fig-cap", "code-summary", "column"}   # directives that Quarto understands
OWN = re.compile(r"https://specnb\.github\.io/specnb/([\w/.-]*)(#[\w.-]*)?$")
FAST = ["explanations/01_dataset", "explanations/05_frames", "03_prep"]        # pages whose outputs are compared in every run
nbformat, nbconvert, yaml = (pytest.importorskip(name, reason=f"needs {name}, one of the tools of extra `dev`") for name in ("nbformat", "nbconvert", "yaml"))
from nbconvert import HTMLExporter  # noqa: E402
ids = dict(ids=lambda p: str(p.relative_to(NBS).with_suffix("")) if isinstance(p, Path) else str(p))


def as_quarto_would(page):
    "The notebook of a prepared page with its title as a heading, hidden input gone, and known directives taken away."
    book = nbformat.read(page, 4)
    for cell in book.cells:
        if cell.cell_type == "raw":
            found = yaml.safe_load(cell.source.strip().strip("-")) or {}
            cell.cell_type, cell.source = "markdown", f"# {found.get('title', page.stem)}\n\n> {found.get('description', '')}"
        if cell.cell_type != "code": continue
        said = {d.split(":")[0].strip(): d.split(":")[-1].strip() for d in directives(cell.source)}
        cell.source = "\n".join(line for line in cell.source.splitlines() if not (line.startswith("#|") and line[2:].split(":")[0].strip() in KNOWN))
        if said.get("include") == "false": cell.source, cell.outputs = "", []
        if "false" in (said.get("include"), said.get("echo")): cell.metadata["tags"] = ["remove_input"]
        for output in cell.outputs:
            if "text/markdown" in output.get("data", {}): output.data["text/markdown"] = re.sub(r"\{target=[^}]*\}", "", "".join(output.data["text/markdown"]))
    return book


class Reader(HTMLParser):
    "Links, pictures, anchors, and the words of a page outside code."
    def __init__(self, text):
        super().__init__()
        self.links, self.pictures, self.anchors, self.words, self._inside = [], [], set(), [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {_plain(attrs[k]) for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if tag == "img": self.pictures.append(attrs.get("src") or "")
        if tag in ("script", "style", "pre", "code", "title"): self._inside.append(tag)
    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag: self._inside.pop()
    def handle_data(self, data):
        if not self._inside: self.words.append(data)


def _plain(anchor): return re.sub(r"[^a-z0-9_]+", "-", urllib.parse.unquote(anchor).lower()).strip("-")


@pytest.fixture(scope="module")
def site(copy):  # noqa: F811
    "Every page of the site: its path relative to nbs -> its HTML file, beside the prepared notebooks."
    tool("nbdev_proc_nbs", copy)
    nothing = "data:text/javascript,"
    exporter = HTMLExporter(mathjax_url=nothing, require_js_url=nothing, jquery_url=nothing, mermaid_js_url=nothing, widget_renderer_url=nothing)
    exporter.register_preprocessor(nbconvert.preprocessors.TagRemovePreprocessor(remove_input_tags={"remove_input"}, enabled=True), enabled=True)
    made = {}
    for page in sorted((copy / "_proc").rglob("*.ipynb")):
        body, _ = exporter.from_notebook_node(as_quarto_would(page))
        target = page.with_suffix(".html")
        target.write_text(body, encoding="utf-8")
        made[page.relative_to(copy / "_proc").as_posix()] = target
    return made


@pytest.fixture(scope="module")
def readers(site): return {name: Reader(path.read_text(encoding="utf-8")) for name, path in site.items()}


def test_every_page_is_prepared(site):
    wanted = {p.relative_to(NBS).as_posix() for p in PAGES}
    assert wanted <= set(site), sorted(wanted - set(site))


def raw_parts(text):
    "Directives that a reader would see, in code and in prose, and links within links, which show their brackets."
    inside = re.findall(r"^#\|.*$", re.sub(r"<[^>]+>", "", text), re.M)
    return inside + [w.strip() for w in Reader(text).words if re.search(r"^:::|\{\.callout|^#\||\{\{<|\]\(", w.strip(), re.M)]


def test_no_raw_directive_is_left(site):
    raw = {name: found[:4] for name, path in site.items() if (found := raw_parts(path.read_text(encoding="utf-8")))}
    assert not raw


def test_raw_directives_are_seen(tmp_path):
    "The search can fail."
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("#| nosuch: thing\n1"), nbformat.v4.new_markdown_cell("::: {.callout-note}\nwords\n:::"), nbformat.v4.new_markdown_cell("[[`name`](x.html)](y.html)")])
    nbformat.write(book, tmp_path / "page.ipynb")
    body, _ = HTMLExporter().from_notebook_node(as_quarto_would(tmp_path / "page.ipynb"))
    assert len(raw_parts(body)) >= 3


def test_links_between_pages_resolve(site, readers):
    published = {}
    for name, path in site.items():
        front = "".join(json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"][0]["source"])
        output = re.search(r"output-file: (\S+)", front)
        published[(Path(name).parent / (output[1] if output else Path(name).with_suffix(".html").name)).as_posix()] = name
    broken, n = [], 0
    for name, reader in readers.items():
        for link in reader.links:
            own = OWN.match(link)
            if re.match(r"[a-z]+:", link) and not own: continue
            n += 1
            place, _, anchor = link.partition("#") if not own else (own[1], "", (own[2] or "")[1:])
            if own: target = published.get(place or "index.html")
            elif not place: target = name
            else:
                path = (site[name].parent / urllib.parse.unquote(place)).resolve()
                root = site["index.ipynb"].parent.resolve()
                target = path.relative_to(root).as_posix() if path.exists() and path.is_relative_to(root) else None
            if target is None: broken.append((name, link))
            elif anchor and target in readers and not own and _plain(anchor) not in readers[target].anchors: broken.append((name, link, "no such heading"))
    print(f"{n} links between pages")
    assert n > 50 and not broken, broken


def test_pictures_are_there(site, readers):
    missing = [(name, src[:80]) for name, reader in readers.items() for src in reader.pictures if not src.startswith(("data:", "http")) and not (site[name].parent / urllib.parse.unquote(src)).exists()]
    assert not missing
    assert not [name for name, reader in readers.items() for src in reader.pictures if src.startswith("http")], "a picture from elsewhere is not there when elsewhere is not"


def test_pages_in_a_browser(site, browser):  # noqa: F811
    "Every picture is drawn, no script fails, no page is empty."
    wrong = {}
    browser.get_log("browser")
    for name, path in site.items():
        browser.get(path.as_uri())
        broken = browser.execute_script("return [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src.slice(0, 80))")
        words = browser.execute_script("return document.body.innerText.length")
        failed = [e["message"][:200] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
        if broken or failed or words < 200: wrong[name] = dict(broken=broken, failed=failed, words=words)
    assert not wrong


# outputs -------------------------------------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?", re.I)
TIMED = re.compile(r"\b\d[\d.,]* ?(?:ms|µs|us|s|min|seconds?|minutes?|MB/s)\b|0x[0-9a-f]+|\d\d:\d\d(?::\d\d)?|\d{4}-\d\d-\d\d\S*")


def text_outputs(cell):
    "What a code cell printed or returned, as text; progress bars and pictures left out."
    parts = []
    for output in cell.get("outputs", []):
        text = "".join(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
        if output["output_type"] == "stream" and output.get("name") == "stderr" or re.search(r"<Figure|it/s|%\||fastprogress|object at|HTML object", text): continue
        parts.append(TIMED.sub("<time>", re.sub(r" at 0x[0-9a-f]+", "", text)))      # nbdev_clean takes addresses away as well
    return re.sub(r"\s+", " ", "\n".join(parts)).strip()


def differences(old, new, tolerance):
    "Cells whose words differ, or whose numbers differ by more than the tolerance allows."
    out = []
    for i, (a, b) in enumerate(zip(old.cells, new.cells)):
        if a.cell_type != "code" or re.search(r"^#\|\s*(eval:\s*false|slow|gpu|net)\b", a.source, re.M): continue
        a, b = text_outputs(a), text_outputs(b)
        numbers = [[float(v.replace(",", "")) for v in NUMBER.findall(text)] for text in (a, b)]
        same_words = re.sub(r"[\s+-]", "", NUMBER.sub("#", a)) == re.sub(r"[\s+-]", "", NUMBER.sub("#", b))
        close = len(numbers[0]) == len(numbers[1]) and all(abs(x - y) <= tolerance*max(abs(x), abs(y), 1.) for x, y in zip(*numbers))
        if not (same_words and close): out.append((i, a[:300], b[:300]))
    return out


def again(page):
    "The page and the same page after a fresh run."
    client = pytest.importorskip("nbclient", reason="needs nbclient, one of the tools of extra `dev`")
    old, new = nbformat.read(page, 4), nbformat.read(page, 4)
    for cell in new.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*(eval:\s*false|slow|gpu|net)\b", cell.source, re.M): cell.source = ""
    client.NotebookClient(new, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(page.parent)}}).execute()
    return old, new


@pytest.mark.filterwarnings("ignore")      # of the kernel's own libraries
@pytest.mark.parametrize("name", FAST)
def test_saved_outputs_are_fresh(name):
    stale = differences(*again(NBS / f"{name}.ipynb"), tolerance=1e-3)
    assert not stale, f"{name}: run it again; (cell, saved, fresh) {stale}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [p for p in PAGES if p.relative_to(NBS).with_suffix("").as_posix() not in FAST], **ids)
def test_all_saved_outputs_are_fresh(page):
    "Networks trained on another processor are not the same to the last digit, so numbers may differ by a twentieth of one, or of themselves."
    stale = differences(*again(page), tolerance=0.05)
    assert not stale, f"{page.stem}: run it again; (cell, saved, fresh) {stale}"


def test_stale_outputs_are_seen():
    "The comparison can fail: another word, another number, a missing line; and times are let go."
    book = lambda text: nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text=text)])])
    saved = book("3 nodes, 1.582 nat, 12.1 s")
    assert not differences(saved, book("3 nodes, 1.5821 nat, 14 s"), 1e-3)
    for text in ("3 nodes, 1.7 nat, 12.1 s", "3 spectra, 1.582 nat, 12.1 s", "3 nodes, 12.1 s", ""): assert differences(saved, book(text), 1e-3)


def test_readme_has_no_dead_link():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = [link for link in re.findall(r"\]\(([^)#]+)", text) if not re.match(r"[a-z]+:", link)]
    assert relative and not [link for link in relative if not (ROOT / link).exists()]
    own = {OWN.match(link)[1] for link in re.findall(r"\]\((https?:[^)]+)\)", text) if OWN.match(link)}
    names = {re.sub(r"(^|/)\d+_", r"\1", p.relative_to(NBS).with_suffix("").as_posix()) + ".html" for p in PAGES}
    assert own <= names, sorted(own - names)


def test_numbers_can_be_printed():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "measure.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    assert "pages" in done.stdout and "words per exported cell" in done.stdout
