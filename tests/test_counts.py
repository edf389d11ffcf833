"""A step's cost where no clock is needed: no method makes the host wait for the device, and none starts more kernels than
its figure.

Forward, backward and what follows the step (teachers, queues) are counted together (benchmarks/counted.py), of a ViT of two
blocks. The figures are what was counted when they were written: a change that
adds operations must raise them here, knowingly.
"""

import sys
from pathlib import Path

import pytest
import torch
from one_step import BATCH, after_step, batch, build
from ssl_pretrain.methods.mae import MAE

from ssl_pretrain import backbones, plugins, train
from ssl_pretrain.config import Run
from ssl_pretrain.pretext import Method, Step

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from counted import Counted

METHODS = plugins.own("ssl_pretrain.methods")
KERNELS = {
    "aim": 133, "barlow": 283, "byol": 359, "data2vec2": 206, "dino": 304, "dinov2": 2562, "ibot": 2394, "ijepa": 313,
    "lejepa": 470, "mae": 134, "mocov3": 546, "msn": 364, "nnclr": 408, "npid": 163, "semaim": 181, "simclr": 236,
    "simmim": 113, "simsiam": 368, "supervised": 118, "swav": 369, "vicreg": 320,
}  # fmt: skip
ON_THE_HOST = {"ijepa": ["_local_scalar_dense"]}  # of a tensor that is on the CPU wherever the run is: nobody waits


PLAIN = {**backbones.defaults("vit_micro"), "patch_size": 8}
DECODER = MAE.Config(decoder_dim=32, decoder_depth=1, decoder_heads=2)
LOOP = 21  # bytes to pixels, norms, the check, AdamW of two groups, the log's row
CROPS = ("_upsample_bicubic2d_aa", "flip")  # the loader's, here without a worker


def counted(name: str) -> Counted:
    """Of a method as its test builds it."""
    return of_a_step(build(name))


def of_a_step(method: Method) -> Counted:
    """The second step of a method, whose first may set things up."""
    given = batch(method, slice(0, BATCH))
    for number in (3, 4):
        step = Step(step=number, total=10, noise=7, rows=slice(0, BATCH), batch_size=BATCH, device=torch.device("cpu"))
        with Counted() as count:
            losses = method(given, step)
            losses.total.backward()
            after_step(method, step, losses.carry)
        for parameter in method.parameters():
            parameter.grad = None
    return count


@pytest.mark.parametrize("name", METHODS)
def test_a_step_makes_nobody_wait_and_starts_no_more_kernels_than_before(name: str) -> None:
    count = counted(name)
    assert count.waits == ON_THE_HOST.get(name, [])
    total = sum(count.kernels.values())
    assert total <= KERNELS[name], f"{total} kernels, {KERNELS[name]} before: {count.kernels.most_common(12)}"
    assert total > 0.9 * KERNELS[name], f"{total} kernels, {KERNELS[name]} before: lower the figure"


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
        own = of_a_step(MAE(backbones.build("vit_micro", image_size=(32, 32), **PLAIN), DECODER)).kernels
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


if __name__ == "__main__":
    for each in METHODS:
        found = counted(each)
        print(f'    "{each}": {sum(found.kernels.values())},', found.waits)
