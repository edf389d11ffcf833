"""The package as it is installed: the wheel runs elsewhere, Python's own ssl stays itself, the core stands alone."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


def test_import_ssl_at_the_root_is_pythons_own() -> None:
    code = "import ssl, ssl_pretrain; ssl.create_default_context(); print(ssl.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).name == "ssl.py"
    assert not (ROOT / "ssl" / "__init__.py").exists()


def test_no_module_is_named_like_one_of_pythons() -> None:
    folders = ("ssl/ssl_pretrain", "methods", "launch", "eval", "tests", "benchmarks")
    names = {p.stem for folder in folders for p in (ROOT / folder).rglob("*.py")} - {"__init__"}
    assert not names & sys.stdlib_module_names


def test_windows_is_refused_in_one_line() -> None:
    code = "import sys; sys.platform = 'win32'; import ssl_pretrain"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "ssl-pretrain does not run on Windows: use Linux, or WSL 2 on Windows\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_runs_elsewhere(wheel: Path, tmp_path: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (
        (ROOT / "ssl" / "ssl_pretrain", "ssl_pretrain"),
        (ROOT / "methods", "ssl_pretrain/methods"),
        (ROOT / "launch", "ssl_pretrain/launch"),
        (ROOT / "eval", "ssl_pretrain/eval"),
    ):
        for path in folder.rglob("*.py"):
            assert f"{package}/{path.relative_to(folder).as_posix()}" in held
    for path in (ROOT / "launch" / "report_assets").iterdir():
        assert f"ssl_pretrain/launch/report_assets/{path.name}" in held
    assert {"LICENSE", "NOTICE", "LICENSE-uPlot.txt"} <= {Path(name).name for name in held if "dist-info/" in name}
    assert not any(name.startswith(("tests/", "ssl/", "benchmarks/")) for name in held)

    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True, text=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = "import ssl_pretrain.train, ssl_pretrain.methods.mae as m; print(m.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().startswith(str(site))
    run = ["--method", "mae", "--steps", "3", "--workers", "0", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "ssl_pretrain.launch.pretrain", *run],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kNN top-1" in done.stdout
    argv = [sys.executable, "-m", "ssl_pretrain.launch.report", "run"]
    subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert "new uPlot(" in (tmp_path / "run" / "report.html").read_text()


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports (relative imports stay relative, with their dots)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_the_core_imports_no_outer_folder_and_they_do_not_import_each_other() -> None:
    outer = ("methods", "launch", "eval")
    for path in (ROOT / "ssl").rglob("*.py"):
        for name in imports(path):
            assert not any(part in name.split(".") for part in outer), f"{path.name} imports {name}"
    for folder in outer:
        for path in (ROOT / folder).glob("*.py"):
            for name in imports(path):
                others = [o for o in outer if o != folder]
                assert not any(name.startswith(f"ssl_pretrain.{o}") for o in others), f"{path} imports {name}"


def test_no_test_file_imports_from_another() -> None:
    """What several need is in a module of its own. Code that a test gives to another process counts, too."""
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    statement = re.compile(r"(?:^|;)\s*(?:from|import)\s+([\w.]+(?:\s*,\s*[\w.]+)*)", re.MULTILINE)
    for path in (ROOT / "tests").rglob("*.py"):
        found = set(imports(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= {name for names in statement.findall(node.value) for name in re.split(r"\s*,\s*", names)}
        taken = {name for name in found if name.removeprefix("tests.").split(".")[0] in tests}
        assert not taken, f"{path.name} imports {', '.join(sorted(taken))}"


def test_listing_backbones_and_commands_imports_no_torch() -> None:
    code = (
        "import sys, ssl_pretrain, ssl_pretrain.config, ssl_pretrain.flags, ssl_pretrain.plugins, ssl_pretrain.backbones\n"
        "import ssl_pretrain.launch.pretrain, ssl_pretrain.launch.evaluate; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
