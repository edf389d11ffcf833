"""Write docs/methods/index.md, the table of all methods, from the methods' pages.

    python docs/make_methods_index.py            write it
    python docs/make_methods_index.py --check    exit code 1 where it is out of date

A page has a title, a table with the rows family, needs and exports, and a section "Idea". The table shows the first
sentence of that section, and the second too where the first is short.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

PAGES = Path(__file__).parent / "methods"
FAMILIES = (
    "masked images",
    "tokenizers",
    "masked latents, JEPA",
    "contrastive",
    "without negatives",
    "clustering",
    "self-distillation",
    "distillation",
    "autoregressive",
    "control",
)
SHORT = 92  # characters of a first sentence that the second is added to
HEAD = """# Methods

A pretraining method is chosen with `--method NAME`. Each method has a page: the idea, the key components, what
to watch while it trains, and what differs from the paper. The tables below group the methods into families.

- *needs* says which encoders the method works with, and what else it requires.
- *exports* says which network the run saves for later use.

[Results](../results.md) compares the methods at the same budget.
"""


@dataclass(frozen=True)
class Page:
    """What the table says of a method."""

    name: str  # of --method
    title: str
    family: str
    needs: str
    exports: str
    idea: str


def read(path: Path) -> Page:
    """A method's page. Raises ValueError where something is missing."""
    text = path.read_text()
    found = dict(re.findall(r"^\| (family|needs|exports) \| (.+?) \|$", text, re.MULTILINE))
    title = re.match(r"# (.+)", text)
    idea = re.search(r"^## Idea\n+(.+?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    missing = [name for name in ("family", "needs", "exports") if name not in found]
    if missing or title is None or idea is None:
        raise ValueError(f"{path}: no {' and no '.join(missing or ['title' if title is None else 'section Idea'])}")
    if found["family"] not in FAMILIES:
        raise ValueError(f"{path}: unknown family {found['family']!r}, known are: {'; '.join(FAMILIES)}")
    return Page(path.stem, title[1], found["family"], found["needs"], found["exports"], short(idea[1]))


def short(idea: str) -> str:
    """The beginning of a section, on one line. Of a list behind a colon, what its items begin with."""
    paragraph, _, rest = idea.partition("\n\n")
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z`])", " ".join(paragraph.split()))
    first = sentences[0]
    if first.endswith(":"):
        return f"{first} {', '.join(item.lower() for item in re.findall(r'^- ([^:]+):', rest, re.MULTILINE))}."
    return first if len(first) >= SHORT or len(sentences) == 1 else f"{first} {sentences[1]}"


def table() -> str:
    """The page."""
    pages = [read(path) for path in PAGES.glob("*.md") if path.name != "index.md"]
    parts = [HEAD, "<!-- Made by docs/make_methods_index.py from the pages in this folder. Do not edit. -->"]
    for family in FAMILIES:
        rows = [
            f"| [{page.title}]({page.name}.md) | `{page.name}` | {page.idea} | {page.needs} | {page.exports} |"
            for page in sorted(pages, key=lambda page: page.title.lower())
            if page.family == family
        ]
        if rows:
            title = family[0].upper() + family[1:]
            parts.append(
                f"\n## {title}\n\n| method | `--method` | idea | needs | exports |\n| --- | --- | --- | --- | --- |"
            )
            parts += rows
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    options = parser.parse_args()
    path, text = PAGES / "index.md", table()
    if not options.check:
        path.write_text(text)
    elif not path.exists() or path.read_text() != text:
        print(f"{path} is out of date: python docs/make_methods_index.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
