"""Stored outputs of frozen networks: a run that reads them ends with the same bits as one that runs the network, and what
does not fit is refused in words."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import losses, picture
from kernels import Counted
from method_helpers import tiny_flags
from small_encoders import export
from ssl_pretrain.launch.data import main as data
from ssl_pretrain.launch.pretrain import main, read_command
from ssl_pretrain.methods.featmim import FeatMIM

from ssl_pretrain import backbones, config, encoder, tokenizer
from ssl_pretrain.backbones.quantizer import Quantizer
from ssl_pretrain.backbones.stored import StoredOutputs
from ssl_pretrain.conformance import Fault, methods, one_step
from ssl_pretrain.data import rows
from ssl_pretrain.data.loader import Share, batches
from ssl_pretrain.data.rows import Layout, Rows
from ssl_pretrain.data.source import open_source
from ssl_pretrain.data.views import Reads, Sight, fitted
from ssl_pretrain.distributed import World
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.loop import estimate, networks, stages, teacher_cache
from ssl_pretrain.tokenizer import Tokenizer

STEPS, BATCH = 6, 16
MEAN, STD = (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)  # of the teacher's images
SMALL = (
    "--encoder vit_micro --depth 2 --image-size 32 --patch-size 8 --no-score --monitor-every 0 --picture-every 0 "
    "--workers 0 --checkpoint-every 3 --keep-last 5 --log-every 1"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, one of them unreadable; teacher/, of another patch, size, width and normalisation; run/, a run with it
    without a cache; and its cache/."""
    folder = tmp_path_factory.mktemp("cached")
    (folder / "photos").mkdir()
    for i in range(40):
        picture(i).save(folder / "photos" / f"{i:03d}.jpg", quality=90)
    (folder / "photos" / "017.jpg").write_bytes(b"no image")
    export(folder / "teacher", patch=16, size=64, mean=MEAN, std=STD, dim=192, heads=3, depth=3)
    call(main, *flags(folder), "--out", folder / "run")
    call(data, "cache-teacher", *flags(folder), "--teacher-cache", folder / "cache")
    return folder


def flags(folder: Path, *more: object, **other: object) -> list[object]:
    """Of the run with the teacher; `other` replaces some."""
    named = {"method": "featmim", "teacher": folder / "teacher", "data": folder / "photos", "steps": STEPS}
    named |= {"batch_size": BATCH, "precision": "fp32", **other}
    words = [
        word for name, value in named.items() for word in ("--" + name.replace("_", "-"), value) if value is not None
    ]
    return [*words, *SMALL, *more]


def call(command, *words: object, code: int = 0) -> None:
    assert command(list(map(str, words))) == code


def weights(run: Path) -> bytes:
    return (run / "encoder" / "model.safetensors").read_bytes()


# ---- The same bits


def test_a_run_with_a_cache_ends_with_the_same_bits(folder: Path, tmp_path: Path):
    """Also by two loader workers, without --teacher, and where the teacher is gone: nothing of it is read."""
    call(main, *flags(folder), "--teacher-cache", folder / "cache", "--out", tmp_path / "a")
    assert weights(tmp_path / "a") == weights(folder / "run")
    assert losses(tmp_path / "a") == losses(folder / "run")
    call(main, *flags(folder), "--teacher-cache", folder / "cache", "--workers", "2", "--out", tmp_path / "b")
    assert weights(tmp_path / "b") == weights(folder / "run")
    aside = folder / "aside"
    (folder / "teacher").rename(aside)
    try:
        call(main, *flags(folder, teacher=None), "--teacher-cache", folder / "cache", "--out", tmp_path / "c")
    finally:
        aside.rename(folder / "teacher")
    assert weights(tmp_path / "c") == weights(folder / "run")
    known = json.loads((tmp_path / "c" / "manifest.json").read_text())["networks"]["teacher"]
    wanted = {"spec": str(folder / "teacher"), "fingerprint": encoder.load(folder / "teacher").fingerprint}
    assert known.items() >= wanted.items()


def test_rows_are_the_teachers_features_of_the_runs_crops(folder: Path):
    """Of the last step, against the teacher called by hand with pixels in its own normalisation."""
    layout, _ = rows.read_head(folder / "cache", "teacher cache")
    assert layout.count == STEPS * BATCH
    source = open_source(str(folder / "photos"), None)
    student = backbones.build("vit_micro", image_size=(32, 32), depth=2, patch_size=8)
    teacher = encoder.load(folder / "teacher")
    specs = fitted(FeatMIM.views(FeatMIM.Config(), (32, 32)), (32, 32), student.stride, {"teacher": Sight((16, 16))})
    stream = batches(
        source,
        specs,
        Share(BATCH),
        seed=0,
        channels=3,
        start_step=STEPS - 1,
        stop_step=STEPS,
        workers=0,
        policy="replace",
    )
    with closing(stream):
        raw = next(stream)
    pixels = raw.views["teacher"].numpy().astype(np.float64).transpose(0, 3, 1, 2) / 255
    by_hand = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.no_grad():
        expected = teacher(torch.from_numpy(by_hand).float()).patches
    found = Rows(folder / "cache", layout, "").read(0, (STEPS - 1) * BATCH, raw.index)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert 17 not in Rows(folder / "cache", layout, "").index()  # replaced, as in the run


def test_it_resumes_at_any_step_with_or_without_the_cache(folder: Path, tmp_path: Path):
    for name, more in (("with", ["--teacher-cache", folder / "cache"]), ("without", [])):
        call(main, *flags(folder), "--teacher-cache", folder / "cache", "--out", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / f"step-{STEPS:08d}")
        shutil.rmtree(tmp_path / name / "encoder")
        call(main, *flags(folder), *more, "--out", tmp_path / name)
        starts = [each["step"] for each in json.loads((tmp_path / name / "manifest.json").read_text())["launches"]]
        assert starts == [0, 3]
        assert weights(tmp_path / name) == weights(folder / "run")


def test_the_estimate_of_a_long_run_reads_the_cache(folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "LONG_STEP", 0.0)
    call(main, *flags(folder), "--teacher-cache", folder / "cache", "--out", tmp_path / "run")
    assert "estimated from" in capsys.readouterr().err
    assert weights(tmp_path / "run") == weights(folder / "run")


def test_micro_batches_and_another_batch(folder: Path, tmp_path: Path):
    """Rows are of places in the stream of images, not of steps: other batches read the same cache, and targets agree to
    rounding. Written in the run's micro-batches, they are the same bits."""
    uncached = flags(folder, batch_size=8)
    call(main, *uncached, "--out", tmp_path / "8")
    call(main, *uncached, "--teacher-cache", folder / "cache", "--out", tmp_path / "8c")
    for step, loss in losses(tmp_path / "8").items():
        assert losses(tmp_path / "8c")[step] == pytest.approx(loss, rel=1e-5)
    halves = flags(folder, "--accumulate", "2")
    call(data, "cache-teacher", *halves, "--teacher-cache", tmp_path / "halves")
    call(main, *halves, "--out", tmp_path / "h")
    call(main, *halves, "--teacher-cache", tmp_path / "halves", "--out", tmp_path / "hc")
    assert weights(tmp_path / "h") == weights(tmp_path / "hc")


@pytest.mark.slow
def test_two_processes(folder: Path, pretrain, tmp_path: Path):
    both = flags(folder, "--nproc", "2", "--accumulate", "2")
    call(data, "cache-teacher", *both, "--teacher-cache", tmp_path / "cache")
    pretrain(*both, "--out", tmp_path / "a")
    pretrain(*both, "--teacher-cache", tmp_path / "cache", "--out", tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    pretrain(*both, "--teacher-cache", folder / "cache", "--out", tmp_path / "c")
    for step, loss in losses(folder / "run").items():
        assert losses(tmp_path / "c")[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("kind", ["features", "gram"])
def test_an_anchor_reads_a_cache(kind: str, folder: Path, tmp_path: Path):
    call(main, *flags(folder, method="mae", teacher=None, steps=2), "--out", tmp_path / "start")
    own = flags(folder, "--anchor", kind, "--init-from", tmp_path / "start", method="mae", teacher=None, steps=3)
    call(main, *own, "--out", tmp_path / "a")
    call(data, "cache-teacher", *own, "--teacher-cache", tmp_path / "cache")
    call(main, *own, "--teacher-cache", tmp_path / "cache", "--out", tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_pooled_vectors_under_gradcache(folder: Path, tmp_path: Path):
    """4 bytes for each of the teacher's channels, once an image."""
    more = ["--teacher-weight", "1", "--accumulate", "2", *tiny_flags("mvmr")]
    own = flags(folder, *more, method="mvmr", steps=2)
    call(main, *own, "--out", tmp_path / "a")
    call(data, "cache-teacher", *own, "--teacher-cache", tmp_path / "cache")
    call(main, *own, "--teacher-cache", tmp_path / "cache", "--out", tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    layout, _ = rows.read_head(tmp_path / "cache", "teacher cache")
    assert layout.record.itemsize == 8 + 4 * 192


def test_a_block_before_the_norm_and_bfloat16(folder: Path, tmp_path: Path):
    own = flags(folder, "--target-block", "1", "--no-target-final-norm", precision="bf16", steps=2)
    call(main, *own, "--out", tmp_path / "a")
    call(data, "cache-teacher", *own, "--teacher-cache", tmp_path / "cache")
    call(main, *own, "--teacher-cache", tmp_path / "cache", "--out", tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_tokenizer_reads_a_cache(folder: Path, tmp_path: Path):
    """Ids take two bytes each."""
    torch.manual_seed(0)
    backbone = backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=1)
    exported = Encoder(backbone, "vit_micro", Preprocessing.for_size((32, 32), MEAN, STD), {})
    tokenizer.save(tmp_path / "tokens", Tokenizer(exported, Quantizer(backbone.dim, 32, 4)))
    own = flags(folder, "--tokenizer", tmp_path / "tokens", method="beit", teacher=None)
    call(main, *own, "--out", tmp_path / "a")
    call(data, "cache-teacher", *own, "--tokenizer-cache", tmp_path / "cache")
    call(main, *own, "--tokenizer-cache", tmp_path / "cache", "--out", tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    layout, _ = rows.read_head(tmp_path / "cache", "teacher cache")
    assert layout.record.itemsize == 8 + 2 * 16
    call(main, *own, "--teacher-cache", tmp_path / "cache", "--out", tmp_path / "c", code=2)


@pytest.mark.parametrize(("kind", "near"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_the_space(kind: str, near: float, folder: Path, tmp_path: Path, capsys):
    cache = ["--teacher-cache", tmp_path / "cache"]
    call(data, "cache-teacher", *flags(folder), *cache, "--store", kind, "--check", "2")
    assert "computed 2 of 6 steps again: the largest difference is 0.0e+00" in capsys.readouterr().out
    layout, _ = rows.read_head(tmp_path / "cache", "teacher cache")
    exact, _ = rows.read_head(folder / "cache", "teacher cache")
    assert layout.record.itemsize - 8 == (exact.record.itemsize - 8) // 2
    index = Rows(folder / "cache", exact, "").index()[:20]
    found, wanted = (
        Rows(p, each, "").read(0, 0, index).float()
        for p, each in ((tmp_path / "cache", layout), (folder / "cache", exact))
    )
    torch.testing.assert_close(found, wanted, rtol=near, atol=near)
    assert not found.equal(wanted)
    call(main, *flags(folder), *cache, "--out", tmp_path / "run")
    assert losses(tmp_path / "run")[1] == pytest.approx(losses(folder / "run")[1], rel=near)
    call(main, *flags(folder), *cache, "--out", tmp_path / "run")
    # what began with rounded targets goes on with them
    call(main, *flags(folder), "--out", tmp_path / "run", code=2)
    assert f"began with outputs of the teacher in {kind}, and now they are in float32" in capsys.readouterr().err


# ---- The cost


def test_the_teacher_adds_its_forward_and_nothing_else(folder: Path):
    """Kernels of a step with the teacher are those of a step that reads stored outputs, and of the teacher alone."""
    method = one_step.build("featmim")
    batch, step = one_step.batch(method), one_step.step()
    teacher = method.target.teacher
    assert teacher is not None
    with torch.no_grad():
        seen = teacher(batch.views["teacher"])
    stands_in = StoredOutputs(
        dim=teacher.dim, depth=teacher.backbone.depth, stride=teacher.sight.stride, image_size=(32, 32), in_chans=3,
        block=teacher.backbone.depth - 1, outputs=("patches",), kind="float32", grids={seen.patches.shape[1]: seen.grid},
    )  # fmt: skip
    scale = ((0.5,) * 3, (0.5,) * 3)
    cached = Frozen(stands_in, spec="s", fingerprint="f", sight=teacher.sight, own=scale, run=scale)

    def kernels(work) -> dict[str, int]:
        work()
        with Counted() as count:
            work()
        return dict(count.kernels)

    def one() -> None:
        method(batch, step).total.backward()

    alone = kernels(lambda: teacher(batch.views["teacher"]))
    with_teacher = kernels(one)
    method.target.teacher, batch.views["teacher"] = cached, seen.patches[:, None].clone()
    without = kernels(one)
    assert sum(alone.values()) > 30
    added = {
        name: count - without.get(name, 0) for name, count in with_teacher.items() if count != without.get(name, 0)
    }
    assert added == alone


def test_nothing_of_the_teacher_is_in_the_checkpoint(folder: Path, tmp_path: Path):
    """A checkpoint has the student's parameters and AdamW's two moments of each. The teacher is larger than that."""
    call(main, *flags(folder, steps=2), "--out", tmp_path / "a")
    call(data, "cache-teacher", *flags(folder, steps=2), "--teacher-cache", tmp_path / "cache")
    call(main, *flags(folder, steps=2), "--teacher-cache", tmp_path / "cache", "--out", tmp_path / "b")
    sizes = []
    for name in "ab":
        files = [path for path in (tmp_path / name / "checkpoints").rglob("*") if path.is_file()]
        sizes.append(sum(path.stat().st_size for path in files))
    student = backbones.build("vit_micro", image_size=(32, 32), depth=2, patch_size=8)
    teacher = encoder.load(folder / "teacher").backbone
    count = sum(p.numel() for p in student.parameters()) + 128 + 129 * 192
    numbers = sum(p.numel() for p in teacher.parameters())
    assert 4 * numbers > 200_000
    assert abs(sizes[0] - 12 * count) < 100_000
    assert abs(sizes[0] - sizes[1]) < 200  # the path of the cache


def test_conformance_finds_outputs_that_are_not_what_is_read(monkeypatch):
    plain = FeatMIM.views

    def wrong(cls, config, size):
        return tuple(replace(spec, reads=Reads(block=0)) if spec.network else spec for spec in plain(config, size))

    checks = methods._Checks("featmim")
    checks.stored_outputs_give_the_same_loss()
    monkeypatch.setattr(FeatMIM, "views", classmethod(wrong))
    with pytest.raises(Fault, match=r"the loss is .*say in ViewSpec\.reads what forward reads"):
        methods._Checks("featmim").stored_outputs_give_the_same_loss()


# ---- Writing


def test_a_killed_writer_continues(folder: Path, tmp_path: Path):
    """With SIGKILL between parts and within one; the bytes are those of one that was not killed."""
    code = (
        "import sys, time; from ssl_pretrain.data import rows; from ssl_pretrain.launch.data import main\n"
        "rows.PART_BYTES = 1\n"
        "plain = rows.as_array\n"
        "rows.as_array = lambda *a: (time.sleep(0.2), plain(*a))[1]\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = list(map(str, ["cache-teacher", *flags(folder), "--teacher-cache", tmp_path / "killed"]))
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    second = tmp_path / "killed" / "part-00001.npy"
    until = time.monotonic() + 300
    while not second.exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    parts = sorted(path.name for path in (tmp_path / "killed").glob("part-*"))
    assert 2 <= len(parts) < STEPS
    before = {name: os.stat(tmp_path / "killed" / name).st_mtime_ns for name in parts}
    (tmp_path / "killed" / ".part-00004.npy").write_bytes(b"half")
    call(main, *flags(folder), "--teacher-cache", tmp_path / "killed", "--out", tmp_path / "early", code=2)
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert "to write" in done.stdout
    assert {name: os.stat(tmp_path / "killed" / name).st_mtime_ns for name in parts} == before  # kept
    assert not list((tmp_path / "killed").glob(".part*"))
    whole = subprocess.run([sys.executable, "-c", code, *words[:-1], str(tmp_path / "whole")], check=True)
    assert whole.returncode == 0
    for path in (tmp_path / "whole").glob("part-*"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    call(main, *flags(folder), "--teacher-cache", tmp_path / "killed", "--out", tmp_path / "run")
    assert weights(tmp_path / "run") == weights(folder / "run")


def test_a_longer_run_makes_the_cache_longer(folder: Path, tmp_path: Path, capsys):
    cache = ["--teacher-cache", tmp_path / "cache"]
    call(data, "cache-teacher", *flags(folder, steps=4), *cache)
    call(main, *flags(folder), *cache, "--out", tmp_path / "run", code=2)
    assert "has outputs for 64 images, and this run sees 96" in capsys.readouterr().err
    call(data, "cache-teacher", *flags(folder), *cache)
    call(main, *flags(folder), *cache, "--out", tmp_path / "run")
    assert weights(tmp_path / "run") == weights(folder / "run")
    capsys.readouterr()
    call(data, "cache-teacher", *flags(folder, steps=2), *cache)  # a shorter one is in it
    assert "0 bytes to write" in capsys.readouterr().out


def test_the_free_space_is_compared_first(folder: Path, tmp_path: Path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(rows.shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.used, 1000))
    call(data, "cache-teacher", *flags(folder), "--teacher-cache", tmp_path / "cache", code=2)
    said = capsys.readouterr().err
    assert "1.13 MiB are needed and" in said
    assert "has 1e+03 bytes free: choose another disk, fewer --steps, or --store float16 for half of it" in said
    assert list((tmp_path / "cache").iterdir()) == []


def test_values_beyond_float16_are_refused(folder: Path, tmp_path: Path, capsys):
    opened = encoder.load(folder / "teacher")
    with torch.no_grad():
        opened.backbone.norm.weight.fill_(1e6)
    encoder.save(tmp_path / "loud", opened)
    own = flags(folder, teacher=tmp_path / "loud")
    call(data, "cache-teacher", *own, "--teacher-cache", tmp_path / "a", "--store", "float16", code=2)
    assert "which do not fit float16: use --store bfloat16" in capsys.readouterr().err
    call(data, "cache-teacher", *own, "--teacher-cache", tmp_path / "b", "--store", "bfloat16")


def test_a_check_finds_other_outputs(folder: Path, tmp_path: Path, capsys):
    shutil.copytree(folder / "cache", tmp_path / "cache")
    with open(tmp_path / "cache" / "part-00000.npy", "r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(np.full(10, 9, np.float32).tobytes())
    own = [*flags(folder), "--teacher-cache", tmp_path / "cache"]
    call(data, "cache-teacher", *own, "--check", STEPS, code=1)
    assert "write the cache again" in capsys.readouterr().out


# ---- What does not fit


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seed": 1}, "--seed: 0 in the cache, 1 in this run"),
        ({"image_size": 48}, "size of view teacher: [64, 64] in the cache, [96, 96] in this run"),
        ({"crop_scale": [0.5, 1.0]}, "scale of view teacher: [0.2, 1.0] in the cache, [0.5, 1.0] in this run"),
        ({"precision": "bf16"}, "--precision: fp32 in the cache, bf16 in this run"),
        ({"target_block": 0}, "block: 2 in the cache, 0 in this run"),
        ({"bad_images": "skip"}, "--bad-images: replace in the cache, skip in this run"),
        ({"steps": 7}, "has outputs for 96 images, and this run sees 112"),
        ({"val_images": 4}, "--val-images needs the teacher itself"),
        ({"stages": ["0.5 image_size=16", "0.5"]}, "--stages changes them"),
        ({"target": "hog", "teacher": None}, "reads no teacher: leave it out"),
        ({"method": "mae", "anchor": "weights"}, "which reads more than features of fixed views (weights, or"),
    ],
    ids=str,
)
def test_a_cache_of_another_run_is_refused(more: dict, message: str, folder: Path, tmp_path: Path, capsys):
    extra = [
        word for name in more if isinstance(more[name], list) for word in ("--" + name.replace("_", "-"), *more[name])
    ]
    own = flags(folder, *extra, **{name: value for name, value in more.items() if not isinstance(value, list)})
    own = [
        word
        for i, word in enumerate(own)
        if word != "--image-size" or i < own.index("--encoder") or "image_size" not in more
    ]
    own = own if "image_size" not in more else [w for i, w in enumerate(own) if w != "32"]
    call(main, *own, "--teacher-cache", folder / "cache", "--out", tmp_path / "run", code=2)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_teacher_is_refused(folder: Path, tmp_path: Path, capsys):
    export(tmp_path / "other", seed=9, patch=16, size=64, mean=MEAN, std=STD, dim=192, heads=3, depth=3)
    for command, words in ((main, ["--out", tmp_path / "run"]), (data, [])):
        own = ["cache-teacher"] if command is data else []
        call(
            command,
            *own,
            *flags(folder, teacher=tmp_path / "other"),
            "--teacher-cache",
            folder / "cache",
            *words,
            code=2,
        )
        said = capsys.readouterr().err
        assert str(folder / "teacher") in said or "fingerprint of the network" in said
    call(
        main,
        *flags(folder, teacher="timm:vit_tiny"),
        "--teacher-cache",
        folder / "cache",
        "--out",
        tmp_path / "r",
        code=2,
    )
    assert f"holds outputs of {folder / 'teacher'}" in capsys.readouterr().err


def test_images_that_changed_under_their_names_are_refused(folder: Path, tmp_path: Path, capsys):
    shutil.copytree(folder / "photos", tmp_path / "photos")
    for path in (tmp_path / "photos").iterdir():
        content = bytearray(path.read_bytes())
        if path.name != "017.jpg":
            content[-20] ^= 0xFF
            path.write_bytes(content)
    own = flags(folder, data=tmp_path / "photos")
    call(main, *own, "--teacher-cache", folder / "cache", "--out", tmp_path / "run", code=2)
    assert "other pixels than this run makes (files of the same names" in capsys.readouterr().err


def edited(facts: dict, *keys: str, value: object) -> dict:
    inner = facts
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return facts


HOSTILE = [
    lambda facts: b"",
    lambda facts: b"\x80\x04cos\nsystem\n",
    lambda facts: b"[" * 100_000,
    lambda facts: b"x" * (rows.MOST_HEAD_BYTES + 1),
    lambda facts: edited(facts, "layout", "count", value=-1),
    lambda facts: edited(facts, "layout", "count", value=1 << 61),
    lambda facts: edited(facts, "layout", "part", value=0),
    lambda facts: edited(facts, "layout", "fields", value=[["teacher", "object", [1, 16, 192]]]),
    lambda facts: edited(facts, "layout", "fields", value=[["teacher", "float32", [1 << 40, 1 << 40]]]),
    lambda facts: edited(facts, "layout", "fields", value=[["teacher", "float32", [1, 8, 192]]]),
    lambda facts: edited(facts, "layout", "fields", value=[]),
    lambda facts: edited(facts, "network", "dim", value=100),
    lambda facts: edited(facts, "network", "depth", value=0),
    lambda facts: edited(facts, "network", "interpolation", value="__import__"),
    lambda facts: edited(facts, "views", "teacher", "grid", value=[1]),
    lambda facts: edited(facts, "views", value={}),
    lambda facts: edited(facts, "depends", value=7),
    lambda facts: edited(facts, "network", "origin", value=7),
    lambda facts: edited(facts, "codes", value=[1 << 50, 4]),
    lambda facts: edited(facts, "kind", value="token data set"),
    lambda facts: {"kind": "teacher cache"},
]


def test_a_damaged_head_is_one_message(folder: Path, tmp_path: Path, capsys):
    """As far as a run opens a cache; and once in a run."""
    words = list(map(str, [*flags(folder), "--teacher-cache", tmp_path / "cache"]))
    asked, knobs, _ = read_command(words)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    source = open_source(str(folder / "photos"), None)
    run = config.resolve(asked, FeatMIM.recipe, len(source), "fp32")

    def open_cache() -> None:
        found = networks.open_networks(run, FeatMIM, knobs, world)
        plan = stages.plan(run, FeatMIM, knobs, (8, 8), {name: each.sight for name, each in found.items()})
        teacher_cache.use(run, plan, found, source)

    shutil.copytree(folder / "cache", tmp_path / "cache")
    head = tmp_path / "cache" / "rows.json"
    whole = head.read_text()
    open_cache()
    for number, change in enumerate(HOSTILE):
        made = change(json.loads(whole))
        head.write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
        with pytest.raises(UserError) as refused:
            open_cache()
        assert str(tmp_path / "cache") in str(refused.value), number
        assert "\n" not in str(refused.value)
    call(main, *words, "--out", tmp_path / "run", code=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_damaged_parts_are_found_and_written_again(folder: Path, tmp_path: Path, capsys):
    shutil.copytree(folder / "cache", tmp_path / "cache")
    part, own = tmp_path / "cache" / "part-00000.npy", [*flags(folder), "--teacher-cache", tmp_path / "cache"]
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    call(main, *own, "--out", tmp_path / "run", code=2)
    assert "is not whole: 1 of 1 parts are missing or cut off" in capsys.readouterr().err
    call(data, "cache-teacher", *own)
    assert part.read_bytes() == whole
    # an object array of pickles in its place, of the same size
    part.write_bytes(whole.replace(b"'<f4'", b"'|O' ", 1))
    assert len(part.read_bytes()) == len(whole)
    call(main, *own, "--out", tmp_path / "run", code=2)
    assert f"{part} is damaged or cut off" in capsys.readouterr().err


def test_rows_across_parts_and_of_other_images(tmp_path: Path):
    layout = Layout((("a", "float32", (2,)), ("b", "uint16", ())), 10, 4)
    records = np.zeros(10, layout.record)
    records["index"], records["f0"], records["f1"] = (
        np.arange(10) * 7,
        np.arange(20).reshape(10, 2),
        65535 - np.arange(10),
    )
    for part in range(layout.parts):
        rows.write_part(tmp_path, layout, part, [records[i : i + 1] for i in layout.rows(part)])
    assert rows.missing(tmp_path, layout) == []
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == layout.total
    opened = Rows(tmp_path, layout, "do this")
    assert opened.read(0, 3, np.array([21, 28, 35, 42, 49, 56])).tolist() == records["f0"][3:9].tolist()
    assert opened.read(1, 8, np.array([56, 63])).long().tolist() == [65527, 65526]
    assert np.load(rows.part_path(tmp_path, 1), allow_pickle=False)["f0"].tolist() == records["f0"][4:8].tolist()
    with pytest.raises(UserError, match=r"row 4 is of image 28, and this run sees image 29 there.*do this"):
        opened.read(0, 3, np.array([21, 29]))
    with pytest.raises(UserError, match=r"has 10 rows, and more are needed: do this"):
        opened.read(0, 9, np.array([63, 70]))
    rows.part_path(tmp_path, 2).unlink()
    assert rows.missing(tmp_path, layout) == [2]


def test_help_and_mistakes(folder: Path, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        data(["cache-teacher", "--help"])
    assert "--store" in capsys.readouterr().out
    call(data, "cache-teacher", *flags(folder), code=2)
    assert "give --teacher-cache FOLDER" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    call(data, "cache-teacher", *flags(folder), "--teacher-cache", tmp_path / "full", code=2)
    assert "holds something else than a teacher cache" in capsys.readouterr().err
    call(main, *flags(folder), "--teacher-cache", tmp_path / "full", "--out", tmp_path / "run", code=2)
    assert "holds no teacher cache (rows.json: No such file or directory)" in capsys.readouterr().err
    call(data, "cache-teacher", *flags(folder), "--teacher-cache", folder / "cache", "--store", "float16", code=2)
    assert "as float32 instead of float16: repeat --store float32" in capsys.readouterr().err
