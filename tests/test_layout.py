"""The core's layers: few files at the top, imports that go downward only, no cycles."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

CORE = ROOT / "ssl" / "ssl_pretrain"
# From low to high: a file may import from its own layer and from lower ones. A name is a file or a package of the core.
LAYERS = (
    ("errors", "memory", "randomness", "files"),
    ("plugins", "flags"),
    ("distributed", "loggers"),
    ("data", "backbones"),
    ("pretext",),
    ("parts", "encoder", "optim", "checkpoint"),
    ("features", "foreign", "config"),
    ("loop",),
    ("train",),
    ("conformance",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Kinds of data import the abstract source; opening data imports its kind when that is known.
ALLOWED_CYCLE = frozenset(f"data.{name}" for name in ("source", "folder", "tar", "parquet", "packed", "fractals"))


def module(path: Path) -> str:
    """The dotted name of a file below the core."""
    parts = path.relative_to(CORE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module(path): path for path in sorted(CORE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The modules of the core that one of them imports, also within functions and for type checkers."""
    path = FILES[name]
    package = name.split(".") if path.name == "__init__.py" and name else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            base = [part for part in base if part]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in FILES else ".".join(base))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssl_pretrain"):
            found.add((node.module or "").removeprefix("ssl_pretrain").strip("."))
    return found - {name, ""}


def test_the_top_of_the_core_has_few_files() -> None:
    assert len(list(CORE.glob("*.py"))) <= 14


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_imports_go_downward(name: str) -> None:
    top = name.split(".", maxsplit=1)[0]
    assert top in RANK, f"{name} is in no layer of tests/test_layout.py"
    for other in imports(name):
        assert RANK[other.split(".")[0]] <= RANK[top], f"{name} imports {other}, which lies in a higher layer"


def test_there_is_no_import_cycle_but_the_source_and_its_kinds() -> None:
    edges = {name: imports(name) for name in FILES}
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        state[name] = 1
        for other in sorted(edges[name]):
            if state.get(other) == 1:
                cycle = [*path[path.index(other) :], other] if other in path else [name, other]
                assert set(cycle) <= ALLOWED_CYCLE, f"import cycle: {' -> '.join(cycle)}"
            elif other not in state:
                visit(other, (*path, other))
        state[name] = 2

    for name in FILES:
        if name not in state:
            visit(name, (name,))


def test_the_loop_is_short() -> None:
    path = CORE / "train.py"
    assert len(path.read_text().splitlines()) < 350
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    for node in functions:
        length = (node.end_lineno or 0) - node.lineno + 1
        assert length < 200, f"{node.name} has {length} lines"
