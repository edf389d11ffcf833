"""A run is the same run however its parameters are spread over processes, and on however many it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import spark_helpers
import torch
from conftest import TINY, command, losses
from torch import nn

from ssl_pretrain import backbones, checkpoint, pretext
from ssl_pretrain.loop import parallel

# One method of each unlike kind: pixels; a teacher, prototypes and a centre; a loss over the global batch.
KINDS = {
    "mae": TINY,
    "dino": [*TINY[:10], "--prototypes", "64", "--hidden-dim", "64", "--bottleneck-dim", "16", "--local-views", "2",
             "--monitor-every", "0", "--picture-every", "0", "--precision", "fp32"],
    "simclr": [*TINY[:10], "--hidden-dim", "64", "--embedding-dim", "16", "--monitor-every", "0", "--picture-every", "0",
               "--precision", "fp32"],
}  # fmt: skip


def wait_for(process: subprocess.Popen, run: Path, step: int) -> None:
    while process.poll() is None and not ((run / "metrics.jsonl").exists() and max(losses(run), default=0) >= step):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", KINDS)
def test_sharded_replicated_and_alone_are_the_same_run(
    method: str, photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    same = ("--method", method, "--data", photos, "--steps", 10, "--log-every", 1, "--lr", 1e-4, "--workers", 0,
            *KINDS[method])  # fmt: skip
    pretrain(*same, "--out", tmp_path / "alone", "--gradient-checkpointing")
    pretrain(*same, "--out", tmp_path / "ddp", "--nproc", 2)
    pretrain(*same, "--out", tmp_path / "fsdp", "--nproc", 2, "--parallel", "fsdp", "--recompute")
    alone = losses(tmp_path / "alone")
    assert len(alone) == 10
    assert losses(tmp_path / "ddp") == pytest.approx(alone, rel=1e-5)
    assert losses(tmp_path / "fsdp") == pytest.approx(alone, rel=1e-5)
    one, two = (checkpoint.load(tmp_path / run / "checkpoints", 10) for run in ("alone", "fsdp"))
    assert one["method"].keys() == two["method"].keys()
    assert one["optimizer"].keys() == two["optimizer"].keys()
    # All together, for Adam turns the rounding errors of gradients that should be 0 (a key's bias) into whole steps.
    names = sorted(one["method"])
    a, b = (torch.cat([each["method"][name].double().flatten() for name in names]) for each in (one, two))
    assert float((a - b).norm() / a.norm()) < 1e-3
    files = sorted(p.name[:11] for p in (tmp_path / "fsdp" / "checkpoints" / "step-00000010").glob("*.safetensors"))
    assert files == ["shard-00001", "shard-00002"]  # each process wrote its part


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "dino"])
def test_sharded_in_bfloat16_stays_with_replicated(
    method: str, photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    same = ("--method", method, "--data", photos, "--steps", 10, "--log-every", 1, "--lr", 1e-4, "--workers", 0,
            *KINDS[method], "--precision", "bf16", "--nproc", 2)  # fmt: skip
    pretrain(*same, "--out", tmp_path / "ddp")
    pretrain(*same, "--out", tmp_path / "fsdp", "--parallel", "fsdp")
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-2)  # 8 bits of mantissa
    kept = checkpoint.load(tmp_path / "fsdp" / "checkpoints", 10)["method"]
    assert {each.dtype for each in kept.values() if each.is_floating_point()} == {torch.float32}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_another_way_of_sharing(
    photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    same = ("--method", "mae", "--data", photos, "--steps", 60, "--log-every", 1, "--workers", 0, *TINY)
    pretrain(*same, "--out", tmp_path / "undisturbed", "--nproc", 2)
    out = tmp_path / "run"
    places = (("--nproc", 2, "--parallel", "fsdp"), (), ("--nproc", 4, "--parallel", "hsdp", "--shard-size", 2))
    for place, until in zip(places[:2], (5, 20), strict=True):
        process = subprocess.Popen(
            command("pretrain", *same, "--out", out, *place),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for(process, out, until)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate()
        assert process.returncode == 75, said
        assert max(losses(out)) < 60
    done = pretrain(*same, "--out", out, *places[2])
    assert "continuing from step" in done.stdout + done.stderr
    expected = losses(tmp_path / "undisturbed")
    assert len(expected) == 60
    assert losses(out) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_lars_sees_whole_norms_of_sharded_parameters(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    same = ("--method", "mae", "--data", photos, "--steps", 4, "--log-every", 1, "--optimizer", "lars", "--lr", 0.2,
            "--clip-grad", 0.5, "--workers", 0, *TINY)  # fmt: skip
    pretrain(*same, "--out", tmp_path / "alone")
    pretrain(*same, "--out", tmp_path / "fsdp", "--nproc", 2, "--parallel", "fsdp")
    one, two = (checkpoint.load(tmp_path / run / "checkpoints", 4)["method"] for run in ("alone", "fsdp"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--cpu-offload",), "--cpu-offload needs --parallel fsdp"),
        (("--cpu-offload", "--parallel", "fsdp"), "on the host already"),
        (("--shard-size", 2), "--parallel hsdp"),
        (("--shard-size", 3, "--parallel", "hsdp"), "does not divide"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(flags: tuple, said: str, photos: Path, tmp_path: Path, pretrain: Callable):
    done = pretrain("--method", "mae", "--data", photos, "--steps", 2, "--out", tmp_path / "run", *TINY, *flags, code=2)
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("encoder", "count"),
    [
        ("vit_micro", 4),
        ("resnet18", 8),
        ("convnext_micro", None),
        ("swin_micro", 6),
        ("octic_micro", 4),
        ("grouper_micro", 4),
        ("hiera_micro", 5),
    ],
)
def test_the_blocks_of_every_kind_of_backbone_are_found(encoder: str, count: int | None) -> None:
    model = backbones.build(encoder, image_size=(32, 32), in_chans=3, **backbones.defaults(encoder))
    found = parallel.blocks(model)
    assert len(found) == (model.depth if count is None else count)
    inside = sum(p.numel() for block in found for p in block.parameters())
    assert inside > 0.8 * sum(p.numel() for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read as Linux tells it")
def test_activations_computed_again_need_less_memory_and_give_the_same_gradients() -> None:
    code = """
import json, sys, torch
from ssl_pretrain import backbones
from ssl_pretrain.config import Run
from ssl_pretrain.loop import parallel
class Asked:
    gradient_checkpointing, compile, parallel = sys.argv[1] == "yes", False, "ddp"
class Alone:
    size = 1
torch.manual_seed(0)
model = backbones.build("vit_tiny", image_size=(128, 128), in_chans=3, patch_size=8)
parallel.wrap(model, Asked, Alone)
images = torch.randn(16, 3, 128, 128)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
model(images).pooled.square().sum().backward()
grown = peak() - before
norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None])
print(json.dumps([grown, norm.tolist()]))
"""
    # Memory that is let go goes back to the system at once: holes in glibc's heap would count as used.
    place = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    argv = [sys.executable, "-c", code]
    runs = [subprocess.run([*argv, w], capture_output=True, text=True, check=True, env=place) for w in ("no", "yes")]
    kept, again = (json.loads(run.stdout) for run in runs)
    assert again[1] == pytest.approx(kept[1], rel=1e-6)
    assert again[0] < 0.5 * kept[0]


@pytest.mark.parametrize("masked", [False, True])
def test_activations_computed_again_move_running_statistics_once(masked: bool) -> None:
    asked = types.SimpleNamespace(gradient_checkpointing=False, compile=False, parallel="ddp")
    found = []
    for asked.gradient_checkpointing in (False, True):
        method, x = spark_helpers.build("resnet_micro"), spark_helpers.images()
        parallel.wrap(method, asked, types.SimpleNamespace(size=1))  # type: ignore[arg-type]
        before = {name: each.clone() for name, each in method.named_buffers()}
        for _ in range(2):
            if masked:
                method(spark_helpers.a_batch(x), spark_helpers.step()).total.backward()
            else:
                method.encoder(x).pooled.square().sum().backward()
        seen = {n: b for n, b in method.named_buffers() if n.startswith("encoder") and b.is_floating_point()}
        assert len(seen) == 2 * 12  # batch norms: of the stem, two a block, and three shortcuts
        assert not any(torch.equal(value, before[name]) for name, value in seen.items())
        grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        found.append((dict(method.named_buffers()), grads))
    for one, two in zip(*found, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert torch.equal(value, two[name]), name


def test_a_model_that_is_not_sharded_is_seen_as_it_is() -> None:
    layer = nn.Linear(3, 2)
    shards = parallel.Shards(layer, torch.device("cpu"))
    assert shards(layer.weight) is layer.weight
    assert not parallel.is_sharded(layer)
    other = nn.Linear(3, 2)
    parallel.copy_whole(layer, other)
    assert torch.equal(other.weight, layer.weight)


def test_every_method_has_blocks_to_share_out() -> None:
    encoder = backbones.build("vit_micro", image_size=(32, 32), in_chans=3, patch_size=8)
    kind = pretext.load("mae")
    assert len(parallel.blocks(kind(encoder, kind.Config(decoder_dim=32, decoder_depth=3, decoder_heads=2)))) == 4 + 3
