"""Every command in README and docs is run, shrunk; links lead somewhere; the README's Python example works."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import DATA, ROOT, TINY

from ssl_pretrain import pretext

METHODS = [path.stem for path in (ROOT / "methods").glob("[!_]*.py") if path.stem != "supervised"]
EVALUATORS = list((ROOT / "eval").glob("[!_]*.py"))
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SHRINK = {
    "pretrain": ["--steps", "2", "--workers", "0", "--no-score"],
    "evaluate": ["--batch-size", "32"],
}


# Of TINY: more blocks than one are wanted by the probes, and a decoder is not what every method has.
LEFT_OUT = {"--depth", "--decoder-dim", "--decoder-depth", "--decoder-heads"}


def commands(page: Path) -> list[str]:
    """Lines of code blocks (indented or fenced) that are one of our commands, continuation lines joined."""
    text = re.sub(r" *\\\n\s*", " ", page.read_text())
    lines = re.findall(
        r"^(?:    )?((?:.*&& )?(?:ssl-pretrain|ssl-eval|ssl-data|ssl-report|python benchmarks/)[^|`\n]*)$",
        text,
        re.MULTILINE,
    )
    return [line.split("&& ")[-1].strip() for line in lines]


ALL = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)]


def test_the_commands_are_found() -> None:
    readme = [line for page, line in ALL if page == "README.md"]
    assert "ssl-pretrain --method mae" in readme
    assert any(line.startswith("ssl-eval linear") for line in readme)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    ("page", "sentence", "count"),
    [
        ("README.md", r"It has (\d+) pretraining methods", len(METHODS)),
        ("README.md", r"one training loop and (\d+) evaluators", len(EVALUATORS)),
        ("README.md", r"\| methods \| (\d+) and a supervised control", len(METHODS)),
        ("docs/index.md", r"- (\d+) pretraining methods and a supervised control", len(METHODS)),
    ],
)
def test_what_the_pages_count_is_so(page: str, sentence: str, count: int) -> None:
    (said,) = re.findall(sentence, (ROOT / page).read_text())
    assert int(said) == count


def test_the_readme_lists_every_method_once() -> None:
    listed = re.findall(
        r"docs/methods/(\w+)\.md", (ROOT / "README.md").read_text().split("## Methods")[1].split("\n## ")[0]
    )
    assert sorted(listed) == sorted([*METHODS, "supervised"])


def small(words: list[str]) -> list[str]:
    """Flags that make a run small: of the encoder, and of the method's heads."""
    method = words[words.index("--method") + 1] if "--method" in words else "mae"
    if "--config" in words and (ROOT / "recipes" / f"{words[words.index('--config') + 1]}.yaml").is_file():
        recipe = ROOT / "recipes" / f"{words[words.index('--config') + 1]}.yaml"
        method = yaml.safe_load(recipe.read_text())["method"]
    flags = [w for i, w in enumerate(TINY) if w not in LEFT_OUT and TINY[i - 1] not in LEFT_OUT]
    encoder = pretext.load(method).recipe.small.get("encoder", "vit_micro")
    if encoder != "vit_micro":  # of a method that trains no ViT
        flags = [w for i, w in enumerate(flags) if not {w, flags[i - 1]} & {"--encoder", "--patch-size"}]
        flags += ["--encoder", encoder, "--stem-patch", "1", "--depths", "1", "1", "1", "1"]
    for knob, value in pretext.load(method).recipe.tiny.items():
        name = "--" + knob.replace("_", "-")
        if name in words:
            continue
        if isinstance(value, bool):
            flags.append(name if value else "--no-" + name[2:])
        else:
            flags += [name, *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def run(line: str, desk: Path) -> None:
    if "../shared" in line and not DATA.is_dir():
        pytest.skip("../shared/data is not there: this command needs it")
    line = re.sub(r"data/cifar10(?=\s|$)", "data/cifar10_lossless5k", line)  # a tenth of it
    line = re.sub(r"--knn-every \d+", "--knn-every 1", line)  # what is shrunk ends before
    words = shlex.split(line.replace("...", "").split("#")[0])
    program = {"ssl-pretrain": "pretrain", "ssl-eval": "evaluate"}.get(words[0])
    stores = words[:2] == ["ssl-data", "cache-teacher"]  # takes the flags of the run
    if program == "pretrain" or stores:
        module = "data" if stores else "pretrain"
        argv = [sys.executable, "-m", f"ssl_pretrain.launch.{module}", *words[1:], *SHRINK["pretrain"]]
        argv += ["--out", str(desk / "run" / str(abs(hash(line))))] if "--out" not in words else []
        if "--help" not in words and "--data" in words:
            argv += small(words)
    elif words[0] in ("ssl-data", "ssl-report"):
        argv = [sys.executable, "-m", f"ssl_pretrain.launch.{words[0][4:]}", *words[1:]]
    elif program:
        argv = [sys.executable, "-m", "ssl_pretrain.launch.evaluate", *words[1:], *SHRINK[program]]
        if words[1] == "linear" and "../shared" in line:
            argv += ["--steps", "1"]
    else:
        argv = [sys.executable, *words[1:], "--help"]
    done = subprocess.run(argv, cwd=desk, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({page for page, _ in ALL}))
def test_every_command_of_a_page_runs_in_order(page: str, desk: Path) -> None:
    for where, line in ALL:
        if where == page:
            run(line, desk)
    if page == "README.md":
        example = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        assert example
        code = example[1] + "assert features.pooled.shape == (1, model.backbone.dim)\n"
        done = subprocess.run([sys.executable, "-c", code], cwd=desk, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
