"""What the documentation page and the test file of a method of ours must hold. Each function lists what is missing."""

import ast
from pathlib import Path

SECTIONS = ["Idea", "Key components", "What to watch", "Good to know", "Deviations", "Reference"]
TABLE = ["family", "needs", "exports"]  # its rows, above the first section
LEAST_TESTS = 3
CHECKS = ("assert", "check", "raises", "warns")  # what the name of a call begins with that can fail a test


def missing_in_page(root: Path, name: str) -> list[str]:
    """Of docs/methods/<name>.md: the command, the table, the sections in their order, and text in each."""
    path = root / "docs" / "methods" / f"{name}.md"
    if not path.exists():
        return [f"there is no page docs/methods/{name}.md"]
    head, *parts = path.read_text().split("\n## ")
    sections = {part.partition("\n")[0].strip(): part.partition("\n")[2].strip() for part in parts}
    missing = [f"the command `--method {name}`"] if f"--method {name}" not in head else []
    rows = [line.split("|")[1].strip() for line in head.splitlines() if line.startswith("|") and line.count("|") > 2]
    missing += [f"the row {row!r} of the table" for row in TABLE if row not in rows]
    if list(sections) != SECTIONS:
        missing.append(f"the sections {', '.join(SECTIONS)} (it has {', '.join(sections) or 'none'})")
    return missing + [f"text in the section {title!r}" for title, text in sections.items() if not text]


def missing_in_tests(root: Path, name: str) -> list[str]:
    """Of tests/test_<name>.py: an import of the method's module, tests that can fail, and one of each stated collapse."""
    path = root / "tests" / f"test_{name}.py"
    if not path.exists():
        return [f"there is no tests/test_{name}.py"]
    tree = ast.parse(path.read_text())
    module = f"ssl_pretrain.methods.{name}"
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imports |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    missing = [] if module in imports else [f"an import of {module}"]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    checking = {function.name for function in functions if _can_fail(function)}
    tests = [f for f in functions if f.name.startswith("test_") and (f.name in checking or _calls(f) & checking)]
    if len(tests) < LEAST_TESTS:
        missing.append(f"{LEAST_TESTS} tests that check something (it has {len(tests)})")
    method = root / "methods" / f"{name}.py"
    states = method.exists() and any(
        isinstance(node, ast.FunctionDef) and node.name == "collapsed"
        for node in ast.walk(ast.parse(method.read_text()))
    )
    if states and not any("collapsed" in test.name and "check_stated" in _calls(test) for test in tests):
        missing.append("a test of the collapsed state (method_helpers.check_stated)")
    return missing


def _can_fail(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(function)) or any(
        name.startswith(CHECKS) for name in _calls(function)
    )


def _calls(function: ast.FunctionDef) -> set[str]:
    """The last names of what is called: `np.testing.assert_allclose(...)` is `assert_allclose`."""
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
