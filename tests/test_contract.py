"""What every method must fulfil, checked over the folder's listing: a new method is tested by being there."""

import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, losses, metrics
from one_step import SIZE, SMALL, batch, build, one_step
from ssl_pretrain.launch.pretrain import main

from ssl_pretrain import backbones, checkpoint, encoder, flags, plugins, pretext
from ssl_pretrain.config import Run
from ssl_pretrain.data.source import open_source
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.features import extract
from ssl_pretrain.pretext import Step

METHODS = plugins.own("ssl_pretrain.methods")
every_method = pytest.mark.parametrize("name", METHODS)


def test_the_folder_is_what_is_tested() -> None:
    assert sorted(p.stem for p in (ROOT / "methods").glob("*.py") if p.stem != "__init__") == METHODS
    assert "mae" in METHODS


@every_method
def test_one_final_class_with_a_frozen_config_whose_every_knob_is_explained_and_read(name: str) -> None:
    kind = pretext.load(name)
    assert getattr(kind, "__final__", False), f"{kind.__name__} must be @final"
    assert kind.__mro__[1] in (pretext.Method, pretext.WholeBatchMethod)
    assert dataclasses.is_dataclass(kind.Config)
    assert kind.Config.__dataclass_params__.frozen
    explained = flags.docs(kind.Config)
    source = inspect.getsource(inspect.getmodule(kind))
    run = {field.name for field in dataclasses.fields(Run)}
    for field in dataclasses.fields(kind.Config):
        assert explained.get(field.name), f"{field.name} has no help"
        assert re.search(rf"config\.{field.name}\b", source), f"nothing reads {field.name}"
        assert field.name not in run, f"{field.name} is a flag of the run"
    known = run | set(kind.Config.__dataclass_fields__) | set(backbones.config_class("vit_micro").__dataclass_fields__)
    assert set(kind.recipe.small) <= known


def test_every_flag_of_a_run_is_explained_and_read() -> None:
    explained = flags.docs(Run)
    files = [*(ROOT / "ssl").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
    source = "\n".join(path.read_text() for path in files)
    for field in dataclasses.fields(Run):
        assert explained.get(field.name), f"{field.name} has no help"
        read = (
            re.search(rf"\b(run|asked)\.{field.name}\b", source) or field.name == "config"
        )  # read before there is a Run
        assert read, f"nothing reads --{field.name}"


@every_method
def test_it_has_a_page_and_a_test(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert f"--method {name}" in page
    assert (ROOT / "tests" / f"test_{name}.py").exists()


@every_method
def test_views_are_declared(name: str) -> None:
    kind = pretext.load(name)
    specs = kind.views(kind.Config(), (48, 32))
    assert specs
    assert all(isinstance(spec, ViewSpec) for spec in specs)
    assert len({spec.name for spec in specs}) == len(specs)
    assert (48, 32) in [spec.size for spec in specs]  # not square, not turned round


@every_method
def test_the_loss_is_finite_and_no_parameter_is_dead(name: str) -> None:
    result = one_step(name)
    assert torch.isfinite(result["loss"])
    dead = [n for n in result["trainable"] if not result["gradients"].get(n, torch.zeros(1)).abs().sum() > 0]
    assert not dead
    assert all(bool(torch.isfinite(g).all()) for g in result["gradients"].values())


@every_method
def test_forward_changes_no_state_and_is_a_function_of_the_step(name: str) -> None:
    method = build(name)
    method.eval()
    before = {n: v.clone() for n, v in method.state_dict().items()}

    def loss(number: int) -> float:
        step = Step(step=1, total=10, noise=number, rows=slice(0, 16), batch_size=16, device=torch.device("cpu"))
        with torch.no_grad():
            return float(method(batch(method, slice(0, 16)), step).total)

    assert loss(1) == loss(1)
    assert all(torch.equal(v, before[n]) for n, v in method.state_dict().items())


@every_method
def test_two_ranks_and_two_micro_batches_give_the_loss_and_gradients_of_one(name: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("one_step.py")
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "rendezvous").as_uri(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, name, tmp_path / "two"],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    one = one_step(name)
    for other in (torch.load(tmp_path / "two.pt"), one_step(name, 2)):
        torch.testing.assert_close(other["loss"], one["loss"], rtol=1e-5, atol=1e-6)
        assert other["gradients"].keys() == one["gradients"].keys()
        for n, gradient in one["gradients"].items():
            # A sum of large terms that cancel carries their rounding: measured by the tensor's largest, too.
            rounding = 1e-6 + 1e-5 * float(gradient.abs().max())
            torch.testing.assert_close(other["gradients"][n], gradient, rtol=1e-3, atol=rounding)
        for n, value in one["state"].items():
            torch.testing.assert_close(other["state"][n], value, rtol=1e-4, atol=1e-6)


@every_method
def test_a_resumed_run_has_the_bits_of_the_undisturbed_one(
    name: str, photos_in_classes: Path, tmp_path: Path, pretrain_here: Callable
) -> None:
    out = tmp_path / "run"
    same = ["--method", name, "--data", photos_in_classes, "--out", out, "--steps", 6, "--log-every", 1]
    same += ["--checkpoint-every", 3, "--no-score"]
    same += ["--encoder", "vit_micro", "--image-size", *SIZE, "--patch-size", 8, "--depth", 2, "--batch-size", 16]
    same += [word for knob, value in SMALL.get(name, {}).items() for word in ("--" + knob.replace("_", "-"), value)]
    same += ["--lr", "1e-3", "--workers", 0]
    pretrain_here(*same)
    whole, curve = checkpoint.load(out / "checkpoints", 6), losses(out)
    whole = {part: {n: v.clone() for n, v in whole[part].items()} for part in ("method", "optimizer")}
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    pretrain_here(*same)
    resumed = checkpoint.load(out / "checkpoints", 6)
    for part in ("method", "optimizer"):
        for n, value in whole[part].items():
            assert torch.equal(value, resumed[part][n]), n
    assert losses(out) == curve
    exported = encoder.load(out)
    assert exported(torch.zeros(1, 3, *SIZE)).pooled.shape == (1, exported.backbone.dim)


# What half a minute to a minute of one core is enough for, where it is not 150 steps of 128 images at a peak rate of 2e-3
LEARNING: dict[str, dict[str, object]] = {
    "mae": {"steps": 200},
    "aim": {"steps": 200, "norm_pix": True},
    "semaim": {"norm_pix": True},
    "barlow": {"steps": 300, "lr": 1e-3},
    "byol": {"steps": 300, "lr": 1e-3},
    "dino": {"steps": 300, "lr": 1e-3, "momentum": 0.9},
    "simsiam": {"steps": 250, "lr": 1e-3},
    # These need more steps than the others to leave the untrained encoder behind, and get them from smaller batches.
    "dinov2": {"batch_size": 32, "steps": 600, "lr": 5e-4, "momentum": 0.99, "pool": "cls"},
    "ibot": {
        **{"batch_size": 32, "steps": 1300, "lr": 5e-4, "momentum": 0.99, "pool": "cls"},
        **{"teacher_temperature": 0.04, "teacher_patch_temperature": 0.04, "prototypes": 64, "hidden_dim": 256},
    },
    "ijepa": {"batch_size": 32, "steps": 1500, "lr": 5e-4, "momentum": 0.99},
    "npid": {"batch_size": 32, "steps": 1500, "lr": 1e-4, "loss": "softmax"},
}


@pytest.mark.slow
@every_method
def test_it_learns_on_real_images(name: str, shared_data: Path, tmp_path: Path, pretrain: Callable) -> None:
    """A small encoder, half a minute on 4,000 CIFAR-10 images: of the 10,000 test images the nearest neighbours of clearly
    more (three standard errors, counted over the images on which the two differ) share their class than with the untrained
    encoder."""
    small = pretext.load(name).recipe.small
    left_out = ("pool", "patch_size", "warmup_steps", "optimizer")
    knobs = {
        **{knob: value for knob, value in small.items() if knob not in left_out},
        **{"optimizer": "adamw", "steps": 150, "lr": 2e-3, "warmup_steps": 20, "batch_size": 128, "aug": "fast"},
        **{
            "encoder": "vit_micro",
            "dim": 64,
            "heads": 2,
            "depth": 2,
            "image_size": 32,
            "patch_size": 8,
            "pool": "mean",
        },
        **{"workers": 0, "monitor_every": 0, "picture_every": 0, "log_every": 50, "precision": "fp32"},
        **LEARNING.get(name, {}),
    }
    argv = ["--method", name, "--data", shared_data / "cifar10_lossless5k", "--out", tmp_path / "run", "--no-score"]
    for knob, value in knobs.items():
        flag = knob.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            argv += [f"--{flag}", *(value if isinstance(value, tuple) else [value])]
    pretrain(*argv)
    model = encoder.load(tmp_path / "run")
    trained, untrained = (
        neighbours_agree(each, shared_data / "cifar10") for each in (model, encoder.random_like(model, seed=0))
    )
    more, fewer = int((trained & ~untrained).sum()), int((untrained & ~trained).sum())
    print(f"{name}: {100 * trained.mean():.1f} and {100 * untrained.mean():.1f} %, {more} more and {fewer} fewer")
    assert (more - fewer) / (more + fewer) ** 0.5 > 3


def neighbours_agree(model: encoder.Encoder, data: Path) -> np.ndarray:
    """Whether the 20 nearest others (cosine) of each test image vote for its class, (10000,) bool."""
    found = extract(model, open_source(str(data), "test"), ("pooled",), cache=False)
    x = found.features["pooled"] / np.linalg.norm(found.features["pooled"], axis=1, keepdims=True)
    similar = x @ x.T
    np.fill_diagonal(similar, -1)
    nearest = np.argpartition(-similar, 20, axis=1)[:, :20]
    votes = np.zeros((len(x), 10))
    np.add.at(votes, (np.arange(len(x))[:, None], found.labels[nearest]), 1)
    return votes.argmax(1) == found.labels


def test_draws_on_the_host_go_on_where_the_step_stands() -> None:
    one, other = (
        Step(step=0, total=2, noise=5, rows=slice(1, 3), batch_size=4, device=torch.device("cpu")) for _ in range(2)
    )
    one.rand(2)
    other.rand(2)
    with one.on_host() as host:
        assert torch.equal(host.rand(3), other.rand(3))
    assert torch.equal(one.shared_rand(3), other.shared_rand(3))


@pytest.mark.parametrize("encoder", ["vit_micro", "resnet18"])
@every_method
def test_a_batch_of_one_image_trains_or_says_what_it_lacks(
    name: str, encoder: str, photos_in_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--method", name, "--data", photos_in_classes, "--out", tmp_path / "run", "--steps", 1, "--batch-size", 1]
    argv += [
        "--encoder",
        encoder,
        "--image-size",
        *SIZE,
        "--workers",
        0,
        "--log-every",
        1,
        "--lr",
        "1e-3",
        "--no-score",
    ]
    argv += ["--patch-size", 8, "--depth", 2] if encoder == "vit_micro" else []
    argv += [word for knob, value in SMALL.get(name, {}).items() for word in ("--" + knob.replace("_", "-"), value)]
    code = main([str(word) for word in argv])
    said = capsys.readouterr().err.splitlines()
    if code == 0:
        (line,) = [line for line in metrics(tmp_path / "run") if "loss" in line]
        assert line["grad_norm"] > 1e-6  # something is learned
        assert line["skipped"] == 0
    else:
        assert code == 2
        assert re.search(r"--batch-size|needs an encoder that supports|of different images", said[-1])
        assert sum("ssl-pretrain:" in line for line in said) == 1
        assert not any("Traceback" in line for line in said)
