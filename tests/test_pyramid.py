"""The pyramid of maps: real stages of convnets against timm and torchvision, a ViT's against NumPy, and its consumers."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from feature_pyramid import Pyramid
from oracles import import_timm, import_torchvision
from torch import Tensor, nn

from ssl_pretrain import backbones, encoder
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny": {"dim": 48, "depth": 2, "heads": 3},
    "resnet18": {},
    "resnet50": {"depths": (1, 1, 1, 1)},
    "convnext_tiny": {"dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1)},
}


def built(name: str, size: tuple[int, int] = (64, 96), **options: Any) -> Any:
    torch.manual_seed(0)
    return backbones.build(name, image_size=size, **{**SMALL[name], **options}).eval()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def doubled(x: np.ndarray, axis: int) -> np.ndarray:
    """Bilinear interpolation to twice the length, pixel centres at half a pixel, the edge repeated."""
    before = np.concatenate([x.take([0], axis), x.take(range(x.shape[axis] - 1), axis)], axis)
    after = np.concatenate([x.take(range(1, x.shape[axis]), axis), x.take([-1], axis)], axis)
    pairs = np.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
    return pairs.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


@pytest.mark.parametrize("size", [(64, 96), (48, 80), (16, 16)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_vits_pyramid_is_its_last_map_resampled(size: tuple[int, int], pool: str) -> None:
    model = built("vit_tiny", size, pool=pool)
    assert model.map_strides == ((4, 4), (8, 8), (16, 16), (32, 32))
    assert model.map_channels == (48,) * 4
    with torch.no_grad():
        found = model(draw(2, 3, *size), maps=True, pooled_only=True)
    h, w = found.grid
    x = found.patches.double().numpy().transpose(0, 2, 1).reshape(2, 48, h, w)
    twice = doubled(doubled(x, 2), 3)
    np.testing.assert_allclose(found.maps[1].numpy(), twice, atol=1e-5)
    np.testing.assert_array_equal(found.maps[2].numpy(), x.astype(np.float32))
    assert found.maps[0].shape == (2, 48, 4 * h, 4 * w)
    ends = np.concatenate([np.arange(0, h, 2)]), np.concatenate([np.arange(0, w, 2)])
    halved = np.maximum.reduceat(np.maximum.reduceat(x, ends[0], 2), ends[1], 3)
    np.testing.assert_array_equal(found.maps[3].numpy(), halved.astype(np.float32))
    assert found.maps[3].shape[2:] == (math.ceil(h / 2), math.ceil(w / 2))


def test_four_times_as_large_is_bilinear_too() -> None:
    """A ramp stays the ramp, away from the edges."""
    from ssl_pretrain.backbones.pyramid import simple_pyramid

    ramp = torch.arange(6.0)[:, None] * 8 + torch.arange(5.0)[None] * 4
    largest = simple_pyramid(ramp[None, None])[0][0, 0]
    rows, columns = (torch.arange(n * 4) + 0.5 for n in (6, 5))
    expected = ((rows / 4 - 0.5)[:, None] * 8) + (columns / 4 - 0.5)[None] * 4
    torch.testing.assert_close(largest[2:-2, 2:-2], expected[2:-2, 2:-2])


def test_strides_of_other_patches() -> None:
    assert built("vit_tiny", (28, 28), patch_size=14).map_strides == ((3.5, 3.5), (7, 7), (14, 14), (28, 28))
    assert built("resnet18").map_strides == ((4, 4), (8, 8), (16, 16), (32, 32))
    assert built("resnet18", stem="small").map_strides == ((1, 1), (2, 2), (4, 4), (8, 8))
    assert built("convnext_tiny", stem_patch=2).map_strides == ((2, 2), (4, 4), (8, 8), (16, 16))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnets_maps_are_the_stages_of_torchvision(name: str) -> None:
    torchvision = import_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    model = backbones.build(name, image_size=(70, 96)).eval()
    theirs = getattr(torchvision.models, name)(weights=None)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(model.state_dict())
    nodes = {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}
    images = draw(2, 3, 70, 96)
    with torch.no_grad():
        wanted = create_feature_extractor(theirs.eval(), nodes)(images)
        found = model(images, maps=True).maps
    assert [x.shape[1] for x in found] == list(model.map_channels)
    for ours, other in zip(found, wanted.values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_a_convnexts_maps_are_those_of_timm() -> None:
    timm = import_timm()
    model = backbones.build("convnext_tiny", image_size=(64, 96), layer_scale=0.5).eval()
    theirs = timm.create_model("convnext_tiny", pretrained=False, features_only=True)
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("norm.")}
    names = {n: n.replace("stem.", "stem_").replace("stages.", "stages_", 1) for n in own}
    theirs.load_state_dict({names[n]: value for n, value in own.items()})
    images = draw(2, 3, 64, 96)
    with torch.no_grad():
        wanted, found = theirs.eval()(images), model(images, maps=True).maps
    assert model.map_strides == tuple((r, r) for r in theirs.feature_info.reduction())
    assert model.map_channels == tuple(theirs.feature_info.channels())
    for ours, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(64, 96), (96, 160)])
def test_torchvisions_fpn_takes_the_maps_and_trains_the_encoder(name: str, size: tuple[int, int]) -> None:
    torchvision = import_torchvision()
    neck = Pyramid(torchvision, built(name)).train()
    found = neck(draw(2, 3, *size))
    assert [tuple(x.shape) for x in found.values()] == [(2, 32, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    sum(x.square().mean() for x in found.values()).backward()
    unused = {"norm.weight", "norm.bias"} if name.startswith("convnext") else set()
    assert {n for n, p in neck.model.named_parameters() if p.grad is None} == unused


@pytest.mark.parametrize("name", ["vit_tiny", "resnet18"])
def test_torchvisions_detector_trains_a_step_on_the_maps(name: str) -> None:
    torchvision = import_torchvision()
    from torchvision.models.detection import FCOS

    detector = FCOS(
        Pyramid(torchvision, built(name)), 3, min_size=64, max_size=96,
        anchor_generator=torchvision.models.detection.anchor_utils.AnchorGenerator(
            sizes=((8,), (16,), (32,), (64,)), aspect_ratios=((1.0,),) * 4),
    ).train()  # fmt: skip
    boxes = torch.tensor([[4.0, 4, 40, 50], [20, 10, 60, 40]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])}] * 2
    losses = detector(list(torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))), targets)
    sum(losses.values()).backward()
    assert all(math.isfinite(float(each.detach())) for each in losses.values())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in detector.backbone.model.parameters())


def test_maps_of_kept_patches_are_refused() -> None:
    with pytest.raises(UserError, match="without keep"):
        built("vit_tiny")(draw(1, 3, 64, 96), keep=torch.zeros(1, 2, dtype=torch.int64), maps=True)


def test_an_encoder_of_another_library_has_its_last_map_resampled_or_says_why_not() -> None:
    from ssl_pretrain.foreign.libraries import Foreign, _read_module

    how = Preprocessing.for_size((16, 16), (0.5,) * 3, (0.5,) * 3)
    one_map, vector = nn.Sequential(nn.Conv2d(3, 8, 4, 4)), nn.Sequential(nn.Conv2d(3, 8, 16), nn.Flatten())
    foreign = Encoder(Foreign(one_map, _read_module, "module:a:b", (16, 16), 3), "module:a:b", how, {})
    images = draw(1, 3, 16, 16)
    assert foreign(images).maps == ()
    maps = foreign(images, maps=True).maps
    assert foreign.backbone.map_strides == ((1, 1), (2, 2), (4, 4), (8, 8))
    assert [tuple(x.shape) for x in maps] == [(1, 8, side, side) for side in (16, 8, 4, 2)]
    assert torch.equal(maps[2], one_map(images))
    foreign = Encoder(Foreign(vector, _read_module, "module:a:b", (16, 16), 3), "module:a:b", how, {})
    with pytest.raises(
        UnsupportedByBackbone, match="maps needs an encoder that gives maps: module:a:b gives one vector"
    ):
        foreign(images, maps=True)


def test_an_export_has_the_maps_too(tmp_path: Any) -> None:
    model = built("vit_tiny")
    encoder.save(tmp_path, Encoder(model, "vit_tiny", Preprocessing.for_size((64, 96), (0.5,) * 3, (0.5,) * 3), {}))
    images = draw(1, 3, 64, 96)
    with torch.no_grad():
        for one, two in zip(encoder.load(tmp_path)(images, maps=True).maps, model(images, maps=True).maps, strict=True):
            assert torch.equal(one, two)


def test_crops_together_have_their_maps() -> None:
    model = built("vit_tiny")
    batches = [(draw(2, 3, 64, 96), {"maps": True}), (draw(2, 3, 32, 32), {})]
    with torch.no_grad():
        one, two = model.forward_crops(batches)
        alone = model(batches[0][0], maps=True)
    assert two.maps == ()
    assert all(torch.equal(x, y) for x, y in itertools.zip_longest(one.maps, alone.maps))
