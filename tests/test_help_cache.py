"""`--help` of a method is printed again without importing torch, and never when it could be out of date."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ssl_pretrain.launch import help_cache

# The command as a console script runs it, and whether torch was imported
COMMAND = (
    "import sys\n"
    "from ssl_pretrain.launch.{module} import main\n"
    "try: main()\n"
    "finally: print('torch' in sys.modules, file=sys.stderr)\n"
)


def run(module: str, *words: str, **env: str) -> tuple[str, bool]:
    """What a command prints, and whether it imported torch."""
    script = COMMAND.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr.split()[-1] == "True"


@pytest.mark.parametrize(
    ("module", "words"), [("pretrain", ("--method", "mae", "--help")), ("evaluate", ("knn", "--help"))]
)
def test_the_second_help_is_the_first_without_torch(module: str, words: tuple[str, ...], tmp_path: Path) -> None:
    cache = {"SSL_PRETRAIN_CACHE": str(tmp_path)}
    first, slow = run(module, *words, **cache)
    assert slow
    assert "--batch-size" in first
    assert run(module, *words, **cache) == (first, False)
    assert run(module, *words, "--seed", "1", **cache)[1]  # another command line


def test_a_changed_file_of_the_package_makes_it_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "package"
    sources.mkdir()
    monkeypatch.setattr(help_cache, "FOLDERS", (sources,))
    texts = iter(("old", "new"))

    def work(words: list[str]) -> int:
        print(next(texts))
        raise SystemExit(0)

    def printed() -> str:
        assert help_cache.helped("ssl-pretrain", ["--help"], work) == 0
        return capsys.readouterr().out

    assert (printed(), printed()) == ("old\n", "old\n")
    (sources / "method.py").write_text("x = 1\n")
    assert (printed(), printed()) == ("new\n", "new\n")


@pytest.mark.parametrize("code", [2, "a mistake"])
def test_a_refused_command_is_not_kept(code: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path))

    def work(words: list[str]) -> int:
        raise SystemExit(code)

    assert help_cache.helped("ssl-pretrain", ["--help", "--oops"], work) in (1, 2)
    assert not list(tmp_path.rglob("*.txt"))


def test_what_depends_on_files_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("method: mae\n")
    assert help_cache.wanted(["--method", "mae", "--help"])
    assert help_cache.wanted(["--config", "mae_cifar10", "-h"])
    for words in (
        ["--config", "mine.yaml"],
        ["--config=mine.yaml"],
        ["--encoder", "timm:resnet18"],
        ["--out", "runs/a"],
    ):
        assert not help_cache.wanted([*words, "--help"]), words
    assert not help_cache.wanted(["--method", "mae"])


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "file" / "cache"))
    assert help_cache.helped("ssl-pretrain", ["--help"], lambda words: 0) == 0
