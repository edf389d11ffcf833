"""Checkpoints of convnets as their authors, torchvision and transformers write them, read into our backbones."""

import json
import re
from pathlib import Path

import pytest
import torch
from export_cases import SMALL_CONVNEXT, made
from oracles import import_torchvision, import_transformers
from torch import Tensor

from ssl_pretrain import encoder
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign import libraries, published


def authors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ConvNeXt's weights under the names of the authors' code."""
    named = {}
    for name, value in weights.items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2.", name)
        name = name.replace(".conv_dw.", ".dwconv.").replace(".mlp.fc", ".pwconv")
        if ".mlp.grn." in name:
            name = name.replace(".mlp.grn.weight", ".grn.gamma").replace(".mlp.grn.bias", ".grn.beta")
            value = value[None, None, None]
        named[name] = value.clone()
    return named


@torch.no_grad()
@pytest.mark.parametrize("kind", ["convnext_micro", "convnextv2_micro"])
def test_the_authors_names_of_a_convnext(kind: str, tmp_path: Path) -> None:
    ours = made(kind, **SMALL_CONVNEXT)
    weights = {**authors(ours.backbone.state_dict()), "head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)}
    torch.save({"model": weights}, tmp_path / "file.pth")
    found = published.read(tmp_path / "file.pth", image_size=(32, 48))
    assert found.backbone.config == ours.backbone.config
    assert found.lineage["left_out"] == ["head.bias", "head.weight"]
    assert "missing" not in found.lineage
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(x).pooled, ours(x).pooled)


@torch.no_grad()
def test_the_encoder_of_fcmae_and_of_spark(tmp_path: Path) -> None:
    """Without a final norm, beside a decoder, and in SparK's file with a decoder of its own."""
    ours = made("convnextv2_micro", **SMALL_CONVNEXT)
    weights = authors({n: v for n, v in ours.backbone.state_dict().items() if not n.startswith("norm.")})
    decoder = {
        "mask_token": torch.zeros(1, 8, 1, 1),
        "proj.weight": torch.zeros(8, 48, 1, 1),
        "pred.bias": torch.zeros(3),
    }
    decoder |= {"decoder.0.dwconv.weight": torch.zeros(8, 1, 7, 7)}
    torch.save({"model": {**weights, **decoder}}, tmp_path / "fcmae.pth")
    spark = {f"sparse_encoder.sp_cnn.{n}": v for n, v in weights.items()}
    spark |= {"dense_decoder.proj.weight": torch.zeros(3, 24, 1, 1), "mask_tokens.0": torch.zeros(1, 48, 1, 1)}
    torch.save({"module": spark, "config": {"epochs": 1600}}, tmp_path / "spark.pth")
    own = {n: v for n, v in ours.backbone.state_dict().items() if not n.startswith("norm.")}
    for name, part in (("fcmae", "model"), ("spark", "module.sparse_encoder.sp_cnn")):
        found = published.read(tmp_path / f"{name}.pth")
        state = found.backbone.state_dict()
        assert all(torch.equal(state[n], v) for n, v in own.items())
        assert found.lineage["missing"] == ["norm.bias", "norm.weight"]
        assert found.lineage["part"] == part
        assert (state["norm.weight"] == 1).all()
    encoder.save(tmp_path / "export", found)
    assert encoder.load(tmp_path / "export").fingerprint == found.fingerprint


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_resnet(name: str, tmp_path: Path) -> None:
    theirs = getattr(import_torchvision().models, name)(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    found = published.read(tmp_path / "resnet.pth", image_size=(64, 64))
    assert found.name == name
    assert found.lineage["left_out"] == ["fc.bias", "fc.weight"]
    theirs.fc, x = torch.nn.Identity(), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(x).pooled, theirs(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = import_transformers()
    sizes = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "num_stages": 4}
    model = transformers.ConvNextV2Model(transformers.ConvNextV2Config(**sizes)).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    model.save_pretrained(tmp_path)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": 64}, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = published.read(tmp_path / "model.safetensors")
    assert found.preprocessing.mean == (0.5, 0.5, 0.5)
    assert found.backbone.image_size == (64, 64)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(x).pooled, model(x).pooler_output, atol=1e-5, rtol=1e-5)
    assert found.name == "convnextv2_tiny"


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    weights = authors(made("convnextv2_micro", **SMALL_CONVNEXT).backbone.state_dict())
    weights["stages.0.0.more"] = weights.pop("stages.2.1.pwconv2.bias")
    torch.save(weights, tmp_path / "file.pth")
    expected = r"does not fit a ConvNeXt .*1 missing: stages.2.blocks.1.mlp.fc2.bias; 1 unknown: stages.0.blocks.0.more"
    with pytest.raises(UserError, match=expected):
        published.read(tmp_path / "file.pth")
    found = published.read(tmp_path / "file.pth", partial=True)
    assert found.lineage["missing"] == ["stages.2.blocks.1.mlp.fc2.bias"]
    torch.save(
        {"conv1.weight": torch.zeros(8, 3, 5, 5), "layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3)}, tmp_path / "r"
    )
    with pytest.raises(UserError, match=r"a stem of shape \(8, 3, 5, 5\), and our ResNet's are 7x7 or 3x3"):
        libraries.load(f"torch:{tmp_path / 'r'}")
