"""Features: what a tap is, what is kept in the cache and when it is used again, and images that cannot be read."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from small_encoders import MEAN, STD, ImageCounter, small_encoder
from torch import nn

from ssl_pretrain.data.source import Source, open_source
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.encoder import Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import NotFinite, Tap, blocks, extract, pixel_encoder, poolings, vectors


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of five 16 x 16 images."""
    for i in range(10):
        place = tmp_path / "data" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(i, (16, 16)).save(place / f"{i}.png")
    return tmp_path / "data"


def images_of(folder: Path) -> torch.Tensor:
    """The images of a folder as the source orders them, read and normalised independently."""
    source = open_source(str(folder), None)
    pixels = np.stack(
        [np.asarray(Image.open(folder / source.name(i).removeprefix(f"{folder}/"))) for i in range(len(source))]
    )
    return torch.from_numpy(((pixels / 255 - MEAN) / STD).astype(np.float32)).permute(0, 3, 1, 2)


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm) -> np.ndarray:
    values = x.double().numpy()
    scaled = (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + 1e-6)
    return scaled * norm.weight.double().detach().numpy() + norm.bias.double().detach().numpy()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_every_tap_is_the_vector_it_names(folder: Path, pool: str) -> None:
    encoder = small_encoder(registers=2, pool=pool)
    outputs: list[torch.Tensor] = []
    for block in encoder.backbone.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        encoder.backbone(images_of(folder))
    tokens = [layer_norm(output, encoder.backbone.norm) for output in outputs]
    wanted = {
        "cls": tokens[2][:, 0],
        "mean": tokens[2][:, 3:].mean(1),  # behind the CLS token and two registers
        "pooled": tokens[2][:, 0] if pool == "cls" else tokens[2][:, 3:].mean(1),
        "cls@-2": tokens[1][:, 0],
        "mean@-3": tokens[0][:, 3:].mean(1),
    }
    found = extract(encoder, open_source(str(folder), None), list(wanted), batch_size=4)
    assert list(found.features) == list(wanted)
    for name, vector in wanted.items():
        np.testing.assert_allclose(found.features[name], vector, rtol=1e-4, atol=1e-5, err_msg=name)
        assert found.features[name].dtype == np.float32
    np.testing.assert_array_equal(found.labels, [0, 1] * 5)
    np.testing.assert_array_equal(found.index, np.arange(10))


def test_the_number_of_workers_and_the_batch_size_change_nothing(folder: Path) -> None:
    source = open_source(str(folder), None)
    encoder = small_encoder()
    state = torch.get_rng_state()
    found = [
        extract(encoder, source, ["pooled"], batch_size=size, workers=workers, cache=False).features["pooled"]
        for size, workers in ((10, 0), (10, 2), (3, 0))
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], rtol=1e-4, atol=1e-5)
    assert torch.equal(state, torch.get_rng_state())


def test_the_second_time_the_encoder_is_not_asked(folder: Path) -> None:
    source, encoder = open_source(str(folder), None), small_encoder()
    passes = ImageCounter(encoder)
    first = extract(encoder, source, ["cls", "mean"])
    assert passes.images == 11  # and a blank one, for the widths of the taps
    second = extract(encoder, source, ["mean", "cls"])
    assert passes.images == 11
    for name in ("cls", "mean"):
        assert isinstance(second.features[name].base, np.memmap) or isinstance(second.features[name], np.memmap)
        assert not second.features[name].flags.writeable
        np.testing.assert_array_equal(first.features[name], second.features[name])
    extract(encoder, source, ["cls", "mean@-2"])  # one of them is new: one pass for it
    assert passes.images == 22
    extract(encoder, source, ["cls", "mean@-2", "mean"], cache=False)
    assert passes.images == 33


def test_the_cache_is_not_used_for_anything_else(folder: Path, cache: Path) -> None:
    def kept() -> int:
        return sum(1 for entry in cache.iterdir() if entry.is_dir())

    source = open_source(str(folder), None)
    extract(small_encoder(), source, ["cls"])
    changed = small_encoder()
    with torch.no_grad():
        changed.backbone.norm.bias[0] += 1e-3
    extract(changed, source, ["cls"])
    assert kept() == 2
    flipped = small_encoder()
    flipped.preprocessing = Preprocessing(16, (16, 16), "bilinear", MEAN, STD)
    extract(flipped, source, ["cls"])
    assert kept() == 3
    extract(small_encoder(), source, ["cls"], precision="bf16")
    assert kept() == 4
    for rows in ([0, 1, 2], [3, 4, 5]):
        part = extract(small_encoder(), Subset(source, np.array(rows)), ["cls"])
        whole = extract(small_encoder(), source, ["cls"])
        np.testing.assert_allclose(part.features["cls"], whole.features["cls"][rows], rtol=1e-4, atol=1e-5)
    assert kept() == 6
    picture(99, (16, 16)).save(folder / "a" / "new.png")
    assert len(extract(small_encoder(), open_source(str(folder), None), ["cls"]).features["cls"]) == 11
    assert kept() == 7


def test_bf16_features_are_near_the_others_and_not_the_same(folder: Path) -> None:
    source = open_source(str(folder), None)
    fine = extract(small_encoder(), source, ["cls"]).features["cls"]
    coarse = extract(small_encoder(), source, ["cls"], precision="bf16").features["cls"]
    assert coarse.dtype == np.float32
    assert 0 < np.abs(fine - coarse).max() < 0.1


def test_a_damaged_file_of_the_cache_is_made_again(folder: Path, cache: Path) -> None:
    source, encoder = open_source(str(folder), None), small_encoder()
    whole = np.array(extract(encoder, source, ["cls"]).features["cls"])
    [file] = cache.glob("*/cls.*.npy")
    for damage in (file.read_bytes()[:200], b"", file.read_bytes() + b"x" * 4000):
        file.write_bytes(damage)
        np.testing.assert_array_equal(extract(encoder, source, ["cls"]).features["cls"], whole)
    [record] = cache.glob("*/images.json")
    record.write_text('{"bad": [')
    np.testing.assert_array_equal(extract(encoder, source, ["cls"]).features["cls"], whole)


def test_images_that_cannot_be_read_are_left_out_and_listed(folder: Path) -> None:
    encoder = small_encoder()
    good = extract(encoder, open_source(str(folder), None), ["cls"]).features["cls"]
    (folder / "a" / "2.png").write_bytes(b"no image")
    (folder / "b" / "5.png").write_bytes((folder / "b" / "5.png").read_bytes()[:60])
    source = open_source(str(folder), None)
    for cache in (True, True, False):
        found = extract(encoder, source, ["cls"], batch_size=2, cache=cache)
        np.testing.assert_array_equal(found.index, [0, 1, 3, 4, 6, 7, 8, 9])
        assert [Path(bad.name).name for bad in found.bad] == ["2.png", "5.png"]
        assert [bad.index for bad in found.bad] == [2, 5]
        assert all(bad.reason for bad in found.bad)
        np.testing.assert_allclose(found.features["cls"], good[found.index], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.labels, [0, 1, 1, 0, 0, 1, 0, 1])


class Moody(Source):
    """Images of which one can be read at some times only."""

    def __init__(self, source: Source) -> None:
        self.source, self.broken = source, set[int]()
        self.labels, self.classes = source.labels, source.classes
        self.fingerprint, self.description = source.fingerprint, source.description

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        if index in self.broken:
            raise OSError("stale file handle")
        return self.source[index]

    def name(self, index: int) -> str:
        return self.source.name(index)


def test_rows_of_two_passes_are_never_mixed(folder: Path) -> None:
    encoder, source = small_encoder(), Moody(open_source(str(folder), None))
    extract(encoder, source, ["cls"])
    source.broken = {3}
    found = extract(encoder, source, ["cls", "mean"])  # cls is kept, but with a row more
    assert [len(array) for array in found.features.values()] == [9, 9]
    assert [bad.index for bad in found.bad] == [3]
    source.broken = set()
    whole = extract(encoder, source, ["cls", "mean"], cache=False)
    for name, array in found.features.items():
        np.testing.assert_allclose(array, whole.features[name][found.index], rtol=1e-4, atol=1e-5)


def test_nothing_readable_is_said_at_once(folder: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"none of the first 10 images can be read.*5 are read from \.npy"):
        extract(small_encoder(in_chans=5), open_source(str(folder), None), ["cls"])
    assert not [*cache.glob("*/*.npy"), *cache.glob("*/.*")]


def test_features_that_are_not_finite(folder: Path, cache: Path) -> None:
    encoder = small_encoder()
    with torch.no_grad():
        encoder.backbone.norm.bias[3] = torch.nan
    with pytest.raises(NotFinite, match="NaN or infinity"):
        extract(encoder, open_source(str(folder), None), ["cls"])
    assert not [*cache.glob("*/*.npy"), *cache.glob("*/.*")]


def test_a_cache_that_cannot_be_written(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, encoder = open_source(str(folder), None), small_encoder()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    kept = extract(encoder, source, ["cls"], cache=False).features["cls"]
    with pytest.warns(UserWarning, match=r"No space left.*SSL_PRETRAIN_CACHE.*--no-cache"):
        found = extract(encoder, source, ["cls"])
    np.testing.assert_array_equal(found.features["cls"], kept)
    assert not [*cache.glob("*/*.npy"), *cache.glob("*/.*")]
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        found = extract(encoder, source, ["cls"])
    np.testing.assert_array_equal(found.features["cls"], kept)
    monkeypatch.setenv("WORLD_SIZE", "2")  # several processes share the features through it
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="cannot be written"):
        extract(encoder, source, ["cls"])


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("clss", "did you mean cls"),
        ("cls@2", "unknown feature"),
        ("pooled@-2", "'pooled' is a vector of the last block"),
        ("cls@-4", "last 3 block"),
    ],
)
def test_a_tap_that_is_none(folder: Path, tap: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        extract(small_encoder(), open_source(str(folder), None), [tap])


def test_an_encoder_without_a_class_token(folder: Path) -> None:
    encoder = small_encoder(cls=False, pool="mean")
    assert poolings(encoder, "cpu") == ("pooled", "mean")
    assert poolings(small_encoder(), "cpu") == ("pooled", "cls", "mean")
    with pytest.raises(UserError, match="no CLS token"):
        extract(encoder, open_source(str(folder), None), ["cls"])


def test_raw_pixels_as_an_encoder(tmp_path: Path) -> None:
    for name, size in (("a", (16, 16)), ("b", (40, 80))):
        picture(1, size).save(tmp_path / f"{name}.png")
    source = open_source(str(tmp_path), None)
    small = extract(pixel_encoder((16, 16), 3), Subset(source, np.array([0])), ["pooled"]).features["pooled"]
    pixels = np.asarray(Image.open(tmp_path / "a.png")) / 255
    np.testing.assert_allclose(small[0], ((pixels - 0.5) / 0.25).transpose(2, 0, 1).ravel(), rtol=1e-5, atol=1e-5)
    assert extract(pixel_encoder((40, 80), 3), source, ["pooled"]).features["pooled"].shape == (2, 3 * 32 * 32)
    assert blocks(pixel_encoder((16, 16), 3)) == 1
    with pytest.raises(UserError, match="last 1 block"):
        vectors(pixel_encoder((16, 16), 3), torch.zeros(1, 3, 16, 16), [Tap.parse("mean@-2")])
