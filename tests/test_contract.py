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

import pytest
import torch
from conftest import ROOT, losses
from one_step import SIZE, SMALL, batch, build, one_step

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
            torch.testing.assert_close(other["gradients"][n], gradient, rtol=1e-3, atol=1e-6)
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("mae", 400), ("simclr", 200)])
def test_it_learns_on_real_images(name: str, steps: int, shared_data: Path, tmp_path: Path, pretrain: Callable) -> None:
    """A small encoder of CIFAR-10 images, after a minute: the nearest neighbours of all 5,017 images among each other
    share their class clearly more often than with the untrained encoder (one standard error is about 0.7 points).

    Of the other methods benchmarks/methods.py measures it: they need longer to show it than a test may take.
    """
    data = shared_data / "cifar10_lossless5k"
    small = {
        flag: v for flag, v in pretext.load(name).recipe.small.items() if flag not in ("pool", "steps", "patch_size")
    }
    argv = ["--method", name, "--data", data, "--out", tmp_path / "run", "--steps", steps, "--lr", "2e-3"]
    argv += ["--encoder", "vit_micro", "--dim", 64, "--heads", 2, "--depth", 2, "--image-size", 32, "--patch-size", 8]
    argv += [
        "--batch-size",
        128,
        "--workers",
        0,
        "--monitor-every",
        0,
        "--picture-every",
        0,
        "--pool",
        "mean",
        "--no-score",
    ]
    for knob, value in small.items():
        if knob != "lr":
            argv += ["--" + knob.replace("_", "-"), *(value if isinstance(value, tuple) else [value])]
    pretrain(*argv)
    trained = encoder.load(tmp_path / "run")
    untrained = encoder.random_like(trained, seed=0)
    assert neighbours_agree(trained, data) > neighbours_agree(untrained, data) + 2


def neighbours_agree(model: encoder.Encoder, data: Path) -> float:
    """Share in percent of the images whose 20 nearest others (cosine) vote for their class."""
    found = extract(model, open_source(str(data), None), ("pooled",), cache=False)
    x = torch.nn.functional.normalize(torch.as_tensor(found.features["pooled"]), dim=1)
    labels = torch.as_tensor(found.labels)
    similar = (x @ x.T).fill_diagonal_(-1)
    votes = torch.nn.functional.one_hot(labels[similar.topk(20).indices], 10).sum(1)
    return 100 * float((votes.argmax(1) == labels).float().mean())


def test_draws_on_the_host_go_on_where_the_step_stands() -> None:
    one, other = (
        Step(step=0, total=2, noise=5, rows=slice(1, 3), batch_size=4, device=torch.device("cpu")) for _ in range(2)
    )
    one.rand(2)
    other.rand(2)
    with one.on_host() as host:
        assert torch.equal(host.rand(3), other.rand(3))
    assert torch.equal(one.shared_rand(3), other.shared_rand(3))
