"""Shell completion and --version: what is offered, how fast, and that the scripts work in their shells."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from ssl_pretrain.launch import completion, data, evaluate, export, pretrain, recipe_files, report

from ssl_pretrain import __version__, backbones, pretext
from ssl_pretrain.config import Run
from ssl_pretrain.flags import docs


def offered(line: str) -> list[str]:
    """What stands to choose from at the end of a line."""
    return completion.answer(line.split(" "))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ssl-pretrain --metho", ["--method"]),
        ("ssl-pretrain --method vic", ["vicreg"]),
        ("ssl-pretrain --method mae --mask", ["--mask-ratio"]),
        ("ssl-pretrain --encoder resnet", ["resnet18", "resnet50", "resnet_micro"]),
        ("ssl-pretrain --config mae_", ["mae_cifar10", "mae_imagenet1k_vit_base"]),
        ("ssl-pretrain --logger w", ["wandb"]),
        ("ssl-pretrain --optimizer ", ["adamw", "lamb", "lars", "muon", "sgd"]),
        ("ssl-pretrain --no-sc", ["--no-score"]),
        ("ssl-pretrain --score --no-sc", ["--no-score"]),
        ("ssl-pretrain --data ", []),  # any file
        ("ssl-pretrain rep", ["reproduce"]),
        ("ssl-pretrain reproduce vicreg_c", ["vicreg_cifar10"]),
        ("/usr/bin/ssl-eval lin", ["linear"]),
        ("ssl-eval knn --train-s", ["--train-split"]),
        ("ssl-eval suite --aga", ["--again"]),
        ("ssl-data b", ["bench"]),
        ("ssl-data bench photos --aug ", ["exact", "fast"]),
        ("ssl-export ", ["card", "import", "resize", "to"]),
        ("ssl-export import x.pth --layout dinov", ["dinov2", "dinov3"]),
        ("ssl-export import x.pth --fixed", []),
        ("ssl-export to t", ["timm", "torch-export", "transformers"]),
        ("ssl-export to onnx runs/mae --fixed", ["--fixed-size"]),
        ("ssl-export to onnx runs/mae --lay", []),
        ("ssl-export card --ou", []),
        ("ssl-export resize runs/mae --wi", ["--window"]),
        ("ssl-report runs/mae --o", ["--out"]),
        ("ssl-report --versi", ["--version"]),
    ],
)
def test_what_is_offered(line: str, words: list[str]) -> None:
    found = offered(line)
    assert found == words


@pytest.mark.parametrize("method", ["mae", "dinov2"])
def test_all_flags_of_a_method_and_its_encoder_are_offered(method: str) -> None:
    found = set(offered(f"ssl-pretrain --method {method} --encoder resnet18 --"))
    for kind in (Run, pretext.load(method).Config, backbones.config_class("resnet18")):
        assert {"--" + name.replace("_", "-") for name in docs(kind)} <= found


def test_an_answer_is_quick_and_does_not_import_torch_or_numpy() -> None:
    code = (
        "import resource, sys; from ssl_pretrain.launch.pretrain import main\n"
        "assert main(['--complete', 'ssl-pretrain', '--method', 'mae', '--mask']) == 0\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert runs[0][0] == "--mask-ratio"
    assert min(float(seconds) for _, seconds in runs) < 0.5


@pytest.fixture
def path(tmp_path: Path) -> str:
    """PATH with the command."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssl-pretrain").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m ssl_pretrain.launch.pretrain "$@"\n'
    )
    (tmp_path / "bin" / "ssl-pretrain").chmod(0o755)
    return f"{tmp_path / 'bin'}:/usr/bin:/bin"


def test_the_script_in_bash(path: str) -> None:
    ask = (
        'eval "$(ssl-pretrain --print-completion bash)"\n'
        "COMP_WORDS=(ssl-pretrain --method simc); COMP_CWORD=2; _ssl_pretrain; echo ${COMPREPLY[@]}\n"
        "COMP_WORDS=(ssl-eval kn); COMP_CWORD=1; _ssl_pretrain; echo ${COMPREPLY[@]}\n"
        "complete -p ssl-pretrain ssl-eval ssl-data ssl-export ssl-report"
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, env={"PATH": path})
    assert done.stdout.splitlines()[:2] == ["simclr", "knn"]
    assert done.stdout.count("_ssl_pretrain") == 5


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_other_shells(shell: str, path: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(completion.script(shell))
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)
    if shell == "fish":
        ask = f'source {tmp_path / "script"}; complete -C "ssl-pretrain --method simc"'
        done = subprocess.run(["fish", "-c", ask], capture_output=True, text=True, check=True, env={"PATH": path})
        assert "simclr" in done.stdout.split()


def test_an_unknown_shell_is_named(capsys: pytest.CaptureFixture) -> None:
    assert pretrain.main(["--print-completion", "tcsh"]) == 2
    assert "takes bash, zsh or fish, not 'tcsh'" in capsys.readouterr().err


@pytest.mark.parametrize("module", [pretrain, evaluate, data, export, report])
def test_every_command_says_its_version(module: object, capsys: pytest.CaptureFixture) -> None:
    assert module.main(["--version"]) == 0  # type: ignore[attr-defined]
    assert capsys.readouterr().out.startswith(f"{module.PROG} {__version__} (torch 2")  # type: ignore[attr-defined]


def test_recipes_offered_are_those_of_the_folder() -> None:
    assert recipe_files.names() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
