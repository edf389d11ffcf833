"""The scaling model's volumes, against arithmetic by hand and against the bytes that real processes send."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scaling


def test_volumes_by_hand() -> None:
    # two processes, ten parameters: ddp sends its half of 40 bytes to be summed and its half again to be handed out
    assert scaling.volumes("ddp", 10, 2, 1) == (0, 40)
    # fsdp: half of the bf16 parameters twice, half of the float32 gradients once
    assert scaling.volumes("fsdp", 10, 2, 1) == (10 + 10 + 20, 0)
    # hsdp of 4 as 2 x 2: as fsdp of two, then ddp of half the gradients between two copies
    assert scaling.volumes("hsdp", 10, 4, 2) == (40, 20)
    assert scaling.volumes("ddp", 10, 1, 1) == (0, 0)


def test_costs_hang_together() -> None:
    model, cluster = scaling.vit("ViT-g/14"), scaling.Cluster()
    assert model.parameters == pytest.approx(1.13e9, rel=0.02)  # DINOv2's ViT-g
    small, large = (scaling.cost("fsdp", model, 32, world, cluster) for world in (8, 64))
    assert large.memory < small.memory
    assert large.exchange > small.exchange
    assert scaling.cost("hsdp", model, 32, 64, cluster).across == pytest.approx(
        scaling.cost("ddp", model, 32, 64, cluster).across / 8, rel=0.15
    )
    for how in ("ddp", "fsdp", "hsdp"):
        cost = scaling.cost(how, model, 32, 64, cluster)
        assert 0 < cost.exposed <= cost.exchange
        assert cost.step > cost.exposed


def test_what_hides_an_exchange() -> None:
    model = scaling.Model(parameters=4 * scaling.BUCKET // 4, units=10, flops=0.0, activations=0.0)  # four buckets
    hidden = [scaling.not_hidden(how, model, 1.0, 3.0, waits=False) for how in ("ddp", "fsdp")]
    assert hidden == [0.25, 0.1]  # the last bucket, the last block
    bound = [scaling.not_hidden(how, model, 5.0, 3.0, waits=False) for how in ("ddp", "fsdp")]
    assert bound == [3.0, 2.0]  # backward is two thirds of three seconds; a sharded step has all of them
    assert scaling.not_hidden("hsdp", model, 1.0, 3.0, waits=True) == 1.0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel's counters of bytes are Linux's")
def test_ddp_sends_the_bytes_that_are_predicted() -> None:
    seen = scaling.run("ddp", 2, 2)
    assert seen.counted == pytest.approx(sum(scaling.volumes("ddp", seen.parameters, 2, 1)), rel=0.01)
    assert min(seen.step, seen.compute) > 0  # which of them is longer is for a quiet machine to show
