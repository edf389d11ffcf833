"""Staged runs: the plan, what is refused, noise patches, and a run through two resolutions that resumes bit for bit."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import losses
from ssl_pretrain.methods.dino import DINO
from ssl_pretrain.methods.mae import MAE

from ssl_pretrain import backbones, checkpoint, config
from ssl_pretrain.config import Run
from ssl_pretrain.data.colour import finish
from ssl_pretrain.data.views import NOISE_SIGMA, Sight, ViewSpec, cut, fitted
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop.stages import check_sizes, plan
from ssl_pretrain.randomness import numpy_generator


def resolved(*stages: str, steps: int = 100, size: int = 64) -> config.Resolved:
    run = Run(method="mae", image_size=(size,), steps=steps, stages=stages)
    return config.resolve(run, MAE.recipe, 1000, "fp32")


def test_the_shares_become_steps_and_the_settings_views() -> None:
    stages = plan(resolved("0.75 image_size=32", "0.25 crop_scale=0.5,1"), MAE, MAE.Config(), (16, 16))
    assert [(s.first, s.last) for s in stages] == [(0, 75), (75, 100)]
    assert [s.specs[0].size for s in stages] == [(32, 32), (64, 64)]
    assert [s.specs[0].scale for s in stages] == [(0.2, 1.0), (0.5, 1.0)]
    (whole,) = plan(resolved(), MAE, MAE.Config(), (16, 16))
    assert (whole.first, whole.last) == (0, 100)


def test_every_step_is_in_one_stage_however_the_shares_round() -> None:
    stages = plan(resolved("0.33", "0.33 image_size=32", "0.34", steps=10), MAE, MAE.Config(), (16, 16))
    assert [s.first for s in stages[1:]] == [s.last for s in stages[:-1]]
    assert (stages[0].first, stages[-1].last) == (0, 10)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (["0.5", "0.4"], "add up to 0.9"),
        (["half image_size=32", "0.5"], "must begin with a share"),
        (["0 image_size=32", "1"], "above 0"),
        (["1 image_size"], "KEY=VALUE"),
        (["1 crop_scal=0.5,1"], "did you mean.*crop-scale"),
        (["1 mask_ratio=0.5"], "mask_ratio changes no view"),
        (["1 image_size=big"], "image-size"),
    ],
)
def test_mistakes_are_named(stages: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(resolved(*stages), MAE, MAE.Config(), (16, 16))


def test_small_crops_are_whole_mask_units() -> None:
    """Of an encoder whose masks are coarser than its patches: 4 x 4 pixels a patch, 8 x 8 a unit."""
    made = backbones.build("hiera_micro", image_size=(32, 32), in_chans=3, q_pool=1)
    assert (made.stride, made.unit) == ((4, 4), (8, 8))
    knobs = DINO.Config(local_ratio=0.4)  # 13 pixels
    (stage,) = plan(resolved(size=32), DINO, knobs, made.stride, unit=made.unit)
    assert [spec.size for spec in stage.specs] == [(32, 32), (32, 32), (16, 16)]
    for spec in stage.specs:
        made(torch.zeros(1, 3, *spec.size))
    (stage,) = plan(resolved(size=32), DINO, knobs, made.stride)
    assert stage.specs[-1].size == (12, 12)  # what it would not take


def test_views_in_pixels_of_a_network_are_whole_mask_units_of_it() -> None:
    spec = ViewSpec(name="teacher", size=(42, 44), network="teacher", network_pixels=True)
    (found,) = fitted((spec,), (32, 32), (8, 8), {"teacher": Sight((4, 4), unit=(8, 8))})
    assert found.size == (40, 48)
    (found,) = fitted((spec,), (32, 32), (8, 8), {"teacher": Sight((4, 4))})
    assert found.size == (44, 44)


@pytest.mark.parametrize(
    ("encoder", "size", "remedy"),
    [("vit_micro", "36,32", "image_size=32,32"), ("hiera_micro", "28", "image_size=32,32"), ("resnet_micro", "28", "")],
)
def test_a_stage_that_the_encoder_does_not_take_is_refused_at_once(encoder: str, size: str, remedy: str) -> None:
    run = replace(resolved("0.9", f"0.1 image-size={size}", size=32), encoder=encoder)
    settings = backbones.defaults(encoder) | ({"patch_size": 8} if encoder == "vit_micro" else {})
    made = backbones.build(encoder, image_size=(32, 32), in_chans=3, **settings)
    if not remedy:
        check_sizes(run, made.config)
        return
    with pytest.raises(UserError, match=rf"--stages '0.1 image-size={size}': images of .* do not divide") as refused:
        check_sizes(run, made.config)
    assert remedy in str(refused.value)
    assert "--image-size" not in str(refused.value)


def test_noise_lies_on_one_square_and_is_the_same_each_time() -> None:
    spec = ViewSpec(name="v", size=(48, 32), scale=(1.0, 1.0), ratio=(2 / 3, 2 / 3), hflip=0.0)
    image = np.full((48, 32, 3), 128, np.uint8)
    noisy = replace(spec, noise_patch=1.0)
    changed, sigmas = [], []
    for i in range(40):
        one = cut(image, noisy, numpy_generator(i))
        sigmas.append(one.colour[NOISE_SIGMA])
        views = [
            finish(torch.from_numpy(one.image)[None], one.colour[None], noisy, (0.0,) * 3, (1.0,) * 3) for _ in range(2)
        ]
        assert torch.equal(*views)
        assert float(views[0].min()) >= 0
        assert float(views[0].max()) <= 1
        touched = ((views[0][0] - 128 / 255).abs() > 1e-6).any(0)
        where = touched.nonzero()
        if len(where):
            top, left = where.min(0).values
            bottom, right = where.max(0).values
            assert touched[top : bottom + 1, left : right + 1].float().mean() > 0.99  # nearly every value of a square
        changed.append(touched.float().mean().item())
    assert max(sigmas) <= 0.5
    assert np.mean(sigmas) == pytest.approx(0.25, abs=0.08)
    assert min(changed) < 0.1
    assert max(changed) > 0.3
    plain = cut(image, spec, numpy_generator(0))
    assert plain.colour[NOISE_SIGMA] == 0


def test_a_run_through_two_resolutions_resumes_in_either(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    out = tmp_path / "run"
    argv = ["--method", "mae", "--data", photos, "--out", out, "--steps", 8, "--log-every", 1, "--checkpoint-every", 2]
    argv += ["--encoder", "vit_micro", "--depth", 2, "--image-size", 32, "--patch-size", 8, "--batch-size", 8]
    argv += ["--decoder-dim", 32, "--decoder-depth", 1, "--decoder-heads", 2, "--workers", 0, "--keep-last", 4]
    argv += ["--stages", "0.5 image_size=16", "0.5 crop_scale=0.5,1", "--positions", "learned"]
    pretrain(*argv)
    curve = losses(out)
    whole = {name: value.clone() for name, value in checkpoint.load(out / "checkpoints", 8)["method"].items()}
    assert whole["encoder.pos_embed"].shape[1] == 17  # 4 x 4 patches and the class token: of the whole size
    for upto in (6, 2):  # within the second stage, and within the first
        for step in range(upto + 2, 10, 2):
            shutil.rmtree(out / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
        pretrain(*argv)
        resumed = checkpoint.load(out / "checkpoints", 8)["method"]
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
        assert losses(out) == curve
