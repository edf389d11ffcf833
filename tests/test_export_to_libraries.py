"""Folders for timm and transformers (`ssl-export to`), opened by these libraries."""

from pathlib import Path

import pytest
import torch
from export_cases import OTHERS, VITS, case, difference, images, made, vit
from oracles import import_timm, import_transformers

from ssl_pretrain import backbones, encoder
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign import to_libraries

NATIVE = {
    "plain": "Dinov2Model",
    "class token": "Dinov2Model",
    "registers": "Dinov2WithRegistersModel",
    "sine-cosine": "Dinov2WithRegistersModel",
    "layer scale": "Dinov2Model",
    "layer scale 0": "Dinov2Model",
    "no bias": "Dinov2Model",
    "gated mlp": "Dinov2Model",
    "gated mlp, registers, layer scale": "Dinov2WithRegistersModel",
    "epsilon": "Dinov2Model",
    "four channels": "Dinov2Model",
    "rotary": "DINOv3ViTModel",
    "rotary, DINOv3": "DINOv3ViTModel",
    "convnext": "ConvNextModel",
    "convnext 2": "ConvNextV2Model",
    "convnext 2, layer scale": "TimmWrapperModel",
    "convnext, no layer scale": "ConvNextModel",
    "no class token": "TimmWrapperModel",
    "query-key norm": "TimmWrapperModel",
    "narrow mlp": "TimmWrapperModel",
    "norm of patches": "TimmWrapperModel",
    "resnet18": "TimmWrapperModel",
}


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE)
def test_transformers_opens_a_folder_of_its_own_class(name: str, tmp_path: Path) -> None:
    import_timm()
    transformers = import_transformers()
    encoder = case(name, image_size=(32, 32))
    kind, found = to_libraries.to_transformers(encoder, tmp_path / "out")
    assert kind == NATIVE[name]
    assert max(found.values()) <= 1e-5
    assert found.keys() & {"pooled", "tokens"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    x = images(encoder)
    if name in VITS:
        ours = encoder(x)
        last = model(pixel_values=x).last_hidden_state
        assert difference(last, ours.patches if ours.tokens is None else ours.tokens) <= 1e-5


@torch.no_grad()
def test_images_that_are_not_square_take_the_wrapper(tmp_path: Path) -> None:
    """transformers' DINOv2 resizes tables of positions as if they were square."""
    import_timm()
    import_transformers()
    kind, found = to_libraries.to_transformers(vit(pool="cls"), tmp_path / "out")
    assert kind == "TimmWrapperModel"
    assert max(found.values()) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "rotary, DINOv3", "convnext", "relative"])
def test_timm_opens_a_folder_of_its_own(name: str, tmp_path: Path) -> None:
    timm = import_timm()
    encoder = case(name)
    found = to_libraries.to_timm(encoder, tmp_path / "out")
    assert max(found.values()) <= 1e-5
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = images(encoder)
    assert difference(model(x), encoder(x).pooled) <= 1e-5


@torch.no_grad()
def test_a_bias_of_keys_is_left_out_for_timm(tmp_path: Path) -> None:
    """It changes no output."""
    timm = import_timm()
    encoder = made("vit_micro", **OTHERS["relative, bias"][1])
    assert encoder.backbone.get_parameter("blocks.0.attn.qkv.bias")[64:128].abs().max() > 0.1
    assert max(to_libraries.to_timm(encoder, tmp_path / "out").values()) <= 1e-5
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = images(encoder)
    assert difference(model(x), encoder(x).pooled) <= 1e-5


def test_what_they_cannot_express_is_refused_with_the_reason(tmp_path: Path) -> None:
    import_timm()
    import_transformers()
    encoder = vit(norms="post")
    with pytest.raises(UserError, match=r"timm cannot express the encoder vit_micro: .* no norm after each branch"):
        to_libraries.to_timm(encoder, tmp_path / "out")
    with pytest.raises(UserError, match=r"transformers cannot express the encoder vit_micro: .*; nor can timm"):
        to_libraries.to_transformers(encoder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_features_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_transformers()
    right = to_libraries._named
    encoder = vit(pool="cls", image_size=(32, 32))

    def wrong(*given: object) -> dict:
        weights = right(*given)  # type: ignore[arg-type]
        weights["encoder.layer.1.norm1.weight"] = weights["encoder.layer.1.norm1.weight"] + 0.1
        return weights

    monkeypatch.setattr(to_libraries, "_named", wrong)
    with pytest.raises(UserError, match="out is not written: its features differ from the encoder's"):
        to_libraries.to_transformers(encoder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_image_processor_is_ours(tmp_path: Path) -> None:
    import_timm()
    transformers = import_transformers()
    encoder = vit(pool="cls", image_size=(32, 32))
    to_libraries.to_transformers(encoder, tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    from PIL import Image

    generator = torch.Generator().manual_seed(1)
    small = torch.randint(0, 256, (9, 12, 3), generator=generator, dtype=torch.uint8).numpy()
    image = Image.fromarray(small).resize((90, 70), Image.Resampling.BICUBIC)
    found = processor(image, return_tensors="pt")["pixel_values"]
    expected = encoder.preprocess([image])
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() <= 1 / 255 / 0.25


@torch.no_grad()
def test_a_model_of_timm_is_written_for_both(tmp_path: Path) -> None:
    """Trained as --encoder timm:NAME; its card names timm as the loader."""
    timm, transformers = import_timm(), import_transformers()
    backbone = backbones.build("timm:resnet18", image_size=(32, 32)).eval()
    how = Preprocessing(36, (32, 32), "bicubic", (0.5,) * 3, (0.25,) * 3)
    written = Encoder(backbone, "timm:resnet18", how, {"method": "simclr"})
    assert max(to_libraries.to_timm(written, tmp_path / "timm").values()) <= 1e-5
    kind, found = to_libraries.to_transformers(written, tmp_path / "hf")
    assert (kind, max(found.values()) <= 1e-5) == ("TimmWrapperModel", True)
    encoder.save(tmp_path / "encoder", written)
    x = images(written)
    for folder in ("timm", "encoder"):
        model = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True).eval()
        assert difference(model(x), written(x).pooled) <= 1e-5
    model = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    assert difference(model(x).pooler_output, written(x).pooled) <= 1e-5
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "library_name: timm\n" in card
    assert "- timm: `timm.create_model(" in card
