"""Write README.md from nbs/index.ipynb: prose and visible code as they are, the saved figure as a file, links to pages as links to the site.

`python .ci/readme.py --check` only says whether README.md is up to date.
"""
import base64
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
settings = ConfigParser(delimiters=["="])
settings.read(root / "settings.ini")
site = settings["DEFAULT"]["doc_host"] + settings["DEFAULT"]["doc_baseurl"]
figure = Path("nbs") / "images" / "first_light.png"


def cell_text(cell):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return re.sub(r"\]\((?!https?:)([\w/]+)\.ipynb\)", lambda m: f"]({site}/{re.sub('[0-9]+_', '', m[1])}.html)", source)
    parts = []
    if "echo: false" not in source and "#| hide" not in source:
        parts.append("```python\n" + "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip() + "\n```")
    for output in cell["outputs"]:
        if "image/png" in output.get("data", {}): parts.append(f"![Two nodes of the network against the truth that it was never told]({figure.as_posix()})")
    return "\n\n".join(parts)


def main():
    cells = json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "<!-- Made from nbs/index.ipynb by .ci/readme.py; change the notebook, not this file. -->\n\n" + "\n\n".join(t for t in map(cell_text, cells) if t) + "\n"
    pictures = [o["data"]["image/png"] for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    picture = base64.b64decode("".join(pictures[0])) if pictures else b""
    if "--check" in sys.argv:
        same = (root / "README.md").read_text(encoding="utf-8") == text and (not picture or (root / figure).read_bytes() == picture)
        if not same: sys.exit("README.md is not what nbs/index.ipynb says: run python .ci/readme.py")
        return
    (root / "README.md").write_text(text, encoding="utf-8")
    if picture: (root / figure).parent.mkdir(exist_ok=True); (root / figure).write_bytes(picture)


if __name__ == "__main__":
    main()
