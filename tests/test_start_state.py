"""--init-state: the state of another run's method, and branches that take over its optimiser and step too."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ssl_pretrain.launch.pretrain import main, read_command

from ssl_pretrain import checkpoint, config, train
from ssl_pretrain.distributed import World
from ssl_pretrain.errors import UserError
from ssl_pretrain.pretext import load

COMMON = (
    "--batch-size 16 --monitor-every 0 --picture-every 0 --precision fp32 --no-score --workers 0 --log-every 1"
).split()
SMALL = "--encoder vit_micro --dim 64 --depth 2 --heads 2 --patch-size 8 --image-size 32".split()
HEADS = "--hidden-dim 32 --bottleneck-dim 16 --prototypes 24 --local-views 0".split()
CONSTANT = "--schedule constant --warmup-steps 1 --lr 1e-3".split()


@pytest.fixture(scope="module")
def source(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DINO of 6 steps at a constant rate, with checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("source") / "run"
    argv = ["--method", "dino", *COMMON, *SMALL, *HEADS, *CONSTANT, "--data", str(photos), "--out", str(out)]
    assert main([*argv, "--steps", "6", "--cooldown-steps", "0", "--checkpoint-every", "2", "--keep-every", "2"]) == 0
    return out


def built(argv: list[str], images: int = 96) -> tuple[Any, list[str]]:
    """The method that this command starts with, and what is said about it."""
    flags, knobs, options = read_command(argv)
    kind = load(flags.method)
    run = config.resolve(flags, kind.recipe, images, "fp32")
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    method, _, notes = train._build_method(run, kind, knobs, options, images, 0, world)
    return method, notes


def method_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "checkpoints", step)["method"]


def test_the_whole_state_is_loaded_and_no_flag_is_repeated(source: Path, photos: Path) -> None:
    argv = ["--method", "dino", *COMMON, "--data", str(photos), "--seed", "4"]
    method, notes = built([*argv, "--init-state", f"{source}/@4"])
    assert notes == [f"starting from the state of {source} at step 4; optimiser and step are new"]
    there = method_state(source, 4)
    own = method.state_dict()
    assert own.keys() == there.keys()
    assert all(torch.equal(value, own[name]) for name, value in there.items())
    assert not torch.equal(own["teacher.encoder.norm.weight"], own["encoder.norm.weight"])  # the teacher lags behind
    newest, _ = built([*argv, "--init-state", str(source)])
    assert torch.equal(newest.centre, method_state(source, 6)["centre"])
    assert not torch.equal(newest.centre, method.centre)


def test_a_run_from_a_state_begins_anew(source: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = ["--method", "dino", *COMMON, "--data", str(photos), "--out", str(out), "--steps", "2", "--lr", "0"]
    argv += ["--init-state", f"{source}@4", "--final-lr", "0", "--checkpoint-every", "1", "--keep-every", "1"]
    assert main(argv) == 0
    state = checkpoint.load(out / "checkpoints", 1)
    assert float(state["optimizer"]["encoder.norm.weight/step"]) == 1
    assert torch.equal(state["method"]["encoder.norm.weight"],
                       method_state(source, 4)["encoder.norm.weight"])  # fmt: skip
    recorded = yaml.safe_load((out / "config.yaml").read_text())
    assert (recorded["init_state"], recorded["prototypes"]) == (f"{source}@4", 24)
    # It resumes without the other run.
    hidden = source.with_name("hidden")
    source.rename(hidden)
    try:
        shutil.rmtree(out / "checkpoints" / "step-00000002")
        assert main(argv) == 0
    finally:
        hidden.rename(source)


def test_a_branch_is_the_run_that_was_cooled_down(source: Path, photos: Path, tmp_path: Path) -> None:
    """Bit for bit: a copy of the run that goes on with --extend."""
    shutil.copytree(source, tmp_path / "extended")
    shutil.rmtree(tmp_path / "extended" / "checkpoints" / "step-00000006")
    argv = ["--method", "dino", *COMMON, *SMALL, *HEADS, *CONSTANT, "--data", str(photos), "--checkpoint-every", "2"]
    length = ["--steps", "7", "--cooldown-steps", "3"]
    assert main([*argv, "--out", str(tmp_path / "extended"), "--keep-every", "2", *length, "--extend"]) == 0
    branch = ["--config", str(source / "config.yaml"), "--init-state", f"{source}@4", "--branch"]
    assert main([*branch, "--out", str(tmp_path / "branch"), *length]) == 0
    one, two = (checkpoint.load(tmp_path / name / "checkpoints", 7) for name in ("extended", "branch"))
    for part in ("method", "optimizer"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    # and not what is had without the optimiser's state
    again = ["--config", str(source / "config.yaml"), "--init-state", f"{source}@4", "--out", str(tmp_path / "anew")]
    assert main([*again, "--steps", "3", "--warmup-steps", "0", "--cooldown-steps", "3"]) == 0
    anew = method_state(tmp_path / "anew", 3)
    assert not torch.equal(anew["encoder.norm.weight"], one["method"]["encoder.norm.weight"])


def test_a_branch_resumes(source: Path, photos: Path, tmp_path: Path) -> None:
    argv = ["--config", str(source / "config.yaml"), "--init-state", f"{source}@4", "--branch", "--steps", "7"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000007")
    assert checkpoint.steps(tmp_path / "cut" / "checkpoints") == [6]
    assert main([*argv, "--out", str(tmp_path / "cut")]) == 0
    one, two = (method_state(tmp_path / name, 7) for name in ("whole", "cut"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--init-state {source}@3", "has no checkpoint of step 3; it has those of 2, 4, 6"),
        ("--init-state {source}/encoder@4", "is no run folder"),
        ("--init-state {source}@4 --patch-size 4", "--patch-size 4 instead of 8"),
        ("--init-state {source}@4 --prototypes 25", "does not fit the method of these flags: 3 of another shape"),
        ("--init-state {source}@4 --method simclr", "is the state of --method dino, and this is --method simclr"),
        ("--init-state {source}@4 --init-from {source}", "give one of them"),
        ("--init-state {source}@4 --branch --steps 4", "has done 4 steps, and this run has 4"),
        ("--init-state {source}@4 --branch --steps 9 --optimizer sgd", "with --optimizer adamw, and this is sgd"),
        ("--init-state {source}@4 --branch --steps 9 --prototypes 25", "does not fit these flags: 3 of another shape"),
        ("--init-state {source}@4 --init-fingerprint 12", "--init-fingerprint 12 instead of"),
        ("--branch", "--branch needs --init-state"),
        ("--partial", "--partial needs --init-from or --init-state"),
    ],
)
def test_a_mistake_is_named(
    flags: str, message: str, source: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--method", "dino", *COMMON, "--data", str(photos), "--out", str(tmp_path / "run"), "--steps", "1"]
    assert main([*argv, *flags.format(source=source).split()]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(
    source: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(source, tmp_path / "damaged")
    file = next((tmp_path / "damaged" / "checkpoints" / "step-00000004").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    argv = ["--method", "dino", *COMMON, "--data", str(photos), "--out", str(tmp_path / "run"), "--steps", "1"]
    assert main([*argv, "--init-state", f"{tmp_path / 'damaged'}@4"]) == 2
    assert "the checkpoint of step 4 is damaged" in capsys.readouterr().err


def test_partial_loads_what_fits_and_lists_the_rest(source: Path, photos: Path) -> None:
    argv = ["--method", "dino", *COMMON, "--data", str(photos), "--init-state", f"{source}@4", "--partial"]
    method, notes = built([*argv, "--prototypes", "25", *HEADS[:4], *HEADS[6:]])
    assert re.match(
        r"--partial: the state fits the method in part: 3 of another shape: centre \(24,\) instead", notes[1]
    )
    there = method_state(source, 4)
    assert torch.equal(method.state_dict()["encoder.norm.weight"], there["encoder.norm.weight"])
    assert method.centre.shape == (25,)
    with pytest.raises(UserError, match="takes over the whole state"):
        built([*argv, "--branch"])


def test_two_processes_branch_off(source: Path, tmp_path: Path, pretrain: Callable[..., Any]) -> None:
    argv = ["--config", source / "config.yaml", "--init-state", f"{source}@4", "--branch", "--steps", 6]
    pretrain(*argv, "--out", tmp_path / "one")
    pretrain(*argv, "--out", tmp_path / "two", "--nproc", 2)
    one, two = (method_state(tmp_path / name, 6) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)
