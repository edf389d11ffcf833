"""The pages on adding plugins: the example of each is installed as the page says, and conforms; what they name is there."""

import importlib
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from distributions import install

PAGES = ROOT / "docs" / "contributing"
MODULES = {"eval": "evaluators"}  # where a group's checks have another name than the group


def block(page: Path, language: str) -> str:
    """The one code block of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"{page.name} has {len(found)} blocks of {language}"
    return found[0]


@pytest.mark.parametrize("name", ["methods", "backbones", "evaluators", "sources", "loggers"])
def test_the_example_of_a_page_conforms(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGES / f"{name}.md"
    (group,) = tomllib.loads(block(page, "toml"))["project"]["entry-points"].items()
    package, entries = group
    module = next(iter(entries.values())).partition(":")[0]
    kind = package.removeprefix("ssl_pretrain.")
    assert MODULES.get(kind, kind) == name
    checks = f"ssl_pretrain.conformance.{name}"
    if importlib.util.find_spec(checks) is None:
        pytest.skip(f"there is no {checks}")
    found = install(tmp_path / "site", module, block(page, "python"), {package: entries})
    monkeypatch.setenv("PYTHONPATH", found["PYTHONPATH"])  # for the processes that a check starts
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, module, raising=False)
    for entry in entries:
        for check in importlib.import_module(checks).checks(entry):
            check()


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *sorted(PAGES.glob("*.md"))], ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for path in re.findall(r"`((?:ssl|eval|methods|launch|tests|docs)/[\w./]+\.\w+)`", page.read_text()):
        if path != "ssl/__init__.py" and not {"NAME", "FOLDER"} & set(re.split(r"\W|_", path)):
            assert (ROOT / path).exists(), path


def test_the_guide_names_the_six_files_and_every_page() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.split("## Read the code in this order")[1].split("## ")[0]
    assert len(re.findall(r"^\| \[", table, re.MULTILINE)) == 6
    assert set(re.findall(r"\(docs/contributing/(\w+)\.md\)", text)) == {page.stem for page in PAGES.glob("*.md")}
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in text
