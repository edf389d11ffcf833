"""Exports: written whole, read back to the bit, refused with a message where anything is not as it was written."""

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import import_transformers, to_transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from small_encoders import EXPORT_LINEAGE, EXPORT_PREPROCESSING, EXPORT_SIZE, small_export
from torch import Tensor

from ssl_pretrain import encoder
from ssl_pretrain.encoder import Preprocessing
from ssl_pretrain.errors import UserError


def images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *EXPORT_SIZE, generator=torch.Generator().manual_seed(seed))


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    encoder.save(tmp_path / "run" / "encoder", small_export())
    return tmp_path / "run" / "encoder"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "sincos", "registers": 2, "layer_scale": 0.1, "swiglu": True},
        {"positions": "rope", "cls": False, "qk_norm": True, "shortcut_decay": 0.7, "drop_path": 0.1},
    ],
    ids=str,
)
def test_a_round_trip_is_exact_and_touches_no_random_state(options: dict[str, Any], tmp_path: Path) -> None:
    written = small_export(3, **options)
    encoder.save(tmp_path / "run" / "encoder", written)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    read = encoder.load(str(tmp_path / "run"))  # the run's folder does, too
    assert torch.equal(torch.rand(3), expected)
    before, after = written.backbone.state_dict(), read.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    assert read.backbone.config == written.backbone.config
    assert (read.preprocessing, read.lineage, read.name) == (EXPORT_PREPROCESSING, EXPORT_LINEAGE, "vit_micro")
    assert read.fingerprint == written.fingerprint
    assert not read.training
    assert all(p.requires_grad for p in read.parameters())
    with torch.no_grad():
        assert torch.equal(read(images()).patches, written(images()).patches)
        assert torch.equal(read(images(), blocks=(0,)).blocks[0], written(images(), blocks=(0,)).blocks[0])


def test_the_folder_holds_what_other_programs_read(export: Path) -> None:
    assert sorted(file.name for file in export.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((export / "config.json").read_text())
    assert config["format"] == 1
    assert config["backbone"]["name"] == "vit_micro"
    assert config["backbone"]["image_size"] == [16, 24]
    assert config["backbone"]["options"]["patch_size"] == 8
    assert config["preprocessing"] == {
        "resize": 20, "crop": [16, 24], "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]
    }  # fmt: skip
    assert config["lineage"] == EXPORT_LINEAGE
    assert load_file(export / "model.safetensors").keys() == small_export().backbone.state_dict().keys()
    card = (export / "README.md").read_text()
    assert "pretrained with mae" in card
    assert "- data: photos" in card
    assert "3 x 16 x 24" in card


def test_the_same_encoder_gives_the_same_bytes(export: Path, tmp_path: Path) -> None:
    """In another process, too."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
        "from ssl_pretrain import encoder; from small_encoders import small_export; "
        "[encoder.save(Path(sys.argv[2]) / str(i), small_export()) for i in range(6)]"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], check=True)
    for i in range(6):
        for file in ("model.safetensors", "config.json", "README.md"):
            assert (tmp_path / str(i) / file).read_bytes() == (export / file).read_bytes()


def test_fingerprints_tell_weights_architecture_and_preprocessing_apart() -> None:
    mean, std = EXPORT_PREPROCESSING.mean, EXPORT_PREPROCESSING.std
    resized = Preprocessing(21, EXPORT_SIZE, "bicubic", mean, std)
    other = [small_export(1), small_export(0, shortcut_decay=0.9), small_export(0, preprocessing=resized)]
    other.append(small_export(0))
    with torch.no_grad():
        next(other[-1].parameters())[0, 0] += 1e-6
    assert len({one.fingerprint for one in (small_export(), *other)}) == 5
    moved = small_export()
    moved.lineage = {"method": "another"}
    assert moved.fingerprint == small_export().fingerprint


def test_the_readme_example(export: Path, tmp_path: Path) -> None:
    Image.fromarray(pixels(40, 30)).save(tmp_path / "cat.jpg")
    model = encoder.load(export.parent)
    batch = model.preprocess([Image.open(tmp_path / "cat.jpg")])
    features = model(batch)
    assert batch.shape == (1, 3, *EXPORT_SIZE)
    assert features.pooled.shape == (1, 128)


# ---- Preprocessing.


def test_preprocessing_is_resize_crop_and_normalise() -> None:
    """Against Pillow's bicubic, which like ours antialiases; 8-bit rounding is all they may differ by."""
    array = np.asarray(Image.fromarray(pixels(5, 6)).resize((60, 50), Image.Resampling.BICUBIC))
    found = small_export().preprocess([array, Image.fromarray(array)])
    assert found.dtype == torch.float32
    assert torch.equal(found[0], found[1])
    resized = np.asarray(Image.fromarray(array).resize((24, 20), Image.Resampling.BICUBIC))[2:18]
    expected = (resized.astype(np.float64) / 255 - EXPORT_PREPROCESSING.mean) / EXPORT_PREPROCESSING.std
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=1.01 / 255 / 0.2)
    assert np.abs(found[0].permute(1, 2, 0).numpy() - expected).mean() < 0.2 / 255 / 0.2


def test_images_come_in_every_form_and_upright() -> None:
    model, array = small_export(), pixels(30, 40)
    expected = model.preprocess([array])
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    assert torch.equal(model.preprocess([file.getvalue()]), expected)
    assert torch.equal(model.preprocess([Image.fromarray(array).convert("RGBA")]), expected)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown by turning it a quarter clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(array))).save(turned, "PNG", exif=exif)
    assert torch.equal(model.preprocess([Image.open(turned)]), expected)
    assert torch.equal(model.preprocess([turned.getvalue()]), expected)
    grey = model.preprocess([Image.fromarray(array[..., 0]), np.repeat(array[..., :1], 3, axis=2)])
    assert torch.equal(grey[0], grey[1])
    deep = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    assert torch.equal(model.preprocess([deep])[0], grey[0])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(channels: int) -> None:
    how = Preprocessing(20, EXPORT_SIZE, "bilinear", (0.5,) * channels, (0.25,) * channels)
    model, array = small_export(preprocessing=how), pixels(*EXPORT_SIZE, channels)
    array = np.kron(array, np.ones((2, 2, 1), np.uint8))  # 32 x 48: halved to 20 x 30
    found = model.preprocess([array])
    assert found.shape == (1, channels, *EXPORT_SIZE)
    assert model(found).pooled.shape == (1, 128)
    if channels == 1:
        assert torch.equal(model.preprocess([Image.fromarray(array[..., 0])]), found)


def test_an_image_that_cannot_be_encoded_is_named() -> None:
    model, good = small_export(), pixels(30, 40)
    for bad, why in [
        (good.astype(np.float32), "float32"),
        (good[..., :2], "2 channels where 3 are wanted"),
        (b"no image", "not an image"),
    ]:
        with pytest.raises(UserError, match=f"image 1 of the 2 to encode: .*{why}"):
            model.preprocess([good, bad])


@pytest.mark.parametrize(
    ("size", "resize"), [((224, 224), 256), ((32, 32), 32), ((96, 96), 96), ((384, 512), 439), ((448, 224), 256)]
)
def test_the_usual_crop_of_a_size(size: tuple[int, int], resize: int) -> None:
    how = Preprocessing.for_size(size, EXPORT_PREPROCESSING.mean, EXPORT_PREPROCESSING.std)
    assert (how.resize, how.crop, how.interpolation, how.channels) == (resize, size, "bicubic", 3)


# ---- What is refused.


def edit(export: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((export / "config.json").read_text())
    change(config)
    (export / "config.json").write_text(json.dumps(config))


def test_a_path_that_holds_no_encoder(export: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runn does not exist; did you mean run\?: give a run folder"):
        encoder.load(tmp_path / "runn")
    with pytest.raises(UserError, match="no/where does not exist: give a run folder"):
        encoder.load(tmp_path / "no" / "where")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no encoder .* that has saved a checkpoint"):
        encoder.load(tmp_path / "empty")
    with pytest.raises(UserError, match=r"model\.safetensors has no encoder"):
        encoder.load(export / "model.safetensors")
    (export / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        encoder.load(export)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=3), "has format 3, newer than 2: upgrade ssl-pretrain"),
        (lambda c: c.pop("format"), "does not describe an encoder: KeyError"),
        (lambda c: c.update(backbone=3), "does not describe an encoder"),
        (lambda c: c["backbone"].pop("name"), "does not describe an encoder: KeyError"),
        (lambda c: c["backbone"].update(image_size=[16]), "does not describe an encoder: ValueError"),
        (lambda c: c["backbone"].update(name="vit_mikro"), r"config\.json: unknown encoder 'vit_mikro'; did you mean"),
        (lambda c: c["backbone"]["options"].update(depht=3), "has no option 'depht'; did you mean depth"),
        (lambda c: c["backbone"]["options"].update(heads=None), "heads: None is not a whole number"),
        (lambda c: c["preprocessing"].pop("mean"), "does not describe an encoder: KeyError"),
    ],
)
def test_a_description_that_is_not_ours(change: Callable[[dict], object], message: str, export: Path) -> None:
    edit(export, change)
    with pytest.raises(UserError, match=message):
        encoder.load(export)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "{}"])
def test_a_description_that_is_no_object(text: str, export: Path) -> None:
    (export / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json does not describe an encoder"):
        encoder.load(export)


def test_weights_that_do_not_match_are_listed_key_for_key(export: Path) -> None:
    weights = load_file(export / "model.safetensors")
    weights["norm.scale"] = weights.pop("norm.weight")
    weights["cls_token"] = torch.zeros(1, 1, 64)
    save_file(weights, export / "model.safetensors")
    with pytest.raises(UserError) as found:
        encoder.load(export)
    message = str(found.value)
    assert "do not fit the ViT of its config" in message
    assert "1 missing: norm.weight; " in message
    assert "1 unexpected: norm.scale; " in message
    assert "1 of another shape: cls_token (1, 1, 64) instead of (1, 1, 128)" in message


def test_a_long_difference_is_counted_and_cut(export: Path) -> None:
    edit(export, lambda config: config["backbone"]["options"].update(depth=5))
    with pytest.raises(UserError) as found:
        encoder.load(export)
    assert "36 missing: blocks.2.attn.proj.bias, " in str(found.value)
    assert str(found.value).count("blocks.") == 10
    assert str(found.value).endswith(", ...")


def test_damage_is_found(export: Path) -> None:
    whole = (export / "model.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for content, message in [
        (whole[: len(whole) // 2], r"model\.safetensors cannot be read"),
        (whole[:5], r"model\.safetensors cannot be read"),
        (b"", r"model\.safetensors cannot be read"),
        (bytes(flipped), "is damaged or was replaced"),
    ]:
        (export / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=message):
            encoder.load(export)
    (export / "model.safetensors").write_bytes(whole)
    encoder.load(export)


def test_a_full_disk_leaves_the_export_before(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ssl_pretrain.encoder.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        encoder.save(export, small_export(1))
    monkeypatch.undo()
    assert sorted(file.name for file in export.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert encoder.load(export).fingerprint == small_export().fingerprint


# ---- Other weights for the same architecture.


def test_random_like_is_a_function_of_the_seed_alone(export: Path) -> None:
    trained = encoder.load(export)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one, again, other = (encoder.random_like(of, seed=s) for of, s in ((trained, 1), (export, 1), (trained, 2)))
    assert torch.equal(torch.rand(3), expected)
    assert one.fingerprint == again.fingerprint
    assert len({trained.fingerprint, one.fingerprint, other.fingerprint}) == 3
    assert one.backbone.config == trained.backbone.config
    assert one.preprocessing == trained.preprocessing
    assert one.lineage == {"method": "random", "seed": 1}
    assert not one.training


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope"])
def test_weights_start_an_encoder_for_another_image_size(positions: str, tmp_path: Path) -> None:
    source = small_export(3, positions=positions)
    encoder.save(tmp_path / "encoder", source)
    same = small_export(4, positions=positions)
    larger = small_export(4, positions=positions, size=(48, 32), drop_path=0.1, pool="cls")
    for target in (same, larger):
        encoder.load_weights(tmp_path, target.backbone)
    state = source.backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in same.backbone.state_dict().items())
    for name, value in larger.backbone.state_dict().items():
        if name == "pos_embed":
            assert torch.equal(value[:, 0], state[name][:, 0])
            grid = state[name][:, 1:].reshape(1, 2, 3, -1).permute(0, 3, 1, 2)
            resized = F.interpolate(grid, size=(6, 4), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
            torch.testing.assert_close(value[:, 1:], resized, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(value, state[name])
    x = torch.randn(1, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # resized once or at every forward, it is the same encoder
        torch.testing.assert_close(larger(x).patches, source(x).patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 8}, "--heads 8 instead of 4"),
        ({"positions": "sincos"}, "--positions sincos instead of learned"),
        ({"depth": 3, "dim": 64}, "--depth 3 instead of 2, --dim 64 instead of 128"),
        ({"preprocessing": Preprocessing(20, EXPORT_SIZE, "bicubic", (0.5,), (0.5,))}, "--in-chans 1 instead of 3"),
    ],
)
def test_weights_of_another_architecture_are_refused(options: dict[str, Any], message: str, export: Path) -> None:
    with pytest.raises(UserError, match=f"differs from the one to initialise: .*{message}"):
        encoder.load_weights(export, small_export(4, **options).backbone)


@pytest.mark.parametrize("name", ["ViT", "Dinov2"])
def test_transformers_reads_an_export(name: str, tmp_path: Path) -> None:
    transformers = import_transformers()
    how = Preprocessing.for_size((32, 32), EXPORT_PREPROCESSING.mean, EXPORT_PREPROCESSING.std)
    written = small_export(5, size=(32, 32), preprocessing=how, layer_scale=0.3 if name == "Dinov2" else None)
    encoder.save(tmp_path, written)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    if name == "Dinov2":
        del sizes["intermediate_size"]
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    kind = getattr(transformers, f"{name}Model")
    other = (kind(config, add_pooling_layer=False) if name == "ViT" else kind(config)).eval()
    other.load_state_dict(to_transformers(load_file(tmp_path / "model.safetensors"), other.state_dict()))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, expected = encoder.load(tmp_path)(x), other(x).last_hidden_state
    assert features.cls is not None
    torch.testing.assert_close(features.cls, expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.patches, expected[:, 1:], atol=1e-5, rtol=1e-5)
