"""Hooks of the documentation site (mkdocs.yml).

1. A page may link to a file of the repository outside docs/, such as ../CONTRIBUTING.md or ../methods/mae.py. Such a file
   gets a page in the site, under repository/, and the link leads there. A link to a file that does not exist stays as it
   is: mkdocs reports it, and the strict build fails.
2. The notebook gets a page with its text, code and outputs.
3. A list in a list may be indented by two or three spaces, as in Markdown elsewhere; mkdocs wants four.
"""

import base64
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOK, NOTEBOOK_PAGE = "guides/evaluate_encoder.ipynb", "guides/evaluate_encoder_notebook.md"
COPIES = "repository/"  # where files from outside docs/ are in the site
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash"}

ROOT = Path(__file__).resolve().parents[1]  # of the repository
DOCS = "docs"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file outside docs/ that a page links to, directly or through other such pages, and one for the
    notebook."""
    to_read = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    added = set()
    while to_read:
        place = to_read.pop()
        for target in _outside(place, (ROOT / place).read_text()):
            if target not in added:
                added.add(target)
                files.append(File.generated(config, _copy(target), content=_as_page(target)))
                if target.endswith(".md"):
                    to_read.append(target)
    files.append(File.generated(config, NOTEBOOK_PAGE, content=notebook_page(Path(config.docs_dir) / NOTEBOOK)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to files outside docs/ to their pages, and links from these pages back into docs/; indent lists."""
    uri = page.file.src_uri
    place = _original(uri)

    def lead(match: re.Match[str]) -> str:
        target = _resolve(place, match[1])
        if target is None:
            return match[0]
        inside = target.startswith(f"{DOCS}/")
        if inside and not uri.startswith(COPIES):
            return match[0]
        to = target.removeprefix(f"{DOCS}/") if inside else _copy(target)
        return posixpath.relpath(to, posixpath.dirname(uri)) + (match[2] or "")

    return indented(LINK.sub(lead, markdown))


def indented(markdown: str) -> str:
    """Lists in lists indented by four spaces, with all that belongs to them."""
    found, code, inner, extra = [], False, 1, 0
    for line in markdown.split("\n"):
        code ^= line.startswith("```")
        depth = len(line) - len(line.lstrip())
        if re.match(r" {2,3}([-*]|\d+\.) ", line) and not code:
            inner, extra = depth, 4 - depth
        elif line.strip() and depth < inner:
            extra = 0
        found.append(" " * extra + line if line.strip() else line)
    return "\n".join(found)


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed and drew."""
    notebook = json.loads(path.read_text())
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{text}\n```")
            parts += [shown for output in cell["outputs"] for shown in _output(output)]
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\nThis page is the notebook [{path.name}]({path.name}) with its outputs.\n{rest}\n"


def _output(output: dict[str, Any]) -> Iterator[str]:
    """One output of a cell as Markdown."""
    data = output.get("data", {})
    if "image/png" in data:
        png = "".join(data["image/png"]).replace("\n", "")
        base64.b64decode(png, validate=True)
        yield f'<img alt="output of the cell above" src="data:image/png;base64,{png}">'
    elif text := "".join(output.get("text", data.get("text/plain", ""))):
        yield f"```text\n{text.rstrip()}\n```"


def _outside(place: str, markdown: str) -> Iterator[str]:
    """The existing files outside docs/ that a page links to; `place` is the page's path in the repository."""
    for match in LINK.finditer(markdown):
        target = _resolve(place, match[1])
        if target is not None and not target.startswith(f"{DOCS}/"):
            yield target


def _resolve(place: str, link: str) -> str | None:
    """The path in the repository that a relative link of the page at `place` leads to; None for any other link, and where
    nothing is there."""
    if ":" in link or link.startswith("/"):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
    return target if not target.startswith("..") and (ROOT / target).exists() else None


def _copy(target: str) -> str:
    """Where the page of a repository file is in the site's sources."""
    return COPIES + (target if target.endswith(".md") else f"{target}.md")


def _original(uri: str) -> str:
    """The path in the repository of the file that the page at `uri` shows."""
    return uri.removeprefix(COPIES) if uri.startswith(COPIES) else f"{DOCS}/{uri}"


def _as_page(target: str) -> str:
    """A repository file as Markdown; a folder as the list of its files."""
    path = ROOT / target
    if path.suffix == ".md":
        return path.read_text()
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if not each.name.startswith((".", "_")))
        return f"# {target}/\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
    return f"# {target}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````\n"
