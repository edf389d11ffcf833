"""Exports as timm and transformers read them: the library's model, made from the folder alone, gives our features."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import CONVNETS, OTHERS, SMALL_CONVNEXT, TINY, VITS, case, difference, images, made, vit
from oracles import import_timm, import_transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ssl_pretrain import backbones, encoder
from ssl_pretrain.backbones import forms
from ssl_pretrain.errors import UserError


@torch.no_grad()
@pytest.mark.parametrize("name", [*VITS, *CONVNETS])
def test_timm_and_transformers_read_the_folder(name: str, tmp_path: Path) -> None:
    timm, transformers = import_timm(), import_transformers()
    written = case(name)
    encoder.save(tmp_path, written)
    x = images(written)
    ours = written(x)

    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert difference(theirs(x), ours.pooled) <= 1e-5
    if written.name.startswith("vit"):
        tokens = ours.patches if ours.tokens is None else ours.tokens
        assert difference(theirs.forward_features(x), tokens) <= 1e-5
    assert theirs.num_features == written.backbone.dim
    assert theirs.pretrained_cfg["mean"] == list(written.preprocessing.mean)

    model, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert difference(model.eval()(x).pooler_output, ours.pooled) <= 1e-5

    again = encoder.load(tmp_path)
    assert again.fingerprint == written.fingerprint
    assert torch.equal(again(x).pooled, ours.pooled)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("convnext_micro", {}, "ConvNextModel"),
        ("convnext_micro", {"layer_scale": None}, "ConvNextModel"),
        ("convnextv2_micro", {}, "ConvNextV2Model"),
    ],
)
def test_transformers_reads_a_convnext_that_timm_has_not(
    kind: str, options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    """Stems with patches of 2 pixels, as in our convnext_micro."""
    transformers = import_transformers()
    written = made(kind, **SMALL_CONVNEXT, **options)
    assert written.backbone.config.stem_patch == 2
    encoder.save(tmp_path, written)
    x = images(written)
    model, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == expected
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert difference(model.eval()(x).pooler_output, written(x).pooled) <= 1e-5
    again = encoder.load(tmp_path)
    assert again.fingerprint == written.fingerprint
    assert "architecture" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("name", OTHERS)
def test_what_timm_has_not_has_a_reason(name: str, tmp_path: Path) -> None:
    """And our own loader reads it; config.json then has no entries of timm."""
    kind, options, reason = OTHERS[name]
    written = made(kind, **options)
    found = forms.timm_form(written.backbone)
    assert isinstance(found, str)
    assert reason in found
    assert "\n" not in found
    encoder.save(tmp_path, written)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "architecture" not in config
    assert ("model_type" in config) == kind.startswith("convnext")
    assert encoder.load(tmp_path).fingerprint == written.fingerprint


@pytest.mark.parametrize("name", ["registers", "gated mlp, registers, layer scale", "rotary, DINOv3", "convnext"])
def test_exports_of_the_first_format_are_read(name: str, tmp_path: Path) -> None:
    """They held our own names, without the entries of other libraries."""
    written = case(name)
    encoder.save(tmp_path, written)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format"], config["names"]) == (2, "timm")
    weights = {n: v.contiguous() for n, v in written.backbone.state_dict().items()}
    old = {n: config[n] for n in ("backbone", "preprocessing", "lineage")}
    old |= {"format": 1, "weights": encoder.weights_hash(weights)}
    (tmp_path / "config.json").write_text(json.dumps(old))
    save_file(weights, tmp_path / "model.safetensors", metadata={"config": json.dumps(old)})
    again = encoder.load(tmp_path)
    assert all(torch.equal(value, again.backbone.state_dict()[n]) for n, value in weights.items())


def test_weights_under_theirs_names_are_read_strictly(tmp_path: Path) -> None:
    encoder.save(tmp_path, vit(registers=2))
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["pos_embed"].shape[1] == 1 + 2 + 24
    weights["pos_embed"][0, 1, 0] = 1.0  # our registers have no positions
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"1 of another shape: pos_embed \(1, 27, 64\) instead of \(1, 25, 64\)"):
        encoder.load(tmp_path)
    weights["pos_embed"][0, 1, 0] = 0.0
    weights["more"] = weights.pop("reg_token")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 missing: reg_tokens; 1 unexpected: more"):
        encoder.load(tmp_path)


def test_names_of_a_later_version_are_refused(tmp_path: Path) -> None:
    encoder.save(tmp_path, vit(shortcut_decay=0.5))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "names": "timm"}))
    with pytest.raises(UserError, match="names of 'timm', which this version does not use for the encoder vit_micro"):
        encoder.load(tmp_path)


@pytest.mark.parametrize(
    "name", [name for name in backbones.own() if not name.startswith(("octic", "grouper", "jumbo"))]
)
def test_every_size_has_a_form(name: str) -> None:
    """And its names lead there and back."""
    side = 256 if name.startswith("swin") else 224  # windows of 8 positions divide the maps of 256 pixels
    with torch.device("meta"):
        backbone = backbones.build(name, image_size=(side, side))
    form = forms.of_export(backbone)
    if name == "resnet_micro":
        assert form is None  # neither library has its stem
        return
    assert form is not None
    weights = {n: torch.zeros(v.shape, device="meta") for n, v in backbone.state_dict().items()}
    there = form.theirs(weights)
    back = form.ours(there)
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in weights.items()}


def test_the_weights_say_that_they_are_of_torch(tmp_path: Path) -> None:
    encoder.save(tmp_path, vit())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == sorted(vit().backbone.state_dict())
    assert metadata["format"] == "pt"
    assert json.loads(metadata["config"]) == json.loads((tmp_path / "config.json").read_text())


def test_preprocessing_is_the_same(tmp_path: Path) -> None:
    """transformers' processor, which is timm's transform, against ours: both resize uint8 images with antialiasing."""
    import_timm()
    transformers = import_transformers()
    from PIL import Image

    written = made("vit_micro", **TINY, image_size=(32, 32))
    encoder.save(tmp_path, written)
    generator = torch.Generator().manual_seed(1)
    small = torch.randint(0, 256, (9, 12, 3), generator=generator, dtype=torch.uint8).numpy()
    image = Image.fromarray(small).resize((61, 47), Image.Resampling.BICUBIC)
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path)(image)["pixel_values"]
    expected = written.preprocess([image])
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2 / 255 / 0.25


def test_a_new_classifier_in_timm_keeps_the_encoder(tmp_path: Path) -> None:
    timm = import_timm()
    written = vit(pool="cls")
    encoder.save(tmp_path, written)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5).eval()
    assert isinstance(model.head, nn.Linear)
    x = images(written)
    with torch.no_grad():
        assert model(x).shape == (2, 5)
        assert difference(model.forward_head(model.forward_features(x), pre_logits=True), written(x).pooled) <= 1e-5
