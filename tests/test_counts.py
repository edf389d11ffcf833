"""A step's cost where no clock is needed: no method makes the host wait for the device, and none starts more kernels than
its own test states (`KERNELS`, see kernels.py). The figures are what was counted when they were written: a change that adds
operations must raise them, knowingly.
"""

from pathlib import Path

import pytest
import torch
from kernels import Counted, counted, stated
from ssl_pretrain.methods.mae import MAE

from ssl_pretrain import backbones, plugins, train
from ssl_pretrain.config import Run
from ssl_pretrain.conformance.one_step import build

METHODS = plugins.own("ssl_pretrain.methods")
PLAIN = {**backbones.defaults("vit_micro"), "patch_size": 8}
DECODER = MAE.Config(decoder_dim=32, decoder_depth=1, decoder_heads=2)
LOOP = 21  # bytes to pixels, norms, the check, AdamW of two groups, the log's row
CROPS = ("_upsample_bicubic2d_aa", "flip")  # the loader's, here without a worker


@pytest.mark.parametrize("name", METHODS)
def test_a_step_makes_nobody_wait_and_starts_no_more_kernels_than_before(name: str) -> None:
    kernels, on_the_host = stated(name)
    count = counted(build(name))
    assert count.waits == on_the_host
    total = sum(count.kernels.values())
    assert total <= kernels, f"{total} kernels, {kernels} before: {count.kernels.most_common(12)}"
    assert total > 0.9 * kernels, f"{total} kernels, {kernels} before: lower the figure"


@pytest.mark.parametrize(
    ("more", "kernels"),
    [({}, LOOP), ({"accumulate": 2, "clip_grad": 1.0}, None), ({"optimizer": "lars"}, None)],
    ids=str,
)
def test_the_loop_waits_where_it_logs_and_nowhere_else(
    photos: Path, tmp_path: Path, more: dict, kernels: int | None
) -> None:
    """Nor does a step of it start more kernels beside the method's own than its figure."""
    counts = []
    for steps in (4, 9):
        run = Run(
            method="mae", data=str(photos), out=tmp_path / str(steps), encoder="vit_micro", image_size=(32,), batch_size=8,
            steps=steps, log_every=100, checkpoint_every=100, monitor_every=0, picture_every=0, workers=0,
            precision="fp32", **more,
        )  # fmt: skip
        with Counted() as count:
            train.train(run, DECODER, backbones.config_class("vit_micro")(**PLAIN))
        counts.append(count)
    assert len(counts[0].waits) == len(counts[1].waits)
    assert len(counts[0].waits) > 0  # it logs once
    if kernels is not None:
        own = counted(MAE(backbones.build("vit_micro", image_size=(32, 32), **PLAIN), DECODER)).kernels
        short, long = (count.kernels for count in counts)
        beside = sum((long[name] - short[name]) / 5 - own[name] for name in long if name not in CROPS)
        assert 0.9 * kernels < beside <= kernels


def test_the_counter_sees_what_it_is_for() -> None:
    x = torch.arange(6.0, requires_grad=True)
    with Counted() as count:
        float(x.detach().sum())
        x[x > 2].sum().backward()
        x.view(2, 3).t()
    assert sorted(count.waits) == ["_local_scalar_dense", "index", "index_put"]
    assert count.kernels["sum"] == 2
    assert "view" not in count.kernels
