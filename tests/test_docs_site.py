"""The documentation site: the table of methods is up to date, every page is in the navigation, the strict build passes."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """mkdocs.yml."""
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(nav: Any) -> Iterator[str]:
    """Every page of a navigation."""
    if isinstance(nav, str):
        yield nav
    for each in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages(each)


@pytest.mark.parametrize(
    "script", ["make_methods_index.py", pytest.param("make_encoders_table.py", marks=pytest.mark.slow)]
)
def test_the_tables_are_up_to_date(script: str) -> None:
    command = [sys.executable, str(DOCS / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_method_has_a_page_in_the_navigation(settings: dict[str, Any]) -> None:
    methods = {path.stem for path in (ROOT / "methods").glob("*.py") if not path.stem.startswith("_")}
    shown = {page.removeprefix("methods/").removesuffix(".md") for page in pages(settings["nav"]) if "methods/" in page}
    assert methods <= shown, "mkdocs.yml: a method's page is missing in nav"
    table = (DOCS / "methods" / "index.md").read_text()
    assert methods == set(re.findall(r"\]\((\w+)\.md\) \| `\1` \|", table))


def test_every_page_is_in_the_navigation_once(settings: dict[str, Any]) -> None:
    named = list(pages(settings["nav"]))
    assert len(named) == len(set(named))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert there <= set(named)
    made = {"guides/evaluate_encoder_notebook.md"}  # by docs/hooks.py
    assert set(named) - there == made


def test_the_site_loads_nothing_from_elsewhere(settings: dict[str, Any]) -> None:
    assert settings["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css", "extra"} & settings.keys()


def test_every_picture_of_the_gallery_is_there_and_they_are_small() -> None:
    used = set(re.findall(r"\]\(pictures/([^)]+)\)", (DOCS / "gallery.md").read_text()))
    there = {path.name: path.stat().st_size for path in (DOCS / "pictures").iterdir()}
    assert used == there.keys()
    assert sum(there.values()) < 1_500_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -c constraints.txt '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_the_strict_build_passes(site: Path) -> None:
    assert "Masked" in (site / "methods" / "mae" / "index.html").read_text()
    assert "ssl_pretrain.pretext.Method" in (site / "api" / "pretext" / "index.html").read_text()
    assert "data:image/png;base64," in (site / "guides" / "evaluate_encoder_notebook" / "index.html").read_text()


def test_no_picture_of_the_site_is_missing_or_remote(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        for source in re.findall(r'<(?:img|script|source)[^>]* src="([^"]+)"', text):
            if not source.startswith("data:"):
                assert "://" not in source, (page, source)
                place = site / source.lstrip("/") if source.startswith("/") else page.parent / source
                assert place.resolve().is_file(), (page, source)
        assert not re.search(r'<link[^>]* rel="stylesheet"[^>]* href="https?://', text), page
