"""The core's layers: few files at the top, imports that go downward only, no cycles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

CORE = ROOT / "ssl" / "ssl_pretrain"
# From low to high: a file may import from its own layer and from lower ones. A name is a file or a package of the core.
LAYERS = (
    ("errors", "memory", "randomness", "files"),
    ("plugins", "flags", "rates"),
    ("distributed", "loggers"),
    ("data", "backbones"),
    ("frozen", "pretext"),
    ("parts", "encoder", "model_card", "optim", "checkpoint"),
    ("features", "foreign", "config", "tokenizer"),
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


def cycles(edges: dict[str, set[str]]) -> Iterator[set[str]]:
    """Sets of modules each of which imports, directly or not, every other of its set."""

    def reached(name: str) -> set[str]:
        found, waiting = set[str](), [name]
        while waiting:
            for other in edges[waiting.pop()] - found:
                found.add(other)
                waiting.append(other)
        return found

    reach = {name: reached(name) for name in edges}
    for name in edges:
        cycle = {other for other in reach[name] if name in reach[other]}
        if cycle and name == min(cycle):
            yield cycle


def test_there_is_no_import_cycle_but_the_source_and_its_kinds() -> None:
    for cycle in cycles({name: imports(name) for name in FILES}):
        assert cycle <= ALLOWED_CYCLE, f"import cycle: {', '.join(sorted(cycle))}"


@pytest.mark.parametrize("folder", ["methods", "launch", "eval"])
def test_the_outer_folders_have_no_import_cycle(folder: str) -> None:
    paths = {path.stem: path for path in (ROOT / folder).glob("*.py")}
    edges: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                words = [module.split(".")[-1], *(alias.name for alias in node.names)]
                if module.startswith((".", f"ssl_pretrain.{folder}")):
                    edges[name] |= paths.keys() & set(words) - {name}
    assert not list(cycles(edges))


def test_a_cycle_beside_a_permitted_one_is_found() -> None:
    edges = {"a": {"b", "x"}, "b": {"a"}, "x": {"b"}, "y": {"a"}}
    assert list(cycles(edges)) == [{"a", "b", "x"}]


def test_the_loop_is_short() -> None:
    path = CORE / "train.py"
    assert len(path.read_text().splitlines()) < 350
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    for node in functions:
        length = (node.end_lineno or 0) - node.lineno + 1
        assert length < 200, f"{node.name} has {length} lines"
