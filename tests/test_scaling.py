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


def test_checkpoints_by_hand() -> None:
    # A billion parameters: 12 GB of state, 4 GB of export; every speed 1 GB/s but the storage's, nothing else takes time
    room = scaling.Cluster(
        to_host=1e9, to_pages=1e9, stream=1e9, sums=1e9, adapter=1e9, storage=2e9, inside=1e9, across=1e9,
        latency=0.0, operation=0.0, operations=float("inf"), listing=0.0,
    )  # fmt: skip
    model = scaling.Model(parameters=10**9, units=10, flops=0.0, activations=0.0, tensors=25)
    alone = scaling.saved("ddp", model, 16, room)
    assert alone.part == 16e9
    assert alone.blocked == 4 + 12  # the export's copy, the state's
    assert alone.written == 16
    assert alone.read == 12 + 12  # the sums, then a copy for each of two machines, by 1 GB/s each
    shared = scaling.saved("fsdp", model, 16, room)
    assert shared.part == 12e9 / 16 + 4e9
    assert shared.blocked == 12 / 16  # a sixteenth of the state
    assert shared.written == 6 + 4 + 4  # half of the state through an adapter, then the export, read and written
    assert shared.read == 12 + 6
    by_machine = scaling.saved("hsdp", model, 16, room)
    assert by_machine.blocked == 12 / 8
    assert (by_machine.part, by_machine.written, by_machine.read) == (shared.part, shared.written, 12 + 12)


def test_small_files_and_headers_cost_what_they_are_many() -> None:
    model = scaling.Model(parameters=0, units=10, flops=0.0, activations=0.0)
    room = scaling.Cluster(latency=0.0, operation=1e-3, operations=1e6)
    assert scaling.saved("fsdp", model, 64, room).blocked == pytest.approx(2 * 64 * 1e-3)
    assert scaling.saved("fsdp", model, 64, room).read == pytest.approx(64 * 1e-3)  # as fast as one asks
    assert scaling.saved("fsdp", model, 10_000, room).read == pytest.approx(10_000**2 / 1e6)  # as fast as it answers


def test_images_a_second() -> None:
    cluster = scaling.Cluster()
    model = scaling.vit("ViT-L/16")
    assert scaling.images_a_second(model, cluster) == pytest.approx(cluster.flops / (6 * 304e6 * 197), rel=0.1)
    faster = scaling.images_a_second(scaling.mae("ViT-L/16"), cluster)
    # A quarter of the tokens, and a decoder a twelfth of the encoder's size that sees all of them: a third of the work
    assert faster / scaling.images_a_second(model, cluster) == pytest.approx(1 / (1 / 4 + 1 / 12), rel=0.1)


def test_where_parts_lie_is_read_by_every_process() -> None:
    model = scaling.Model(parameters=0, units=10, flops=0.0, activations=0.0, tensors=100)
    room = scaling.Cluster(operation=0.0, operations=float("inf"), listing=1e-3)
    assert scaling.saved("fsdp", model, 64, room).read == pytest.approx(300 * 64 * 1e-3)
    assert scaling.saved("hsdp", model, 64, room).read == pytest.approx(300 * 8 * 1e-3)  # each part once


def test_planning_is_measured() -> None:
    assert 1e-6 < scaling.planning(50) < 1e-2
    assert 1e-6 < scaling.listing(4, 50) < 1e-2


def test_every_table_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--storage", "50", "--image-bytes", "40000"])
    scaling.main()
    lines = capsys.readouterr().out.splitlines()
    tables = [text.split("\n") for text in "\n".join(lines).split("\n\n") if text.startswith("|")]
    assert [len(table) - 2 for table in tables] == [12] * 6 + [6]  # 3 models, a step's and a checkpoint's; the images
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert any("written, s (GB/s), of 50 GB/s" in line for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel's counters of bytes are Linux's")
@pytest.mark.parametrize(("how", "world"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
def test_processes_send_the_bytes_that_are_predicted(how: str, world: int) -> None:
    seen = scaling.run(how, world, 2)
    # Over gloo a sum that is scattered is an all-reduce of everything; parameters are gathered in float32.
    predicted = sum(scaling.volumes(how, seen.parameters, world, 2, gathered=4, scattered=8))
    assert seen.counted == pytest.approx(predicted, rel=0.01)
    assert min(seen.step, seen.compute) > 0  # which of them is longer is for a quiet machine to show
