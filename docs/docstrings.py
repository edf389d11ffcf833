"""For the API reference (mkdocs.yml): descriptions of fields and parameters, as the sources have them.

1. A field is described by the comment behind it or above it:

       step: int  # optimiser steps done before this one
       # True where the loss is finite on every rank
       ok: Tensor

   A comment behind a field may go on in the lines below. There it begins with a small letter, and a comment above a field
   begins with a capital.

2. Lines of a function's docstring that begin with a parameter's name and a colon become a list.
"""

import re
from typing import Any

from griffe import Attribute, Docstring, Extension, Function


class Descriptions(Extension):
    """Called by griffe while it reads the sources."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        """Describe a field by its comment."""
        if attr.docstring is None and attr.lineno and attr.endlineno:
            lines = attr.lines_collection[attr.filepath]  # type: ignore[index]  # a list of paths only for a package
            if text := _behind(lines, attr.endlineno) or _above(lines, attr.lineno):
                attr.docstring = Docstring(text, lineno=attr.lineno, parent=attr)

    def on_function_instance(self, *, func: Function, **_: Any) -> None:
        """Turn the parameters in a docstring into a list."""
        if func.docstring is not None:
            func.docstring.value = _listed(func.docstring.value, {each.name.strip("*") for each in func.parameters})


def _behind(lines: list[str], last: int) -> str:
    """The comment at the end of line number `last` and in the lines below it."""
    match = re.search(r"  # (.+)$", lines[last - 1])
    found = [match[1]] if match else []
    while (text := _comment(lines, last)) and not text[0].isupper():
        found.append(text)
        last += 1
    return " ".join(found)


def _above(lines: list[str], first: int) -> str:
    """The comment in the lines above line number `first`."""
    found: list[str] = []
    while text := _comment(lines, first - 2):
        found.insert(0, text)
        first -= 1
    return " ".join(found) if found and found[0][0].isupper() else ""


def _comment(lines: list[str], index: int) -> str:
    """What a line that is nothing but a comment says; empty for any other line."""
    match = re.fullmatch(r"\s*# (.+)", lines[index]) if 0 <= index < len(lines) else None
    return match[1] if match else ""


def _listed(text: str, parameters: set[str]) -> str:
    """A docstring with a list item for each line that begins with parameters and a colon, and for its indented lines."""
    found: list[str] = []
    inside = False  # a list
    for line in text.split("\n"):
        names, colon, what = line.partition(": ")
        if colon and set(names.split(", ")) <= parameters:
            found += [] if inside else [""]
            found.append(f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {what}")
            inside = True
        else:
            ends = inside and line.strip() and not line.startswith(" ")
            found += ["", line] if ends else [line]
            inside = inside and not ends
    return "\n".join(found)
