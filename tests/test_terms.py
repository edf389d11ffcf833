"""A reader who knows the papers finds the field's terms by searching: in the documentation and in the names of the code."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

# Term, and what the thing is called in the code (None where it is no thing of its own, only something that code does).
TERMS = {
    "gradient checkpointing": "gradient_checkpointing",
    "gradient accumulation": "accumulate",
    "mixed precision": "mixed_precision",
    "GradCache": "grad_cache",
    "EMA teacher": "ema_teacher",
    "momentum encoder": "momentum",
    "projector": "projector",
    "predictor": "predictor",
    "prototypes": "prototypes",
    "queue": "queue",
    "temperature": "temperature",
    "centering": "centering",
    "Sinkhorn": "sinkhorn",
    "multi-crop": "multi_crop",
    "stop-gradient": None,
    "masking ratio": "mask_ratio",
    "linear probe": "linear_probe",
    "kNN": "knn",
    "layer decay": "layer_decay",
    "drop path": "drop_path",
}
CODE = [path for folder in ("ssl", "methods", "eval", "launch") for path in (ROOT / folder).rglob("*.py")]


def names(path: Path) -> set[str]:
    """The names that a file defines or uses, and its own."""
    found = {path.stem}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    # CamelCase as snake_case
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in found}


@pytest.fixture(scope="module")
def all_names() -> set[str]:
    return set().union(*map(names, CODE))


@pytest.mark.parametrize("term", TERMS)
def test_the_term_is_in_the_documentation(term: str) -> None:
    pages = [path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    # A term may be broken by the end of a line, and stand in the plural.
    pattern = re.compile(re.escape(term).replace(r"\ ", r"\s+"), re.IGNORECASE)
    assert any(pattern.search(page) for page in pages)


@pytest.mark.parametrize("term", [term for term, name in TERMS.items() if name])
def test_the_thing_has_the_terms_name_in_the_code(term: str, all_names: set[str]) -> None:
    assert any(re.search(rf"(^|_){TERMS[term]}(_|s?$)", name) for name in all_names), TERMS[term]


def test_stop_gradient_is_said_where_code_does_it() -> None:
    said = [path.name for path in (ROOT / "methods").glob("*.py") if "stop-gradient" in path.read_text()]
    assert "simsiam.py" in said
    assert "byol.py" in said
