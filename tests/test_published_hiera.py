"""Hiera's checkpoints, fine-tuned and of pretraining, in their authors' names and timm's, against timm's model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import import_timm
from torch import Tensor

from ssl_pretrain import encoder as exported
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign.published import read

SIDE, DEPTHS = 64, (1, 2, 1, 1)


def timms(q_pool: int = 3) -> Any:
    """A small Hiera of timm with 5 classes, every parameter noise."""
    model = import_timm().models.hiera.Hiera(
        img_size=(SIDE, SIDE), embed_dim=8, num_heads=2, stages=DEPTHS, q_pool=q_pool, num_classes=5
    )
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model.eval()


def authors(model: Any) -> dict[str, Tensor]:
    names = {"head.norm.": "norm.", "head.fc.": "head.projection."}
    found = {}
    for name, value in model.state_dict().items():
        for theirs, published in names.items():
            name = name.replace(theirs, published) if name.startswith(theirs) else name
        found[name] = value
    return found


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("names", ["authors", "timm"])
def test_a_fine_tuned_hiera(names: str, images: Tensor, tmp_path: Path) -> None:
    model = timms()
    content: dict[str, Any] = model.state_dict() if names == "timm" else {"model_state": authors(model), "epoch": 7}
    torch.save(content, tmp_path / "hiera.pth")
    found = read(tmp_path / "hiera.pth", heads=2)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found(images).pooled, expected, atol=1e-5, rtol=1e-5)
    assert found.backbone.describe()["depths"] == DEPTHS
    assert found.lineage["left_out"] == [
        f"head.{'fc' if names == 'timm' else 'projection'}.{p}" for p in ("bias", "weight")
    ]
    exported.save(tmp_path / "export", found)
    again = exported.load(tmp_path / "export")
    assert torch.equal(again(images).patches, found(images).patches)
    assert read(tmp_path / "hiera.pth", heads=2, image_size=(32, 96))(images[:, :, :32]).grid == (1, 2)


@torch.no_grad()
def test_a_pretraining_file_has_two_poolings_and_gets_a_norm(images: Tensor, tmp_path: Path) -> None:
    model = timms(q_pool=2)
    weights = {n: v for n, v in authors(model).items() if not n.startswith(("norm.", "head."))}
    beside = {
        "encoder_norm.weight": torch.ones(64), "mask_token": torch.zeros(1, 1, 16),
        "decoder_embed.weight": torch.ones(16, 64),
        "multi_scale_fusion_heads.0.weight": torch.ones(64, 8, 4, 4), "decoder_pos_embed": torch.zeros(1, 16, 16),
    }  # fmt: skip
    torch.save({"model_state": weights | beside}, tmp_path / "mae.pth")
    found = read(tmp_path / "mae.pth", heads=2)
    assert found.backbone.stride == (16, 16)
    assert found.lineage["method"] == "mae"
    assert found.lineage["new"] == ["norm.weight", "norm.bias"]
    last = model.forward_intermediates(images, intermediates_only=True)[-1]
    maps = found.backbone(images, maps=True).maps
    torch.testing.assert_close(maps[-1], last, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    file, weights = tmp_path / "hiera.pth", authors(timms())

    def refused(content: dict[str, Tensor], message: str, heads: int | None = 2) -> None:
        torch.save(content, file)
        with pytest.raises(UserError, match=message):
            read(file, heads=heads)

    refused(weights, "give the number of heads of its first stage", heads=None)
    refused(
        {n: v for n, v in weights.items() if n != "blocks.1.mlp.fc1.bias"},
        "does not fit a Hiera .*blocks.1.mlp.fc1.bias",
    )
    refused({**weights, "more": torch.ones(1)}, "does not fit a Hiera .*more")
    refused({**weights, "patch_embed.proj.weight": torch.ones(8, 3, 3, 7, 7)}, "that of a Hiera for images is 7 x 7")
    refused({n: v for n, v in weights.items() if n != "pos_embed"}, "no learned positions of a square grid")
