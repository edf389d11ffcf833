"""`ssl-data` on real files: what is wrong with them, what is in them, how fast they are, and packed pixels."""

import json
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, losses, picture
from PIL import Image
from ssl_pretrain.launch.data import main

from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.source import evaluation_splits, open_source, splits
from ssl_pretrain.errors import UserError


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two splits of two classes, of different sizes; one file is no image, one a copy."""
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 6), ("val", 3)):
        for number, label in enumerate(("ant", "bee")):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                seed = 10 * number + i + (50 if split == "val" else 0)
                picture(seed, (40 + i, 60)).save(folder / f"{split}{i}.png")
    (tmp_path / "photos" / "train" / "ant" / "broken.jpg").write_bytes(b"none")
    first = tmp_path / "photos" / "train" / "ant" / "train0.png"
    (tmp_path / "photos" / "val" / "bee" / "copy.png").write_bytes(first.read_bytes())
    return tmp_path / "photos"


def test_check(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", str(photos), "--out", str(tmp_path / "found.json")]) == 1
    said = capsys.readouterr().out
    assert "19 images can be read, 1 cannot" in said
    assert re.search(r"ant/broken\.jpg: .*not an image", said)
    assert "1 are the same" in said
    assert re.search(r"copy\.png is .*train0\.png", said)
    assert "height: 40 to 45 pixels" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["readable"], len(found["bad"]), len(found["double"])) == (19, 1, 1)
    assert found["width"] == {"min": 60, "median": 60, "max": 60}
    (photos / "train" / "ant" / "broken.jpg").unlink()
    assert main(["check", str(photos), "--workers", "1"]) == 0
    assert "19 images can be read, 0 cannot" in capsys.readouterr().out


def test_stats(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["stats", str(photos), "--split", "train", "--out", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    images = [np.asarray(Image.open(path).convert("RGB")) / 255 for path in photos.glob("train/*/train*.png")]
    mean = np.mean([image.mean((0, 1)) for image in images], axis=0)
    std = np.sqrt(np.mean([(image**2).mean((0, 1)) for image in images], axis=0) - mean**2)
    np.testing.assert_allclose([found["mean"], found["std"]], [mean, std], atol=1e-9)
    assert found["classes"] == {"ant": 7, "bee": 6}
    assert f"--mean {mean[0]:.4f}" in said


def test_bench_names_what_takes_longest(photos: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["bench", str(photos), "--method", "simclr", "--image-size", "32", "--seconds", "0.1", "--aug", "fast"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    rates = {
        name: float(value.replace(",", "")) for name, value in re.findall(r"^(\S.*?)\s+([\d,]+) images/s", said, re.M)
    }
    assert list(rates) == ["read", "read and decoded", "views cut (uint8)", "views finished (float32)"]
    assert rates["read"] > rates["views finished (float32)"] > 0
    assert "What helps: " in said


def test_packed_pixels_are_those_of_the_files(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["pack", str(photos), "--out", str(tmp_path / "packed")]) == 0
    assert "packed 19 images" in capsys.readouterr().out
    assert splits(str(tmp_path / "packed")) == splits(str(photos)) == ["train", "val"]
    assert evaluation_splits(str(tmp_path / "packed")) == ("train", "val")
    for split in ("train", "val", None):
        files, packed = open_source(str(photos), split), open_source(str(tmp_path / "packed"), split)
        readable = [i for i in range(len(files)) if "broken" not in files.name(i)]
        assert len(packed) == len(readable)
        assert packed.classes == files.classes == ("ant", "bee")
        assert packed.labels is not None
        np.testing.assert_array_equal(packed.labels, np.asarray(files.labels)[readable])
        again = pickle.loads(pickle.dumps(packed))
        for at, i in enumerate(readable):
            np.testing.assert_array_equal(again[at], decode(files[i], 3))
            assert packed.name(at) == files.name(i)
        with pytest.raises(IndexError):
            packed[len(packed)]
    train, val = (open_source(str(tmp_path / "packed"), split).fingerprint for split in ("train", "val"))
    assert train != val


def test_packed_smaller(photos: Path, tmp_path: Path) -> None:
    assert main(["pack", str(photos), "--split", "train", "--side", "20", "--out", str(tmp_path / "packed")]) == 0
    source = open_source(str(tmp_path / "packed"), None)
    assert {source[i].shape for i in range(len(source))} == {(20, 20 * 60 // (40 + i), 3) for i in range(6)}
    whole = open_source(str(photos), "train")
    assert source.fingerprint != whole.fingerprint


@pytest.mark.slow
def test_a_run_and_an_evaluation_on_packed_pixels_are_those_on_the_files(
    photos: Path, tmp_path: Path, pretrain: Callable, evaluate: Callable[..., subprocess.CompletedProcess]
) -> None:
    (photos / "train" / "ant" / "broken.jpg").unlink()
    assert main(["pack", str(photos), "--out", str(tmp_path / "packed")]) == 0
    for data in ("photos", "packed"):
        pretrain("--method", "mae", "--data", tmp_path / data, "--out", tmp_path / f"run-{data}", "--steps", 4,
                 "--log-every", 1, "--workers", 1, "--no-score", *TINY)  # fmt: skip
        evaluate("knn", "--encoder", tmp_path / f"run-{data}", "--no-baselines", "--out", tmp_path / f"knn-{data}")
    assert losses(tmp_path / "run-photos") == losses(tmp_path / "run-packed")
    one, two = (json.loads((tmp_path / f"knn-{data}" / "results.json").read_text()) for data in ("photos", "packed"))
    assert one["metrics"] == two["metrics"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["chek", "photos"], "unknown verb 'chek'; did you mean check?"),
        (["check"], "the data comes behind the verb"),
        (["check", "nowhere"], "there is no nowhere"),
        (["pack", "photos"], "--out is needed"),
        (["pack", "photos", "--out", "photos"], "photos exists"),
        (["pack", "photos", "--out", "new", "--side", "0"], "--side is 0"),
        (["stats", "photos", "--imges", "3"], "unknown flag --imges; did you mean --images?"),
        (["bench", "photos", "--method", "simclrr"], "did you mean simclr"),
    ],
)
def test_mistakes(
    argv: list[str], said: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(photos.parent)
    assert main(argv) == 2
    assert said in capsys.readouterr().err
    assert not (photos.parent / "new").exists()


def test_no_room_and_a_stop_leave_nothing(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from ssl_pretrain.data import packed

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    assert main(["pack", str(photos), "--out", str(tmp_path / "packed")]) == 2
    monkeypatch.undo()
    monkeypatch.setattr(packed.Writer, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["pack", str(photos), "--out", str(tmp_path / "packed")]) == 1
    assert not [path.name for path in tmp_path.iterdir() if "packed" in path.name]


def test_damaged_packed_data_is_said(photos: Path, tmp_path: Path) -> None:
    assert main(["pack", str(photos), "--out", str(tmp_path / "packed")]) == 0
    pixels = tmp_path / "packed" / "train.pixels"
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(UserError, match="pack it again"):
        open_source(str(tmp_path / "packed"), "train")
    (tmp_path / "packed" / "packed.json").write_text("{")
    with pytest.raises(UserError, match="pack the data again"):
        splits(str(tmp_path / "packed"))
